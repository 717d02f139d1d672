"""Acceptance and speed of the rules, from the JSON of several ``outrider bench`` runs.

``python -m outrider.coordinator.bench.studies.rules FILE… > docs/results/acceptance-rules.md``
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from outrider.coordinator.bench import tables
from outrider.shared.core.rules import GREEDY

HEADER = [
    *("temperature", "rule", "K", "acceptance", "by position", "tokens/round", "tokens/s"),
    *("against base", "same tokens as the base alone"),
]


def page(runs: Sequence[dict[str, Any]], note: str = "") -> str:
    """The Markdown page: one row per run and K, in the order of the runs."""
    first = runs[0]
    alone: set[float] = set()
    hardware, workload = first["hardware"], first["workload"]
    versions = ", ".join(f"{name} {version}" for name, version in hardware["versions"].items())
    models = "; ".join(
        f"{side} {one['architecture']}, {one['parameters'] / 1e6:.1f} M parameters, "
        f"{one['dtype']} on {one['device']}"
        for side in ("base", "draft")
        if (one := first[side])
    )
    parts = [
        "# Acceptance rules, measured",
        "What `coupled` and `rejection` accept of the bundled draft's tokens, and what that is "
        "worth. At temperature 0 all rules are `greedy`. What the rules promise is in "
        "[acceptance.md](../acceptance.md).",
        tables.markdown(HEADER, [row for run in runs for row in _rows(run, alone)]),
        "Acceptance is accepted over proposed tokens, corrections and bonus tokens not counted. "
        "`rejection` gives the base's distribution but not its very tokens, so another text is "
        "no error there. Speeds are medians over repeats.",
    ]
    if note:
        parts.append(note)
    parts += [
        f"{hardware['processor']}, {hardware['cores']} cores, {hardware['system']}, Python "
        f"{hardware['python']}; {versions}. Models: {models}. {workload['prompts']} held-out "
        f"prompts, {workload['max_new_tokens']} new tokens each, {workload['concurrency']} "
        f"request at once, {workload['repeats']} repeats.",
        "```sh\n" + "\n".join(run["command"] for run in runs) + "\n```",
    ]
    return "\n\n".join(parts)


def _rows(run: dict[str, Any], alone: set[float]) -> list[list[str]]:
    """``alone``: temperatures at which the base alone has a row; it is the same for all rules."""
    workload, rows = run["workload"], []
    temperature = workload["temperature"]
    for v in run["variants"]:
        if v["k"] == 0 and temperature in alone:
            continue
        if v["k"] == 0:
            alone.add(temperature)
        rule = GREEDY.word if temperature == 0 else workload["rule"]
        same = {True: "yes", False: "no", None: "-"}[v.get("same_tokens_as_base")]
        rows.append(
            [
                tables.number(temperature, 1),
                "-" if v["k"] == 0 else rule,
                "auto" if v["k"] is None else str(v["k"]),
                tables.number(v["acceptance_rate"], 2, "-"),
                " ".join(f"{one:.2f}" for one in v["acceptance_by_position"]) or "-",
                tables.number(v["mean_accepted_length"], 2, "-"),
                tables.number(v["tokens_per_second"], 1),
                tables.number(v.get("speedup"), 2, "-"),
                same,
            ]
        )
    return rows


def main(words: Sequence[str]) -> None:
    """Prints the page of the files; ``--note TEXT`` first adds a paragraph."""
    note = ""
    if words[:1] == ["--note"]:
        note, words = words[1], words[2:]
    print(page([json.loads(Path(word).read_text()) for word in words], note))


if __name__ == "__main__":
    main(sys.argv[1:])
