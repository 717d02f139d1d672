"""Deltas add up to the decoding of everything at once, for every kind of decoder."""

from __future__ import annotations

import random
import string
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from outrider.coordinator.requests.text.detokenize import KEEP, WINDOW, Detokenizer
from outrider.coordinator.requests.text.tokenizer import Tokenizer
from outrider_testing.tokenizer_families import blocks_of


class _NoChat:
    def render(self, messages: object) -> str:
        raise NotImplementedError


def byte_level() -> Tokenizer:
    """GPT-2 and Llama-3 style: tokens are byte strings, some of them pieces of characters."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*alphabet, "Ġthe", "Ã©", "ðŁĺ", "âĤ", "ðŁĺĢĠ", "ï¿½"]
    backend = Backend(models.BPE({piece: i for i, piece in enumerate(pieces)}, []))
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<s>", special=True)])
    backend.add_tokens([AddedToken("<tool>")])
    return Tokenizer(backend, _NoChat())  # type: ignore[arg-type]


def byte_fallback() -> Tokenizer:
    """Llama-2 style SentencePiece: words, and single bytes for what is not a word."""
    pieces = [
        "<unk>",
        *(f"<0x{i:02X}>" for i in range(256)),
        "▁",
        "▁the",
        "cat",
        "é",
        "▁▁",
        "\ufffd",
    ]
    backend = Backend(
        models.BPE({p: i for i, p in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True)
    )
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens([AddedToken("<s>", special=True)])
    return Tokenizer(backend, _NoChat())  # type: ignore[arg-type]


def metaspace() -> Tokenizer:
    """T5 style: a word mark that becomes a space, except at the start."""
    pieces = ["<unk>", *string.ascii_lowercase, "▁", "▁the", "▁cat", "s"]
    backend = Backend(models.WordLevel({p: i for i, p in enumerate(pieces)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.decoder = decoders.Metaspace()
    return Tokenizer(backend, _NoChat())  # type: ignore[arg-type]


KINDS = {"byte_level": byte_level(), "byte_fallback": byte_fallback(), "metaspace": metaspace()}
kinds = pytest.mark.parametrize("kind", KINDS)


@kinds
@settings(max_examples=150, deadline=None)
@given(ids=st.lists(st.integers(0, 270), max_size=5 * WINDOW), seed=st.integers(0, 99))
def test_detokenizer_deltas_equal_decoding_at_once(kind: str, ids: list[int], seed: int) -> None:
    tokenizer = KINDS[kind]
    one = Detokenizer(tokenizer)
    deltas = [one.push(block) for block in blocks_of(ids, random.Random(seed))]
    deltas.append(one.flush())
    assert "".join(deltas) == tokenizer.decode(ids)


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=60), cut=st.integers(0, 20), seed=st.integers(0, 99))
@example(text="a\N{GRINNING FACE}b", cut=3, seed=0)
def test_detokenizer_continues_the_prompt_exactly(text: str, cut: int, seed: int) -> None:
    tokenizer = KINDS["byte_level"]
    table = {v: k for k, v in zip(range(256), _bytes_to_alphabet(), strict=True)}
    assert len(table) == 256
    ids = [tokenizer._backend.token_to_id(_bytes_to_alphabet()[byte]) for byte in text.encode()]
    prompt, rest = ids[:cut], ids[cut:]
    one = Detokenizer(tokenizer, prompt)
    deltas = [one.push(block) for block in blocks_of(rest, random.Random(seed))] + [one.flush()]
    whole, before = tokenizer.decode(ids), tokenizer.decode(prompt)
    # A character that began in the prompt belongs to what follows.
    assert "".join(deltas) == whole[len(before) - before.endswith("\ufffd") :]
    assert all("\ufffd" not in delta for delta in deltas if "\ufffd" not in text)


def _bytes_to_alphabet() -> list[str]:
    """GPT-2's table from bytes to printable characters (``bytes_to_unicode`` there)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    made, extra = [], 0
    for byte in range(256):
        if byte in printable:
            made.append(chr(byte))
        else:
            made.append(chr(256 + extra))
            extra += 1
    return made


@kinds
def test_detokenizer_text_released_does_not_depend_on_blocks(kind: str) -> None:
    tokenizer = KINDS[kind]
    rng = random.Random(1)
    for _ in range(50):
        ids = [rng.randrange(260) for _ in range(40)]
        single, blocks = Detokenizer(tokenizer), Detokenizer(tokenizer)
        one_by_one = "".join(single.push([token]) for token in ids)
        at_once = blocks.push(ids)
        assert one_by_one == at_once


def test_detokenizer_holds_a_character_until_it_is_whole() -> None:
    tokenizer = KINDS["byte_level"]
    table = _bytes_to_alphabet()
    one = Detokenizer(tokenizer)
    deltas = [
        one.push([tokenizer._backend.token_to_id(table[byte])])
        for byte in "é\N{GRINNING FACE}x".encode()
    ]
    assert deltas == ["", "é", "", "", "", "\N{GRINNING FACE}", "x"]


def test_detokenizer_window_stays_short_and_time_linear() -> None:
    tokenizer = KINDS["byte_level"]
    one = Detokenizer(tokenizer)
    letter = tokenizer._backend.token_to_id("a")
    started = time.process_time()
    for _ in range(4000):
        one.push([letter])
        assert len(one._window) <= WINDOW + 1
    assert time.process_time() - started < 4.0
    assert one._closed >= KEEP


def test_detokenizer_endless_bad_bytes_stay_exact_and_cheap() -> None:
    # A model stuck on an invalid byte, and on the token that is U+FFFD itself.
    for piece in ("ÿ", "ï¿½"):
        tokenizer = KINDS["byte_level"]
        token = tokenizer._backend.token_to_id(piece)
        one = Detokenizer(tokenizer)
        started = time.process_time()
        text = "".join(one.push([token]) for _ in range(3000)) + one.flush()
        assert text == "\ufffd" * 3000
        assert time.process_time() - started < 2.0
        assert len(one._window) <= WINDOW + 1
