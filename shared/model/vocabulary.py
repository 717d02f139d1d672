"""The fingerprint by which draft and base are known to share a vocabulary."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path

from outrider.shared.core.tokenizer_files import added_tokens, listed_tokens

log = logging.getLogger(__name__)


def fingerprint(path: str, vocab_size: int) -> str:
    """SHA-256, in hex, over the tokenizer's vocabulary (token texts sorted by id, and ids).

    ``path``: the model's folder or hub id. A model without tokenizer files is fingerprinted by
    ``vocab_size`` (rows of its output layer) alone, and the result says so by its prefix
    ``size-only:``. Padding of the output layer beyond the tokenizer does not count: models of
    one family pad differently. Nor do ids beyond the output layer, which no text has.
    """
    vocabulary = _vocabulary(path) if path else None
    digest = hashlib.sha256()
    if vocabulary is None:
        digest.update(f"vocab_size {vocab_size}".encode())
        return f"size-only:{digest.hexdigest()}"
    known = {token: number for token, number in vocabulary.items() if number < vocab_size}
    for token, number in sorted(known.items(), key=lambda entry: (entry[1], entry[0])):
        digest.update(f"{number}\t{token}\n".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _vocabulary(path: str) -> dict[str, int] | None:
    """Token text -> id; None where there is no tokenizer."""
    folder = Path(path)
    if folder.is_dir():
        if (folder / "tokenizer.json").is_file():
            from tokenizers import Tokenizer

            try:
                backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
            except Exception as error:  # the library raises bare ones; the model itself may serve
                log.warning("no tokenizer at %s: %s", path, error)
                return None
            known: dict[str, int] = backend.get_vocab(with_added_tokens=True)
            added = added_tokens(folder, known)
            return known | {text: number for number, (text, _) in added.items()}
        if (folder / "vocab.json").is_file():
            plain: dict[str, int] = json.loads((folder / "vocab.json").read_text("utf-8"))
            return plain | {text: number for number, (text, _) in listed_tokens(folder).items()}
        if not (folder / "tokenizer_config.json").is_file():
            return None
    from transformers import AutoTokenizer

    try:
        found: dict[str, int] = AutoTokenizer.from_pretrained(path).get_vocab()
    except Exception as error:  # whatever is wrong with it, the model itself may serve
        log.warning("no tokenizer at %s: %s", path, error)
        return None
    return found
