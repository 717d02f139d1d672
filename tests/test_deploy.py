"""Deployment files name only settings and parts that exist."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml

from outrider.coordinator.cli.main import make_parser
from outrider.shared.config.schema import SECRETS, SECTIONS, load
from outrider.shared.config.setting import allowed

ROOT = Path(__file__).resolve().parents[1]
TOML = sorted((ROOT / "deploy").rglob("*.toml"))


@pytest.mark.parametrize("file", TOML, ids=lambda path: str(path.relative_to(ROOT / "deploy")))
def test_deploy_configuration_loads(file: Path) -> None:
    config = load(file, environment={})
    assert config != load(None, environment={})


def test_deploy_kubernetes_arguments_are_flags_and_ports_agree() -> None:
    documents = list(yaml.safe_load_all((ROOT / "deploy/kubernetes/outrider.yaml").read_text()))
    documents = [document for document in documents if document]
    services = {d["metadata"]["name"]: d["spec"] for d in documents if d["kind"] == "Service"}
    deployments = [d for d in documents if d["kind"] == "Deployment"]
    assert len(deployments) == len(services) == 3
    for deployment in deployments:
        (container,) = deployment["spec"]["template"]["spec"]["containers"]
        arguments = container["args"]
        assert arguments[0] == "serve"
        section = {"verify": "base", "draft": "draft", "coordinator": "coordinator"}[arguments[1]]
        known = {
            f"--{spec.name.replace('_', '-')}" for spec in dataclasses.fields(SECTIONS[section])
        }
        assert {word for word in arguments if word.startswith("--")} <= known
        port = container["ports"][0]["containerPort"]
        assert f"0.0.0.0:{port}" in arguments
        assert services[container["name"]]["ports"] == [{"port": port}]
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            assert container[probe]["grpc"]["port"] == port
    coordinator = next(d for d in deployments if d["metadata"]["name"] == "outrider")
    arguments = coordinator["spec"]["template"]["spec"]["containers"][0]["args"]
    for flag in ("--base-target", "--draft-target"):
        name, _, port = arguments[arguments.index(flag) + 1].partition(":")
        assert services[name]["ports"] == [{"port": int(port)}]
    make_parser().parse_args(arguments)


def reference() -> str:
    """The tables of docs/configuration.md."""
    parts = []
    for section, cls in SECTIONS.items():
        rows = []
        for spec in dataclasses.fields(cls):
            secret = " (environment or file only)" if spec.name in SECRETS else ""
            rows.append(
                f"| `{spec.name}` | `{spec.default}` | {allowed(spec)} | "
                f"{spec.metadata['help']}{secret} |".replace("`None`", "none")
            )
        head = "| key | default | allowed | meaning |\n|---|---|---|---|\n"
        parts.append(f"## [{section}]\n\n{head}" + "\n".join(rows) + "\n")
    return "\n".join(parts)


def test_configuration_page_names_every_key() -> None:
    page = (ROOT / "docs/configuration.md").read_text()
    written = page[page.index("## [base]") :]
    assert written == reference(), "write `reference()` to docs/configuration.md"
