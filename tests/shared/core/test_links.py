"""The table of links: whatever lists them reads it, and each row is whole."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
from pathlib import Path

import pytest

from outrider.coordinator.bench.studies import links as study
from outrider.coordinator.cli.main import make_parser
from outrider.draft_service.service import SIDE as DRAFT
from outrider.shared.config.schema import CoordinatorConfig
from outrider.shared.core.errors import ConfigError
from outrider.shared.core.links import AUTO, LINKS, MESSAGES, Reached, wanted
from outrider.verify_service.service import SIDE as VERIFY

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "links.md").read_text()
# There the word is OpenTelemetry's, for one of its own protocols.
OTHERS = ("shared/telemetry/", "shared/config/otel_environment.py")
each = pytest.mark.parametrize("name", LINKS)

HERE, THERE = "unix:/run/base", "unix:/run/draft"


def reached(
    verify: str = HERE,
    draft: str = THERE,
    devices: tuple[str, str] = ("", ""),
    is_model: bool = True,
) -> tuple[Reached, Reached]:
    return Reached("verify", verify, devices[0]), Reached("draft", draft, devices[1], is_model)


@each
def test_link_can_be_configured_and_has_its_flag(name: str) -> None:
    assert CoordinatorConfig(link=name).link == name
    args = make_parser().parse_args(["generate", "a", "--link", name])
    assert vars(args)["coordinator.link"] == name
    assert study.names(name) == [name] and study.settings(name)["link"] == name


def test_links_are_all_that_can_be_configured() -> None:
    (spec,) = (one for one in dataclasses.fields(CoordinatorConfig) if one.name == "link")
    assert spec.metadata["choices"] == (AUTO, *LINKS)
    with pytest.raises(ConfigError, match=f"must be one of {', '.join((AUTO, *LINKS))}"):
        CoordinatorConfig(link="pigeons")


@each
def test_link_is_described_as_its_row_says(name: str) -> None:
    link = LINKS[name]
    assert f"\n| `{name}` | {link.travels} | {link.where} | " in PAGE
    assert f"`--link {'|'.join((AUTO, *LINKS))}`" in PAGE
    choosing = PAGE.split("## Choosing")[1].split("\n## ")[0]
    assert f"\n| `{name}` | " in choosing


@each
def test_link_has_a_carrier_and_who_takes_its_turns(name: str) -> None:
    link = LINKS[name]
    assert link.name == name and link.way in VERIFY.ways
    if not link.carrier:
        return
    assert link.way in DRAFT.ways
    module, _, kind = link.carrier.partition(":")
    carrier = getattr(importlib.import_module(module), kind)
    assert list(inspect.signature(carrier).parameters) == ["link", "spin", "device"]
    assert callable(carrier.offer) and callable(carrier.fetch)


@each
def test_link_lies_above_one_that_is_always_there(name: str) -> None:
    order, link = list(LINKS), LINKS[name]
    while link.name != MESSAGES:
        assert order.index(link.beneath) < order.index(link.name)
        link = LINKS[link.beneath]
    assert order[0] == MESSAGES
    assert link.why_not(*reached("10.0.0.1:1", "10.0.0.2:1")) is None and not link.carrier


@pytest.mark.parametrize(
    ("name", "services", "link", "reason"),
    [
        ("auto", reached(), "shm", ""),
        ("auto", reached(devices=("one", "one")), "cuda-ipc", ""),
        ("auto", reached(devices=("one", "two")), "shm", ""),
        ("auto", reached(devices=("one", "")), "shm", ""),
        ("auto", reached("far:1"), "grpc", "the verify service is reached at far:1"),
        (
            "auto",
            reached(draft="far:1", devices=("a", "a")),
            "grpc",
            "the draft service is reached",
        ),
        ("grpc", reached(devices=("one", "one")), "grpc", ""),
        ("shm", reached(devices=("one", "one")), "shm", ""),
        ("shm", reached(draft="far:1"), "grpc", "the draft service is reached at far:1"),
        ("cuda-ipc", reached(devices=("one", "two")), "cuda-ipc", ""),
        ("cuda-ipc", reached("far:1"), "grpc", "the verify service is reached at far:1"),
        ("auto", reached(devices=("one", ""), is_model=False), "shm", ""),
        ("cuda-ipc", reached(is_model=False), "shm", "the draft is no model"),
        ("cuda-ipc", reached("far:1", is_model=False), "grpc", "the draft is no model"),
    ],
)
def test_link_wanted_is_the_best_that_nothing_speaks_against(
    name: str, services: tuple[Reached, Reached], link: str, reason: str
) -> None:
    found, why = wanted(name, *services)
    assert found.name == link
    assert why.startswith(reason) and bool(why) == bool(reason)


def named(source: str) -> set[int]:
    """Lines of a file on which a link's name stands."""
    return {
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Constant) and node.value in LINKS
    }


def test_links_are_named_in_their_table_alone() -> None:
    assert named('how = "shm"') == {1}
    for folder in ("shared", "coordinator", "draft_service", "verify_service"):
        for path in (ROOT / folder).rglob("*.py"):
            file = path.relative_to(ROOT).as_posix()
            if file != "shared/core/links.py" and not file.startswith(OTHERS):
                assert not named(path.read_text()), f"{file} names a link: read LINKS"
