"""One forward through a Llama-family model, as a chain of operations.

Five launches a block: q/k/v with the norm folded in; attention with rotary embedding and
KV append; output projection onto the residual; gate/up with the norm and the activation;
down projection onto the residual. Each kernel fetches its first weights before it waits for
its predecessor (programmatic dependent launch), so that memory is busy across the seams.
Nothing is allocated or decided while it runs: it can be captured as a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from outrider.kernels import registry
from outrider.kernels.attention_shapes import Work
from outrider.kernels.linear_shapes import Epilogue, Tile
from outrider.kernels.operation import Call, Tools
from outrider.kernels.registry import Choice
from outrider.shared.model.cuda.passes import HEAD_ROWS, PassLimits
from outrider.shared.model.cuda.tuning import Tuning, attention_blocks
from outrider.shared.model.cuda.weights import Weights


@dataclass(frozen=True, slots=True)
class Batch:
    """Where the rows of a forward stand: int32 tensors on the device.

    ``tokens`` [rows]; ``starts`` [pools, sequences], first slot of each extent; per sequence
    ``first_rows``, ``row_counts`` (0: not there), ``positions`` (of its first row). For branches:
    ``prefix_starts`` [pools, sequences], first slot of the parent; ``prefix_lens`` (0: none).
    """

    tokens: Tensor
    starts: Tensor
    first_rows: Tensor
    row_counts: Tensor
    positions: Tensor
    prefix_starts: Tensor | None = None
    prefix_lens: Tensor | None = None


def resolve_all(
    tools: Tools, dtype: torch.dtype, wanted: Mapping[str, str] | None = None
) -> tuple[dict[str, Call], list[Choice]]:
    """The best implementation of every operation on a device, built, and how it was chosen.

    ``wanted``: implementations asked for by name of operation; raises NotAvailable where one
    can't be had.
    """
    calls: dict[str, Call] = {}
    choices = []
    for name in registry.operations():
        implementation, choice = registry.resolve(
            name, tools.device, dtype, implementation=(wanted or {}).get(name)
        )
        calls[name] = implementation.build(tools)
        choices.append(choice)
    return calls, choices


@dataclass(slots=True)
class Forward:
    """The chain of operations of one model over one arena.

    ``calls``: the operations by name, see ``resolve_all``. ``limits``: the most rows of a forward
    and its attention's scratch memory.
    """

    weights: Weights
    calls: Mapping[str, Call]
    limits: PassLimits
    tuning: Tuning
    x: Tensor = field(init=False)
    logits: Tensor = field(init=False)
    _qkv: Tensor = field(init=False)
    _attended: Tensor = field(init=False)
    _gated: Tensor = field(init=False)
    _picked: Tensor = field(init=False)
    _work: Work = field(init=False)

    def __post_init__(self) -> None:
        """Allocates everything a forward writes."""
        w, device = self.weights, self.weights.embedding.device
        dtype, layer = w.embedding.dtype, w.layers[0]

        def new(columns: int) -> Tensor:
            return torch.zeros(self.limits.rows, columns, dtype=dtype, device=device)

        self.x = new(w.embedding.shape[1])
        self.logits = torch.zeros(HEAD_ROWS, w.head.shape[0], device=device)
        self._qkv = new(layer.qkv.shape[0])
        self._attended = new(layer.heads.heads * layer.heads.head_dim)
        self._gated = new(layer.down.shape[1])
        self._picked = torch.zeros_like(self.x[:HEAD_ROWS])
        self._work = Work.of(layer.heads, self.limits.work, device)

    @property
    def workspace_bytes(self) -> int:
        """Device memory of everything allocated here."""
        tensors = (self.x, self.logits, self._qkv, self._attended, self._gated, self._picked)
        return sum(t.nbytes for t in tensors) + self._work.nbytes

    def embed(self, tokens: Tensor, rows: int) -> None:
        """x = embedding[tokens]."""
        self.calls["embed"](
            tokens=tokens,
            table=self.weights.embedding,
            out=self.x,
            rows=rows,
            overlap=self.tuning.overlap,
        )

    def qkv(self, layer: int, rows: int) -> None:
        """Queries, keys and values of the normalised rows."""
        w = self.weights.layers[layer]
        self._linear(
            self.x, w.qkv, self._qkv, rows, self.tuning.at(rows).qkv, norm=w.input_norm,
            bias=w.qkv_bias,
        )  # fmt: skip

    def attention(
        self, layer: int, batch: Batch, sequences: int, queries: int, offset: int = 0
    ) -> None:
        """Attention of the rows over the arena; appends their keys and values."""
        w, prefixes = self.weights.layers[layer], batch.prefix_starts
        self.calls["attention"](
            qkv=self._qkv,
            keys=w.keys,
            values=w.values,
            out=self._attended,
            starts=batch.starts[w.pool],
            prefix_starts=None if prefixes is None else prefixes[w.pool],
            prefix_lens=batch.prefix_lens,
            first_rows=batch.first_rows,
            row_counts=batch.row_counts,
            positions=batch.positions,
            offset=offset,
            sequences=sequences,
            rows=queries,
            rope=self.weights.rope,
            heads=w.heads,
            work=self._work,
            q_norm=w.q_norm,
            k_norm=w.k_norm,
            eps=self.weights.eps,
            blocks=attention_blocks(sequences),
            overlap=self.tuning.overlap,
        )

    def output(self, layer: int, rows: int) -> None:
        """x += output projection of what was attended."""
        w = self.weights.layers[layer]
        self._linear(
            self._attended, w.output, self.x, rows, self.tuning.at(rows).output, bias=w.output_bias,
            residual=self.x, epilogue=Epilogue.RESIDUAL,
        )  # fmt: skip

    def gate_up(self, layer: int, rows: int) -> None:
        """The gated activation of the normalised rows."""
        w = self.weights.layers[layer]
        self._linear(
            self.x, w.gate_up, self._gated, rows, self.tuning.at(rows).gate_up, norm=w.post_norm,
            epilogue=Epilogue.GATED,
        )  # fmt: skip

    def down(self, layer: int, rows: int) -> None:
        """x += down projection."""
        w = self.weights.layers[layer]
        self._linear(
            self._gated, w.down, self.x, rows, self.tuning.at(rows).down, residual=self.x,
            epilogue=Epilogue.RESIDUAL,
        )  # fmt: skip

    def head(self, rows: int, picks: Tensor | None = None) -> None:
        """Logits of the first ``rows`` rows, or of the rows ``picks`` (int32), float32."""
        w, x = self.weights, self.x
        if picks is not None:
            x = self._picked
            self.calls["embed"](
                tokens=picks, table=self.x, out=x, rows=rows, overlap=self.tuning.overlap
            )
        self._linear(
            x, w.head, self.logits, rows, self.tuning.at(rows).head, norm=w.norm,
            epilogue=Epilogue.STORE_FLOAT,
        )  # fmt: skip

    def choose(
        self,
        count: int,
        rows: Tensor | None,
        temperatures: Tensor,
        seeds: Tensor,
        positions: Tensor,
        tokens: Tensor,
        offset: int = 0,
    ) -> None:
        """tokens[i] = the choice of logits row ``rows[i]`` (i where None); see kernels.choose."""
        self.calls["choose"](
            logits=self.logits,
            rows=rows,
            temperatures=temperatures,
            seeds=seeds,
            positions=positions,
            offset=offset,
            tokens=tokens,
            count=count,
            overlap=self.tuning.overlap,
        )

    def accept(
        self, chosen: Tensor, tokens: Tensor, pending: Tensor, proposed: Tensor, verdicts: Tensor
    ) -> None:
        """verdicts[s] = (accepted, next token); see kernels.accept."""
        count = verdicts.shape[0]
        self.calls["accept"](
            chosen=chosen,
            tokens=tokens,
            pending=pending[:count],
            proposed=proposed[:count],
            verdicts=verdicts,
            overlap=self.tuning.overlap,
        )

    def run(
        self,
        batch: Batch,
        rows: int,
        sequences: int,
        queries: int,
        *,
        offset: int = 0,
        head: bool = True,
    ) -> None:
        """tokens → logits for ``rows`` rows of ``sequences`` sequences.

        ``queries``: the most rows one sequence brings; ``offset`` is added to all positions;
        ``head`` False leaves the logits out (rows that are only taken in).
        """
        self.embed(batch.tokens, rows)
        for layer in range(len(self.weights.layers)):
            self.qkv(layer, rows)
            self.attention(layer, batch, sequences, queries, offset)
            self.output(layer, rows)
            self.gate_up(layer, rows)
            self.down(layer, rows)
        if head:
            self.head(rows)

    def _linear(
        self,
        x: Tensor,
        w: Tensor,
        out: Tensor,
        rows: int,
        tile: Tile,
        *,
        epilogue: Epilogue = Epilogue.STORE,
        norm: Tensor | None = None,
        bias: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> None:
        self.calls["linear"](
            x=x,
            w=w,
            out=out,
            rows=rows,
            epilogue=epilogue,
            norm=norm,
            bias=bias,
            residual=residual,
            eps=self.weights.eps,
            tile=tile,
            overlap=self.tuning.overlap,
        )
