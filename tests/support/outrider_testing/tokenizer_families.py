"""Small tokenizers of every family that checkpoints come with."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

TEXT = (
    "def add(left, right):\n    return left + right\n\n"
    "The cat's naïve café isn't open , is it ? 猫と犬 \N{GRINNING FACE}\n"
    "class Point:\n    def __init__(self, x, y):\n        self.x = x\n"
) * 6
SPECIAL = ["<s>", "</s>", "<|tool|>"]
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def byte_level() -> Tokenizer:
    """GPT-2, Llama 3 and Qwen: tokens are byte strings, some of them pieces of characters."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator(
        [TEXT],
        trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=SPECIAL,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return made


def llama() -> Tokenizer:
    """Llama 2 and Mistral: SentencePiece BPE with single bytes, and a space before the text."""
    made = _byte_fallback()
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return made


def gemma() -> Tokenizer:
    """Gemma: as Llama 2, but the text begins as it is."""
    made = _byte_fallback()
    made.normalizer = normalizers.Replace(" ", "▁")
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return made


def unigram() -> Tokenizer:
    """T5 and XLNet: SentencePiece Unigram, whose word mark becomes a space."""
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    made.train_from_iterator(
        [TEXT],
        trainers.UnigramTrainer(
            vocab_size=200,
            special_tokens=[*SPECIAL, "<unk>"],
            unk_token="<unk>",
            show_progress=False,
        ),
    )
    return made


def word_piece() -> Tokenizer:
    """BERT: pieces that are joined to words, and spaces before punctuation cleaned up."""
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece(cleanup=True)
    made.train_from_iterator(
        [TEXT],
        trainers.WordPieceTrainer(
            vocab_size=200, special_tokens=[*SPECIAL, "[UNK]"], show_progress=False
        ),
    )
    return made


FAMILIES: dict[str, Callable[[], Tokenizer]] = {
    "byte-level": byte_level,
    "llama": llama,
    "gemma": gemma,
    "unigram": unigram,
    "word-piece": word_piece,
}


def finish(made: Tokenizer) -> Tokenizer:
    """With the tokens that checkpoints add: special ones, and one that is text."""
    made.add_special_tokens([AddedToken(one, special=True) for one in SPECIAL])
    made.add_tokens([AddedToken("<think>", special=False)])
    return made


def write(family: str, folder: Path) -> Tokenizer:
    """Puts the family's tokenizer into ``folder``, with a token that was added to it."""
    made = finish(FAMILIES[family]())
    made.save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(
        json.dumps(config | {"bos_token": "<s>", "eos_token": "</s>"})
    )
    return made


def blocks_of(ids: Sequence[int], rng: random.Random) -> list[list[int]]:
    """``ids`` cut into blocks of one to nine, as verdicts do."""
    made, start = [], 0
    while start < len(ids):
        size = rng.randint(1, 9)
        made.append(list(ids[start : start + size]))
        start += size
    return made


def _byte_fallback() -> Tokenizer:
    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    # A byte's token is in the vocabulary, but no merge may make one.
    made.train_from_iterator(
        [TEXT.replace(" ", "▁")],
        trainers.BpeTrainer(
            vocab_size=330, special_tokens=["<unk>", *SPECIAL, *_BYTES], show_progress=False
        ),
    )
    state = json.loads(made.to_str())
    # Training made them added tokens; only those of SPECIAL are.
    state["added_tokens"] = []
    return Tokenizer.from_str(json.dumps(state))
