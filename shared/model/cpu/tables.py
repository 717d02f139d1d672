"""The table of a model: its sizes, and the addresses of its weights and buffers."""

from __future__ import annotations

import ctypes
import struct
from array import array
from typing import Any

import torch
from torch import Tensor

from outrider.kernels.cpu import barrier
from outrider.kernels.cpu.linear import scratch_floats
from outrider.kernels.cpu.shape import KernelShape, padded
from outrider.kernels.cpu.tables import LayerWords, ModelWords
from outrider.kernels.cpu.team import address, openmp
from outrider.shared.kv.storage import Storage
from outrider.shared.model.cpu.weights import filled, gated_panels, panels
from outrider.shared.model.llama.shapes import rotary_table

MAX_ROWS = 512
"""Rows of one call."""


class ModelTable:
    """Holds what it points at; ``words`` is what the kernels are given."""

    def __init__(
        self,
        model: Any,
        storage: Storage,
        shape: KernelShape,
        *,
        positions: int,
        threads: int,
        release: bool,
    ) -> None:
        """``positions``: rows of the rotary table, and the longest context. ``threads``: the most
        that will run. ``release``: the module's weights are let go of one after the other, so
        that no second copy of all of them is ever held."""
        self._held: list[Tensor] = []
        self._shape = shape
        self._kind = getattr(torch, shape.weights)
        config, columns, dim = model.config, shape.columns, shape.head_dim
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        hidden, inner = config.hidden_size, config.intermediate_size
        self._hidden_width = padded(hidden, columns)
        self._qkv_width = padded((heads + 2 * kv_heads) * dim, columns)
        self.vocabulary_width = padded(model.lm_head.weight.shape[0], columns)
        mixed, gated = padded(heads * dim, columns), padded(inner, columns // 2)
        longest = max(self._hidden_width, mixed, gated)
        # Scores of attention are rounded up to whole vectors, with one more behind them.
        scratch = padded(max(scratch_floats(shape, longest), positions + 32), 64)
        cos, sin = rotary_table(model, positions, torch.zeros(1))
        library = openmp()
        own = ctypes.CDLL(None)
        head = {
            ModelWords.LAYERS: config.num_hidden_layers,
            ModelWords.HIDDEN: hidden,
            ModelWords.HIDDEN_WIDTH: self._hidden_width,
            ModelWords.HEADS: heads,
            ModelWords.KV_HEADS: kv_heads,
            ModelWords.QKV_WIDTH: self._qkv_width,
            ModelWords.MIXED: heads * dim,
            ModelWords.MIXED_WIDTH: mixed,
            ModelWords.GATED: inner,
            ModelWords.GATED_WIDTH: gated,
            ModelWords.VOCABULARY: model.lm_head.weight.shape[0],
            ModelWords.VOCABULARY_WIDTH: self.vocabulary_width,
            ModelWords.EPS: _bits(config.rms_norm_eps),
            ModelWords.SCALE: _bits(dim**-0.5),
            ModelWords.COS: self._hold(cos),
            ModelWords.SIN: self._hold(sin),
            ModelWords.NORM: self._vector(model.model.norm.weight),
            ModelWords.HIDDEN_ROWS: self._zeros(MAX_ROWS, self._hidden_width),
            ModelWords.QKV_ROWS: self._zeros(MAX_ROWS, self._qkv_width),
            ModelWords.MIXED_ROWS: self._zeros(MAX_ROWS, mixed),
            ModelWords.GATED_ROWS: self._zeros(MAX_ROWS, gated),
            ModelWords.PICKED_ROWS: self._zeros(MAX_ROWS, self._hidden_width),
            ModelWords.SCRATCH: self._zeros(threads, scratch),
            ModelWords.SCRATCH_BYTES: scratch * 4,
            ModelWords.BARRIER: self._hold(torch.zeros(barrier.WORDS, dtype=torch.int64)),
            ModelWords.THREAD: address(library.omp_get_thread_num) if library else 0,
            ModelWords.THREADS: address(library.omp_get_num_threads) if library else 0,
            ModelWords.YIELD: address(own.sched_yield),
        }
        records: list[int] = []
        for number, layer in enumerate(model.model.layers):
            records += self._layer(layer, number, storage)
            if release:
                _let_go(layer)
        head[ModelWords.HEAD] = self._panels(model.lm_head.weight)
        table = model.model.embed_tokens.weight.data
        head[ModelWords.EMBEDDING] = self._hold(table.to(self._kind).contiguous())
        if release:
            _let_go(model)
        self.words = array("q", [head[place] for place in ModelWords] + records)

    def _layer(self, layer: Any, number: int, storage: Storage) -> list[int]:
        attention, mlp, columns = layer.self_attn, layer.mlp, self._shape.columns
        trio = (attention.q_proj, attention.k_proj, attention.v_proj)
        bias = trio[0].bias
        out_bias = attention.o_proj.bias
        gate, up = mlp.gate_proj.weight.data, mlp.up_proj.weight.data
        query_norm, key_norm = (getattr(attention, n, None) for n in ("q_norm", "k_norm"))
        keys, values = storage.layer_keys[number], storage.layer_values[number]
        record = {
            LayerWords.NORM: self._vector(layer.input_layernorm.weight),
            LayerWords.QKV: self._panels(torch.cat([one.weight.data for one in trio])),
            LayerWords.QKV_BIAS: 0
            if bias is None
            else self._hold(filled(torch.cat([one.bias.data for one in trio]), self._qkv_width)),
            LayerWords.QUERY_NORM: 0 if query_norm is None else self._floats(query_norm.weight),
            LayerWords.KEY_NORM: 0 if key_norm is None else self._floats(key_norm.weight),
            LayerWords.OUT: self._panels(attention.o_proj.weight),
            LayerWords.OUT_BIAS: 0 if out_bias is None else self._vector(out_bias),
            LayerWords.MLP_NORM: self._vector(layer.post_attention_layernorm.weight),
            LayerWords.GATE_UP: self._hold(gated_panels(gate, up, columns, self._kind)),
            LayerWords.DOWN: self._panels(mlp.down_proj.weight),
            LayerWords.KEYS: keys.data_ptr(),
            LayerWords.VALUES: values.data_ptr(),
            LayerWords.TOKEN_STRIDE: keys.stride(0),
            LayerWords.POOL: storage.pool_of[number],
        }
        return [record[place] for place in LayerWords]

    def _hold(self, tensor: Tensor) -> int:
        self._held.append(tensor)
        return tensor.data_ptr()

    def _zeros(self, rows: int, width: int) -> int:
        return self._hold(torch.zeros(rows, width))

    def _floats(self, weight: Any) -> int:
        return self._hold(weight.data.float().contiguous())

    def _vector(self, weight: Any) -> int:
        return self._hold(filled(weight.data, self._hidden_width))

    def _panels(self, weight: Any) -> int:
        return self._hold(panels(weight.data, self._shape.columns, self._kind))


def _bits(value: float) -> int:
    """A float32 as the integer with its bits."""
    whole: int = struct.unpack("<i", struct.pack("<f", value))[0]
    return whole


def _let_go(module: Any) -> None:
    for parameter in module.parameters():
        parameter.data = parameter.data.new_empty(0)
