"""Names of metrics and attributes against OpenTelemetry's published conventions."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from types import ModuleType
from typing import Any

import opentelemetry.semconv._incubating.attributes as incubating_attributes
import opentelemetry.semconv._incubating.metrics as incubating_metrics
import opentelemetry.semconv.attributes as stable_attributes
import pytest

from outrider.coordinator.telemetry.attributes import ATTRIBUTES
from outrider.shared.telemetry.metrics import METRICS, Metric

NAME = re.compile(r"[a-z][a-z0-9_]*(\.[a-z][a-z0-9_]*)+")


def constants(package: ModuleType) -> set[str]:
    """All names that the modules of a package define."""
    found = set()
    for module in pkgutil.iter_modules(package.__path__):
        loaded = importlib.import_module(f"{package.__name__}.{module.name}")
        found |= {
            value
            for name, value in vars(loaded).items()
            if name.isupper() and isinstance(value, str)
        }
    return found


class Meter:
    """Notes what the conventions' own factories create."""

    def __init__(self) -> None:
        self.made: tuple[str, str, str] = ("", "", "")

    def __getattr__(self, method: str) -> Any:
        kind = method.removeprefix("create_").removeprefix("observable_")

        def create(name: str, *args: Any, unit: str = "", **kwargs: Any) -> None:
            self.made = (name, kind.replace("up_down_counter", "updown"), unit or args[-1])

        return create


def published(name: str) -> tuple[str, str]:
    """Kind and unit of a metric of the conventions."""
    for module in pkgutil.iter_modules(incubating_metrics.__path__):
        loaded = importlib.import_module(f"{incubating_metrics.__name__}.{module.name}")
        for function_name, function in inspect.getmembers(loaded, inspect.isfunction):
            wanted = {"create_" + name.replace(".", "_")}
            if function_name in wanted:
                meter = Meter()
                callbacks = [None] if len(inspect.signature(function).parameters) > 1 else []
                function(meter, *callbacks)
                return meter.made[1], meter.made[2]
    raise AssertionError(f"{name} is not in the conventions")


def test_attribute_names_are_published_or_our_own() -> None:
    known = constants(incubating_attributes) | constants(stable_attributes)
    used = {one.name for one in ATTRIBUTES} | {key for one in METRICS for key in one.attributes}
    for name in used:
        assert NAME.fullmatch(name), name
        assert name.startswith("outrider.") is not (name in known), name


@pytest.mark.parametrize(
    "metric", [one for one in METRICS if not one.name.startswith("outrider.")], ids=str
)
def test_metrics_of_the_conventions_have_their_kind_and_unit(metric: Metric) -> None:
    kind, unit = published(metric.name)
    assert (metric.kind, metric.unit) == (kind, unit)


def test_our_metrics_are_not_in_the_conventions() -> None:
    known = constants(incubating_metrics)
    for metric in METRICS:
        assert NAME.fullmatch(metric.name), metric.name
        assert metric.name.startswith("outrider.") is not (metric.name in known)
        assert metric.description and not metric.description.endswith(".")


def test_declarations_are_unique_and_buckets_rise() -> None:
    assert len({one.name for one in METRICS}) == len(METRICS)
    assert len({one.name for one in ATTRIBUTES}) == len(ATTRIBUTES)
    for metric in METRICS:
        assert bool(metric.buckets) is (metric.kind == "histogram")
        assert list(metric.buckets) == sorted(set(metric.buckets))
