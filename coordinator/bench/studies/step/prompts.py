"""How long whole prompts take, to the first token, against transformers on the same weights."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch  # seconds to import: only where something is measured

REPEATS = 5


@dataclass(frozen=True, slots=True)
class PromptFigure:
    """``sequences`` prompts of ``rows`` tokens at once, from nothing to their first tokens.

    ``seconds``: the runner's median; ``peer_seconds``: that of transformers, a batch, None where
    the model is not at hand; ``ceiling_seconds``: the multiplications of the linear layers and of
    causal attention at the speed of a large product of this device's library.
    """

    sequences: int
    rows: int
    seconds: float
    peer_seconds: float | None
    ceiling_seconds: float

    @property
    def rate(self) -> float:
        """Prompt tokens per second, all prompts together."""
        return self.sequences * self.rows / self.seconds

    @property
    def share(self) -> float:
        """Of the ceiling."""
        return self.ceiling_seconds / self.seconds

    @property
    def ratio(self) -> float | None:
        """Of transformers' time."""
        return None if self.peer_seconds is None else self.seconds / self.peer_seconds


def sizes(text: str) -> list[tuple[int, int]]:
    """``1024,8x2048`` as (sequences, rows)."""
    found = []
    for part in text.split(",") if text else []:
        count, _, rows = part.rpartition("x")
        found.append((int(count or 1), int(rows)))
    return found


def measure_prompts(
    runner: Any, config: Any, model: Any, shapes: Sequence[tuple[int, int]], speed: float
) -> list[PromptFigure]:
    """``config``, ``model``: transformers' own, the latter or None; ``speed``: FLOP/s of a large
    product."""
    return [
        PromptFigure(
            count,
            rows,
            _median(_own(runner, count, rows), runner.storage.device),
            None if model is None else _median(_peer(model, count, rows), runner.storage.device),
            _flops(runner.facts.parameters, config, count, rows) / speed,
        )
        for count, rows in shapes
    ]


def product_speed(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the library's product of large square matrices."""
    import torch

    n = 8192 if device.type == "cuda" else 1024
    a = torch.randn(n, n, device=device).to(dtype)
    b = torch.randn(n, n, device=device).to(dtype)
    return 2 * n**3 / _median(lambda: a @ b, device)


def prompt(rows: int, vocabulary: int) -> list[int]:
    """Token ids that do not repeat soon, always the same."""
    return [(7919 * i + 13) % vocabulary for i in range(rows)]


def _own(runner: Any, count: int, rows: int) -> Callable[[], None]:
    from outrider.shared.model.runner import Span

    tokens = prompt(rows, runner.facts.vocab_size)

    def run() -> None:
        extents = [runner.arena.admit(rows + 1) for _ in range(count)]
        runner.forward([Span(extent, 0, tokens, 1) for extent in extents]).argmax(-1).tolist()
        runner.finish()
        for extent in extents:
            runner.arena.free(extent)

    return run


def _peer(model: Any, count: int, rows: int) -> Callable[[], None]:
    import torch

    ids = torch.tensor([prompt(rows, model.config.vocab_size)] * count, device=model.device)

    def run() -> None:
        model(ids, logits_to_keep=1).logits.argmax(-1).tolist()

    return run


def _median(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds, after two calls to warm up."""
    import torch

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    taken = []
    for _ in range(2 + REPEATS):
        wait()
        began = time.perf_counter()
        run()
        wait()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken[2:])


def _flops(parameters: int, config: Any, count: int, rows: int) -> float:
    """Two for each weight and row, the head and the embedding left out; attention: q k and p v
    over half of the square."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width = config.num_attention_heads * head_dim
    tables = (1 if config.tie_word_embeddings else 2) * config.vocab_size * config.hidden_size
    attention = 4 * width * config.num_hidden_layers * rows / 2
    return float(count * rows * (2 * (parameters - tables) + attention))


def table(figures: Sequence[PromptFigure]) -> str:
    """As Markdown."""
    lines = [
        "| prompts | ms | tokens/s | share of ceiling | of transformers' time |",
        "|---|---|---|---|---|",
    ]
    for f in figures:
        ratio = "" if f.ratio is None else f"{f.ratio:.2f}"
        lines.append(
            f"| {f.sequences} × {f.rows} | {f.seconds * 1e3:.1f} | {f.rate:,.0f} "
            f"| {100 * f.share:.0f} % | {ratio} |"
        )
    return "\n".join(lines) + "\n"
