"""Attention over pieces of the arena against the textbook formula."""

from __future__ import annotations

import itertools

import pytest
import torch

from outrider.shared.model.attention import attend, fold_mask, visibility

ROWS, KEYS, DIM = 3, 11, 8


def textbook(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    visible: torch.Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Head by head, row by row, key by key."""
    _, heads, rows, _ = query.shape
    group = heads // keys.shape[1]
    out = torch.zeros(1, heads, rows, values.shape[-1], dtype=torch.float64)
    for head in range(heads):
        for row in range(rows):
            scores, seen = [], []
            for key in range(keys.shape[2]):
                if visible[row, key]:
                    score = (query[0, head, row] @ keys[0, head // group, key]).double() * scale
                    if softcap is not None:
                        score = torch.tanh(score / softcap) * softcap
                    if bias is not None:
                        score = score + bias[head, min(row, bias.shape[1] - 1), key]
                    scores.append(score)
                    seen.append(values[0, head // group, key].double())
            if sinks is not None:
                scores.append(sinks[head].double())
                seen.append(torch.zeros(values.shape[-1], dtype=torch.float64))
            out[0, head, row] = torch.stack(scores).softmax(0) @ torch.stack(seen)
    return out.float()


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("split", [None, 4, 10])
@pytest.mark.parametrize("extra", ["none", "softcap", "sinks", "bias"])
@pytest.mark.parametrize("window", [None, 5])
def test_attend_equals_the_textbook(
    kv_heads: int, split: int | None, extra: str, window: int | None
) -> None:
    torch.manual_seed(0)
    query = torch.randn(1, 4, ROWS, DIM)
    keys, values = torch.randn(1, kv_heads, KEYS, DIM), torch.randn(1, kv_heads, KEYS, 6)
    start = KEYS - ROWS
    options = {
        "none": {},
        "softcap": {"softcap": 2.0},
        "sinks": {"sinks": torch.randn(4)},
        "bias": {"bias": torch.randn(4, 1, KEYS)},
    }[extra]
    visible = torch.tensor(
        [
            [
                key <= start + row and (window is None or key > start + row - window)
                for key in range(KEYS)
            ]
            for row in range(ROWS)
        ]
    )
    mask = visibility(ROWS, start, 0, window=window, dtype=query.dtype, device=query.device)
    assert mask is not None
    assert torch.equal(mask == 0, visible)
    cuts = [0, KEYS] if split is None else [0, split, KEYS]
    pieces = [(keys[:, :, a:b], values[:, :, a:b]) for a, b in itertools.pairwise(cuts)]
    wanted = textbook(query, keys, values, visible, scale=0.3, **options)
    for given in (mask, fold_mask(mask, ROWS, 4 // kv_heads)):
        if extra == "bias" and given is not mask:
            continue
        found = attend(query, pieces, given, scale=0.3, **options)
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_a_row_that_sees_all_needs_no_mask() -> None:
    options = {"dtype": torch.float32, "device": torch.device("cpu")}
    assert visibility(1, 9, 0, window=None, **options) is None
    assert visibility(1, 9, 5, window=5, **options) is None
    assert visibility(1, 9, 4, window=5, **options) is not None


@pytest.mark.parametrize("split", [None, 2])
def test_causal_rows_that_are_all_the_keys(split: int | None) -> None:
    torch.manual_seed(1)
    query, keys, values = (torch.randn(1, h, 5, DIM) for h in (4, 2, 2))
    pieces = [(keys, values)]
    if split is not None:
        pieces = [(keys[:, :, :2], values[:, :, :2]), (keys[:, :, 2:], values[:, :, 2:])]
    found = attend(query, pieces, None, scale=0.3, causal=True)
    visible = torch.ones(5, 5).tril().bool()
    torch.testing.assert_close(
        found, textbook(query, keys, values, visible, scale=0.3), atol=1e-5, rtol=1e-5
    )
