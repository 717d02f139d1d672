"""The specification's table of invariants names tests that exist."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SPECIFICATION = ROOT / "docs" / "design" / "zero_copy_design.md"
ROW = re.compile(r"^\| (I\d+) \| (.+?) \| (.+) \|$", re.MULTILINE)
TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`(?: \(`(\w+)`\))?")


@cache
def names_in(path: str) -> tuple[set[str], set[str]]:
    """What pytest can collect of a file at its top level, and every function defined in it."""
    tree = ast.parse((ROOT / path).read_text())
    top: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            top.add(node.name)
        elif isinstance(node, ast.Assign):
            top.update(target.id for target in node.targets if isinstance(target, ast.Name))
    functions = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    return top, functions


def test_every_invariant_names_tests_that_exist() -> None:
    rows = ROW.findall(SPECIFICATION.read_text())
    assert [name for name, _, _ in rows] == [f"I{i + 1}" for i in range(len(rows))]
    assert len(rows) >= 12
    for name, _, tests in rows:
        found = TEST.findall(tests)
        assert found, f"{name} names no test"
        left = TEST.sub("", tests).replace(",", "").strip()
        assert not left, f"{name}: {left!r} is not the name of a test"
        for path, test, part in found:
            assert (ROOT / path).is_file(), f"{name}: there is no {path}"
            top, functions = names_in(path)
            assert test in top and re.match(r"test_|Test", test), f"{name}: no {path}::{test}"
            assert not part or part in functions, f"{name}: no {part} in {path}"


def members(part: ast.stmt) -> Iterator[str]:
    """The methods and fields that a statement of a class's body makes."""
    if isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef):
        yield part.name
    elif isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
        yield part.target.id


def test_specification_names_code_that_exists() -> None:
    folders = ("shared", "draft_service", "verify_service", "coordinator")
    classes = [
        node
        for folder in folders
        for path in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
    ]
    defined = {
        f"{one.name}.{name}" for one in classes for part in one.body for name in members(part)
    }
    named = set(re.findall(r"`([A-Z]\w+\.[a-z_]\w*)`", SPECIFICATION.read_text()))
    assert len(named) > 15
    assert not named - defined, f"the specification names {named - defined}"


@pytest.mark.parametrize("model", ["protocol", "mailbox"])
def test_every_mutation_is_named_in_the_specification(model: str) -> None:
    rules = (ROOT / "docs" / "design" / f"{model}.pml").read_text()
    mutations = set(re.findall(r"#(?:ifdef|ifndef) MUTATE_(\w+)", rules))
    text = SPECIFICATION.read_text()
    tests = (ROOT / "tests" / "design" / f"test_{model}_model.py").read_text()
    assert mutations
    for mutation in mutations:
        assert f"`{mutation}`" in text, f"the specification does not explain {mutation}"
        assert re.search(rf'"(MUTATE_)?{mutation}"', tests), f"no test runs {mutation}"
