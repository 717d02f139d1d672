"""Plans are arithmetic over configurations: compared with known sizes."""

from __future__ import annotations

import argparse
import json

import pytest

from outrider.coordinator.cli import capacity, plan
from outrider.coordinator.cli.capacity import GIB, GPUS, read_model
from outrider.shared.core.errors import ConfigError


def _plan(gpu: str, base: str, draft: str | None, **changes):
    settings = {"sequences": 4, "context": 4096, "acceptance": 0.8}
    return capacity.plan(
        GPUS[gpu], read_model(base), read_model(draft) if draft else None, **(settings | changes)
    )


def test_sizes_are_those_of_the_published_models():
    # Parameters as their model cards say: 3.21 and 1.24 billion, tied; 8.03 billion.
    assert read_model("llama-3.2-3b").weights / 2 == pytest.approx(3.21e9, rel=2e-3)
    assert read_model("llama-3.2-1b").weights / 2 == pytest.approx(1.24e9, rel=5e-3)
    assert read_model("llama-3.1-8b").weights / 2 == pytest.approx(8.03e9, rel=2e-3)
    assert read_model("gpt2").weights / 2 == pytest.approx(124.4e6, rel=2e-3)
    # 28 layers x 2 x 8 heads x 128 x 2 bytes.
    assert read_model("llama-3.2-3b").token_bytes == 114688


def test_small_pair_fits_a_t4_and_a_large_base_does_not():
    small = _plan("t4", "llama-3.2-3b", "llama-3.2-1b")
    assert small.fits and small.dtype == "float16"
    assert small.base.total + small.draft.total + small.free == small.memory
    assert 10 * GIB < small.memory - small.free < 14 * GIB
    assert not _plan("t4", "llama-3.1-8b", "llama-3.2-1b").fits


def test_more_sequences_than_it_names_do_not_fit():
    found = _plan("l4", "llama-3.2-3b", "llama-3.2-1b")
    assert _plan("l4", "llama-3.2-3b", "llama-3.2-1b", sequences=found.most_sequences - 2).fits
    assert not _plan("l4", "llama-3.2-3b", "llama-3.2-1b", sequences=found.most_sequences + 2).fits


def test_ceilings_equal_the_closed_form():
    found = _plan("h200", "llama-3.2-3b", "llama-3.2-1b", context=0)
    base, draft = 6.425e9, 2.471e9
    for speed in found.speeds:
        expected = sum(0.8**i for i in range(speed.k + 1)) / (base + speed.k * draft)
        assert speed.gain == pytest.approx(expected * base, rel=2e-3)
    # The ratio is the memory's: K = 2 is worth 1.38 times.
    assert found.best_k == 2 and found.speeds[2].gain == pytest.approx(1.38, abs=0.01)


def test_without_a_draft_only_k_0_is_planned():
    found = _plan("m4", "llama-3.2-1b", None)
    assert found.draft is None and [s.k for s in found.speeds] == [0] and found.best_k == 0


def test_reads_the_config_of_a_folder(tmp_path):
    config = {
        "model_type": "qwen3", "hidden_size": 1024, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
        "intermediate_size": 3072, "vocab_size": 151936, "tie_word_embeddings": True,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = read_model(str(tmp_path))
    assert model.weights / 2 == pytest.approx(0.596e9, rel=5e-3)


@pytest.mark.parametrize("text", ["no-such-model", None])
def test_refuses_what_it_does_not_know(tmp_path, text):
    if text is None:
        (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
        text = str(tmp_path)
    with pytest.raises(ConfigError):
        read_model(text)


def test_command_prints_a_table_and_fails_where_it_does_not_fit(capsys):
    parser = argparse.ArgumentParser()
    plan.add_parser(parser.add_subparsers())
    words = ["plan", "--gpu", "t4", "--base", "llama-3.2-3b", "--draft", "llama-3.2-1b"]
    args = parser.parse_args(words)
    assert args.run(args) == 0
    out = capsys.readouterr().out
    assert "fits" in out and "best" in out
    args = parser.parse_args(["plan", "--gpu", "t4", "--base", "llama-3.1-8b", "--json"])
    assert args.run(args) == 1
    assert json.loads(capsys.readouterr().out)["fits"] is False


def test_draft_from_the_text_takes_nothing_of_the_gpu_and_costs_no_step():
    alone = _plan("h200", "llama-3.2-3b", None)
    found = _plan("h200", "llama-3.2-3b", None, from_text=True)
    assert (found.base, found.draft, found.free) == (alone.base, None, alone.free)
    assert [speed.k for speed in alone.speeds] == [0]
    for speed in found.speeds:
        wanted = alone.speeds[0].tokens_per_second * sum(0.8**j for j in range(speed.k + 1))
        assert speed.tokens_per_second == pytest.approx(wanted)
