"""Cuts prompts out of held-out packages, each ending where a person would let the model go on.

    python prompts.py --corpus FOLDER --out heldout_prompts.json

`heldout_index.jsonl` in FOLDER is what corpus.py wrote beside the shards.
"""

from __future__ import annotations

import argparse
import ast
import collections
import json
import random
from pathlib import Path


def candidates(text: str) -> list[str]:
    """Function beginnings in one file: (a) up to the docstring, (b) up to the middle of the body.

    Each begins at the start of the `def` line or of its decorators and ends with the indentation
    of the next statement, because the tokenizer keeps a line break and its indentation together.
    """
    lines, found = text.split("\n"), []
    try:
        tree = ast.parse(text)
    except SyntaxError:
        return []
    for node in ast.walk(tree):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or len(node.body) < 2:
            continue
        first = min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1
        documented = ast.get_docstring(node) is not None
        if documented:
            found.append(
                "\n".join(lines[first : node.body[0].end_lineno])
                + "\n"
                + " " * node.body[1].col_offset
            )
        middle = node.body[len(node.body) // 2]
        indent = " " * middle.col_offset
        found.append("\n".join(lines[first : middle.lineno - 1]).rstrip() + "\n" + indent)
    if text.startswith(('"""', "import", "from")):
        found.append("\n".join(lines[:12]).rstrip())
    return found


def main() -> None:
    from tokenizers import Tokenizer

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True, help="tokenizer.json")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=256)
    args = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(args.tokenizer))
    licences = {
        row["package"]: row["licence"]
        for row in json.loads((args.corpus / "manifest.json").read_text())["packages"]
    }
    pool = collections.defaultdict(list)
    for line in (args.corpus / "heldout_index.jsonl").read_text().splitlines():
        entry = json.loads(line)
        for text in candidates(entry["text"]):
            if text.isascii() and 32 <= len(tokenizer.encode(text).ids) <= 96:
                pool[entry["package"]].append((entry["file"], text))
    chosen, rng, per_file = [], random.Random(0), collections.Counter()
    for items in pool.values():
        rng.shuffle(items)
    while len(chosen) < args.count and any(pool.values()):
        for package, items in sorted(pool.items()):
            while items:
                file, text = items.pop()
                if per_file[file] < 6 and not any(text in c["text"] for c in chosen):
                    per_file[file] += 1
                    chosen.append(
                        {
                            "package": package,
                            "licence": licences[package],
                            "file": file,
                            "text": text,
                        }
                    )
                    break
    chosen = sorted(chosen[: args.count], key=lambda c: (c["package"], c["file"]))
    args.out.write_text(json.dumps(chosen, indent=0) + "\n")
    print(f"{len(chosen)} prompts from {len(pool)} packages, {args.out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
