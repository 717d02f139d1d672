"""Whether the files of a checkpoint are whole, before anything is read from them."""

from __future__ import annotations

import json
import struct
import zipfile
from pathlib import Path

from outrider.shared.core.errors import ConfigError

_POINTER = b"version https://git-lfs"
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SINGLE = ("model.safetensors", "pytorch_model.bin")


def check_weight_files(folder: Path) -> None:
    """Raises ``ConfigError`` naming the file that is not there, not whole or not the real one.

    Leaves a folder without any of them to whoever loads it.
    """
    for file in weight_files(folder):
        _check(file)


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights; none where there are none by the usual names.

    As transformers takes them: safetensors before pickles, one file before an index. Raises
    ``ConfigError`` for an index that is none, or names what is not there.
    """
    for index, single in zip(_INDEXES, _SINGLE, strict=True):
        if (folder / single).is_file():
            return [folder / single]
        if (folder / index).is_file():
            return _shards(folder, folder / index)
    return []


def _shards(folder: Path, index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(_told(index, _reason(index) or "is no index of weights")) from None
    shards = [folder / str(name) for name in names]
    for shard in shards:
        if not shard.is_file():
            raise ConfigError(_told(shard, f"is not there, but {index.name} names it"))
    return shards


def _check(file: Path) -> None:
    reason = _reason(file)
    if reason is None:
        broken = _broken_safetensors if file.suffix == ".safetensors" else _broken_archive
        reason = broken(file)
    if reason is not None:
        raise ConfigError(_told(file, reason))


def _told(file: Path, reason: str) -> str:
    return f"path: {file} {reason}: fetch the file again"


def _reason(file: Path) -> str | None:
    """What is wrong with any file of weights; None where nothing is."""
    with file.open("rb") as stream:
        head = stream.read(len(_POINTER))
    if not head:
        return "is empty"
    if head == _POINTER:
        return "is a pointer of Git LFS, not the file itself (git lfs pull)"
    return None


def _broken_archive(file: Path) -> str | None:
    """What is wrong with a file of torch.save; None where nothing can be seen from outside.

    Its table of contents stands at its end. Older ones are a plain pickle.
    """
    with file.open("rb") as stream:
        archive = stream.read(4) == b"PK\x03\x04"
    return "is cut off" if archive and not zipfile.is_zipfile(file) else None


def _broken_safetensors(file: Path) -> str | None:
    """What is wrong with its header or its length; None where nothing is."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        first = stream.read(8)
        length = struct.unpack("<Q", first)[0] if len(first) == 8 else size
        if 8 + length > size:
            return "is cut off within its header, or no safetensors file"
        try:
            entries = json.loads(stream.read(length))
            ends = [one["data_offsets"][1] for name, one in entries.items() if name[:2] != "__"]
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            return "has a header that is not one of safetensors"
    wanted = 8 + length + max(ends, default=0)
    return f"is cut off: {size} of {wanted} bytes" if size < wanted else None
