"""Attention of many rows on a device: Hopper's kernel has the bits of the one for every chip."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from outrider.kernels import attention_cuda, attention_wgmma
from outrider.kernels.attention import rope_table
from outrider.kernels.attention_shapes import Heads, Work
from outrider.kernels.operation import Tools

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
PREFIX_START = 5
SHAPES = [
    (Heads(24, 8, 128), [(0, 4096)]),
    (Heads(24, 8, 128), [(4000, 1037)]),
    (Heads(8, 8, 128), [(0, 33), (77, 1), (190, 64), (2047, 300)]),
    (Heads(32, 8, 64), [(0, 2048), (513, 511)]),
    (Heads(8, 2, 128, 500, 1500), [(3000, 700)]),
    (Heads(6, 2, 64, 90, 256), [(640, 150), (0, 40)]),
]


def ints(numbers: list[int]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32, device=CUDA)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("prefix", [0, 37], ids=["alone", "branches"])
@pytest.mark.parametrize(("heads", "spans"), SHAPES, ids=str)
def test_hoppers_kernel_has_the_bits_of_the_one_for_every_chip(
    heads, spans, prefix, dtype, monkeypatch
):
    """``spans``: (position of the first row, rows) of each sequence."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the device is no Hopper")
    torch.manual_seed(0)
    dim, counts = heads.head_dim, [rows for _, rows in spans]
    lens = [min(prefix, position) for position, _ in spans]
    starts, tokens = [], 64
    for (position, rows), lent in zip(spans, lens, strict=True):
        starts.append(tokens)
        tokens += heads.ring or position + rows - lent
    columns = (heads.heads + 2 * heads.kv_heads) * dim
    qkv = torch.randn(sum(counts), columns, device=CUDA).to(dtype)
    # What nobody has written may hold anything.
    stored = torch.full((2, tokens + 64, heads.kv_heads, dim), float("nan"), device=CUDA)
    stored[:, :64].normal_()
    for start, (position, _), lent in zip(starts, spans, lens, strict=True):
        stored[:, start : start + (heads.ring or position - lent)].normal_()
    rope = rope_table(10000.0 ** -(torch.arange(0, dim, 2, device=CUDA) / dim), 8192)
    found = []
    for taken in (True, False):
        if not taken:
            monkeypatch.setattr(attention_wgmma, "takes", lambda *_: False)
        keys, values = stored.to(dtype)
        out = torch.full((len(qkv), heads.heads * dim), float("nan"), dtype=dtype, device=CUDA)
        attention_cuda.launcher(Tools(CUDA))(
            qkv=qkv.clone(), keys=keys, values=values, out=out, starts=ints(starts),
            prefix_starts=ints([PREFIX_START] * len(spans)), prefix_lens=ints(lens),
            first_rows=ints([sum(counts[:s]) for s in range(len(counts))]),
            row_counts=ints(counts), positions=ints([position for position, _ in spans]),
            offset=0, sequences=len(spans), rows=max(counts), rope=rope, heads=heads,
            work=Work.of(heads, 0, CUDA),
        )  # fmt: skip
        found.append(out)
    assert not found[0].isnan().any()
    assert torch.equal(found[0].view(torch.int16), found[1].view(torch.int16))
