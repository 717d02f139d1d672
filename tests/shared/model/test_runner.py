"""Runners: both paths agree, branches share a prefix, nothing is copied or kept in steady state."""

from __future__ import annotations

import functools
import gc
import json
import os
import subprocess
import sys
import tracemalloc
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from outrider.draft_service.engine import DraftEngine
from outrider.shared.core.errors import ConfigError
from outrider.shared.core.types import Decoding, OpenSequence, ProposeItem, VerifyItem
from outrider.shared.model.runner import Runner, Span
from outrider.verify_service.engine import VerifyEngine
from outrider_testing import engines
from outrider_testing.architectures import tiny

FAMILY = ["llama", "mistral", "qwen2", "qwen3"]


def ragged(runner: Runner) -> torch.Tensor:
    """A few passes of three sequences, some rows rolled back; all logits that were wanted."""
    with torch.inference_mode():
        extents = [runner.arena.admit(40) for _ in range(3)]
        texts = [[(7 * i + n) % 97 for i in range(30)] for n in (1, 2, 3)]
        found = [
            runner.forward(
                [Span(e, 0, t[:n], 1) for e, t, n in zip(extents, texts, (4, 9, 1), strict=True)]
            )
        ]
        for _ in range(6):
            spans = [
                Span(e, e.valid_len, t[e.valid_len : e.valid_len + n], n)
                for e, t, n in zip(extents, texts, (1, 3, 4), strict=True)
            ]
            found.append(runner.forward(spans))
            for extent in extents[1:]:
                assert runner.arena.rollback(extent, extent.valid_len - 2)
        for extent in extents:
            runner.arena.free(extent)
        return torch.cat(found)


@pytest.mark.parametrize("path", ["cpu", "llama"])
@pytest.mark.parametrize("kind", FAMILY)
def test_the_fast_path_equals_the_generic_one(kind: str, path: str) -> None:
    options = {"prefill_chunk": 10, "max_k": 4}
    fast = engines.runner(tiny(kind, {}), runner=path, **options)
    generic = engines.runner(tiny(kind, {}), runner="generic", **options)
    assert (fast.facts.runner, generic.facts.runner) == (path, "generic")
    torch.testing.assert_close(ragged(fast), ragged(generic), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["cpu", "llama", "generic"])
def test_half_precision_stays_close_to_float32(kind: str, dtype: torch.dtype) -> None:
    exact = ragged(engines.runner(tiny("llama", {}), runner=kind))
    half = ragged(engines.runner(tiny("llama", {}).to(dtype), runner=kind))
    assert (half.float() - exact).abs().max() < 0.1 * exact.abs().max()


def test_fused_weights_are_not_held_twice() -> None:
    model = tiny("llama", {})
    plain = sum(p.numel() for p in model.parameters())
    runner = engines.runner(model, runner="llama")
    storages = {p.untyped_storage().data_ptr(): p for p in model.parameters()}
    assert sum(p.untyped_storage().nbytes() for p in storages.values()) == 4 * plain
    block = runner._blocks[0]
    q = model.model.layers[0].self_attn.q_proj.weight
    assert q.data_ptr() == block.qkv.data_ptr()


def test_the_fast_path_is_refused_with_the_reason_where_it_does_not_fit() -> None:
    with pytest.raises(ConfigError, match="GPT2LMHeadModel is not of the Llama block family"):
        engines.runner(engines.tiny_gpt2(), runner="llama")
    dynamic = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    assert engines.runner(tiny("llama", {"rope_parameters": dynamic})).facts.runner == "generic"


def test_positions_up_to_the_last_are_served() -> None:
    runner = engines.runner(tiny("llama", {}), arena_bytes=1 << 20)
    extent = runner.arena.admit(128)
    with torch.inference_mode():
        runner.forward([Span(extent, 0, [1] * 127, 0)])
        assert runner.forward([Span(extent, 127, [2], 1)]).isfinite().all()


def test_a_span_that_may_not_be_written_is_refused_before_anything_is() -> None:
    runner = engines.runner(tiny("llama", {}))
    one, two = runner.arena.admit(8), runner.arena.admit(8)
    with torch.inference_mode():
        for span in (Span(two, 1, [1], 1), Span(two, 0, [1] * 9, 1)):
            with pytest.raises(ValueError, match=r"start|capacity"):
                runner.forward([Span(one, 0, [1], 1), span])
    assert (one.valid_len, two.valid_len) == (0, 0)


@pytest.mark.parametrize("kind", ["llama", "mistral"])
@given(
    rows=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    wanted=st.lists(st.integers(0, 5), min_size=4, max_size=4),
    limit=st.integers(1, 30),
)
@settings(max_examples=25)
def test_many_rows_go_in_passes_and_those_that_are_wanted_in_the_last(
    kind: str, rows: list[int], wanted: list[int], limit: int
) -> None:
    """Every row once and in order; no pass has more than allowed, but for wanted rows; rings."""
    runner = path_for_passes(kind)
    wants = [min(n, want) for n, want in zip(rows, wanted, strict=False)]
    tokens = [[(7 * i + n) % 97 for i in range(count)] for n, count in enumerate(rows)]
    found, passes = [], []
    plain = runner._forward

    def forward(spans: Any) -> torch.Tensor:
        passes.append(list(spans))
        return plain(spans)

    runner._forward = forward  # type: ignore[method-assign]
    try:
        for runner.pass_rows in (None, limit):
            passes.clear()
            extents = [runner.arena.admit(48) for _ in rows]
            spans = [
                Span(*one) for one in zip(extents, [0] * len(rows), tokens, wants, strict=True)
            ]
            with torch.inference_mode():
                found.append(runner.forward(spans))
            for extent, text in zip(extents, tokens, strict=True):
                parts = [one for each in passes for one in each if one.extent is extent]
                assert [token for part in parts for token in part.tokens] == text
                assert extent.valid_len == len(text)
                runner.arena.free(extent)
    finally:
        del runner._forward
    for spans in passes:
        assert sum(len(span.tokens) for span in spans) <= max(limit, sum(wants))
    assert all(span.wanted == 0 for spans in passes[:-1] for span in spans)
    torch.testing.assert_close(found[0], found[1], atol=1e-4, rtol=1e-4)


@functools.cache
def path_for_passes(kind: str) -> Runner:
    """A runner over PyTorch; mistral's has rings of 8 rows beyond its window."""
    return engines.runner(tiny(kind, {}), runner="llama", prefill_chunk=8, max_k=4)


def test_pytorch_takes_as_many_rows_in_a_pass_as_the_settings_say() -> None:
    limits = {
        path: engines.runner(tiny("llama", {}), runner=path, prefill_chunk=24).pass_rows
        for path in ("generic", "llama", "cpu")
    }
    assert limits == {"generic": 24, "llama": 24, "cpu": None}


@pytest.mark.parametrize("kind", [*FAMILY, "gpt2", "gptj", "gemma2"])
def test_branches_read_the_prefix_of_their_parent(kind: str) -> None:
    """n samples of one prompt: each continues it as if it owned the prompt's KV."""
    if kind == "gpt2":
        model = engines.tiny_gpt2()
    elif kind == "gptj":
        model = tiny("gptj", {})
    elif kind == "gemma2":
        mixed = ["sliding_attention", "full_attention"]
        model = tiny("gemma2", {"layer_types": mixed, "initializer_range": 0.2})
    else:
        model = tiny(kind, {})
    prompt = [(5 * i + 1) % 97 for i in range(21)]
    texts = [[(3 * i + n) % 97 for i in range(20)] for n in (2, 9)]
    with torch.inference_mode():
        full = [model(torch.tensor([prompt + text])).logits[0, 21:].clone() for text in texts]
        runner = engines.runner(model, prefill_chunk=6, max_k=4)
        parent = runner.arena.admit(24)
        runner.forward([Span(parent, 0, prompt, 0)])
        used = runner.arena.used
        tails = [runner.arena.branch(parent, 21, 60) for _ in texts]
        assert runner.arena.used == used + sum(
            p.place_size(60 - 21) for p in runner.arena.pools[:1] for _ in texts
        )
        runner.arena.free(parent)
        for at in range(0, 20, 4):
            junk = [Span(t, 21 + at, [0, 1, 2], 1) for t in tails]
            runner.forward(junk)
            for tail in tails:
                assert runner.arena.rollback(tail, 21 + at)
            spans = [
                Span(tail, 21 + at, text[at : at + 4], 4)
                for tail, text in zip(tails, texts, strict=True)
            ]
            logits = runner.forward(spans)
            wanted = torch.cat([rows[at : at + 4] for rows in full])
            torch.testing.assert_close(logits, wanted, atol=2e-3, rtol=1e-3)
        for tail in tails:
            runner.arena.free(tail)
    assert runner.arena.used == 0


class _Watch(TorchDispatchMode):
    """Counts operations, and notes the largest tensor that one newly made."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.operations += 1
        if isinstance(out, torch.Tensor) and not any(
            isinstance(a, torch.Tensor)
            and a.untyped_storage().data_ptr() == out.untyped_storage().data_ptr()
            for a in args
        ):
            self.largest = max(self.largest, out.numel())
        return out


@pytest.mark.parametrize("kind", ["cpu", "llama", "generic"])
@pytest.mark.parametrize("rows", [1, 4])
def test_a_forward_makes_nothing_of_the_size_of_the_kv(kind: str, rows: int) -> None:
    runner = engines.runner(engines.tiny_llama(1), runner=kind)
    extent = runner.arena.admit(500)
    with torch.no_grad():  # under inference mode composite operations stay whole
        runner.forward([Span(extent, 0, [1] * 480, 0)])
        with _Watch() as watch:
            runner.forward([Span(extent, 480, [2] * rows, 1)])
    of_one_layer = 2 * 480 * 2 * 8
    assert watch.largest < of_one_layer / 2


def test_a_rollback_moves_no_byte() -> None:
    runner = engines.runner(engines.tiny_llama(1))
    extent = runner.arena.admit(500)
    with torch.inference_mode():
        runner.forward([Span(extent, 0, [1] * 480, 0)])
        before = [tensor.clone() for tensor in runner.storage.tensors]
        with _Watch() as watch:
            assert runner.arena.rollback(extent, 3)
    assert watch.operations == 0
    assert all(torch.equal(a, b) for a, b in zip(before, runner.storage.tensors, strict=True))


def _held() -> tuple[int, int, int]:
    """Python's blocks and bytes, and the bytes of all tensors."""
    gc.collect()
    # The interpreter's cache of attribute look-ups keeps the names that were looked up, and torch
    # looks up ``__torch_function__`` and its like with a new string at each call: the cache, 4,096
    # entries, would fill up with them for thousands of rounds and look like a leak.
    (getattr(sys, "_clear_internal_caches", None) or sys._clear_type_cache)()
    storages = {
        storage.data_ptr(): storage.nbytes()
        for thing in gc.get_objects()
        if issubclass(type(thing), torch.Tensor) and thing.device.type == "cpu"
        for storage in [thing.untyped_storage()]
    }
    return sys.getallocatedblocks(), tracemalloc.get_traced_memory()[0], sum(storages.values())


def _thousand_rounds() -> None:
    """Prints by how much what is held has grown, as JSON; storage stays where it is."""
    verify = VerifyEngine(engines.runner(engines.tiny_llama(1)), 4)
    draft = DraftEngine(engines.runner(engines.tiny_llama(2, layers=1)), 4)
    sides = (verify.connect(), draft.connect())
    for side in sides:
        side.open(OpenSequence(1, 1, 100, Decoding()))
    pointers = [t.data_ptr() for e in (verify, draft) for t in e.runner.storage.tensors]
    prompt = tuple(range(40))

    def rounds(count: int) -> None:
        for _ in range(count):
            (proposal,) = sides[1].round([ProposeItem(1, 1, 0, prompt[:8], 3)]).answers
            item = VerifyItem(1, 1, 0, prompt[:8], proposal.tokens)
            assert sides[0].round([item]).answers

    tracemalloc.start()
    rounds(300)
    before = _held()
    rounds(1000)
    grown = [now - then for now, then in zip(_held(), before, strict=True)]
    assert pointers == [t.data_ptr() for e in (verify, draft) for t in e.runner.storage.tensors]
    assert verify.info().arena_tokens_used == 100
    print(json.dumps(grown))


def test_a_thousand_rounds_keep_storage_and_memory_where_they_were() -> None:
    """In a process of its own: threads that other tests left allocate as they like."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    told = subprocess.run(
        [sys.executable, __file__], env=environment, check=True, capture_output=True, text=True
    ).stdout
    blocks, size, tensors = json.loads(told.splitlines()[-1])
    # Anything kept a round would be a thousand objects; a list that grows by one entry a round,
    # 8,000 bytes in one object; a tensor that does, as much outside Python's own memory.
    assert blocks < 100
    assert size < 4000
    assert tensors == 0


if __name__ == "__main__":
    _thousand_rounds()
