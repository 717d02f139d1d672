"""The compiled forward: right against transformers, and the same bits whatever ran beside a row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from outrider.kernels.cpu import compile as kernels
from outrider.shared.core.errors import ConfigError
from outrider.shared.model.cpu import runner as cpu
from outrider.shared.model.runner import Runner, Span
from outrider_testing import engines
from outrider_testing.architectures import tiny

FAMILY = ["llama", "mistral", "qwen2", "qwen3"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TEXT = [(31 * i * i + 7 * i + 5) % 97 for i in range(100)]


def whole(runner: Runner, text: Sequence[int], wanted: int) -> torch.Tensor:
    """Logits of the last rows of a text that is taken in at once."""
    extent = runner.arena.admit(len(text))
    with torch.inference_mode():
        logits = runner.forward([Span(extent, 0, text, wanted)])
    runner.arena.free(extent)
    return logits


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("kind", FAMILY)
def test_cpu_runner_multiplies_16_bit_weights_in_float32(kind: str, dtype: torch.dtype) -> None:
    """As transformers does with the same weights as float32; only the KV is rounded."""
    model = tiny(kind, {}).to(dtype)
    found = whole(engines.runner(model, runner="cpu"), TEXT[:40], 40)
    with torch.inference_mode():
        right = model.float()(torch.tensor([TEXT[:40]])).logits[0]
    assert found.dtype == torch.float32
    unit = torch.finfo(dtype).eps
    assert (found - right).abs().max() < 4 * unit * right.abs().max()
    # Were activations rounded as well, the mean would be some times as large.
    assert (found - right).abs().mean() < unit * right.abs().mean()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", FAMILY)
def test_cpu_runner_row_has_the_same_bits_in_any_company(kind: str, dtype: torch.dtype) -> None:
    """1 … 17 rows of a sequence, alone and beside others, against one row at a time."""
    runner = engines.runner(tiny(kind, {}).to(dtype), runner="cpu", prefill_chunk=64, max_k=17)
    before, text = 9, TEXT[:26]
    with torch.inference_mode():
        one = runner.arena.admit(30)
        runner.forward([Span(one, 0, text[:before], 0)])
        rows = [runner.forward([Span(one, i, [text[i]], 1)]) for i in range(before, 26)]
        right = torch.cat(rows)
        for count in range(1, 18):
            assert runner.arena.rollback(one, before)
            found = runner.forward([Span(one, before, text[before : before + count], count)])
            assert torch.equal(found, right[:count])
        others = [runner.arena.admit(20) for _ in range(3)]
        for count in (1, 5):
            assert runner.arena.rollback(one, before)
            spans = [Span(e, 0, TEXT[n : n + n + 3], 1) for n, e in enumerate(others)]
            for other in others:
                other.clear()
            spans.insert(1, Span(one, before, text[before : before + count], count))
            assert torch.equal(runner.forward(spans)[1 : 1 + count], right[:count])


@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_cpu_runner_prompt_has_the_same_bits_in_any_pieces(data: st.DataObject) -> None:
    runner = RUNNERS[data.draw(st.sampled_from(sorted(RUNNERS)))]
    text = data.draw(st.lists(st.integers(0, 96), min_size=2, max_size=60))
    right = whole(runner, text, len(text))
    extent = runner.arena.admit(len(text))
    found, begin = [], 0
    with torch.inference_mode():
        while begin < len(text):
            rows = data.draw(st.integers(1, len(text) - begin))
            found.append(runner.forward([Span(extent, begin, text[begin : begin + rows], rows)]))
            begin += rows
            if begin > 1 and data.draw(st.booleans()):
                back = data.draw(st.integers(1, min(begin, runner.arena.max_rows or begin)))
                if runner.arena.rollback(extent, begin - back):
                    begin -= back
                    found = [torch.cat(found)[:begin]]
    runner.arena.free(extent)
    assert torch.equal(torch.cat(found), right)


RUNNERS = {
    "full": engines.runner(tiny("llama", {}), runner="cpu", prefill_chunk=64),
    "ring": engines.runner(tiny("mistral", {}), runner="cpu", prefill_chunk=64, max_k=4),
}


def test_cpu_runner_takes_long_prompts_in_several_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = engines.runner(tiny("llama", {}), runner="cpu")
    right = whole(runner, TEXT[:60], 30)
    monkeypatch.setattr(cpu, "MAX_ROWS", 16)
    assert torch.equal(whole(runner, TEXT[:60], 30), right)
    extents = [runner.arena.admit(60) for _ in range(3)]
    spans = [Span(e, 0, TEXT[n:60], 60 - n) for n, e in enumerate(extents)]
    with torch.inference_mode():
        found = runner.forward(spans)
    assert torch.equal(found[30:60], right)
    assert found.shape[0] == 60 + 59 + 58


def test_cpu_runner_bits_do_not_depend_on_threads_or_panels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny("llama", {"num_hidden_layers": 2})
    right = whole(engines.runner(model, runner="cpu", threads=1), TEXT[:50], 50)
    for threads in (2, 3):
        found = whole(engines.runner(model, runner="cpu", threads=threads), TEXT[:50], 50)
        assert torch.equal(found, right)
    for columns in (16, 32, 64):
        monkeypatch.setattr(cpu, "columns_for", lambda lanes, columns=columns: columns)
        assert torch.equal(whole(engines.runner(model, runner="cpu"), TEXT[:50], 50), right)


@pytest.mark.parametrize("kind", DTYPES[1:])
def test_cpu_runner_keeps_weights_short_where_that_loses_nothing(kind: torch.dtype) -> None:
    model = tiny("llama", {})
    wide = engines.runner(model, runner="cpu")
    short = engines.runner(model.to(kind).float(), runner="cpu")
    assert (wide.shape.weights, wide.shape.cache) == ("float32", "float32")
    assert (short.shape.weights, short.shape.cache) == (str(kind)[6:], "float32")
    assert 2 * short.facts.weight_bytes == wide.facts.weight_bytes
    with torch.no_grad():
        model.model.norm.weight[0] += 1e-5  # one number that 16 bits do not hold
    again = engines.runner(model, runner="cpu")
    assert again.shape.weights == "float32"
    with torch.no_grad():
        model.model.norm.weight[0] -= 1e-5
    rounded = engines.runner(model, runner="cpu")
    rounded_text = whole(rounded, TEXT[:30], 30)
    assert (rounded_text - whole(short, TEXT[:30], 30)).abs().max() < 1e-3


def test_cpu_runner_forgets_rows_that_were_not_finite() -> None:
    model = tiny("llama", {})
    right = whole(engines.runner(model, runner="cpu"), TEXT[:20], 20)
    bad = TEXT[30]
    assert bad not in TEXT[:20]
    with torch.no_grad():
        model.model.embed_tokens.weight[bad] = float("nan")
    runner = engines.runner(model, runner="cpu")
    assert whole(runner, [bad] * 20, 20).isnan().all()
    assert torch.equal(whole(runner, TEXT[:20], 20), right)


def test_cpu_runner_lets_go_of_the_module_it_was_made_from() -> None:
    model = tiny("llama", {})
    right = whole(engines.runner(model, runner="cpu"), TEXT[:9], 9)
    made = engines.runner(model, runner="cpu", release=True)
    assert sum(p.numel() for p in model.parameters()) == 0
    assert torch.equal(whole(made, TEXT[:9], 9), right)


def test_cpu_runner_says_why_it_can_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = tiny("llama", {"hidden_size": 36, "head_dim": 8})
    with pytest.raises(ConfigError, match=r"got cpu; its hidden size 36 is not a multiple of 8"):
        engines.runner(model, runner="cpu")
    assert engines.runner(model).facts.runner == "llama"
    monkeypatch.setattr(kernels, "why_not", lambda: "there is no processor")
    with pytest.raises(ConfigError, match=r"runner: got cpu; there is no processor"):
        engines.runner(tiny("llama", {}), runner="cpu")
    found = engines.runner(tiny("llama", {}))
    assert found.facts.runner == "llama"
    assert replace(found.facts).runner == "llama"
