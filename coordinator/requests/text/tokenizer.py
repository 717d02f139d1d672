"""The base model's tokenizer, without torch or transformers.

``tokenizers`` reads tokenizer.json directly, which takes milliseconds and keeps the
coordinator small. A model that ships only an older format is converted by transformers, which
is imported for that alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from outrider.coordinator.requests.text.chat import ChatTemplate
from outrider.shared.core.errors import ConfigError, first_line
from outrider.shared.core.tokenizer_files import complete

_OLDER = ("tokenizer_config.json", "vocab.*", "merges.txt", "*.model", "*.tiktoken")
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_WANTED = "a folder with tokenizer.json, a tokenizer.json file, or a hub id"


class Tokenizer:
    """Text to ids and back. Special tokens are left out of decoded text."""

    def __init__(self, backend: object, chat: ChatTemplate) -> None:
        """``backend`` is a ``tokenizers.Tokenizer``."""
        from tokenizers import Tokenizer as Backend

        assert isinstance(backend, Backend)
        # Padding and truncation that a file may ask for are for training batches.
        backend.no_padding()
        backend.no_truncation()
        self._backend = backend
        self.chat = chat
        self._special = {
            token: one.content
            for token, one in backend.get_added_tokens_decoder().items()
            if one.special
        }
        self._byte_fallback = backend.token_to_id("<0x00>") is not None
        self._open: dict[int, bool] = {}

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """The ids of ``text``; ``special``: with the special tokens it is configured to add."""
        return list(self._backend.encode(text, add_special_tokens=special).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``; ids outside the vocabulary have none."""
        return str(self._backend.decode(ids, skip_special_tokens=True))

    def byte(self, token: int) -> int | None:
        """The byte that ``token`` stands for, where it is a byte-fallback token."""
        piece: str | None = self._backend.id_to_token(token) if self._byte_fallback else None
        byte = _BYTE_TOKEN.fullmatch(piece) if piece is not None else None
        return int(byte[1], 16) if byte else None

    def special_tokens(self) -> Mapping[int, str]:
        """The tokens that are left out of decoded text, as they are written."""
        return self._special

    def keeps_run_open(self, token: int) -> bool:
        """Whether a run of byte-fallback tokens goes on through ``token``.

        It does through its own kind and through what is no text: special tokens and unknown ids.
        """
        if not self._byte_fallback:
            return False
        known = self._open.get(token)
        if known is None:
            textless = token in self._special or self._backend.id_to_token(token) is None
            known = self._open[token] = textless or self.byte(token) is not None
        return known


def load_tokenizer(name: str) -> Tokenizer:
    """Loads the tokenizer at ``name``: a folder, a tokenizer.json, a hub id, or a bundled word.

    Raises ``ConfigError`` saying what was looked for.
    """
    from tokenizers import Tokenizer as Backend

    if name in ("base", "draft"):
        from outrider.shared import pair

        name = str(pair.path(name))
    path = Path(name)
    if path.is_file():
        file, folder = path, path.parent
    elif path.is_dir():
        file, folder = path / "tokenizer.json", path
    else:
        file, folder = _from_hub(name)
    if not file.is_file():
        return _converted(name, folder)
    try:
        backend = Backend.from_file(str(file))
    except Exception as error:  # the library raises bare Exceptions
        raise ConfigError(f"tokenizer = {name!r}: {file}: not a tokenizer: {error}") from None
    complete(backend, folder)
    return Tokenizer(backend, ChatTemplate(folder))


def _from_hub(name: str) -> tuple[Path, Path]:
    """The hub's files, from its cache where they are there."""
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ConfigError(f"tokenizer = {name!r}: does not exist; must be {_WANTED}")
    try:
        from huggingface_hub import snapshot_download

        folder = Path(
            snapshot_download(
                name,
                allow_patterns=[
                    "tokenizer*",
                    "special_tokens_map.json",
                    "vocab*",
                    "merges.txt",
                    "chat_template*",
                    "additional_chat_templates/*",
                    "config.json",
                ],
            )
        )
    except Exception as error:
        raise ConfigError(
            f"tokenizer = {name!r}: neither a folder nor on the hub ({first_line(error)}); "
            f"must be {_WANTED}"
        ) from None
    return folder / "tokenizer.json", folder


def _converted(name: str, folder: Path) -> Tokenizer:
    if not any(file for form in _OLDER for file in folder.glob(form)):
        raise ConfigError(f"tokenizer = {name!r}: none in {folder}; must be {_WANTED}")
    try:
        from transformers import AutoTokenizer

        backend = AutoTokenizer.from_pretrained(str(folder)).backend_tokenizer
    except Exception as error:
        raise ConfigError(
            f"tokenizer = {name!r}: no tokenizer.json in {folder}, and what is there can't be "
            f"converted ({first_line(error)}); must be {_WANTED}"
        ) from None
    return Tokenizer(backend, ChatTemplate(folder))
