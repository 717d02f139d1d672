"""What stands beside a tokenizer's vocabulary: added and special tokens.

tokenizer.json may lack what tokenizer_config.json, special_tokens_map.json, added_tokens.json or
the tokenizer's class adds. Read as transformers reads it, whose import takes seconds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_GPT2 = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
_LLAMA = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
_GEMMA = {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>"}
DEFAULTS: Mapping[str, Mapping[str, str]] = {
    "LlamaTokenizer": _LLAMA,
    "CodeLlamaTokenizer": _LLAMA,
    "GPT2Tokenizer": _GPT2,
    "GPTNeoXTokenizer": _GPT2 | {"pad_token": "<|padding|>"},
    "Qwen2Tokenizer": dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>"),
    "GemmaTokenizer": _GEMMA,
    "CohereTokenizer": {
        "bos_token": "<BOS_TOKEN>",
        "eos_token": "<|END_OF_TURN_TOKEN|>",
        "unk_token": "<UNK>",
        "pad_token": "<PAD>",
    },
}
"""Special tokens that a tokenizer's class has where its files are silent; without "Fast"."""


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file; empty where there is none."""
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return read if isinstance(read, dict) else {}


def special_tokens(folder: Path) -> dict[str, str]:
    """Texts of the special tokens by name, such as ``bos_token``.

    The class's own, then those of tokenizer_config.json, then those of special_tokens_map.json:
    the latter count only where the former does not list its added tokens, as in transformers.
    """
    config = read_json(folder / "tokenizer_config.json")
    kind = str(config.get("tokenizer_class") or "").removesuffix("Fast")
    sources: list[Mapping[str, Any]] = [DEFAULTS.get(kind, {}), config]
    if "added_tokens_decoder" not in config:
        sources.append(read_json(folder / "special_tokens_map.json"))
    found: dict[str, str] = {}
    for source in sources:
        for name, value in source.items():
            if not name.endswith("_token"):
                continue
            text = value.get("content") if isinstance(value, dict) else value
            if isinstance(text, str):
                found[name] = text
            elif value is None:
                found.pop(name, None)
    return found


def listed_tokens(folder: Path) -> dict[int, tuple[str, bool]]:
    """By id, the tokens that are listed beside the vocabulary: text, and whether it is special."""
    listed: dict[int, tuple[str, bool]] = {}
    for text, number in read_json(folder / "added_tokens.json").items():
        listed[int(number)] = (text, False)
    decoder = read_json(folder / "tokenizer_config.json").get("added_tokens_decoder")
    for number, one in (decoder or {}).items():
        if isinstance(one, dict) and isinstance(one.get("content"), str):
            listed[int(number)] = (one["content"], bool(one.get("special", False)))
    return listed


def added_tokens(folder: Path, known: Mapping[str, int]) -> dict[int, tuple[str, bool]]:
    """``listed_tokens`` that get the id that is written for them, beside ``known``, the vocabulary.

    The library numbers tokens as they come, so one after a gap would get another.
    """
    found: dict[int, tuple[str, bool]] = {}
    following = len(known)
    for number, (text, special) in sorted(listed_tokens(folder).items()):
        if known.get(text, following) == number:
            found[number] = (text, special)
            following += text not in known
    return found


def complete(backend: Any, folder: Path) -> None:
    """Gives ``backend``, a ``tokenizers.Tokenizer``, what stands beside its file in ``folder``."""
    from tokenizers import AddedToken

    known = backend.get_vocab(with_added_tokens=True)
    added = added_tokens(folder, known)
    for text, special in added.values():
        token = AddedToken(text, special=special, normalized=False)
        (backend.add_special_tokens if special else backend.add_tokens)([token])
    texts = known.keys() | {text for text, _ in added.values()}
    named = [one for one in special_tokens(folder).values() if one in texts]
    backend.add_special_tokens([AddedToken(one, special=True, normalized=False) for one in named])
