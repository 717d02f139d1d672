"""Reading the packed corpus back and turning it into tokens."""

from __future__ import annotations

import lzma
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np


def _open(path: Path) -> str:
    return lzma.decompress(path.read_bytes()).decode()


def documents(corpus: Path, split: str, limit: int | None = None) -> Iterator[str]:
    """Documents of one split ("train" or "heldout"); `limit` caps the shards read.

    Raises FileNotFoundError, naming the folder, if it holds no shard of that split.
    """
    shards = sorted(corpus.glob(f"{split}-*.xz"))[:limit]
    if not shards:
        raise FileNotFoundError(f"no {split} shards in {corpus}: build them with corpus.py")
    for path in shards:
        yield from _open(path).split("\0")


def tokens(corpus: Path, split: str, tokenizer, limit: int | None = None) -> np.ndarray:
    """All documents of a split as one row of uint16 ids, each document begun by END (id 0).

    `tokenizer` is a `tokenizers.Tokenizer`; its threads use every core.
    """
    shards = sorted(corpus.glob(f"{split}-*.xz"))[:limit]
    if not shards:
        raise FileNotFoundError(f"no {split} shards in {corpus}: build them with corpus.py")
    pieces = []
    with ThreadPoolExecutor(len(shards)) as pool:  # lzma releases the interpreter lock
        for text in pool.map(_open, shards):
            for encoding in tokenizer.encode_batch_fast(text.split("\0")):
                pieces.append(np.zeros(1, np.uint16))
                pieces.append(np.array(encoding.ids, dtype=np.uint16))
    return np.concatenate(pieces)
