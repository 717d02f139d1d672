"""A row of attention has the same bits whichever kernel takes it, and whatever comes with it."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from outrider.kernels import attention_cuda
from outrider.kernels.attention import rope_table
from outrider.kernels.attention_shapes import FEW_ROWS, Heads, Work, many, need
from outrider.kernels.operation import Call, Tools

SOURCES = Path(attention_cuda.__file__).parent
CPU = torch.device("cpu")
DRAWS = {75: torch.float16, 90: torch.bfloat16}


@dataclass
class Prompt:
    """One sequence's rows as they come from the projection, and what lies before them."""

    position: int
    qkv: Tensor
    start: int
    prefix_len: int = 0


def prompt(heads: Heads, position: int, rows: int, dtype: torch.dtype) -> Prompt:
    columns = (heads.heads + 2 * heads.kv_heads) * heads.head_dim
    return Prompt(position, (2 * torch.randn(rows, columns)).to(dtype), 0)


class Layer:
    """An arena with random contents in which prompts have their places."""

    def __init__(self, run: Call, heads: Heads, prompts: list[Prompt], *, norms: bool) -> None:
        self.run, self.heads, self.prompts = run, heads, prompts
        dtype, dim = prompts[0].qkv.dtype, heads.head_dim
        self.prefix_start, tokens = 3, 3 + max(p.prefix_len for p in prompts)
        for one in prompts:
            one.start = tokens
            tokens += heads.ring or one.position + len(one.qkv) - one.prefix_len
        self.keys = torch.randn(tokens, heads.kv_heads, dim).to(dtype)
        self.values = torch.randn(tokens, heads.kv_heads, dim).to(dtype)
        self.norms = [(1 + 0.1 * torch.randn(dim)).to(dtype) if norms else None for _ in range(2)]
        self.rope = rope_table(10000.0 ** -(torch.arange(0, dim, 2) / dim), 4500)

    def take(self, counts: list[tuple[int, int]], keys: Tensor, values: Tensor) -> list[Tensor]:
        """Rows ``counts[s] = (first, end)`` of every prompt in one call: what comes out of them."""

        def ints(numbers: list[int]) -> Tensor:
            return torch.tensor(numbers, dtype=torch.int32)

        heads, sizes = self.heads, [end - first for first, end in counts]
        qkv = torch.cat([p.qkv[a:b] for p, (a, b) in zip(self.prompts, counts, strict=True)])
        out = torch.full((len(qkv), heads.heads * heads.head_dim), float("nan"), dtype=qkv.dtype)
        ends = [p.position + end for p, (_, end) in zip(self.prompts, counts, strict=True)]
        self.run(
            qkv=qkv, keys=keys, values=values, out=out,
            starts=ints([p.start for p in self.prompts]),
            prefix_starts=ints([self.prefix_start] * len(self.prompts)),
            prefix_lens=ints([p.prefix_len for p in self.prompts]),
            first_rows=ints([sum(sizes[:s]) for s in range(len(sizes))]),
            row_counts=ints(sizes),
            positions=ints([end - size for end, size in zip(ends, sizes, strict=True)]),
            offset=0, sequences=len(sizes), rows=max(sizes), rope=self.rope, heads=heads,
            work=Work.of(heads, need(heads, ends, max(sizes)), CPU),
            q_norm=self.norms[0], k_norm=self.norms[1], eps=1e-5,
        )  # fmt: skip
        return list(out.split(sizes))

    def whole(self, cuts: list[list[int]]) -> tuple[list[Tensor], Tensor, Tensor]:
        """All rows in calls that end at ``cuts[s]``: (per prompt what came out, keys, values)."""
        keys, values = self.keys.clone(), self.values.clone()
        found: list[list[Tensor]] = [[] for _ in self.prompts]
        for step in range(max(len(own) for own in cuts) - 1):
            taken = [(own[step], own[step + 1]) if step + 1 < len(own) else (0, 0) for own in cuts]
            for s, rows in enumerate(self.take(taken, keys, values)):
                found[s].append(rows)
        return [torch.cat(parts) for parts in found], keys, values


def every(step: int, rows: int) -> list[int]:
    return [*range(0, rows, step), rows]


def check(layer: Layer, ways: list[list[list[int]]]) -> None:
    """Every way to cut the prompts gives the same bits, in the results and in the arena."""
    for one in ways:
        for own, p in zip(one, layer.prompts, strict=True):
            assert own[0] == 0 and own[-1] == len(p.qkv)
    assert {many(max(b - a for own in way for a, b in pairwise(own))) for way in ways} == {
        False, True,
    }  # fmt: skip
    expected = layer.whole(ways[0])
    assert not any(rows.isnan().any() for rows in expected[0])
    for way in ways[1:]:
        found = layer.whole(way)
        for want, have in zip(expected[0], found[0], strict=True):
            assert torch.equal(want.view(torch.int16), have.view(torch.int16))
        assert torch.equal(expected[1], found[1]) and torch.equal(expected[2], found[2])


CHIPS = {
    "sm_75": (75, 75, 1),
    "sm_90 early": (90, 90, 0),
    "sm_90 late": (90, 90, 1),
    "sm_90 on a newer chip": (90, 100, 1),
}
"""What code is for, the chip, and when copies land. Only on its own chip is it Hopper's kernel."""


@pytest.fixture(params=CHIPS.values(), ids=CHIPS)
def chip(request, emulated):
    """(attention on the host, its element type); early or late: when copies land."""
    arch, own, late = request.param
    compiler = emulated(arch)
    compiler.chip, compiler.late = own, late
    return attention_cuda.launcher(Tools(CPU, compiler)), DRAWS[arch]


@pytest.mark.parametrize(
    ("heads", "position", "rows", "norms"),
    [
        (Heads(1, 1, 64), 0, 150, False),
        (Heads(6, 2, 64), 61, 70, True),
        (Heads(4, 1, 128), 130, 33, False),
        (Heads(2, 2, 128), 5, 90, True),
        (Heads(4, 2, 64, 70, 120), 100, 50, False),
        (Heads(3, 1, 64), 1150, 33, False),
        (Heads(1, 1, 128), 2030, 35, False),
        (Heads(6, 6, 64), 3, 200, False),
        (Heads(3, 1, 128, 100, 190), 230, 75, False),
    ],
    ids=[
        "alone",
        "groups of 3",
        "groups of 4",
        "normed",
        "ring",
        "late",
        "over two spans",
        "more tiles than blocks",
        "large ring",
    ],
)
def test_many_rows_have_the_bits_of_few(chip, heads, position, rows, norms):
    run, dtype = chip
    torch.manual_seed(rows)
    layer = Layer(run, heads, [prompt(heads, position, rows, dtype)], norms=norms)
    check(layer, [[every(FEW_ROWS, rows)], [[0, rows]], [[0, 1, rows - 2, rows]]])


@pytest.mark.parametrize("heads", [Heads(2, 1, 64), Heads(1, 1, 128, 40, 110)], ids=["all", "ring"])
def test_what_was_never_written_is_not_read(chip, heads):
    run, dtype = chip
    torch.manual_seed(4)
    layer = Layer(run, heads, [prompt(heads, at, 45, dtype) for at in (70, 11)], norms=False)
    for one in layer.prompts:
        for stored in (layer.keys, layer.values):
            stored[one.start + one.position : one.start + (heads.ring or one.position + 45)] = (
                float("nan")
            )
    ways = [[[0, 45], [0, 45]], [every(15, 45), every(15, 45)]]
    expected, found = (layer.whole(way)[0] for way in ways)
    for want, have in zip(expected, found, strict=True):
        assert not want.isnan().any()
        assert torch.equal(want.view(torch.int16), have.view(torch.int16))


def test_a_row_does_not_depend_on_the_batch(chip):
    run, dtype = chip
    torch.manual_seed(0)
    heads = Heads(2, 1, 64)
    prompts = [prompt(heads, at, rows, dtype) for at, rows in ((64, 40), (0, 1), (10, 3), (90, 35))]
    layer = Layer(run, heads, prompts, norms=False)
    whole = [[0, 40], [0, 1], [0, 3], [0, 35]]
    later = [[0, 0, 40], [0, 1], [0, 1, 2, 3], [0, 35]]
    check(layer, [whole, later, [every(10, 40), [0, 1], [0, 3], every(7, 35)]])


@pytest.mark.parametrize(
    ("heads", "position"),
    [(Heads(1, 1, 64), 4090), (Heads(2, 1, 64, 2300, 2400), 4085)],
    ids=["all", "window"],
)
def test_spans_of_cuts_have_the_same_bits(emulated, heads, position):
    torch.manual_seed(5)
    run = attention_cuda.launcher(Tools(CPU, emulated(90)))
    layer = Layer(run, heads, [prompt(heads, position, 36, torch.float16)], norms=False)
    check(layer, [[[0, 36]], [[0, 6, 36]], [[0, 35, 36]]])


def test_large_heads_have_the_same_bits(emulated):
    torch.manual_seed(1)
    heads = Heads(2, 1, 256)
    layer = Layer(
        attention_cuda.launcher(Tools(CPU, emulated(90))),
        heads,
        [prompt(heads, 40, 40, torch.bfloat16)],
        norms=True,
    )
    check(layer, [[[0, 40]], [every(20, 40)]])


def test_a_branch_has_the_bits_of_a_copy(chip):
    run, dtype = chip
    torch.manual_seed(2)
    heads = Heads(4, 2, 64)
    copies = [prompt(heads, at, rows, dtype) for at, rows in ((100, 40), (70, 2), (3, 5))]
    branches = [
        Prompt(p.position, p.qkv, 0, prefix_len)
        for p, prefix_len in zip(copies, (90, 70, 0), strict=True)
    ]
    one = Layer(run, heads, branches, norms=False)
    other = Layer(run, heads, copies, norms=False)
    other.rope = one.rope
    for whole, own in zip(copies, branches, strict=True):
        for before, after in ((one.keys, other.keys), (one.values, other.values)):
            lent, mine = own.prefix_len, own.position - own.prefix_len
            after[whole.start : whole.start + lent] = before[3 : 3 + lent]
            after[whole.start + lent : whole.start + own.position] = before[
                own.start : own.start + mine
            ]
    for cuts in ([[0, 40], [0, 2], [0, 5]], [every(20, 40), [0, 1, 2], [0, 5]]):
        prefix = one.keys[:93].clone()
        found, expected = one.whole(cuts), other.whole(cuts)
        assert all(torch.equal(a, b) for a, b in zip(found[0], expected[0], strict=True))
        assert torch.equal(found[1][:93], prefix)  # what is lent is only read


@pytest.mark.parametrize("own", [90, 100], ids=["Hopper", "a newer chip"])
@pytest.mark.parametrize(
    ("line", "other"),
    [
        ("base = base_of(peak);", "base = base_of(fmaxf(peak, sums.top[h]));"),
        ("own_sum += x + z;", "own_sum = (own_sum + x) + z;"),
        ("sum += shuffle_xor(sum, 1);", "sum += shuffle_xor(sum, 3);"),
    ],
    ids=["the running peak, not the cut's own", "columns one by one", "other lanes first"],
)
def test_another_order_for_many_rows_is_found(emulated, tmp_path, line, other, own):
    _check_changed(emulated, tmp_path, "attention_many.cuh", line, other, own)


@pytest.mark.parametrize(
    ("line", "other"),
    [
        ("step / 4 * TILE_BYTES + step % 4 * 32;", "step / 4 * TILE_BYTES + (3 - step % 4) * 32;"),
        (
            "for (int k = 0; k < TOKENS / 16; ++k)",
            "for (int i = 0, k = 0; i < 4; ++i, k = i < 3 ? 3 - i : i)",
        ),
    ],
    ids=["scores", "values"],
)
def test_another_order_of_products_is_found(emulated, tmp_path, line, other):
    _check_changed(emulated, tmp_path, "attention_wgmma.cu", line, other, 90)


def _check_changed(emulated, tmp_path, changed, line, other, own):
    for source in (*SOURCES.glob("attention*.cu"), *SOURCES.glob("*.cuh")):
        text = source.read_text()
        if source.name == changed:
            assert text.count(line) == 1
            text = text.replace(line, other)
        (tmp_path / source.name).write_text(text)
    compiler = emulated(90)
    compiler.sources, compiler.chip = tmp_path, own
    torch.manual_seed(3)
    # Most differences get lost in the rounding of the results: many columns and the finer type.
    heads = Heads(4, 1, 128)
    run = attention_cuda.launcher(Tools(CPU, compiler))
    layer = Layer(run, heads, [prompt(heads, 200, 100, torch.float16)], norms=False)
    with pytest.raises(AssertionError):
        check(layer, [[every(FEW_ROWS, 100)], [[0, 100]]])
