"""What pages, docstrings and comments point at is there."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
SOURCES = ("protos", "kernels", "shared", "draft_service", "verify_service", "coordinator")
FOLDERS = (*SOURCES, "tests", "docs", "deploy", "examples", "scripts", "typings")
KINDS = {".py", ".md", ".cu", ".cuh", ".h", ".proto", ".pml"}
NAME = re.compile(r"(?<![\w./*-])((?:[\w*.-]+/)*[\w*-]+\.(?:py|cuh?|proto|pml|md))(?![\w/])")
FOLDER = re.compile(r"`((?:[\w*-]+/)+[\w*-]*)`")
LINK = re.compile(r"\[[^]]*\]\(([^)\s]+)\)")
HISTORY = {ROOT / "CHANGELOG.md"}
"""May name what there is no more."""


@cache
def files() -> tuple[Path, ...]:
    """Every page and every source."""
    found = [
        *ROOT.glob("*.md"),
        *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*")),
    ]
    return tuple(path for path in found if path.suffix in KINDS)


def texts() -> list[Path]:
    """Those that people write, and that are to name what is there."""
    return [path for path in files() if "_pb2" not in path.name and path not in HISTORY]


def pages() -> list[Path]:
    return [path for path in files() if path.suffix == ".md"]


@cache
def prose(path: Path) -> str:
    """A file's words: of Python its docstrings and comments, of others all of it."""
    text = path.read_text("utf-8")
    if path.suffix != ".py":
        return text
    strings = [
        node.value.value
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    ]
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return "\n".join((*strings, *(one.string for one in tokens if one.type == tokenize.COMMENT)))


def missing(path: Path, words: str) -> Iterator[str]:
    """The files and folders named in ``words`` that are not there, seen from ``path``.

    Without a folder a name may be any file's. A path into a folder that is none of ours is
    somebody else's.
    """
    for name in (*NAME.findall(words), *FOLDER.findall(words)):
        folder, _, _ = name.partition("/")
        if folder == name:
            there = any(other.match(name) for other in files())
        else:
            ours = any(fnmatch(one, folder) for one in (*FOLDERS, ".."))
            there = not ours or any(True for base in (ROOT, path.parent) for _ in base.glob(name))
        if not there:
            yield name


def shown(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_files_that_are_named_are_there() -> None:
    gone = {shown(path): names for path in texts() if (names := [*missing(path, prose(path))])}
    assert not gone


def test_files_that_are_gone_are_found() -> None:
    words = "`shared/gone.py`, gone.cu, tests/docs/test_pages.py, *_service/gone.py, `docs/gone/`"
    gone = ["shared/gone.py", "gone.cu", "*_service/gone.py", "docs/gone/"]
    assert [*missing(DOCS / "page.md", words)] == gone


def test_classes_that_docstrings_name_by_module_are_there() -> None:
    modules: dict[str, list[Path]] = {}
    for path in texts():
        if path.suffix == ".py":
            modules.setdefault(path.stem, []).append(path)
    for path in texts():
        for module, name in re.findall(r"``(\w+)\.([A-Z]\w+)``", prose(path)):
            found = modules.get(module, [])
            assert not found or any(name in defined(one) for one in found), (
                f"{shown(path)} names {module}.{name}"
            )


# --- links -------------------------------------------------------------------------------------


def links(page: Path) -> Iterator[str]:
    """The targets of a page's links, those to other sites left out."""
    text = re.sub(r"^( *)```.*?^\1```", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    for target in LINK.findall(text):
        if not re.match(r"\w+:", target):
            yield target


@cache
def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ +(.+?) *$", page.read_text("utf-8"), flags=re.MULTILINE):
        words = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)
        found.add(re.sub(r"[^\w\- ]", "", words.lower()).replace(" ", "-"))
    return found


@pytest.mark.parametrize("page", pages(), ids=shown)
def test_links_lead_somewhere(page: Path) -> None:
    for target in links(page):
        name, _, anchor = target.partition("#")
        there = page.parent / name if name else page
        assert there.exists(), f"{shown(page)} links to {target}"
        if anchor and there.suffix == ".md":
            assert anchor in anchors(there), f"{shown(page)} links to {target}"


def test_every_page_is_in_an_index() -> None:
    """docs/README.md lists every page of docs/ but those that their own folder's README lists."""
    listed = {
        (index.parent / target.partition("#")[0]).resolve()
        for index in DOCS.rglob("README.md")
        for target in links(index)
    }
    for page in DOCS.rglob("*.md"):
        if page != DOCS / "README.md":
            assert page in listed, f"{shown(page)} is in no index"


# --- the glossary ------------------------------------------------------------------------------


@cache
def defined(source: Path) -> set[str]:
    """What a source defines: classes, functions, constants, and members as ``Class.member``."""
    text = source.read_text("utf-8")
    if source.suffix != ".py":
        return set(re.findall(r"^(?:message|enum|service) (\w+)", text, flags=re.MULTILINE))
    found: set[str] = set()
    for node in ast.parse(text).body:
        found |= named(node)
        if isinstance(node, ast.ClassDef):
            members = set[str]().union(*map(named, ast.walk(node)))
            found |= {f"{node.name}.{member}" for member in members}
    return found


def named(node: ast.AST) -> set[str]:
    """The names that a statement defines, attributes of ``self`` among them."""
    if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return {node.name}
    targets: list[ast.expr] = []
    if isinstance(node, ast.Assign):
        targets = node.targets
    elif isinstance(node, ast.AnnAssign):
        targets = [node.target]
    return {
        one.id if isinstance(one, ast.Name) else one.attr
        for target in targets
        for one in (target.elts if isinstance(target, ast.Tuple) else [target])
        if isinstance(one, ast.Name)
        or (isinstance(one, ast.Attribute) and getattr(one.value, "id", "") == "self")
    }


def test_glossary_owners_are_there() -> None:
    rows = re.findall(
        r"^\| (.+?) \| .+ \| (`.+`) \|$", (DOCS / "glossary.md").read_text("utf-8"), re.MULTILINE
    )
    assert len(rows) > 60
    for word, owners in rows:
        names = re.findall(r"`([^`]+)`", owners)
        files = [ROOT / name for name in names if "/" in name]
        assert files and all(file.is_file() for file in files), f"{word}: {owners}"
        known = set[str]().union(*map(defined, files))
        unknown = {name for name in names if "/" not in name} - known
        assert not unknown, f"{word}: {unknown} are not in {owners}"


def test_glossary_words_are_explained_once() -> None:
    text = (DOCS / "glossary.md").read_text("utf-8")
    words = [word for word in re.findall(r"^\| (.+?) \| ", text, re.MULTILINE) if word != "word"]
    assert sorted(set(words)) == sorted(words)


# --- the decisions -----------------------------------------------------------------------------


def test_decisions_have_one_form() -> None:
    found = sorted((DOCS / "decisions").glob("0*.md"))
    assert len(found) >= 10
    assert [page.name[:4] for page in found] == [f"{i + 1:04}" for i in range(len(found))]
    for page in found:
        parts = re.findall(r"^## (.+)$", page.read_text("utf-8"), re.MULTILINE)
        assert parts == [
            "Context", "Decision", "Consequences", "Measured", "What would change it"
        ], shown(page)  # fmt: skip
