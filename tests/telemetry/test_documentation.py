"""The documentation names every metric and attribute, with its unit and meaning."""

from __future__ import annotations

from pathlib import Path

from outrider.coordinator.telemetry.attributes import ATTRIBUTES
from outrider.shared.telemetry.metrics import METRICS

TEXT = (Path(__file__).parents[2] / "docs" / "observability.md").read_text("utf-8")


def rows(first: str) -> list[list[str]]:
    """The rows of the table whose header begins with ``first``."""
    lines = iter(TEXT.splitlines())
    for line in lines:
        if line.startswith(f"| {first} |"):
            break
    next(lines)
    found = []
    for line in lines:
        if not line.startswith("|"):
            break
        found.append([cell.strip() for cell in line.strip("|").split("|")])
    return found


def test_metrics_table_is_the_declaration() -> None:
    shown = {row[0].strip("`"): row for row in rows("metric")}
    assert set(shown) == {metric.name for metric in METRICS}
    for metric in METRICS:
        row = shown[metric.name]
        assert row[2].strip("`") == metric.unit
        assert [one.strip(" `") for one in row[4].split(",") if one] == list(metric.attributes)
        assert row[5] == metric.description


def test_attributes_table_is_the_declaration() -> None:
    shown = {row[0].strip("`"): row for row in rows("attribute")}
    assert set(shown) == {one.name for one in ATTRIBUTES}
    for one in ATTRIBUTES:
        row = shown[one.name]
        assert [each.strip(" `") for each in row[2].split(",")] == list(one.spans)
        assert row[3] == one.meaning


def test_pictures_exist() -> None:
    folder = Path(__file__).parents[2] / "docs"
    for name in ("report.png", "report-dark.png"):
        assert (folder / "images" / name).read_bytes().startswith(b"\x89PNG")
        assert f"images/{name}" in TEXT
