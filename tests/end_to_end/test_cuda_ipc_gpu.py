"""The link `cuda-ipc` with three processes on a real device."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import grpc
import pytest

from outrider.coordinator import cli, private
from outrider.coordinator.bench import bare_links
from outrider.protos import generation_pb2 as pb
from outrider.protos import generation_pb2_grpc as rpc
from outrider.shared.config import load
from outrider.shared.settings import Setting

pytestmark = pytest.mark.gpu
DEVICE = ["--device", "cuda", "--dtype", "bfloat16"]


@pytest.mark.parametrize("mps", [False, True], ids=["plain", "cuda-mps"])
def test_cuda_ipc_has_the_same_tokens_as_every_other_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mps: bool
) -> None:
    monkeypatch.setattr(bare_links, "ROUNDS", 50)
    written = tmp_path / "links.json"
    links = ["--links", "grpc,shm,cuda-ipc", "--ks", "0,1,2,3", "--repeats", "3"]
    arguments = ["bench", "links", *DEVICE, *links, "--json", str(written)]
    assert cli.main([*arguments, *(["--cuda-mps"] if mps else [])]) == 0
    figures = json.loads(written.read_text())
    for one in figures["variants"]:
        assert one["same_tokens_as_base"] and one["same_tokens_as_in_process"], one
    # In turns without the host the same tokens are proposed and accepted as in its own.
    found = {(one["link"], one["k"]): one["acceptance_rate"] for one in figures["variants"]}
    for k in (1, 2, 3):
        assert found["cuda-ipc", k] == pytest.approx(found["shm", k], abs=0.02)


SETTINGS = {"base.device": "cuda", "draft.device": "cuda", "coordinator.link": "cuda-ipc"}


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=lambda one: one.name)
def test_cuda_ipc_draft_that_is_gone_leaves_the_text_as_it_was(how: signal.Signals) -> None:
    flags = [Setting(*name.split("."), value, "test") for name, value in SETTINGS.items()]
    request = pb.GenerateRequest(
        prompt="def main():",
        stopping=pb.StopConditions(max_new_tokens=900, ignore_eos=True),
        speculation=pb.SpeculationParameters(k=3),
    )
    with private.deployment(load(flags=flags)) as target, grpc.insecure_channel(target) as channel:
        stub = rpc.GenerationStub(channel)
        wanted = [id for one in stub.Generate(request) for id in one.delta.token_ids]
        listed = subprocess.run(
            ["pgrep", "-f", "outrider.draft_service"], capture_output=True, text=True, check=True
        )
        (draft,) = [int(one) for one in listed.stdout.split()]
        found: list[int] = []
        try:
            for one in stub.Generate(request):
                before = len(found)
                found += one.delta.token_ids
                if before < 40 <= len(found):
                    os.kill(draft, how)
        finally:
            if how == signal.SIGSTOP:
                os.kill(draft, signal.SIGCONT)
        assert len(wanted) == 900 and found == wanted
