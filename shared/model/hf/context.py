"""How long the sequences of a model may be, by its configuration."""

from __future__ import annotations

from typing import Any

from outrider.shared.core.errors import ConfigError

UNLIMITED = 1 << 20
"""For models without positions of their own (ALiBi): as long as their arena."""
# Kinds of scaled rotary embeddings whose factor tells how much longer the context has become;
# configurations of other kinds (llama3, longrope) give the longer one already.
_MULTIPLIED = ("yarn", "linear")


def context_of(config: Any, wanted: int | None = None) -> int:
    """The model's context in tokens, or ``wanted`` in its place.

    ``config``: transformers' text configuration. A rotary embedding that is scaled by a factor
    has that many times the context that it was trained with
    (``original_max_position_embeddings``, or else ``max_position_embeddings``); one whose
    frequencies change with every further token (``dynamic``) is served as far as they do not,
    which is ``max_position_embeddings``. Where layers of several types have embeddings of their
    own, ``max_position_embeddings`` is what the model as a whole is for.
    Raises ``ConfigError`` where the model has no positions for ``wanted``.
    """
    own: int | None = getattr(config, "max_position_embeddings", None)
    own = own or getattr(config, "max_seq_len", None)
    rope = getattr(config, "rope_parameters", None) or {}
    kind = rope.get("rope_type", rope.get("type", ""))
    original: int = rope.get("original_max_position_embeddings") or own or UNLIMITED
    context = own or UNLIMITED
    if own and kind in _MULTIPLIED:
        context = max(own, int(original * float(rope.get("factor") or 1.0)))
    if wanted is None:
        return context
    learned = own is not None and not rope
    by_layers = [one.get("rope_type") for one in rope.values() if isinstance(one, dict)]
    if wanted > context and (learned or "dynamic" in (kind, *by_layers)):
        why = "has embeddings for" if learned else "has fixed frequencies for"
        raise ConfigError(
            f"max_positions: got {wanted}; must be at most {context}, the positions that the model "
            + why
        )
    return wanted
