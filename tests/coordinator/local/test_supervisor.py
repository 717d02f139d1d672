"""What can't be served ends all of it with the reason; what served once is started again."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from outrider.coordinator.local import children, supervisor
from outrider.coordinator.local.supervisor import MOST_STARTS, SupervisedPart, Supervisor
from outrider.shared.config.schema import Config, load


def config_of(folder: Path, base: Path) -> Config:
    config = load(None, flags={})
    return dataclasses.replace(
        config,
        base=dataclasses.replace(config.base, path=str(base), listen=f"unix:{folder}/b"),
        draft=dataclasses.replace(config.draft, enabled=False),
        coordinator=dataclasses.replace(
            config.coordinator,
            listen=f"unix:{folder}/c",
            base_target=f"unix:{folder}/b",
            draft_target=None,
        ),
    )


def test_up_ends_with_the_reason_where_the_weights_are_not_there(
    tiny_base: Path, tmp_path: Path, short_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in tiny_base.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    assert Supervisor(config_of(short_folder, tmp_path)).run() == 1
    told = capsys.readouterr().err
    assert "model.safetensors is a pointer of Git LFS" in told
    assert "started again" not in told
    assert "Traceback" not in told


def test_up_ends_after_some_starts_of_what_is_never_ready(
    tiny_base: Path,
    short_folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    programs = dict(children.PROGRAMS) | {"base": ("no_such_module",)}
    monkeypatch.setattr(children, "PROGRAMS", programs)
    monkeypatch.setattr(supervisor, "FIRST_BACKOFF", 0.01)
    monkeypatch.setattr(supervisor, "LAST_BACKOFF", 0.01)
    assert Supervisor(config_of(short_folder, tiny_base)).run() == 1
    told = capsys.readouterr().err
    assert told.count("base started again") == MOST_STARTS - 1
    assert f"base has failed {MOST_STARTS} times and was never ready" in told
    assert "No module named no_such_module" in told


def test_up_starts_again_for_ever_what_was_ready_once(
    tiny_base: Path, short_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = Supervisor(config_of(short_folder, tiny_base))
    child: Any = children.start("base", one._config, one._events)
    child.process.kill()
    child.process.wait()
    part = SupervisedPart("base", child, 0.0)
    child.ready = True
    for _ in range(3 * MOST_STARTS):
        assert one._ended(part) is None
        child.ready = False  # the later ones die young
    child.process.stdin.close()
