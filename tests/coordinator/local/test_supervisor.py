"""What can't be served ends all of it with the reason; what served once is started again."""

from __future__ import annotations

import dataclasses
import time
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


@pytest.mark.parametrize("failure", ["", "the device has no memory left for the arena"])
def test_up_starts_again_with_growing_pauses_what_was_ready_once(
    tiny_base: Path, short_folder: Path, capsys: pytest.CaptureFixture[str], failure: str
) -> None:
    """However its starts fail, and however long each of them takes to fail."""
    one = Supervisor(config_of(short_folder, tiny_base))
    child: Any = children.start("base", one._config, one._events)
    child.process.kill()
    child.process.wait()
    long_ago = time.monotonic() - 10 * supervisor.YOUNG
    part = SupervisedPart("base", child, long_ago)
    child.ready = True
    assert one._ended(part) is None
    assert part.backoff == supervisor.FIRST_BACKOFF
    child.ready, child.failure = False, failure
    capsys.readouterr()
    pauses = []
    for _ in range(3 * MOST_STARTS):
        part.started = long_ago
        assert one._ended(part) is None
        pauses.append(part.backoff)
        told = capsys.readouterr().err
        assert told.count(failure or "was killed by SIGKILL") == 1
        assert told.count("base is started again in") == 1
    assert pauses == sorted(pauses)
    assert pauses[0] > supervisor.FIRST_BACKOFF
    assert pauses[-1] == supervisor.LAST_BACKOFF
    child.ready, child.failure = True, ""
    part.started = long_ago
    assert one._ended(part) is None
    assert part.backoff == supervisor.FIRST_BACKOFF
    child.process.stdin.close()
