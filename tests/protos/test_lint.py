"""``buf lint`` passes, with the exceptions that buf.yaml explains."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BUF = "@bufbuild/buf@1.75.0"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("npx") is None, reason="needs npx (Node.js) to run buf")
def test_protos_pass_buf_lint(tmp_path: Path) -> None:
    def buf(folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["npx", "--yes", BUF, *args],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=200,
            env=os.environ | {"npm_config_update_notifier": "false"},
        )

    version = buf(tmp_path, "--version")
    if version.returncode != 0:
        pytest.skip(f"buf could not be fetched: {version.stderr[-300:]}")
    done = buf(ROOT, "lint")
    assert done.returncode == 0, done.stdout + done.stderr

    # The exceptions leave the linter its teeth: an enum without the unspecified zero is refused.
    shutil.copy(ROOT / "buf.yaml", tmp_path)
    shutil.copytree(ROOT / ".buf", tmp_path / ".buf", symlinks=True)
    shutil.copytree(ROOT / "protos", tmp_path / "protos", ignore=shutil.ignore_patterns("*.py*"))
    broken = tmp_path / "protos" / "speculation.proto"
    broken.write_text(broken.read_text().replace("RULE_UNSPECIFIED = 0", "RULE_NONE = 0"))
    done = buf(tmp_path, "lint")
    assert "RULE_NONE" in done.stdout
