"""The command line, end to end: three real processes over a tiny random pair."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from outrider.coordinator.cli import main
from outrider.protos import generation_pb2 as pb
from outrider.protos import generation_pb2_grpc as stubs
from outrider_testing.checkpoints import write_llama
from outrider_testing.waiting import soon

CLI = "outrider.coordinator.cli.main"
Spawn = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def folder(short_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The temporary folder of all that the test starts; empty again at the end."""
    yield short_folder
    assert list(short_folder.iterdir()) == [], "files were left behind"
    assert processes_naming(str(short_folder)) == [], "processes were left behind"


def processes_naming(text: str) -> list[int]:
    """Processes whose environment names ``text``."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                if text.encode() in (entry / "environ").read_bytes():
                    state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                    if state != "Z":
                        found.append(int(entry.name))
            except OSError:
                continue
    return found


def pair(base: Path, draft: Path) -> list[str]:
    return ["--base", str(base), "--draft", str(draft), "--device", "cpu"]


def test_cli_json_has_everything_and_the_tokens_of_the_base_alone(
    spawn: Spawn, folder: Path, tiny_base: Path, tiny_draft: Path
) -> None:
    def generated(*more: str) -> tuple[dict[str, Any], str]:
        args = [*pair(tiny_base, tiny_draft), "--max-new-tokens", "12", "--ignore-eos"]
        args += ["--temperature", "0.8", "--seed", "5", "--json", *more]
        process = spawn(CLI, "generate", "def add(", *args, env={"TMPDIR": str(folder)})
        out, err = process.communicate(timeout=200)
        assert process.returncode == 0, err
        return json.loads(out), err

    made, err = generated("--k", "3")
    assert set(made) == {"text", "token_ids", "finish_reason", "usage", "seed", "speculation"}
    assert len(made["token_ids"]) == 12
    assert made["finish_reason"] == "max_tokens"
    assert made["usage"]["completion_tokens"] == 12
    assert made["seed"] == 5
    speculation = made["speculation"]
    assert speculation["proposed"] == sum(speculation["proposed_per_position"]) > 0
    assert speculation["accepted"] == sum(speculation["accepted_per_position"])
    assert speculation["acceptance_rate"] == pytest.approx(
        speculation["accepted"] / speculation["proposed"]
    )
    assert speculation["rounds"] * speculation["mean_accepted_length"] == pytest.approx(12, abs=3)
    assert set(speculation["seconds"]) == {
        *("queue", "prefill", "draft", "verify", "overhead", "total")
    }
    for part in ("base", "draft", "coordinator"):
        assert f"{part}: ready" in err, "progress is shown"
    alone, _ = generated("--no-draft")
    assert alone["token_ids"] == made["token_ids"]
    assert alone["speculation"]["proposed"] == 0


@pytest.mark.parametrize(
    ("moment", "number", "status"),
    [
        ("loading", signal.SIGINT, 130),
        ("streaming", signal.SIGINT, 130),
        # One handler serves all three; each of the others at one moment.
        ("loading", signal.SIGTERM, 143),
        ("streaming", signal.SIGHUP, 129),
    ],
)
def test_cli_interrupted_generate_leaves_nothing(
    spawn: Spawn,
    folder: Path,
    tiny_base: Path,
    tiny_draft: Path,
    number: int,
    status: int,
    moment: str,
) -> None:
    process = spawn(
        *(CLI, "generate", "def f", *pair(tiny_base, tiny_draft)),
        *("--max-new-tokens", "900", "--ignore-eos", "--temperature", "1"),
        env={"TMPDIR": str(folder)},
    )
    if moment == "streaming":
        assert process.stdout is not None and process.stdout.read(1)
    else:
        soon(lambda: list(folder.glob("*/coordinator")))  # the last to start listens
    process.send_signal(number)
    process.communicate(timeout=200)
    assert process.returncode == status


def test_cli_killed_generate_leaves_no_processes(
    spawn: Spawn, short_folder: Path, tiny_base: Path, tiny_draft: Path
) -> None:
    process = spawn(
        *(CLI, "generate", "def f", *pair(tiny_base, tiny_draft)),
        *("--max-new-tokens", "900", "--ignore-eos"),
        env={"TMPDIR": str(short_folder)},
    )
    assert process.stdout is not None and process.stdout.read(1)
    assert len(processes_naming(str(short_folder))) == 4
    process.kill()
    soon(lambda: not processes_naming(str(short_folder)))


def test_cli_closed_output_ends_quietly(
    spawn: Spawn, folder: Path, tiny_base: Path, tiny_draft: Path
) -> None:
    process = spawn(
        *(CLI, "generate", "def f", *pair(tiny_base, tiny_draft)),
        *("--max-new-tokens", "900", "--ignore-eos"),
        env={"TMPDIR": str(folder)},
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.read(1)
    process.stdout.close()
    errors = process.stderr.read()
    assert process.wait(200) == 128 + signal.SIGPIPE
    assert "Traceback" not in errors and "Error" not in errors


@pytest.mark.parametrize("flag", ["--base", "--draft"])
def test_cli_missing_model_is_told_with_its_path(
    spawn: Spawn, folder: Path, tiny_base: Path, tiny_draft: Path, flag: str
) -> None:
    for path, words in (("/no/such/model", "/no/such/model"), (str(folder), str(folder))):
        process = spawn(
            *(CLI, "generate", "x", *pair(tiny_base, tiny_draft), flag, path),
            env={"TMPDIR": str(folder)},
        )
        _, err = process.communicate(timeout=200)
        assert process.returncode == 1, err
        assert words in err and "Traceback" not in err


def test_cli_vocabulary_mismatch_names_both_fingerprints(
    spawn: Spawn, folder: Path, tiny_base: Path, tmp_path: Path
) -> None:
    other = write_llama(tmp_path / "other", layers=1, hidden=32, seed=3)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[1:3]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    process = spawn(CLI, "generate", "x", *pair(tiny_base, other), env={"TMPDIR": str(folder)})
    _, err = process.communicate(timeout=200)
    assert process.returncode == 1
    assert "do not share a vocabulary" in err
    assert err.count("fingerprint") >= 2 and "--no-draft" in err


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--k", "-1"], "got '-1'; must be a whole number >= 0"),
        (["--k", "17"], "--k: got 17; must be a whole number from 0 to 16"),
        (["--max-new-tokens", "0"], "must be a whole number >= 1"),
        (["--temperature", "nan"], "got 'nan'; must be a number >= 0"),
        (["--temperature", "-1"], "must be a number >= 0"),
        (["--top-p", "0"], "must be a number > 0 and <= 1"),
        (["--top-p", "1.5"], "must be a number > 0 and <= 1"),
        (["--min-p", "1"], "must be a number >= 0 and < 1"),
        (["--top-k", "-1"], "must be a whole number from 0"),
        (["--seed", "-1"], "must be a whole number from 0"),
        (["--device", "gpu"], "device = 'gpu'; must be auto, cpu, mps, cuda or cuda:N"),
        (["--dtype", "int3"], "dtype = 'int3'; must be one of auto, float32"),
        (["--config", "/no/such.toml"], "/no/such.toml: can't be read"),
        (["--rule", "best"], "invalid choice: 'best'"),
    ],
)
def test_cli_bad_flags_are_refused_before_anything_starts(
    args: list[str],
    words: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a process was started"))
    try:
        status = main.main(["generate", "x", *args])
    except SystemExit as end:
        status = int(end.code or 0)
    assert status == 2
    assert words in capsys.readouterr().err


def test_cli_empty_prompt_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["generate", ""]) == 2
    assert "PROMPT: got ''" in capsys.readouterr().err


def test_cli_unreachable_target_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        assert main.main(["generate", "x", "--target", "unix:/no/such"]) == 1
        assert main.main(["info", "--target", "unix:/no/such"]) == 1
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert "UNAVAILABLE" in capsys.readouterr().err


def test_cli_serve_refuses_bad_flags_and_taken_addresses(spawn: Spawn, tiny_base: Path) -> None:
    process = spawn(CLI, "serve", "verify", "--max-k", "65")
    _, err = process.communicate(timeout=200)
    assert process.returncode == 2
    assert "base.max_k = '65'; must be a whole number >= 0 and <= 64" in err
    process = spawn(CLI, "serve", "draft", "--path", str(tiny_base), "--listen", "nowhere")
    _, err = process.communicate(timeout=200)
    assert process.returncode == 1
    assert "listen = 'nowhere'; must be host:port" in err


def test_cli_up_serves_restarts_and_ends_clean(
    spawn: Spawn, folder: Path, tiny_base: Path, tiny_draft: Path, tmp_path: Path
) -> None:
    file = tmp_path / "outrider.toml"
    file.write_text(
        f'[base]\npath = "{tiny_base}"\ndevice = "cpu"\nlisten = "unix:{folder}/b"\n'
        f'[draft]\npath = "{tiny_draft}"\ndevice = "cpu"\nlisten = "unix:{folder}/d"\n'
        f'[coordinator]\nlisten = "unix:{folder}/c"\ndefault_k = 4\n'
    )
    log = tmp_path / "log"
    with log.open("w") as stream:
        process = spawn(CLI, "up", "--config", str(file), stderr=stream)
    target = f"unix:{folder}/c"

    def pids(module: str) -> list[int]:
        return [
            pid
            for pid in processes_naming(str(folder))
            if module.encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
        ]

    soon(lambda: "all services are ready" in log.read_text())
    undisturbed = generate(target)
    (draft,) = pids("draft_service")
    os.kill(draft, signal.SIGKILL)
    assert generate(target) == undisturbed, "rounds go on without the draft"
    soon(lambda: log.read_text().count("draft       | ready") == 2)
    (base,) = pids("verify_service")
    os.kill(base, signal.SIGKILL)
    assert generate(target) == undisturbed, "the request waits for the base to come back"
    assert "killed by SIGKILL" in log.read_text()
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0


def test_cli_killed_up_leaves_no_processes(
    spawn: Spawn, short_folder: Path, tiny_base: Path, tmp_path: Path
) -> None:
    env = {
        "OUTRIDER_BASE_LISTEN": f"unix:{short_folder}/b",
        "OUTRIDER_COORDINATOR_LISTEN": f"unix:{short_folder}/c",
    }
    log = tmp_path / "log"
    with log.open("w") as stream:
        process = spawn(
            *(CLI, "up", "--no-draft", "--base", str(tiny_base), "--device", "cpu"),
            env=env,
            stderr=stream,
        )
    soon(lambda: "all services are ready" in log.read_text())
    process.kill()
    soon(lambda: not processes_naming(str(short_folder)))
    assert list(short_folder.iterdir()) == [], "sockets were left behind"


def test_cli_up_ends_when_a_part_cannot_start(spawn: Spawn, folder: Path, tiny_base: Path) -> None:
    env = {
        "OUTRIDER_BASE_LISTEN": f"unix:{folder}/b",
        "OUTRIDER_COORDINATOR_LISTEN": f"unix:{folder}/c",
    }
    process = spawn(CLI, "up", "--no-draft", "--base", "/no/such", env=env)
    _, err = process.communicate(timeout=200)
    assert process.returncode == 1
    assert "/no/such" in err


def generate(target: str) -> list[int]:
    """Forty greedy tokens."""
    request = pb.GenerateRequest(
        prompt="def add(left",
        stopping=pb.StopConditions(max_new_tokens=40, ignore_eos=True),
    )
    with grpc.insecure_channel(target) as channel:
        return [
            token
            for one in stubs.GenerationStub(channel).Generate(request, timeout=60)
            for token in one.delta.token_ids
        ]
