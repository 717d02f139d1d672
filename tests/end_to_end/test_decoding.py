"""What a client may ask of decoding, through the public API of three real processes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from outrider.coordinator.local.private_stack import deployment
from outrider.coordinator.requests.validation import derived_seed
from outrider.protos import generation_pb2 as pb
from outrider.protos import generation_pb2_grpc as rpc
from outrider.shared.config.schema import load
from outrider.shared.core.rules import COUPLED
from outrider.shared.core.types import Decoding
from outrider_testing import processors
from outrider_testing.checkpoints import write_llama

PROMPTS = ["def add(left", "class Point", "for index in", "naïve café"]
KS = (0, 1, 4, 7)
PENALTIES: dict[str, Any] = {
    "repetition_penalty": 1.2,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.3,
    "logit_bias": {40: 3.0, 50: -100.0},
    "bad_words": [{"ids": [60]}, {"ids": [70, 71]}],
    "min_new_tokens": 4,
}
CUTS: dict[str, Any] = {"top_k": 60, "top_p": 0.95, "min_p": 0.01}
STYLES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "greedy-penalties": PENALTIES,
    "coupled": {"temperature": 0.9, "seed": 3},
    "coupled-all": {"temperature": 0.9, "seed": 3} | PENALTIES | CUTS,
}


@pytest.fixture(scope="module")
def folders(tiny_base: Path, tmp_path_factory: Any) -> Any:
    """A base, and a draft that is often right: the same weights under another norm."""
    draft = write_llama(
        tmp_path_factory.mktemp("near") / "draft", layers=2, hidden=64, seed=1, rms_norm_eps=0.1
    )
    return SimpleNamespace(base=tiny_base, draft=draft)


@pytest.fixture(scope="module")
def stub(folders: Any) -> Iterator[rpc.GenerationStub]:
    config = load(None, flags={})
    config = dataclasses.replace(
        config,
        base=dataclasses.replace(config.base, path=str(folders.base)),
        draft=dataclasses.replace(config.draft, path=str(folders.draft)),
        coordinator=dataclasses.replace(config.coordinator, tokenizer=str(folders.base)),
    )
    with deployment(config) as target, grpc.insecure_channel(target) as channel:
        yield rpc.GenerationStub(channel)


@pytest.fixture(scope="module")
def backend(folders: Any) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(folders.base / "tokenizer.json"))


def request(
    prompt: str,
    count: int = 24,
    *,
    k: int | None = None,
    resume: list[int] | None = None,
    stopping: dict[str, Any] | None = None,
    output: dict[str, Any] | None = None,
    rule: int = 0,
    **sampling: Any,
) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        prompt=prompt,
        sampling=pb.SamplingParameters(**sampling),
        stopping=pb.StopConditions(max_new_tokens=count, **stopping or {}),
        speculation=pb.SpeculationParameters(k=k, rule=rule),
        output=pb.OutputOptions(**output or {}),
        resume_token_ids=pb.TokenIds(ids=resume or []),
    )


def generate(stub: rpc.GenerationStub, asked: pb.GenerateRequest, deltas: int = 1 << 30) -> Any:
    """The first sample, as far as ``deltas`` messages tell it; then the call is cancelled."""
    made = SimpleNamespace(text="", ids=[], logprobs=[], finished=None)
    call = stub.Generate(asked, timeout=120)
    for message in call:
        if message.sample_index:
            continue
        made.text += message.delta.text
        made.ids.extend(message.delta.token_ids)
        made.logprobs.extend(message.delta.logprobs)
        deltas -= message.HasField("delta")
        if message.HasField("finished"):
            made.finished = message.finished
        if not deltas:
            call.cancel()
            break
    return made


@pytest.mark.parametrize("style", STYLES)
def test_tokens_and_logprobs_are_those_of_plain_decoding(
    stub: rpc.GenerationStub, style: str
) -> None:
    def ask(prompt: str, k: int | None) -> Any:
        options: dict[str, Any] = {"stopping": {"ignore_eos": True}, "output": {"logprobs": 3}}
        return generate(stub, request(prompt, k=k, **options, **STYLES[style]))

    plain = [ask(prompt, 0) for prompt in PROMPTS]
    accepted = 0
    with ThreadPoolExecutor(4) as pool:
        for k in (*KS, None):
            alone = ask(PROMPTS[0], k)
            together = list(pool.map(lambda prompt: ask(prompt, k), PROMPTS))  # noqa: B023
            for got, wanted in zip([alone, *together], [plain[0], *plain], strict=True):
                assert (got.ids, got.text) == (wanted.ids, wanted.text)
                assert len(got.logprobs) == len(got.ids) == 24
                accepted += got.finished.speculation.accepted
                for one, other in zip(got.logprobs, wanted.logprobs, strict=True):
                    assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
                    assert [t.logprob for t in one.top] == pytest.approx(
                        [t.logprob for t in other.top], abs=1e-4
                    )
    assert accepted > 50


@pytest.mark.parametrize("rule", [0, pb.ACCEPTANCE_RULE_REJECTION])
def test_logprobs_are_those_of_transformers(
    stub: rpc.GenerationStub, folders: Any, backend: Any, rule: int
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(folders.base), dtype=torch.float32).eval()
    prompt = backend.encode(PROMPTS[0]).ids
    got = generate(
        stub,
        request(
            *(PROMPTS[0], 24),
            k=4,
            rule=rule,
            stopping={"ignore_eos": True},
            output={"logprobs": 3},
            **STYLES["coupled-all"],
        ),
    )
    decoding = Decoding(
        temperature=0.9,
        prompt_len=len(prompt),
        rule=COUPLED,
        **PENALTIES
        | CUTS
        | {"logit_bias": ((40, 3.0), (50, -100.0)), "bad_words": ((60,), (70, 71))}
        | {"min_new_tokens": 0},  # no ending tokens where they are ignored
    )
    rows = processors.logprobs(model, [*prompt, *got.ids], decoding)
    for token, one, row in zip(got.ids, got.logprobs, rows, strict=True):
        assert one.logprob == pytest.approx(row[token].item(), abs=1e-4)
        assert [t.logprob for t in one.top] == pytest.approx(
            row.topk(3).values[: len(one.top)].tolist(), abs=1e-4
        )


@pytest.mark.parametrize("style", ["greedy", "coupled-all"])
def test_a_stop_in_the_middle_of_a_block_ends_exactly_there(
    stub: rpc.GenerationStub, backend: Any, style: str
) -> None:
    options = STYLES[style]
    on = {"ignore_eos": True}
    whole = generate(stub, request(PROMPTS[0], 40, k=0, stopping=on, **options))
    tried = 0
    for cut in range(5, 38):
        # A stop string that begins in one token and ends in the next.
        start = len(backend.decode(whole.ids[:cut])) - 1
        stop = whole.text[start : start + 2]
        if "\ufffd" in stop or tried == 3:
            continue  # half a character looks like that too
        tried += 1
        stops = {"stop": [stop, "never to be seen"], "ignore_eos": True}
        token = {"stop_token_ids": [whole.ids[cut]], "ignore_eos": True}
        first = whole.ids.index(whole.ids[cut])
        for k in KS:
            one = generate(stub, request(PROMPTS[0], 40, k=k, stopping=stops, **options))
            assert one.text == whole.text[: whole.text.index(stop)]
            assert one.ids == whole.ids[: len(one.ids)]
            assert stop in backend.decode(one.ids)
            assert stop not in backend.decode(one.ids[:-1])
            assert one.finished.usage.completion_tokens == len(one.ids)
            assert one.finished.stop_string == stop
            if options.get("min_new_tokens", 0) <= first:
                # min_new_tokens forbids stop tokens too, so an early one is another text.
                one = generate(stub, request(PROMPTS[0], 40, k=k, stopping=token, **options))
                if "min_new_tokens" not in options:
                    assert one.ids == whole.ids[: first + 1]
                assert one.finished.reason == pb.FINISH_REASON_STOP_TOKEN
                assert one.finished.stop_token_id == one.ids[-1] == whole.ids[cut]
                assert one.text == backend.decode(one.ids[:-1])
    assert tried > 1


@pytest.mark.parametrize("k", KS)
def test_end_of_sequence_minimum_and_ignoring_it(stub: rpc.GenerationStub, k: int) -> None:
    likely = {"logit_bias": {0: 60.0}}  # 0 is the end-of-sequence id of the generation config
    one = generate(stub, request(PROMPTS[0], 20, k=k, **likely))
    assert (one.ids, one.text) == ([0], "")
    assert one.finished.reason == pb.FINISH_REASON_END_OF_SEQUENCE
    assert one.finished.usage.completion_tokens == 1
    one = generate(stub, request(PROMPTS[0], 20, k=k, min_new_tokens=6, **likely))
    assert len(one.ids) == 7 and one.ids[-1] == 0 and 0 not in one.ids[:-1]
    assert one.finished.reason == pb.FINISH_REASON_END_OF_SEQUENCE
    one = generate(stub, request(PROMPTS[0], 20, k=k, stopping={"ignore_eos": True}, **likely))
    assert one.ids == [0] * 20
    assert one.finished.reason == pb.FINISH_REASON_MAX_TOKENS


@pytest.mark.parametrize("style", STYLES)
def test_a_lost_stream_goes_on_where_it_was_cut(
    stub: rpc.GenerationStub, backend: Any, style: str
) -> None:
    """Text and tokens join without a seam: characters, stop strings and penalties span it."""
    on = {"ignore_eos": True}
    options = STYLES[style]
    free = generate(stub, request(PROMPTS[3], 40, k=0, stopping=on, **options))
    at = len(backend.decode(free.ids[:30]))
    stops = {"stop": [free.text[at - 2 : at + 2], free.text[5:7] + "\x00"], "ignore_eos": True}
    whole = generate(stub, request(PROMPTS[3], 40, k=3, stopping=stops, **options))
    assert whole.finished.reason == pb.FINISH_REASON_STOP_STRING
    for deltas in range(1, 12):
        head = generate(stub, request(PROMPTS[3], 40, k=3, stopping=stops, **options), deltas)
        if head.finished is not None:
            break
        for k in (0, 4):
            again = request(PROMPTS[3], 40, k=k, stopping=stops, resume=head.ids, **options)
            rest = generate(stub, again)
            assert head.ids + rest.ids == whole.ids
            assert head.text + rest.text == whole.text
            assert rest.finished.usage.completion_tokens == len(rest.ids)
            assert rest.finished.stop_string == whole.finished.stop_string
    assert deltas > 2


def test_samples_are_independent_requests_with_their_seeds(stub: rpc.GenerationStub) -> None:
    asked = request(
        *(PROMPTS[0], 16), stopping={"ignore_eos": True}, output={"num_samples": 3}, **CUTS,
        **STYLES["coupled"],
    )  # fmt: skip
    ids: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for message in stub.Generate(asked):
        ids[message.sample_index].extend(message.delta.token_ids)
    for index, got in ids.items():
        alone = request(PROMPTS[0], 16, k=0, stopping={"ignore_eos": True}, temperature=0.9, **CUTS)
        alone.sampling.seed = derived_seed(3, index) if index else 3
        assert generate(stub, alone).ids == got


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "temperature": ({"temperature": -1.0}, "sampling.temperature: got -1.0; must be 0 or"),
    "top_k": ({"top_k": -3}, "sampling.top_k: got -3; must be a whole number >= 0"),
    "top_p": ({"top_p": 0.0}, "sampling.top_p: got 0.0; must be in (0, 1]"),
    "min_p": ({"min_p": 1.0}, "sampling.min_p: got 1.0; must be in [0, 1)"),
    "repetition": (
        {"repetition_penalty": 0.0},
        "sampling.repetition_penalty: got 0.0; must be in [1e-06, 1e+06]",
    ),
    "presence": ({"presence_penalty": 3.0}, "sampling.presence_penalty: got 3.0; must be in ["),
    "frequency": ({"frequency_penalty": -9.0}, "sampling.frequency_penalty: got -9.0; must be in"),
    "bias": ({"logit_bias": {999: 1.0}}, "sampling.logit_bias[999]: got 999; must be a token in"),
    "bad_words": ({"bad_words": [{"ids": []}]}, "sampling.bad_words[0].ids: got []; must be at"),
    "min_new": ({"min_new_tokens": 25}, "sampling.min_new_tokens: got 25; must be at most max"),
    "rule": (
        {"temperature": 1.0, "rule": pb.ACCEPTANCE_RULE_GREEDY},
        "speculation.rule: got 'GREEDY'; must be COUPLED or REJECTION at temperature 1",
    ),
    "k": ({"k": 999}, "speculation.k: got 999; must be in [0, "),
    "stop": ({"stopping": {"stop": [""]}}, "stopping.stop[0]: got ''; must be 1 to 1024"),
    "stop_token": (
        {"stopping": {"stop_token_ids": [5, 999]}},
        "stopping.stop_token_ids[1]: got 999; must be in [0, 320)",
    ),
    "logprobs": ({"output": {"logprobs": 21}}, "output.logprobs: got 21; must be in [0, 20]"),
    "samples": ({"output": {"num_samples": 0}}, "output.num_samples: got 0; must be in [1, 16]"),
    "resume": ({"resume": [1, 999]}, "resume_token_ids.ids[1]: got 999; must be in [0, 320)"),
    "resume_long": ({"resume": [1] * 25}, "resume_token_ids.ids: got '25 tokens'; must be at most"),
    "resume_samples": (
        {"resume": [1], "output": {"num_samples": 2}},
        "output.num_samples: got 2; must be 1 where resume_token_ids is set",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_names_field_value_and_what_is_allowed(
    stub: rpc.GenerationStub, name: str
) -> None:
    parts, told = BAD[name]
    with pytest.raises(grpc.RpcError) as error:
        generate(stub, request(PROMPTS[0], **parts))
    assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert error.value.details().startswith(told)


def test_a_conversation_without_a_template_is_refused(stub: rpc.GenerationStub) -> None:
    talk = pb.Conversation(messages=[pb.ChatMessage(role="user", content="hi")])
    with pytest.raises(grpc.RpcError, match="no chat template") as error:
        generate(stub, pb.GenerateRequest(conversation=talk))
    assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
