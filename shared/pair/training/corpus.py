"""Builds the corpus: permissively licensed Python source, deduplicated, split by package.

    python corpus.py --out FOLDER [--stdlib DIR] [--site DIR ...]

Writes `train-NN.xz` and `heldout-00.xz` (UTF-8 documents joined by NUL, LZMA), and
`manifest.json`: for each package its version, licence, split, files and bytes.
"""

from __future__ import annotations

import argparse
import collections
import json
import lzma
import multiprocessing
import platform
import random
import sysconfig
from pathlib import Path

from cleaning import Deduplicator, looks_like_data, normalise
from sources import SKIPPED_PARTS, Package, installed, standard_library

HELD_OUT = (
    "werkzeug",
    "trio",
    "jinja2",
    "click",
    "httpx2",
    "httpx",
    "mpmath",
    "attrs",
    "requests",
    "rich",
    "stdlib/asyncio",
    "stdlib/email",
)
SKIPPED = {
    "pip",
    "setuptools",
    "regex",
    "wcwidth",
    "idna",
    "pyasn1-modules",
    "antlr4-python3-runtime",
}


def is_test(path: str) -> bool:
    """Whether a path (relative, posix) belongs to a test suite."""
    parts = path.lower().split("/")
    return any(p in {"tests", "test", "_tests", "testing"} for p in parts[:-1]) or parts[
        -1
    ].startswith(("test_", "bench"))


def collect(packages: list[Package], cap: int, test_share: float, keep_seed: int):
    """Reads, cleans and deduplicates: held-out packages first, then the rest by name.

    `cap` is the most bytes one training package may give; tests at most `test_share` of what
    the package's other files gave. Returns (documents, manifest rows, counts of why files
    were dropped); a document is (split, package, path, text).
    """
    dedup, documents, rows, dropped = Deduplicator(), [], [], collections.Counter()
    for package in sorted(packages, key=lambda p: (p.name not in HELD_OUT, p.name)):
        split = "heldout" if package.name in HELD_OUT else "train"
        paths = [(is_test(p.relative_to(package.root).as_posix()), p) for p in package.files]
        random.Random(keep_seed).shuffle(paths)
        paths.sort(key=lambda item: item[0])
        source = tests = count = 0
        for test, path in paths:
            relative = path.relative_to(package.root).as_posix()
            if SKIPPED_PARTS & set(relative.split("/")[1:-1]) or (
                test and (split == "heldout" or tests > test_share * source)
            ):
                dropped["skipped"] += 1
                continue
            if source + tests > cap:
                dropped["cap"] += 1
                continue
            try:
                raw = path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError):
                dropped["unreadable"] += 1
                continue
            if looks_like_data(path.name, raw):
                dropped["data"] += 1
                continue
            text = normalise(raw)
            verdict = dedup.accept(text, split == "heldout")
            if verdict != "kept" or len(text) < 300:
                dropped[verdict] += 1
                continue
            size = len(text.encode())
            source, tests, count = source + (not test) * size, tests + test * size, count + 1
            documents.append((split, package.name, relative, text))
        if count:
            rows.append(
                {
                    "package": package.name,
                    "version": package.version,
                    "licence": package.licence,
                    "split": split,
                    "files": count,
                    "bytes": source + tests,
                }
            )
    return documents, rows, dropped


def unique_packages(stdlib: Path, sites: list[Path]) -> list[Package]:
    """Every permissive package once, the first site that has it winning."""
    found: dict[str, Package] = {}
    for package in standard_library(stdlib, platform.python_version()):
        found.setdefault(package.name, package)
    for site in sites:
        for package in installed(site):
            if package.name not in SKIPPED:
                found.setdefault(package.name, package)
    return list(found.values())


def _compress(job: tuple[Path, str]) -> int:
    path, text = job
    path.write_bytes(lzma.compress(text.encode(), preset=6))
    return path.stat().st_size


def write(documents, out: Path, shards: int) -> None:
    """Writes the shards: training documents shuffled, held-out ones in reading order."""
    train = [text for split, *_, text in documents if split == "train"]
    random.Random(0).shuffle(train)
    jobs = [(out / f"train-{i:02d}.xz", "\0".join(train[i::shards])) for i in range(shards)]
    jobs.append(
        (
            out / "heldout-00.xz",
            "\0".join(text for split, *_, text in documents if split == "heldout"),
        )
    )
    with multiprocessing.Pool(min(4, multiprocessing.cpu_count())) as pool:
        pool.map(_compress, jobs, chunksize=1)


def main() -> None:
    paths = sysconfig.get_paths()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--stdlib", type=Path, default=Path(paths["stdlib"]))
    parser.add_argument(
        "--site", type=Path, action="append", help="a site-packages folder; may be repeated"
    )
    parser.add_argument("--cap", type=float, default=20.0, help="most megabytes from one package")
    parser.add_argument(
        "--test-share",
        type=float,
        default=0.2,
        help="tests, as a share of a package's other source",
    )
    parser.add_argument("--shards", type=int, default=8)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    packages = unique_packages(args.stdlib, args.site or [Path(paths["purelib"])])
    documents, rows, dropped = collect(packages, int(args.cap * 1e6), args.test_share, 0)
    totals = {
        split: {
            "packages": sum(r["split"] == split for r in rows),
            "files": sum(r["files"] for r in rows if r["split"] == split),
            "bytes": sum(r["bytes"] for r in rows if r["split"] == split),
        }
        for split in ("train", "heldout")
    }
    manifest = {"totals": totals, "dropped": dict(dropped), "packages": rows}
    (args.out / "manifest.json").write_text(json.dumps(manifest, indent=1))
    with (args.out / "heldout_index.jsonl").open("w") as file:
        for split, package, path, text in documents:
            if split == "heldout":
                file.write(json.dumps({"package": package, "file": path, "text": text}) + "\n")
    write(documents, args.out, args.shards)
    print(json.dumps({"totals": totals, "dropped": dict(dropped)}))


if __name__ == "__main__":
    main()
