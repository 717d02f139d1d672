"""Planted checkpoints: models of any true size whose next token, and whose draft's acceptance
rate, are known by construction.

Every weight is dense and random. The layers' output projections are scaled down, so that what
a layer adds to the residual is noise; the input embedding is a random Gaussian table; row pi(t)
of the output head is the embedding of t, pi being one fixed cycle over the vocabulary. So the
model continues t with pi(t). A draft has random weights of its own and a permutation that
agrees with pi on a fixed random share alpha of the tokens: along the base's text it proposes
the base's token with probability alpha, which is its greedy acceptance rate in any engine.

With ``spread`` s > 0 the law is soft: on average over tokens the m-th successor of t under pi
is exp(-1 / s) times as likely as the one before it, m = 1 … 8, in base and draft alike (the
draft's first successor being its own). Base and draft then differ by chance as well, so the
acceptance rate of sampling is measured, not known.

The embedding is not tied to the head, since the head is a permutation of it: a step reads the
head and one row of the embedding, as many bytes as with tied weights.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from outrider.coordinator.bench.models.shapes import SHAPES, ModelShape

SUCCESSORS = 8
# Logit of the likeliest successor: far above the noise of the others at every size here.
TOP_LOGIT = 24.0
# Standard deviation of what one layer adds to a residual of standard deviation 1.
LAYER_NOISE = 0.05
_POOL = 1 << 24


@dataclass(frozen=True, slots=True)
class PlantSpec:
    """What to plant. ``agreement`` None makes a base; a number in 0..1 a draft for the base of
    the same ``seed`` and vocabulary, with that acceptance rate. ``dtype`` a torch name."""

    shape: str
    seed: int = 0
    agreement: float | None = None
    spread: float = 0.0
    dtype: str = "bfloat16"

    @property
    def size(self) -> ModelShape:
        """The shape's numbers."""
        return SHAPES[self.shape]


def cycle(vocabulary: int, seed: int) -> Tensor:
    """pi: int64 [vocabulary], one cycle through all tokens."""
    order = torch.randperm(vocabulary, generator=torch.Generator().manual_seed(seed))
    successor = torch.empty_like(order)
    successor[order] = order.roll(-1)
    return successor


def disagreeing(pi: Tensor, agreement: float, seed: int) -> Tensor:
    """A permutation that equals ``pi`` on exactly round(agreement · vocabulary) tokens."""
    vocabulary = pi.shape[0]
    others = vocabulary - round(agreement * vocabulary)
    if others == 1:
        # One token alone has nowhere else to go: a permutation differs in two places or none.
        others = 0
    chosen = torch.randperm(vocabulary, generator=torch.Generator().manual_seed(seed))[:others]
    changed = pi.clone()
    changed[chosen] = pi[chosen].roll(1)
    return changed


def config_of(spec: PlantSpec) -> Any:
    """The transformers configuration."""
    from transformers import GPT2Config, LlamaConfig

    s = spec.size
    common: dict[str, Any] = {
        "vocab_size": s.vocabulary,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "dtype": spec.dtype,
    }
    if s.architecture == "gpt2":
        return GPT2Config(
            n_embd=s.hidden, n_layer=s.layers, n_head=s.heads, n_positions=s.positions, **common
        )
    return LlamaConfig(
        hidden_size=s.hidden,
        num_hidden_layers=s.layers,
        num_attention_heads=s.heads,
        num_key_value_heads=s.kv_heads,
        head_dim=s.head_dim,
        intermediate_size=s.intermediate,
        max_position_embeddings=s.positions,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        rms_norm_eps=1e-5,
        **common,
    )


class _NoisePool:
    """Gaussian tensors of any size in no time: slices of one pool, each from an offset of its
    own, the same on every device. Rows of one tensor never start at the same place twice."""

    def __init__(self, seed: int, device: torch.device, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._pool = torch.randn(_POOL, generator=generator).to(device=device, dtype=dtype)
        self._offsets = torch.Generator().manual_seed(seed + 1)

    def fill(self, out: Tensor, scale: float) -> None:
        """Standard normal numbers times ``scale``, into a contiguous tensor."""
        flat, begin = out.view(-1), 0
        offset = int(torch.randint(0, _POOL // 2, (1,), generator=self._offsets))
        step = 0
        while begin < flat.numel():
            # The odd step keeps repetitions of the pool out of phase with any row length.
            offset = (offset + 7919 * step + 1) % (_POOL // 2)
            count = min(flat.numel() - begin, _POOL - offset)
            flat[begin : begin + count] = self._pool[offset : offset + count]
            begin, step = begin + count, step + 1
        if scale != 1.0:
            out.mul_(scale)


def plant(
    spec: PlantSpec,
    device: torch.device | str = "cpu",
    progress: Callable[[str], None] = lambda message: None,
) -> Any:
    """The model, in memory on ``device``, in evaluation mode. Seconds for billions of weights."""
    from transformers import AutoModelForCausalLM

    config, device = config_of(spec), torch.device(device)
    dtype = getattr(torch, spec.dtype)
    progress(f"planting {spec.shape}, {spec.size.step_bytes / 1e9:.2f} GB read per step")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model = model.to_empty(device=device).eval().requires_grad_(False)
    if spec.size.architecture == "llama":
        # Its frequencies are computed, not stored: what `to_empty` left there is nothing.
        inner = model.model
        inner.rotary_emb = type(inner.rotary_emb)(config).to(device)
    tensors = dict(model.named_parameters())
    _fill(spec, tensors, device, dtype)
    for name, buffer in model.named_buffers():
        if name.endswith((".attn.bias", ".masked_bias")):
            buffer.copy_(torch.ones_like(buffer).tril())
    model.generation_config.eos_token_id = None
    return model


def _fill(
    spec: PlantSpec, tensors: dict[str, Tensor], device: torch.device, dtype: torch.dtype
) -> None:
    noise = _NoisePool(spec.seed * 2 + (spec.agreement is not None) * 1_000_003 + 17, device, dtype)
    embedding = next(
        t for n, t in tensors.items() if n.endswith(("embed_tokens.weight", "wte.weight"))
    )
    noise.fill(embedding.data, 1.0)
    for name, tensor in tensors.items():
        if tensor is embedding:
            continue
        if name == "lm_head.weight":
            _fill_head(spec, embedding.data, tensor.data)
        elif tensor.dim() == 1:
            tensor.data.fill_(1.0 if name.endswith("weight") else 0.0)
        elif name.endswith("wpe.weight"):
            noise.fill(tensor.data, LAYER_NOISE)
        else:
            noise.fill(tensor.data, _scale(name, tensor, spec.size))


def _scale(name: str, tensor: Tensor, s: ModelShape) -> float:
    """Standard deviation of a projection's weights.

    Inputs are of unit variance, so 1 / sqrt(inputs) keeps that; projections onto the residual
    make LAYER_NOISE (values averaged by attention and gated products are smaller than 1, so
    what is added is less).
    """
    inputs = tensor.shape[0] if s.architecture == "gpt2" else tensor.shape[1]
    onto_residual = name.endswith(("o_proj.weight", "down_proj.weight", "c_proj.weight"))
    return (LAYER_NOISE if onto_residual else 1.0) / math.sqrt(inputs)


def _fill_head(spec: PlantSpec, embedding: Tensor, head: Tensor) -> None:
    """Row j: the embeddings of the tokens that j succeeds, weighted by how likely it is."""
    s = spec.size
    pi = cycle(s.vocabulary, spec.seed)
    first = pi
    if spec.agreement is not None:
        first = disagreeing(pi, spec.agreement, spec.seed + 1)
    unit = TOP_LOGIT / s.hidden
    head[first.to(embedding.device)] = embedding * unit
    if spec.spread > 0:
        jump = pi
        for m in range(1, SUCCESSORS):
            jump = pi[jump]
            weight = TOP_LOGIT - m / spec.spread
            if weight <= 0:
                break
            # In slices: index_add_ over a whole head would need a second one beside it.
            targets = jump.to(embedding.device)
            for begin in range(0, s.vocabulary, 16384):
                rows = slice(begin, begin + 16384)
                head[targets[rows]] += embedding[rows] * (weight / s.hidden)


def save(
    spec: PlantSpec, folder: Path, progress: Callable[[str], None] = lambda message: None
) -> None:
    """Writes an ordinary Hugging Face folder: config, weights, tokenizer, and the spec itself."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = plant(spec, device, progress)
    progress(f"writing {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    save_tokenizer(spec.size.vocabulary, folder)
    record = {name: getattr(spec, name) for name in PlantSpec.__slots__}
    (folder / "planted.json").write_text(json.dumps(record, indent=1) + "\n")


def save_tokenizer(vocabulary: int, folder: Path) -> None:
    """Token i is the word ``ti``; words are split at spaces. The same for every planted model
    of one vocabulary size, so that fingerprints agree."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({f"t{i}": i for i in range(vocabulary)}, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.Sequence([decoders.Replace("t", " t"), decoders.Fuse()])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "t0"}) + "\n"
    )
