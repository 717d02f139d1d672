"""Where the training text comes from: installed packages with a permissive licence.

A *package* here is one installed distribution, or one top-level package or module of the
standard library (`stdlib/asyncio`). The unit of the train/held-out split is the package.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PERMISSIVE = re.compile(
    r"\b(MIT|MIT-0|BSD|0BSD|Apache|ISC|PSF|Python Software Foundation|Zlib|Unlicense|CNRI)",
    re.IGNORECASE,
)
RESTRICTIVE = re.compile(
    r"GPL|General Public|MPL|Mozilla|EPL|EUPL|CDDL|Proprietary|Commercial|CC-BY-NC", re.IGNORECASE
)
PSF = "PSF-2.0"

# Folders that hold other projects' code or data rather than the package's own source.
SKIPPED_PARTS = {
    "_vendor",
    "_vendored",
    "vendor",
    "vendored",
    "extern",
    "site-packages",
    "__pycache__",
    "lib2to3",
    "idlelib",
    "idle_test",
    "ensurepip",
    "turtledemo",
    "data",
    "test_data",
    "testdata",
    "unidata",
}


@dataclass(frozen=True)
class Package:
    """One source of files: `name`, `version`, `licence` (as declared) and its `.py` files."""

    name: str
    version: str
    licence: str
    root: Path
    files: tuple[Path, ...]


def declared_licence(metadata) -> str:
    """The licence a distribution declares, as one line; empty if it declares none.

    The SPDX expression wins over trove classifiers, which win over the first line of `License`.
    """
    if expression := metadata.get("License-Expression"):
        return expression.strip()
    classifiers = [
        c.split("::")[-1].strip()
        for c in metadata.get_all("Classifier") or []
        if c.startswith("License ::")
    ]
    first_line = (metadata.get("License") or "").strip().split("\n")[0][:80]
    return " AND ".join(classifiers) or first_line


def is_permissive(licence: str) -> bool:
    """Whether every word of the declared licence is permissive: unknown counts as not."""
    return bool(PERMISSIVE.search(licence)) and not RESTRICTIVE.search(licence)


def installed(site: Path) -> Iterator[Package]:
    """Distributions under a site-packages folder that declare a permissive licence."""
    for dist in importlib.metadata.distributions(path=[str(site)]):
        licence = declared_licence(dist.metadata)
        if not is_permissive(licence):
            continue
        files = tuple(
            sorted(
                site / str(f)
                for f in dist.files or ()
                if str(f).endswith(".py") and not str(f).startswith("..")
            )
        )
        if files:
            yield Package(
                dist.metadata["Name"].lower().replace("_", "-"), dist.version, licence, site, files
            )


def standard_library(root: Path, version: str) -> Iterator[Package]:
    """The interpreter's own library, one package per top-level folder; single modules together."""
    modules = []
    for entry in sorted(root.iterdir()):
        if entry.is_file() and entry.suffix == ".py":
            modules.append(entry)
        elif (
            entry.is_dir()
            and entry.name not in SKIPPED_PARTS | {"test", "tests"}
            and entry.name.isidentifier()
            and (files := tuple(sorted(entry.rglob("*.py"))))
        ):
            yield Package(f"stdlib/{entry.name}", version, PSF, root, files)
    yield Package("stdlib/modules", version, PSF, root, tuple(modules))
