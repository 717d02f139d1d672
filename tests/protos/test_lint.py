"""The exceptions that buf.yaml explains leave the linter its teeth."""

from __future__ import annotations

import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BUF = shutil.which("buf", path=sysconfig.get_path("scripts"))


@pytest.mark.skipif(BUF is None, reason="needs buf, of the extra `dev`")
def test_buf_refuses_an_enum_without_the_unspecified_zero(tmp_path: Path) -> None:
    def lint() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(BUF), "lint"], cwd=tmp_path, capture_output=True, text=True, timeout=60
        )

    shutil.copy(ROOT / "buf.yaml", tmp_path)
    shutil.copytree(ROOT / "typings", tmp_path / "typings", symlinks=True)
    shutil.copytree(ROOT / "protos", tmp_path / "protos", ignore=shutil.ignore_patterns("*.py*"))
    done = lint()
    assert done.returncode == 0, done.stdout + done.stderr

    broken = tmp_path / "protos" / "speculation.proto"
    broken.write_text(broken.read_text().replace("RULE_UNSPECIFIED = 0", "RULE_NONE = 0"))
    done = lint()
    assert done.returncode != 0
    assert "RULE_NONE" in done.stdout
