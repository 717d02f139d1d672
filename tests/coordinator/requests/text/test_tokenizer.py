"""Where tokenizers come from, and what is said when there is none."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from outrider.coordinator.requests.text.tokenizer import load_tokenizer
from outrider.shared.core.errors import ConfigError


def test_tokenizer_from_folder_and_from_file_are_one(tiny_base: Path) -> None:
    text = "def naïve(x):\n    return x"
    from_folder, from_file = (
        load_tokenizer(str(tiny_base)),
        load_tokenizer(str(tiny_base / "tokenizer.json")),
    )
    ids = from_folder.encode(text)
    assert ids == from_file.encode(text)
    assert from_folder.decode(ids) == text
    assert max(ids) < 320
    assert from_folder.decode([10**6]) == ""


def test_tokenizer_special_tokens_are_left_out_of_text(tiny_base: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_base))
    (end,) = tokenizer.encode("<|end|>")
    assert tokenizer.decode([*tokenizer.encode("a"), end]) == "a"


@pytest.mark.parametrize("name", ["/does/not/exist", "./nor/this", "a/b/c"])
def test_tokenizer_that_does_not_exist_says_what_is_expected(name: str) -> None:
    with pytest.raises(ConfigError, match=r"does not exist; must be a folder"):
        load_tokenizer(name)


def test_tokenizer_folder_without_one_and_broken_file_are_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="none in"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="not a tokenizer"):
        load_tokenizer(str(tmp_path))


def test_coordinator_starts_without_torch_and_transformers(tiny_base: Path) -> None:
    program = (
        "import sys; from outrider.coordinator.requests.text import tokenizer; "
        "from outrider.coordinator.server import service; "
        f"tokenizer.load_tokenizer({str(tiny_base)!r}); "
        "heavy = {'torch', 'transformers', 'jinja2'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-P", "-c", program], check=True, timeout=60)
