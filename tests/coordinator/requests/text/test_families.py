"""Text and stops of a reply, for every family of tokenizers and any cut of prompt and reply."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise

import pytest

from outrider.coordinator.requests.text.detokenize import Detokenizer, finished
from outrider.coordinator.requests.text.output import Output
from outrider.coordinator.requests.text.stopping import Finish, FinishReason, TokenStops
from outrider.coordinator.requests.text.tokenizer import Tokenizer
from outrider_testing.battery.judge import shared_length
from outrider_testing.stops import Part, naive, parts_of
from outrider_testing.tokenizer_families import FAMILIES, SPECIAL, TEXT, blocks_of, finish

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


@pytest.mark.parametrize("kind", BYTES)
def test_special_token_within_a_run_stands_where_it_came(kind: str) -> None:
    table = KINDS[kind]._backend.get_vocab()
    a, line, end = table["a"], table["<0x0A>"], table["</s>"]
    ids = [a, line, end, a]
    assert pushed(kind, ids, ["\n</s>a"]) == (ids, "a", True)
    assert pushed(kind, ids, ["</s>\n"]) == (ids, "a\na", False)
    ids = [a, line, end, line, end, line]
    assert pushed(kind, ids, ["</s>\n</s>\n"]) == (ids, "a\n", True)


@pytest.mark.parametrize("kind", ["byte-level", *BYTES])
def test_special_token_ends_the_text_that_came_before_it(kind: str) -> None:
    """Also where that is within a character, as an end-of-sequence token does."""
    table = KINDS[kind]._backend.get_vocab()
    ids = [table["a"], table["ç" if kind == "byte-level" else "<0xE7>"], table["</s>"], table["a"]]
    assert pushed(kind, ids, ["</s>"]) == (ids[:3], "a" + REPLACEMENT, True)


@kinds
def test_stop_does_not_depend_on_other_stops(kind: str) -> None:
    table = KINDS[kind]._backend.get_vocab()
    ids = [table["a"], table["</s>"], table["a"], table["a"]]
    stop = KINDS[kind].decode([table["a"]] * 2)
    assert pushed(kind, ids, [stop]) == (ids[:3], "", True)
    assert pushed(kind, ids, [stop, "</s>never"]) == (ids[:3], "", True)


@kinds
def test_stop_is_found_in_the_text_as_written(kind: str) -> None:
    tokenizer, rng = KINDS[kind], random.Random(kind)
    special = tokenizer.special_tokens()
    found = 0
    for _ in range(150):
        prompt, plain = random_ids(tokenizer, rng)[:20], random_ids(tokenizer, rng)[:20]
        ids = [
            one
            for token in plain
            for one in (token, *rng.choices([*special], k=rng.choice((0, 0, 1))))
        ]
        texts = [reply(tokenizer, prompt, ids[:n]) for n in range(len(ids) + 1)]
        if any(REPLACEMENT in one or not two.startswith(one) for one, two in pairwise(texts)):
            continue
        parts: list[list[Part]] = [[]]
        for token, one, two in zip(ids, texts, texts[1:], strict=False):
            new = [(special[token], True)] if token in special else parts_of(two[len(one) :])
            parts.append([*parts[-1], *new])
        if not parts[-1]:
            continue
        start = rng.randrange(len(parts[-1]))
        stop = "".join(one for one, _ in parts[-1][start : start + rng.randint(1, 4)])
        first = next(n for n in range(len(parts)) if naive(parts[n], [stop])[1])
        output = Output(tokenizer, prompt, stop_strings=[stop], stops=TokenStops((), (), 999))
        for block in blocks_of(ids, rng):
            if output.push(block, [1] * len(block)):
                break
        delta = output.fetch()
        assert delta is not None
        assert list(delta.token_ids) == ids[:first], (prompt, ids, stop)
        assert delta.text == naive(parts[first], [stop])[0], (prompt, ids, stop)
        found += 1
    assert found > 20


class Counting:
    """A tokenizer that counts how many tokens it decodes."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.byte, self.keeps_run_open = tokenizer.byte, tokenizer.keeps_run_open
        self.special_tokens = tokenizer.special_tokens
        self._decode = tokenizer.decode
        self.decoded = 0

    def decode(self, ids: Sequence[int]) -> str:
        self.decoded += len(ids)
        return self._decode(ids)


@pytest.mark.parametrize("kind", BYTES)
def test_work_for_a_run_is_linear_and_the_stop_in_it_is_found(kind: str) -> None:
    table = KINDS[kind]._backend.get_vocab()
    run = [table["<0x20>"], *[table["<0x61>"], table["</s>"]] * 2000]
    counting = Counting(KINDS[kind])
    output = Output(counting, (), stop_strings=["xyz", "a</s>b"], stops=TokenStops((), (), 9999))
    for token in run:
        assert output.push([token], [1]) is None
    stop = [table["<0x78>"], table["<0x79>"], table["<0x7A>"], table["<0x7A>"]]
    assert output.push(stop, [1] * 4) is not None
    delta = output.fetch()
    assert delta is not None
    assert len(delta.token_ids) == len(run) + 3
    assert delta.text == KINDS[kind].decode(run)
    assert counting.decoded < 10 * len(run)


@kinds
def test_echo_of_a_text_that_ends_in_a_replacement_character_is_sent_once(kind: str) -> None:
    tokenizer = KINDS[kind]
    prompt = tokenizer.encode("a" + REPLACEMENT)
    text = tokenizer.decode(prompt)
    output = Output(tokenizer, prompt, echo=text, stops=TokenStops((), (), 9))
    token = tokenizer.encode("a")[-1]
    output.push([token], [1])
    output.end(Finish(FinishReason.CANCELLED))
    delta = output.fetch()
    assert delta is not None
    assert delta.text == tokenizer.decode([*prompt, token])
