"""`outrider bench step` on the bundled pair, as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from outrider.coordinator.bench.studies.step.prompts import _flops, sizes
from outrider.coordinator.cli.main import main


def test_bench_step_measures_every_kind_of_round(tmp_path: Path) -> None:
    record = tmp_path / "step.json"
    flags = "--batches 1,2 --new 4 --rows 2 --draft-ks 1 --arena 20000000 --prompt-rows 2x32"
    model = Path(__file__).parents[4] / "shared" / "pair" / "draft"
    assert (
        main(["bench", "step", "--model", str(model), *flags.split(), "--json", str(record)]) == 0
    )
    told = json.loads(record.read_text())
    assert [(f["kind"], f["sequences"]) for f in told["figures"]] == [
        ("decode", 1), ("decode", 2), ("verify", 1), ("draft loop", 1),
    ]  # fmt: skip
    (prompts,) = told["prompts"]
    assert (prompts["sequences"], prompts["rows"]) == (2, 32)
    assert prompts["rate"] == pytest.approx(64 / prompts["seconds"])
    assert told["step_bytes"] > 0 and told["copy_bandwidth"] > 0


def test_bench_step_prompt_sizes_are_read_as_they_are_told() -> None:
    assert sizes("1024,8x2048") == [(1, 1024), (8, 2048)]
    assert sizes("") == []


def test_bench_step_counts_the_multiplications_that_torch_counts() -> None:
    """By torch's own counter over transformers' forward; it counts attention's whole square."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=50, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, attn_implementation="eager",
    )  # fmt: skip
    model = LlamaForCausalLM(config).requires_grad_(False)
    parameters = sum(weight.numel() for weight in model.parameters())
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(2, 48, dtype=torch.int64), logits_to_keep=1)
    head = 2 * 2 * 50 * 64
    square = 2 * 48 * (4 * 64 * 2 * 48 / 2)
    assert _flops(parameters, config, 2, 48) == pytest.approx(
        counter.get_total_flops() - head - square, rel=0.02
    )
