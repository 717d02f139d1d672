"""The house's rules that a program can check: who may import whom, and what lies where."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SUPPORT = ROOT / "tests" / "support"
# kernels <- shared <- draft_service | verify_service, and shared <- coordinator.
MAY_IMPORT = {
    "protos": set(),
    "kernels": set(),
    "shared": {"kernels", "protos"},
    "draft_service": {"shared", "kernels", "protos"},
    "verify_service": {"shared", "kernels", "protos"},
    "coordinator": {"shared", "protos"},
}
# The bench's yardstick runs both engines in its own process.
EXCEPT = {"coordinator/bench/": {"draft_service", "verify_service", "kernels"}}
# The same within the two large ones, folder by folder: the lower never imports the higher.
MAY_IMPORT_WITHIN = {
    "shared.pair": set(),
    "shared.core": set(),
    "shared.config": {"shared.core"},
    "shared.kv": {"shared.core"},
    "shared.sampling": {"shared.core"},
    "shared.link": {"shared.core"},
    "shared.model": {
        *("shared.core", "shared.config", "shared.kv", "shared.sampling", "shared.link"),
        "shared.pair",
    },
    "shared.telemetry": {"shared.core", "shared.config"},
    "shared.process": {"shared.core", "shared.config", "shared.telemetry"},
    "shared.rounds": {
        *("shared.core", "shared.config", "shared.kv", "shared.link", "shared.model"),
        *("shared.telemetry", "shared.process"),
    },
    "coordinator.requests.text": {"shared.core", "shared.pair"},
    "coordinator.requests": {"shared.core", "coordinator.requests.text"},
    "coordinator.services": {"shared.core", "shared.config", "shared.process"},
    "coordinator.telemetry": {"shared.core", "shared.process", "shared.telemetry"},
    "coordinator.local": {"shared.core", "shared.config", "shared.process"},
    "coordinator.rounds.controller": {"coordinator.requests", "shared.core"},
    "coordinator.rounds": {
        *("coordinator.requests", "coordinator.requests.text", "coordinator.rounds.controller"),
        *("coordinator.services", "coordinator.telemetry", "shared.core"),
    },
    "coordinator.profile": {"coordinator.telemetry", "shared.core", "shared.process"},
    "coordinator.server": {
        *("coordinator.requests", "coordinator.requests.text", "coordinator.rounds"),
        *("coordinator.rounds.controller", "coordinator.services", "coordinator.telemetry"),
        *("shared.core", "shared.config", "shared.process", "shared.telemetry"),
    },
    "coordinator.bench": {
        *("coordinator.local", "coordinator.telemetry", "coordinator.requests.text"),
        *("shared.core", "shared.config", "shared.kv", "shared.link", "shared.model"),
        *("shared.pair", "shared.process", "shared.telemetry"),
    },
    "coordinator.cli": {
        *("coordinator.bench", "coordinator.local", "coordinator.profile", "coordinator.server"),
        *("coordinator.requests.text", "coordinator.telemetry"),
        *("shared.core", "shared.config", "shared.model", "shared.pair", "shared.process"),
    },
}
MOST_ENTRIES = 12
# Class names that several files define, and why they may.
PURE = (
    "outrider.shared.core.types",
    "outrider.shared.kv.slots",
    "outrider.shared.kv.arena",
    "outrider.coordinator.rounds.scheduler",
    "outrider.coordinator.rounds.controller.batch",
    "outrider.coordinator.rounds.controller.choose_k",
)


def sources(package: str) -> Iterator[Path]:
    for path in sorted((ROOT / package).rglob("*.py")):
        if "__pycache__" not in path.parts:
            yield path


def imported(path: Path, text: str | None = None) -> set[str]:
    """Every module that a file (or ``text`` in its place) imports, as absolute dotted names."""
    package = ("outrider", *path.relative_to(ROOT).parent.parts)
    found = set()
    for node in ast.walk(ast.parse(path.read_text() if text is None else text, str(path))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join((*above, *([node.module] if node.module else ())))
            found.update(f"{base}.{alias.name}" for alias in node.names)
    return found


def ours(modules: set[str]) -> set[str]:
    """The folders of this project among imported modules."""
    return {name.split(".")[1] for name in modules if name.startswith("outrider.")}


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_go_one_way(package: str) -> None:
    allowed = MAY_IMPORT[package] | {package}
    for path in sources(package):
        name = str(path.relative_to(ROOT))
        more = set[str]().union(*(who for folder, who in EXCEPT.items() if name.startswith(folder)))
        wrong = ours(imported(path)) - allowed - more
        assert not wrong, f"{name} imports outrider.{', outrider.'.join(wrong)}"


def folder_of(module: str) -> str | None:
    """The folder of ``MAY_IMPORT_WITHIN`` that a module (without ``outrider.``) stands in."""
    parts = module.split(".")
    names = (".".join(parts[:n]) for n in range(len(parts), 1, -1))
    return next((name for name in names if name in MAY_IMPORT_WITHIN), None)


@pytest.mark.parametrize("folder", MAY_IMPORT_WITHIN)
def test_folders_import_downwards_only(folder: str) -> None:
    for path in sources(folder.replace(".", "/")):
        here = path.relative_to(ROOT).with_suffix("")
        if folder_of(".".join(here.parts)) != folder:
            continue  # a folder inside it that has a row of its own
        found = {folder_of(name.removeprefix("outrider.")) for name in imported(path)}
        wrong = found - MAY_IMPORT_WITHIN[folder] - {folder, None}
        assert not wrong, f"{here} imports {', '.join(sorted(wrong))}"


@pytest.mark.parametrize("package", ["shared", "coordinator"])
def test_every_folder_has_a_row_and_few_entries(package: str) -> None:
    kept = {"__pycache__", "training"}
    for folder in (ROOT / package, *(ROOT / package).rglob("*/")):
        if folder.is_dir() and not kept & set(folder.parts):
            name = ".".join(folder.relative_to(ROOT).parts)
            if name != package and list(folder.glob("*.py")):
                assert folder_of(name), f"{name} is in no row of MAY_IMPORT_WITHIN"
            files = [one for one in folder.iterdir() if one.name not in (*kept, "__init__.py")]
            assert len(files) <= MOST_ENTRIES, f"{name} has {len(files)} entries"


def test_rows_have_no_circle() -> None:
    TopologicalSorter(MAY_IMPORT_WITHIN).prepare()


def test_bench_is_imported_by_the_command_line_alone() -> None:
    bench, own = "outrider.coordinator.bench", ("coordinator/bench/", "coordinator/cli/")
    importers = {
        str(path.relative_to(ROOT))
        for package in MAY_IMPORT
        for path in sources(package)
        if any(f"{name}.".startswith(f"{bench}.") for name in imported(path))
    }
    assert {name for name in importers if not name.startswith(own)} == set()
    assert importers - {name for name in importers if name.startswith(own[0])}


def test_imports_use_the_namespace() -> None:
    for package in MAY_IMPORT:
        for path in sources(package):
            tops = {name.split(".")[0] for name in imported(path)}
            # `kernels` alone is Hugging Face's package of that name.
            wrong = tops & set(MAY_IMPORT)
            assert not wrong, f"{path.relative_to(ROOT)} imports {wrong} from the top level"


def test_class_names_have_one_owner() -> None:
    owners: dict[str, set[str]] = {}
    written = MAY_IMPORT.keys() - {"protos"}  # the rest is generated
    for path in (path for package in written for path in sources(package)):
        for node in ast.parse(path.read_text(), str(path)).body:
            if isinstance(node, ast.ClassDef):
                owners.setdefault(node.name, set()).add(str(path.relative_to(ROOT)))
    several = {name: sorted(files) for name, files in owners.items() if len(files) > 1}
    assert not several, "one word, one meaning: " + "; ".join(
        f"{name} in {' and '.join(files)}" for name, files in several.items()
    )


@pytest.mark.parametrize("module", PURE)
def test_policy_imports_neither_torch_nor_grpc(module: str) -> None:
    path = ROOT.joinpath(*module.split(".")[1:]).with_suffix(".py")
    assert not {name.split(".")[0] for name in imported(path)} & {"torch", "grpc", "numpy"}
    # What it imports in turn must keep to that as well.
    program = (
        f"import sys, {module}\n"
        "print([name for name in ('torch', 'grpc', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", program], capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_architecture_rule_sees_imports_the_wrong_way() -> None:
    text = (
        "def late():\n"
        "    from outrider.verify_service import engine\n"
        "    from ..coordinator import cli\n"
        "    import outrider.draft_service.engine\n"
    )
    found = ours(imported(ROOT / "shared" / "anything.py", text))
    assert found == {"verify_service", "coordinator", "draft_service"}


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_type_checker_finds_the_package(package: str) -> None:
    # Without its link, mypy would take all that the package defines for Any, and say nothing.
    assert (ROOT / "typings" / "outrider" / package).resolve() == ROOT / package


@pytest.mark.parametrize("folder", ["kernels", "tests"])
def test_folder_is_no_package(folder: str) -> None:
    # An __init__.py would let the folder shadow the package `kernels` that transformers imports.
    found = {path.parent for path in (ROOT / folder).rglob("__init__.py")}
    assert all(path.is_relative_to(SUPPORT / "outrider_testing") for path in found)


def test_support_of_the_tests_is_one_package() -> None:
    # The folder is on the path of every test: nothing else in it may be importable.
    assert [path.name for path in SUPPORT.iterdir() if path.name != "__pycache__"] == [
        "outrider_testing"
    ]
