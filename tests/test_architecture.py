"""The house's rules that a program can check: who may import whom, and what lies where."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# kernels <- shared <- draft_service | verify_service, and shared <- coordinator.
MAY_IMPORT = {
    "protos": set(),
    "kernels": set(),
    "shared": {"kernels", "protos"},
    "draft_service": {"shared", "kernels", "protos"},
    "verify_service": {"shared", "kernels", "protos"},
    "coordinator": {"shared", "protos"},
}
PURE = (
    "outrider.shared.kv.slots",
    "outrider.shared.kv.arena",
    "outrider.coordinator.rounds.scheduler",
    "outrider.coordinator.rounds.choose_k",
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
        wrong = ours(imported(path)) - allowed
        assert not wrong, f"{path.relative_to(ROOT)} imports outrider.{', outrider.'.join(wrong)}"


def test_imports_use_the_namespace() -> None:
    for package in MAY_IMPORT:
        for path in sources(package):
            tops = {name.split(".")[0] for name in imported(path)}
            # `kernels` alone is Hugging Face's package of that name.
            wrong = tops & set(MAY_IMPORT)
            assert not wrong, f"{path.relative_to(ROOT)} imports {wrong} from the top level"


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


@pytest.mark.parametrize("folder", ["kernels", "tests"])
def test_folder_is_no_package(folder: str) -> None:
    # An __init__.py would let the folder shadow the package `kernels` that transformers imports.
    assert not list((ROOT / folder).rglob("__init__.py"))
