"""Text and stops of a reply, for every family of tokenizers and any cut of prompt and reply."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from outrider.coordinator.requests.text.detokenize import Detokenizer, finished
from outrider.coordinator.requests.text.output import Output
from outrider.coordinator.requests.text.stopping import FinishReason, TokenStops
from outrider.coordinator.requests.text.tokenizer import Tokenizer
from outrider_testing.battery.judge import shared_length
from outrider_testing.tokenizer_families import FAMILIES, SPECIAL, TEXT, finish

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class _NoChat:
    def render(self, messages: object) -> str:
        raise NotImplementedError


KINDS = {name: Tokenizer(finish(make()), _NoChat()) for name, make in FAMILIES.items()}  # type: ignore[arg-type]
kinds = pytest.mark.parametrize("kind", KINDS)
BYTES = ["llama", "gemma"]


def random_ids(tokenizer: Tokenizer, rng: random.Random) -> list[int]:
    """Sensible text, any tokens, or runs of single bytes."""
    size = tokenizer._backend.get_vocab_size()
    style = rng.randrange(3)
    if style == 0:
        start = rng.randrange(200)
        ids = tokenizer.encode(TEXT[start : start + rng.randint(1, 60)])
    elif style == 1:
        ids = [rng.randrange(size) for _ in range(rng.randint(1, 60))]
    else:
        text = "".join(rng.choice("\n aé猫\N{GRINNING FACE}") for _ in range(rng.randint(1, 9)))
        ids = [tokenizer._backend.token_to_id(f"<0x{byte:02X}>") or 5 for byte in text.encode()]
        ids = [*ids[: rng.randint(1, len(ids))], rng.randrange(size)]
    return ids


def blocks_of(ids: Sequence[int], rng: random.Random) -> list[list[int]]:
    made, start = [], 0
    while start < len(ids):
        size = rng.randint(1, 9)
        made.append(list(ids[start : start + size]))
        start += size
    return made


def reply(tokenizer: Tokenizer, prompt: list[int], ids: list[int]) -> str:
    """The text of both less that of the prompt, as far as the two agree."""
    whole = tokenizer.decode(prompt + ids)
    return whole[shared_length(whole, tokenizer.decode(prompt)) :]


@kinds
def test_deltas_are_the_text_of_all_less_that_of_the_prompt(kind: str) -> None:
    tokenizer, rng = KINDS[kind], random.Random(kind)
    for _ in range(400):
        prompt, ids = random_ids(tokenizer, rng), random_ids(tokenizer, rng)
        one = Detokenizer(tokenizer, prompt)
        text = "".join(one.push(block) for block in blocks_of(ids, rng)) + one.flush()
        assert text == reply(tokenizer, prompt, ids), (prompt, ids)
        assert text.count(REPLACEMENT) <= tokenizer.decode(prompt + ids).count(REPLACEMENT)


@kinds
def test_echo_and_deltas_are_the_text_of_all(kind: str) -> None:
    tokenizer, rng = KINDS[kind], random.Random(kind)
    for _ in range(200):
        prompt, ids = random_ids(tokenizer, rng), random_ids(tokenizer, rng)
        echo, whole = finished(tokenizer.decode(prompt)), tokenizer.decode(prompt + ids)
        one = Detokenizer(tokenizer, prompt, echoed=True)
        text = "".join(one.push(block) for block in blocks_of(ids, rng)) + one.flush()
        if whole.startswith(echo):  # else a later byte has spoiled what was sent
            assert echo + text == whole, (prompt, ids)


@pytest.mark.parametrize("kind", BYTES)
@pytest.mark.parametrize("end", ["\n", " ", "é", "猫", "\N{GRINNING FACE}", "\n\n"])
def test_the_end_of_the_prompt_is_not_sent_again(kind: str, end: str) -> None:
    tokenizer = KINDS[kind]
    table = tokenizer._backend.get_vocab()
    prompt = [*tokenizer.encode("cat"), *(table[f"<0x{byte:02X}>"] for byte in end.encode())]
    one = Detokenizer(tokenizer, prompt)
    told = one.push([table["a"]]) + one.push([table["<0x0A>"]]) + one.flush()
    assert told == "a\n"


@kinds
def test_stop_is_found_at_the_first_token_that_completes_it(kind: str) -> None:
    tokenizer, rng = KINDS[kind], random.Random(kind)
    found = 0
    for _ in range(300):
        prompt, ids = random_ids(tokenizer, rng), random_ids(tokenizer, rng)
        texts = [reply(tokenizer, prompt, ids[:n]) for n in range(len(ids) + 1)]
        if not texts[-1]:
            continue
        start = rng.randrange(len(texts[-1]))
        stop = texts[-1][start : start + rng.randint(1, 4)]
        if REPLACEMENT in stop:
            continue
        first = next(n for n, text in enumerate(texts) if stop in text)
        output = Output(
            tokenizer, prompt, stop_strings=[stop], stops=TokenStops((), (), len(ids) + 1)
        )
        for block in blocks_of(ids, rng):
            if output.push(block, [1] * len(block)):
                break
        delta = output.fetch()
        assert delta is not None
        assert output.finish is not None
        assert output.finish.reason is FinishReason.STOP_STRING
        assert list(delta.token_ids) == ids[:first], (prompt, ids, stop)
        assert delta.text == texts[first][: texts[first].find(stop)]
        found += 1
    assert found > 50


def pushed(
    kind: str, ids: list[int], stops: list[str], cut: int = 1
) -> tuple[list[int], str, bool]:
    output = Output(KINDS[kind], (), stop_strings=stops, stops=TokenStops((), (), 99))
    for start in range(0, len(ids), cut):
        block = ids[start : start + cut]
        if output.push(block, [1] * len(block)):
            break
    delta = output.fetch()
    assert delta is not None
    over = output.finish is not None and output.finish.reason is FinishReason.STOP_STRING
    return list(delta.token_ids), delta.text, over


@kinds
@pytest.mark.parametrize("cut", [1, 3, 9])
def test_stop_may_speak_of_special_tokens(kind: str, cut: int) -> None:
    """They are found where they stand, alone or between other text, and are no text themselves."""
    backend = KINDS[kind]._backend
    a, b = (backend.token_to_id(one) for one in ("a", "n"))
    tool, end = backend.token_to_id("<|tool|>"), backend.token_to_id("</s>")
    ids = [a, a, tool, b, a, end, b, b]
    text = KINDS[kind].decode(ids)
    before = KINDS[kind].decode([a, a])
    assert pushed(kind, ids, ["<|tool|>"], cut) == (ids[:3], before, True)
    assert pushed(kind, ids, ["</s>", "never"], cut) == (ids[:6], KINDS[kind].decode(ids[:5]), True)
    last = KINDS[kind].decode([a, a])[-1]
    assert pushed(kind, ids, [last + "<|tool|>"], cut) == (ids[:3], before[:-1], True)
    assert pushed(kind, ids, ["<|tool|></s>"], cut) == (ids, text, False)
    assert "<|tool|>" in SPECIAL


@pytest.mark.parametrize("kind", BYTES)
def test_stop_may_join_an_open_run_and_a_special_token(kind: str) -> None:
    table = KINDS[kind]._backend.get_vocab()
    ids = [table["a"], table["<0x0A>"], table["</s>"], table["a"]]
    assert pushed(kind, ids, ["\n</s>"]) == (ids[:3], "a", True)


@kinds
def test_stop_may_be_a_token_that_was_added_and_is_text(kind: str) -> None:
    backend = KINDS[kind]._backend
    ids = [backend.token_to_id("a"), backend.token_to_id("<think>"), backend.token_to_id("a")]
    told, text, over = pushed(kind, ids, ["<think>"])
    assert (told, text.strip(), over) == (ids[:2], "a", True)
