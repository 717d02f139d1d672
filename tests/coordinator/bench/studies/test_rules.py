"""The page on acceptance rules, from figures as the bench writes them."""

from __future__ import annotations

from typing import Any

from outrider.coordinator.bench.studies.rules import page


def run(rule: str, temperature: float) -> dict[str, Any]:
    model = {"architecture": "A", "parameters": 2e6, "dtype": "float32", "device": "cpu"}
    variant = {
        "tokens_per_second": 50.0,
        "acceptance_rate": None,
        "acceptance_by_position": [],
        "mean_accepted_length": 1.0,
        "speedup": 1.0,
        "same_tokens_as_base": True,
    }
    return {
        "base": model,
        "draft": None,
        "command": f"bench {rule} {temperature}",
        "hardware": {
            "processor": "P",
            "cores": 2,
            "system": "S",
            "python": "3.11",
            "versions": {"torch": "2"},
        },
        "workload": {
            "prompts": 4,
            "max_new_tokens": 8,
            "concurrency": 1,
            "temperature": temperature,
            "rule": rule,
            "repeats": 2,
        },
        "variants": [
            variant | {"k": 0},
            variant | {"k": 2, "acceptance_rate": 0.5, "acceptance_by_position": [0.6, 0.4]},
        ],
    }


def test_page_has_a_row_for_each_run_and_k() -> None:
    made = page([run("coupled", 0.0), run("coupled", 0.5), run("rejection", 0.5)], "busy")
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in made.splitlines()
        if line.startswith("| 0")
    ]
    # The base alone once per temperature: it is the same under both rules.
    assert [(row[0], row[1], row[2]) for row in rows] == [
        ("0.0", "-", "0"),
        ("0.0", "greedy", "2"),
        ("0.5", "-", "0"),
        ("0.5", "coupled", "2"),
        ("0.5", "rejection", "2"),
    ]
    assert rows[1][3:5] == ["0.50", "0.60 0.40"]
    assert "busy" in made and "bench rejection 0.5" in made
