"""The profile of one request as a file: read, and summed up for a person.

What stands in it is told in ``record``, which makes it. Reading it needs none of what made it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from outrider.shared.core.errors import ConfigError

FORMAT = "outrider-profile"
VERSION = 1
"""Rises when a field changes its meaning."""
PHASES = ("draft", "verify", "cache", "link", "accept", "schedule", "idle")
"""Of a round, in the order in which they are shown."""


def read(path: Path) -> dict[str, Any]:
    """The record in ``path``; raises ``ConfigError`` where it is none, or of another version."""
    try:
        record = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: can't be read: {error.strerror or error}") from None
    except ValueError as error:
        raise ConfigError(f"{path}: not JSON: {error}") from None
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise ConfigError(f"{path}: not a profile; `outrider generate --profile FILE` makes one")
    if record.get("version") != VERSION:
        raise ConfigError(
            f"{path}: profile version {record.get('version')}, this program reads {VERSION}"
        )
    return record


def summary(record: dict[str, Any]) -> str:
    """The figures for a person."""
    seconds, speculation = record["seconds"], record["speculation"]
    lines = [
        f"{len(record['request']['token_ids'])} tokens in {seconds['total']:.3f} s "
        f"({seconds['tokens_per_second']:.1f} tokens/s after the first, "
        f"first after {1e3 * seconds['first_token']:.1f} ms), {len(record['rounds'])} rounds, "
        f"link {record['link']}",
        f"{speculation['accepted']} of {speculation['proposed']} proposed tokens accepted "
        f"({speculation['acceptance_rate']:.0%}), "
        f"{speculation['mean_accepted_length']:.2f} tokens a round, mean K "
        f"{speculation['mean_k']:.2f}",
        "",
        f"{'ms a round':<12}{'median':>9}{'p90':>9}{'p99':>9}{'max':>9}{'total s':>10}{'share':>8}",
    ]
    whole = sum(one["total"] for one in record["phases"].values()) or 1.0
    rows = [*record["phases"].items(), ("round", record["round_seconds"])]
    for name, one in rows:
        figures = "".join(f"{1e3 * one[key]:9.3f}" for key in ("median", "p90", "p99", "max"))
        share = f"{one['total'] / whole:8.1%}" if name != "round" else ""
        lines.append(f"{name:<12}{figures}{one['total']:10.3f}{share}")
    lines.append("")
    ceiling = record["ceiling"]
    if ceiling is not None:
        lines.append(
            f"ceiling: {ceiling['measured_tokens_per_second']:.1f} of "
            f"{ceiling['tokens_per_second']:.1f} tokens/s that reading the weights at "
            f"{ceiling['memory_bandwidth'] / 1e9:.1f} GB/s allows ({ceiling['share']:.0%})"
        )
    for name, one in record["memory"].items():
        line = f"memory of {name}: {one['resident_bytes'] / 2**20:.0f} MiB resident"
        if "arena_tokens" in one:
            line += f", arena {one['arena_tokens_used']} of {one['arena_tokens']} tokens"
        lines.append(line)
    return "\n".join(lines)
