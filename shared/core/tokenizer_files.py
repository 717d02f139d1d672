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
CLASSES: Mapping[str, str] = {
    **dict.fromkeys(
        ("codegen", "dbrx", "gpt2", "gpt_neo", "gptj", "jais2", "opt", "phi", "starcoder2"),
        "GPT2Tokenizer",
    ),
    **dict.fromkeys(("gpt_neox", "mpt", "olmo", "olmoe"), "GPTNeoXTokenizer"),
    **dict.fromkeys(("qwen2", "qwen2_moe", "qwen3", "qwen3_moe"), "Qwen2Tokenizer"),
    **dict.fromkeys(("gemma", "gemma2", "gemma3", "gemma3_text"), "GemmaTokenizer"),
    **dict.fromkeys(("cohere", "cohere2"), "CohereTokenizer"),
}
"""Classes of ``DEFAULTS`` by the ``model_type`` of config.json, for files that name none."""

_FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")


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
    return {name: _text(value) for name, value in _special_tokens(folder).items()}


def _special_tokens(folder: Path) -> dict[str, Any]:
    """The same as they are written: texts, or objects with a text and how it is found."""
    config = read_json(folder / "tokenizer_config.json")
    sources: list[Mapping[str, Any]] = [DEFAULTS.get(_class(folder, config), {}), config]
    if "added_tokens_decoder" not in config:
        sources.append(read_json(folder / "special_tokens_map.json"))
    found: dict[str, Any] = {}
    for source in sources:
        for name, value in source.items():
            if not name.endswith("_token"):
                continue
            if isinstance(_text(value), str):
                found[name] = value
            elif value is None:
                found.pop(name, None)
    return found


def _text(value: Any) -> Any:
    return value.get("content") if isinstance(value, dict) else value


def _class(folder: Path, config: Mapping[str, Any]) -> str:
    """The tokenizer's class without "Fast", as transformers chooses it."""
    model = read_json(folder / "config.json")
    named = config.get("tokenizer_class") or model.get("tokenizer_class")
    return str(named or CLASSES.get(str(model.get("model_type")), "")).removesuffix("Fast")


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
    held = {one.content: one for one in backend.get_added_tokens_decoder().values()}
    added = added_tokens(folder, known)
    named = {_text(value): value for value in _special_tokens(folder).values()}
    decoder = read_json(folder / "tokenizer_config.json").get("added_tokens_decoder") or {}
    listed = {one.get("content"): one for one in decoder.values() if isinstance(one, dict)}
    for text in [text for text, _ in added.values()] + sorted(named.keys() & known):
        # What tokenizer_config.json lists goes before what tokenizer.json has, and that before
        # what stands with a name.
        flags = _flags(listed.get(text, held.get(text, named.get(text, text))))
        special = text in named or flags["special"]
        token = AddedToken(text, **(flags | {"special": special}))
        (backend.add_special_tokens if special else backend.add_tokens)([token])


def _flags(token: Any) -> dict[str, bool]:
    """How a token is found: of the library's object, or as files write it."""
    if isinstance(token, str):
        return dict.fromkeys(_FLAGS, False)
    own = token if isinstance(token, dict) else {name: getattr(token, name) for name in _FLAGS}
    found = {name: bool(own.get(name, False)) for name in _FLAGS}
    # As the library has it where a file is silent.
    return found | {"normalized": bool(own.get("normalized", not found["special"]))}
