"""Planted checkpoints do what their construction says."""

from __future__ import annotations

import json

import pytest
import torch

from outrider.coordinator.bench.models import planted
from outrider.coordinator.bench.models.planted import PlantSpec


def _greedy(model, token: int, count: int) -> list[int]:
    out = model.generate(
        torch.tensor([[token]]), max_new_tokens=count, do_sample=False, pad_token_id=0
    )
    return out[0, 1:].tolist()


def test_cycle_visits_every_token_once():
    pi = planted.cycle(97, seed=3)
    token, seen = 0, set()
    for _ in range(97):
        seen.add(token)
        token = int(pi[token])
    assert token == 0 and len(seen) == 97


@pytest.mark.parametrize("agreement", [0.0, 0.5, 0.8, 1.0])
def test_disagreeing_agrees_on_the_share_asked_for(agreement):
    pi = planted.cycle(500, seed=1)
    other = planted.disagreeing(pi, agreement, seed=2)
    assert sorted(other.tolist()) == list(range(500))
    assert int((other == pi).sum()) == round(agreement * 500)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tiny_base_continues_with_the_cycle(dtype):
    spec = PlantSpec("tiny", seed=5, dtype=dtype)
    model = planted.plant(spec)
    pi = planted.cycle(512, seed=5)
    token, expected = 7, []
    for _ in range(64):
        token = int(pi[token])
        expected.append(token)
    assert _greedy(model, 7, 64) == expected


def test_tiny_draft_agrees_as_often_as_asked():
    base = planted.plant(PlantSpec("tiny", dtype="float32"))
    draft = planted.plant(PlantSpec("tiny", agreement=0.8, dtype="float32"))
    tokens = torch.tensor([[3, *_greedy(base, 3, 500)]])
    with torch.inference_mode():
        told = base(tokens).logits[0].argmax(-1)
        guess = draft(tokens).logits[0].argmax(-1)
    pi = planted.cycle(512, 0)
    changed = planted.disagreeing(pi, 0.8, 1)
    assert torch.equal(told, pi[tokens[0]])
    assert torch.equal(guess, changed[tokens[0]])
    assert abs(float((guess == told).float().mean()) - 0.8) < 0.01


def test_spread_makes_successors_less_likely_by_equal_factors(monkeypatch):
    # Wide, so that the rows of other tokens are nearly orthogonal; the average takes the rest.
    wide = planted.ModelShape("llama", 1024, 1, 4, 2, 256, 64, 512, 128)
    monkeypatch.setitem(planted.SHAPES, "wide", wide)
    model = planted.plant(PlantSpec("wide", spread=2.0, dtype="float32"))
    pi = planted.cycle(512, 0)
    with torch.inference_mode():
        logits = model(torch.arange(512)[:, None]).logits[:, -1]
    successor, means = torch.arange(512), []
    for _ in range(5):
        successor = pi[successor]
        means.append(float(logits.gather(1, successor[:, None]).mean()))
    steps = torch.tensor(means).diff()
    assert torch.allclose(steps, torch.full_like(steps, -0.5), atol=0.2)


def test_gpt2_shape_is_planted_too(monkeypatch):
    small = planted.ModelShape("gpt2", 64, 2, 4, 4, 16, 128, 300, 128)
    monkeypatch.setitem(planted.SHAPES, "small-gpt2", small)
    model = planted.plant(PlantSpec("small-gpt2", dtype="float32"))
    pi = planted.cycle(300, 0)
    with torch.inference_mode():
        told = model(torch.arange(300)[:, None]).logits[:, -1].argmax(-1)
    assert torch.equal(told, pi)


def test_saved_folder_loads_as_any_other(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from outrider.shared.model.vocabulary import fingerprint

    for name, spec in (("base", PlantSpec("tiny")), ("draft", PlantSpec("tiny", agreement=0.5))):
        planted.save(spec, tmp_path / name)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    pi = planted.cycle(512, 0)
    with torch.inference_mode():
        assert int(base(torch.tensor([[9]])).logits[0, -1].argmax()) == int(pi[9])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    assert tokenizer("t3 t500").input_ids == [3, 500]
    prints = {fingerprint(str(tmp_path / name), 512) for name in ("base", "draft")}
    assert len(prints) == 1 and not prints.pop().startswith("size-only")
    record = json.loads((tmp_path / "draft" / "planted.json").read_text())
    assert record["agreement"] == 0.5


def test_step_bytes_are_those_of_the_published_shapes():
    assert planted.SHAPES["llama-3.2-3b"].step_bytes == pytest.approx(6.43e9, rel=2e-3)
    assert planted.SHAPES["llama-3.2-1b"].step_bytes == pytest.approx(2.47e9, rel=2e-3)
