"""Every field: what is refused, with which path, and what the defaults become."""

from __future__ import annotations

import math
from typing import Any

import pytest

from outrider.coordinator.requests.validation import Limits, derived_seed, validate
from outrider.protos import generation_pb2 as pb
from outrider.shared.core.errors import CapacityError, InvalidRequest
from outrider.shared.core.rules import COUPLED, GREEDY, REJECTION, Rule
from outrider.shared.core.types import Decoding


class Text:
    """A tokenizer of one token per character, as far as validation needs one."""

    class _Chat:
        def render(self, messages: list[dict[str, str]]) -> str:
            return "".join(f"<{one['role']}>{one['content']}" for one in messages) + "<assistant>"

    chat = _Chat()

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        return [1] * special + [ord(one) % 97 for one in text]

    def decode(self, ids: Any) -> str:
        return "x" * len(ids)


def limits(**changes: Any) -> Limits:
    return Limits(
        **(
            {
                "vocab_size": 100,
                "max_positions": 64,
                "max_k": 8,
                "slack": 9,
                "arena_longest": 1000,
                "eos_token_ids": (2,),
                "default_k": None,
                "default_max_new_tokens": 16,
                "max_new_tokens": 48,
                "max_logprobs": 20,
            }
            | changes
        )
    )


def ids(*tokens: int) -> pb.TokenIds:
    return pb.TokenIds(ids=tokens)


def request(**parts: Any) -> pb.GenerateRequest:
    if not {"prompt", "prompt_token_ids", "conversation"} & parts.keys():
        parts["prompt_token_ids"] = ids(3, 4)
    return pb.GenerateRequest(**parts)


def sampling(**fields: Any) -> dict[str, Any]:
    return {"sampling": pb.SamplingParameters(**fields)}


def stopping(**fields: Any) -> dict[str, Any]:
    return {"stopping": pb.StopConditions(**fields)}


def talk(*pairs: tuple[str, str]) -> pb.Conversation:
    return pb.Conversation(messages=[pb.ChatMessage(role=r, content=c) for r, c in pairs])


BAD = [
    ({"prompt": ""}, "prompt"),
    ({"prompt": "x" * 64}, "prompt"),
    ({"prompt_token_ids": ids()}, "prompt_token_ids.ids"),
    ({"prompt_token_ids": ids(*[3] * 64)}, "prompt_token_ids.ids"),
    ({"prompt_token_ids": ids(3, 100)}, "prompt_token_ids.ids[1]"),
    ({"prompt_token_ids": ids(2**32 - 1)}, "prompt_token_ids.ids[0]"),
    ({"conversation": talk()}, "conversation.messages"),
    ({"conversation": talk(("", "hi"))}, "conversation.messages[0].role"),
    *(
        (sampling(**{name: value}), f"sampling.{name}")
        for name, values in {
            "temperature": (math.nan, math.inf, -math.inf, -1.0, -1e-9, 1e-9),
            "top_k": (-1,),
            "top_p": (math.nan, 0.0, -0.5, 1.0000001, math.inf),
            "min_p": (math.nan, -0.1, 1.0, math.inf),
            "repetition_penalty": (math.nan, 0.0, -1.0, math.inf),
            "presence_penalty": (math.nan, -2.1, 2.1),
            "frequency_penalty": (math.nan, -2.1, 2.1),
            "min_new_tokens": (-1, 17),
        }.items()
        for value in values
    ),
    (sampling(logit_bias={100: 1.0}), "sampling.logit_bias[100]"),
    (sampling(logit_bias={5: math.nan}), "sampling.logit_bias[5]"),
    (sampling(logit_bias={5: math.inf}), "sampling.logit_bias[5]"),
    (sampling(bad_words=[ids()]), "sampling.bad_words[0].ids"),
    (sampling(bad_words=[ids(1), ids(1, 100)]), "sampling.bad_words[1].ids"),
    (stopping(max_new_tokens=0), "stopping.max_new_tokens"),
    (stopping(max_new_tokens=-5), "stopping.max_new_tokens"),
    (stopping(max_new_tokens=49), "stopping.max_new_tokens"),
    (stopping(stop=["a", ""]), "stopping.stop[1]"),
    (stopping(stop=["x" * 1025]), "stopping.stop[0]"),
    (stopping(stop=[str(i) for i in range(65)]), "stopping.stop"),
    (stopping(stop_token_ids=[1, 100]), "stopping.stop_token_ids[1]"),
    ({"speculation": pb.SpeculationParameters(k=-1)}, "speculation.k"),
    ({"speculation": pb.SpeculationParameters(k=9)}, "speculation.k"),
    ({"speculation": pb.SpeculationParameters(rule=77)}, "speculation.rule"),
    ({"output": pb.OutputOptions(logprobs=-1)}, "output.logprobs"),
    ({"output": pb.OutputOptions(logprobs=21)}, "output.logprobs"),
    ({"output": pb.OutputOptions(num_samples=0)}, "output.num_samples"),
    ({"output": pb.OutputOptions(num_samples=17)}, "output.num_samples"),
    ({"resume_token_ids": ids(1, 100)}, "resume_token_ids.ids[1]"),
    ({"resume_token_ids": ids(*[1] * 17)}, "resume_token_ids.ids"),
    (
        {"resume_token_ids": ids(1), "output": pb.OutputOptions(num_samples=2)},
        "output.num_samples",
    ),
    (
        sampling(temperature=0.5)
        | {"speculation": pb.SpeculationParameters(rule=pb.ACCEPTANCE_RULE_GREEDY)},
        "speculation.rule",
    ),
]


@pytest.mark.parametrize(("parts", "field"), BAD, ids=[f"{f}-{i}" for i, (_, f) in enumerate(BAD)])
def test_requests_bad_field_is_refused_by_its_path(parts: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as error:
        validate(request(**parts), limits(), Text())  # type: ignore[arg-type]
    assert error.value.field == field
    assert str(error.value).startswith(f"{field}: got ")
    assert error.value.allowed


def test_requests_nothing_to_continue_is_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"^input: "):
        validate(pb.GenerateRequest(), limits(), None)


def test_requests_text_needs_a_tokenizer() -> None:
    for parts, field in (
        ({"prompt": "hi"}, "prompt"),
        ({"conversation": talk(("user", "hi"))}, "conversation"),
        (stopping(stop=["x"]), "stopping.stop"),
    ):
        with pytest.raises(InvalidRequest) as error:
            validate(request(**parts), limits(), None)
        assert error.value.field == field


def test_requests_defaults_are_resolved() -> None:
    made = validate(request(), limits(), None)
    assert made.prompt_ids == (3, 4)
    assert made.max_new_tokens == 16
    assert made.capacity == 2 + 16 + 9
    assert made.k is None
    assert made.num_samples == 1
    assert made.eos_token_ids == (2,)
    assert made.logprobs is None
    seedless = Decoding(eos_token_ids=(2,), prompt_len=2, seed=made.decoding.seed, vocab_size=100)
    assert made.decoding == seedless
    assert 0 <= made.decoding.seed < 2**63


def test_requests_every_field_arrives() -> None:
    made = validate(
        request(
            prompt_token_ids=ids(9),
            sampling=pb.SamplingParameters(
                temperature=0.5,
                top_k=7,
                top_p=0.9,
                min_p=0.1,
                repetition_penalty=1.1,
                presence_penalty=-1.0,
                frequency_penalty=0.5,
                logit_bias={5: -1.5, 4: 2.0},
                bad_words=[ids(1, 2), ids(3), ids(3)],
                min_new_tokens=2,
                seed=2**64 - 1,
            ),
            stopping=pb.StopConditions(
                max_new_tokens=10, stop=["a", "b", "a"], stop_token_ids=[8, 9], ignore_eos=True
            ),
            speculation=pb.SpeculationParameters(k=0, rule=pb.ACCEPTANCE_RULE_REJECTION),
            output=pb.OutputOptions(logprobs=0, echo=True, num_samples=1),
            resume_token_ids=ids(4, 5),
        ),
        limits(),
        Text(),  # type: ignore[arg-type]
    )
    assert made.decoding == Decoding(
        temperature=0.5,
        top_k=7,
        top_p=0.9,
        min_p=0.1,
        repetition_penalty=1.1,
        presence_penalty=-1.0,
        frequency_penalty=0.5,
        logit_bias=((4, 2.0), (5, -1.5)),
        bad_words=((1, 2), (3,)),
        eos_token_ids=(8, 9),
        min_new_tokens=2,
        prompt_len=1,
        seed=2**64 - 1,
        rule=REJECTION,
        logprobs=0,
        vocab_size=100,
    )
    assert made.stop_strings == ("a", "b")
    assert made.stop_token_ids == (8, 9)
    assert made.eos_token_ids == ()
    assert made.k == 0
    assert made.resume_ids == (4, 5)
    assert made.max_new_tokens == 10
    assert not made.echo  # a client that resumes has the prompt's text


@pytest.mark.parametrize(
    ("rule", "temperature", "wanted"),
    [
        (pb.ACCEPTANCE_RULE_UNSPECIFIED, 0.0, GREEDY),
        (pb.ACCEPTANCE_RULE_UNSPECIFIED, 0.7, COUPLED),
        (pb.ACCEPTANCE_RULE_GREEDY, 0.0, GREEDY),
        (pb.ACCEPTANCE_RULE_COUPLED, 0.0, GREEDY),
        (pb.ACCEPTANCE_RULE_COUPLED, 0.7, COUPLED),
        (pb.ACCEPTANCE_RULE_REJECTION, 0.0, GREEDY),
        (pb.ACCEPTANCE_RULE_REJECTION, 0.7, REJECTION),
    ],
)
def test_requests_rule_is_resolved(rule: int, temperature: float, wanted: Rule) -> None:
    message = request(
        **sampling(temperature=temperature), speculation=pb.SpeculationParameters(rule=rule)
    )
    assert validate(message, limits(), None).decoding.rule is wanted


def test_requests_default_max_new_tokens_adapts_to_the_context() -> None:
    assert validate(request(prompt_token_ids=ids(*[3] * 60)), limits(), None).max_new_tokens == 4
    assert validate(request(), limits(arena_longest=20), None).max_new_tokens == 9
    with pytest.raises(InvalidRequest, match="context is 64, the prompt has 60"):
        validate(
            request(prompt_token_ids=ids(*[3] * 60), **stopping(max_new_tokens=5)), limits(), None
        )


def test_requests_larger_than_the_arena_are_refused_for_good_with_sizes() -> None:
    with pytest.raises(CapacityError, match=r"needs 27 token slots .* has 20") as error:
        validate(request(**stopping(max_new_tokens=16)), limits(arena_longest=20), None)
    assert error.value.permanent


def test_requests_prompt_text_and_conversation_are_tokenized() -> None:
    text = Text()
    made = validate(request(prompt="hi"), limits(), text)  # type: ignore[arg-type]
    assert list(made.prompt_ids) == text.encode("hi")
    assert made.prompt_text == "hi"
    made = validate(
        request(conversation=talk(("user", "hi"))),
        limits(),
        text,  # type: ignore[arg-type]
    )
    # The template writes special tokens itself.
    assert list(made.prompt_ids) == text.encode("<user>hi<assistant>", special=False)


def test_requests_samples_have_seeds_of_their_own() -> None:
    made = validate(request(**sampling(seed=7)), limits(), None)
    seeds = [made.sample_decoding(i).seed for i in range(16)]
    assert seeds[0] == 7
    assert len(set(seeds)) == 16
    assert all(0 <= seed < 2**64 for seed in seeds)
    # SplitMix64 as published: the first output of the generator seeded with 0.
    assert derived_seed(0, 1) == 0xE220A8397B1DCDAF


@pytest.mark.parametrize("top", [1, 64, 200])
def test_requests_keep_as_much_of_the_draft_as_is_configured(top: int) -> None:
    made = validate(request(), limits(draft_top=top), Text())  # type: ignore[arg-type]
    assert made.decoding.draft_top == top
