"""What a checkpoint's generation_config.json asks for and this project leaves to the request."""

from __future__ import annotations

import logging
from pathlib import Path

from outrider.shared.core.tokenizer_files import read_json

log = logging.getLogger(__name__)

# Fields that change which tokens come, with the value that changes nothing.
_NEUTRAL: dict[str, object] = {
    "do_sample": False,
    "temperature": 1.0,
    "top_k": 50,  # transformers' own, where sampling is on
    "top_p": 1.0,
    "min_p": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "length_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "bad_words_ids": None,
    "sequence_bias": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "exponential_decay_length_penalty": None,
    "min_length": 0,
    "min_new_tokens": None,
    "max_new_tokens": None,
    "max_length": 20,  # transformers' own
    "num_beams": 1,
    "guidance_scale": None,
    "stop_strings": None,
}


def left_to_requests(folder: Path) -> list[str]:
    """What of ``folder``'s generation_config.json is not applied, as ``field = value``.

    All but its end-of-sequence ids: a request says how its tokens are chosen, and one that says
    nothing is decoded greedily, whatever the checkpoint.
    """
    read = read_json(folder / "generation_config.json")
    return [
        f"{name} = {read[name]!r}"
        for name, neutral in _NEUTRAL.items()
        if read.get(name) is not None and read[name] != neutral
    ]


def warn_of_what_is_left(name: str, path: str) -> None:
    """Logs what of the base's generation_config.json is not applied; ``path``: its folder.

    A draft's concerns nobody: how its tokens are chosen is up to the request, too.
    """
    left = left_to_requests(Path(path)) if Path(path).is_dir() else []
    if left:
        log.warning(
            "%s: generation_config.json is not applied but for its end-of-sequence ids; "
            "a request asks for what it wants: %s",
            name,
            ", ".join(left),
        )
