"""What the study of the choice of K makes of its runs, and that it runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from outrider.coordinator.bench.studies import adaptive
from outrider.coordinator.bench.workload import Run
from outrider.coordinator.cli.main import main
from outrider.shared.config.schema import Config, DraftConfig, VerifyConfig
from outrider.shared.core.errors import ConfigError

SHARES = [0.2, 0.8, 0.95]


def ran(speed: float, outputs: Any = ((1, 2),), **changes: Any) -> Run:
    """One request whose first token came at 1 s, and ``speed`` more in the second after it."""
    return Run(arrivals=[(1.0, 1), (2.0, int(speed))], ends=[2.0], outputs=list(outputs), **changes)


def arguments(**changes: Any) -> Any:
    from argparse import Namespace

    return Namespace(**({"prompt_tokens": None, "max_new_tokens": 16} | changes))


def paced(draft: str = "paced:step=1ms") -> Config:
    return Config(base=VerifyConfig(path="paced:step=8ms"), draft=DraftConfig(path=draft))


def test_decode_speed_is_of_the_time_while_all_decode() -> None:
    run = Run(
        arrivals=[(10.0, 1), (10.5, 1), (11.0, 3), (12.0, 4), (12.5, 2), (13.0, 9)],
        ends=[13.1, 12.5],
    )
    # From the first token at 10 s on, and no longer than until one was done: 1 + 3 + 4 + 2.
    assert run.decode_speed() == pytest.approx(10 / 2.5)


def test_point_compares_with_the_best_k_repeat_by_repeat() -> None:
    runs = {
        0: [ran(100), ran(100), ran(50)],
        2: [ran(180), ran(200), ran(90)],
        4: [ran(150), ran(400), ran(10)],
        None: [ran(171), ran(200), ran(99)],
    }
    made = adaptive.point((0.2, 0.95), 8, runs)
    assert (made["agreement"], made["sequences"], made["best_k"]) == ("0.2/0.95", 8, 2)
    assert made["ratio"] == pytest.approx(1.0)
    assert made["speedup"] == pytest.approx(1.98)
    assert [v["tokens_per_second"] for v in made["variants"]] == [100, 180, 150, 171]
    assert all(v["same_tokens_as_base"] for v in made["variants"])


def test_point_tells_of_other_tokens_and_of_acceptance() -> None:
    runs = {
        0: [ran(100)],
        2: [ran(50, [(1, 3)], proposed=8, accepted=6)],
        None: [ran(90)],
    }
    made = adaptive.point(None, 1, runs)
    assert [v["same_tokens_as_base"] for v in made["variants"]] == [True, False, True]
    assert [v["acceptance_rate"] for v in made["variants"]] == [None, 0.75, None]
    assert (made["agreement"], made["best_k"]) == (None, 0)
    row = adaptive.table({"points": [made]}).splitlines()[-1]
    assert [cell.strip() for cell in row.strip("|").split("|")] == [
        "-", "1", "100", "0", "100", "90", "0.900", "0.90", "NO",
    ]  # fmt: skip


def test_workload_of_paced_models_has_the_shares_of_its_mix_in_turn() -> None:
    made = adaptive._workload(arguments(), 5, (0.95, 0.2), SHARES)
    firsts = [prompt[0] for prompt in made.prompts]
    assert [SHARES[place] for place in firsts] == [0.95, 0.2, 0.95, 0.2, 0.95]
    assert len({tuple(prompt) for prompt in made.prompts}) == made.concurrency == 5
    assert all(len(prompt) == adaptive.PACED_PROMPT for prompt in made.prompts)
    config = adaptive._agreeing(paced(), SHARES)
    assert config.draft.path == "paced:step=1ms,agreement=0.2/0.8/0.95"


def test_workload_of_texts_has_as_many_as_there_are_sequences() -> None:
    made = adaptive._workload(arguments(), 500, None, [])
    assert len(made.prompts) == 500
    assert all(isinstance(prompt, str) for prompt in made.prompts)


def test_flags_that_do_not_go_together_are_named() -> None:
    with pytest.raises(ConfigError, match="the agreement must be left to --agreements"):
        adaptive._agreeing(paced("paced:step=1ms,agreement=0.5"), SHARES)
    with pytest.raises(ConfigError, match="must be paced models"):
        adaptive.run(arguments(agreements=[(0.5,)], sequences=[1]), Config())
    with pytest.raises(ConfigError, match="--sequences: fewer than each mix"):
        adaptive.run(arguments(agreements=[(0.2, 0.9)], sequences=[1]), paced())
    with pytest.raises(ConfigError, match="--max-new-tokens: got 15; must be at least 16"):
        adaptive.run(arguments(max_new_tokens=15), paced())


@pytest.mark.slow
def test_study_runs_over_paced_models(tmp_path: Path) -> None:
    words = ["bench", "adaptive", "--base", "paced:step=3ms", "--draft", "paced:step=300us"]
    words += ["--sequences", "1,2", "--agreements", "1/0", "--ks", "3", "--repeats", "1"]
    file = tmp_path / "figures.json"
    assert main([*words, "--max-new-tokens", "24", "--json", str(file)]) == 0
    figures = json.loads(file.read_text())
    (one,) = figures["points"]  # a mix of two needs two sequences
    assert (one["agreement"], one["sequences"]) == ("1/0", 2)
    assert [v["k"] for v in one["variants"]] == [0, 3, None]
    assert all(v["same_tokens_as_base"] for v in one["variants"])
    # Of the 24 tokens of the one 17 or 18 are the draft's, in 6 or 7 rounds; none of the other's.
    assert one["variants"][1]["acceptance_rate"] == pytest.approx(18 / (18 + 69), abs=0.03)
