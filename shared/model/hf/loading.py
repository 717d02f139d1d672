"""Loads transformers models, and says why where one can't be served."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from outrider.shared.core.errors import ConfigError, first_line

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

_COMPUTED = re.compile(
    r"(^|\.)((attn|attention|crossattention)\.bias|masked_bias|causal_mask"
    r"|(original_)?inv_freq|cos_cached|sin_cached|position_ids)$|\.decoder\.version$"
)
"""Buffers that files of older releases and other trainers hold, and the model computes.

transformers leaves out of its report only those that the model's class names
(``_keys_to_ignore_on_load_unexpected``): few do, and it only warns of the others.
"""


def load_model(path: str, dtype: str, device: torch.device) -> Any:
    """A transformers causal language model, in evaluation mode, on ``device``.

    ``dtype``: a name of ``DTYPES``, or ``auto``: float32 on a CPU, elsewhere the checkpoint's,
    with bfloat16 made float16 where the device has none. Raises ``ConfigError``.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # what loads is reported by the service
    try:
        config = AutoConfig.from_pretrained(path)
        reason = refusal(config)
    except Exception as error:  # transformers computes with fields of any type
        said = first_line(error)
        if not isinstance(error, (OSError, ValueError)):
            said = f"{type(error).__name__}: {said}"  # says little by itself
        file = f"{path}/config.json"
        raise ConfigError(f"path: {file} can't be loaded: {said}") from error
    if reason is not None:
        raise ConfigError(f"path: {path}: {reason}")
    try:
        found: Any = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=choose_dtype(dtype, config, device),
            low_cpu_mem_usage=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
        )
    except Exception as error:  # whatever a broken file makes a reader raise
        raise ConfigError(f"path: {path} can't be loaded: {first_line(error)}") from error
    model, info = found
    reason = mismatch(model, info) or refusal(model.config, model)
    if reason is not None:
        raise ConfigError(f"path: {path}: {reason}")
    return model.to(device).eval()


def refusal(config: Any, model: Any = None) -> str | None:
    """Why a model of this configuration can't be served; None where it can, as far as seen."""
    kind = getattr(config, "model_type", "model")
    if getattr(config, "is_encoder_decoder", False):
        return f"{kind} is an encoder-decoder: its decoder also reads an encoder's states"
    # Some decoders have the field and never look at it, so a "no" is not believed by itself.
    if getattr(config, "is_decoder", True) is False and _reads_ahead(config, model):
        return f"{kind} is an encoder: its rows read what comes after them"
    types = set(getattr(config.get_text_config(decoder=True), "layer_types", None) or ())
    unknown = types - {"full_attention", "sliding_attention"}
    if unknown:
        return (
            f"{kind} has layers of type {', '.join(sorted(unknown))}: rollback needs layers of "
            "full or sliding-window attention, whose state is keys and values per position"
        )
    borrowing = _borrowing_layers(config.get_text_config(decoder=True))
    if borrowing:
        return (
            f"{kind} has {borrowing} layers that read the keys and values of another layer: "
            "the arena serves layers that have their own"
        )
    if model is not None and getattr(model, "_is_stateful", False):
        return (
            f"{kind} keeps a recurrent state (state-space or linear attention): rejected tokens "
            "can't be taken back by setting a length"
        )
    return None


def mismatch(model: Any, info: Mapping[str, Any]) -> str | None:
    """What the files lack or have too much of, by transformers' report; None where they agree.

    transformers fills what is missing with random numbers, other ones at each start.
    """
    missing = sorted(info.get("missing_keys", ()))
    if missing:
        return f"the files lack {_named(missing)}, without which the model's text is random"
    shapes = sorted(str(one[0]) for one in info.get("mismatched_keys", ()))
    if shapes:
        return f"the files have {_named(shapes)} in another shape than the configuration says"
    known = {name for name, _ in model.named_buffers()}
    strange = [
        name
        for name in sorted(info.get("unexpected_keys", ()))
        if name not in known and not _COMPUTED.search(name)
    ]
    if strange:
        return f"the files have {_named(strange)}, for which the model has no place"
    return None


def _named(names: Sequence[str]) -> str:
    count = f"{len(names)} tensors" if len(names) > 1 else "the tensor"
    shown = ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
    return f"{count} {shown}"


def _reads_ahead(config: Any, model: Any) -> bool:
    """Whether rows read what comes after them: as far as known before it is loaded, then tried."""
    if model is None:
        from transformers import AutoModelForCausalLM

        try:
            with torch.device("meta"):
                made = AutoModelForCausalLM.from_config(config)
        except Exception:
            return False  # loading it will say why
        return {one.is_causal for one in made.modules() if hasattr(one, "is_causal")} == {False}
    try:
        with torch.inference_mode():
            one, other = (
                model(torch.tensor([[1, last]], device=model.device), use_cache=False).logits[0, 0]
                for last in (2, 3)
            )
    except Exception:
        return True  # no decoder by its own word, and none by trial
    return bool((one - other).abs().max() > 1e-2 * one.abs().max())


def _borrowing_layers(config: Any) -> int:
    """How many layers cache nothing and read what another layer cached."""
    count: int = getattr(config, "num_kv_shared_layers", None) or 0
    if count:
        return count
    modes = getattr(config, "kv_sharing_modes", None) or ()
    return sum(str(mode).startswith("reuse") for mode in modes)


def choose_dtype(name: str, config: Any, device: torch.device) -> torch.dtype:
    """The type of the weights for ``name`` (see ``load_model``) and a model's configuration."""
    if name != "auto":
        return DTYPES[name]
    if device.type == "cpu":
        return torch.float32
    own = getattr(config, "dtype", None)
    own = DTYPES.get(own) if isinstance(own, str) else own
    if own is None:
        return torch.float16
    if own == torch.bfloat16 and not _has_bfloat16(device):
        return torch.float16
    return own


def _has_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "mps":
        try:
            torch.zeros(1, dtype=torch.bfloat16, device=device).add_(1)
        except (RuntimeError, TypeError):
            return False
    return True
