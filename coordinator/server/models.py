"""Whether base and draft fit together, and the tokenizer of their vocabulary."""

from __future__ import annotations

import logging
from pathlib import Path

from outrider.coordinator.requests.text.tokenizer import Tokenizer, load_tokenizer
from outrider.protos.generation_pb2 import ModelDescription
from outrider.shared.core.errors import ConfigError, VocabularyMismatch
from outrider.shared.core.model_facts import read_description

log = logging.getLogger(__name__)


def check_vocabulary(base: ModelDescription, draft: ModelDescription) -> None:
    """Raises ``VocabularyMismatch`` unless draft and base have one vocabulary.

    A draft without a model has none: its tokens are those of the text.
    """
    if not read_description(draft).is_model:
        return
    if base.vocab_fingerprint == draft.vocab_fingerprint:
        return
    raise VocabularyMismatch(
        f"draft and base do not share a vocabulary: base {base.name!r} has "
        f"{base.vocab_size} tokens, fingerprint {base.vocab_fingerprint}; draft "
        f"{draft.name!r} has {draft.vocab_size} tokens, fingerprint "
        f"{draft.vocab_fingerprint}. Choose a draft that was trained with the base's "
        "tokenizer, or run the base alone (--no-draft)"
    )


def check_same_base(before: ModelDescription, now: ModelDescription) -> None:
    """Raises ``ConfigError`` when another model came back in the base's place.

    Sequences go on over a restart of the verifier; with another model their text would change
    half-way.
    """
    for name in ("vocab_fingerprint", "architecture", "parameters", "max_positions", "dtype"):
        old, new = getattr(before, name), getattr(now, name)
        if old != new:
            raise ConfigError(
                f"the verify service came back with another model: {name} was {old!r}, is "
                f"{new!r}; restart the coordinator to use it"
            )


def base_tokenizer(name: str, base: ModelDescription) -> Tokenizer | None:
    """The tokenizer ``name``, or the base's own; None (ids only) where the base has none."""
    own = Path(base.name)
    if name == "base" and own.is_dir():
        name = str(own)
    try:
        return load_tokenizer(name)
    except ConfigError as error:
        if Path(name) != own:
            raise
        log.warning("%s; requests must carry token ids", error)
        return None
