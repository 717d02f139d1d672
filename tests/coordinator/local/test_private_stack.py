"""Coordinators that come and go over services that stay."""

from __future__ import annotations

from pathlib import Path

import grpc

from outrider.coordinator.local.private_stack import deployments, fresh_coordinator
from outrider.protos import generation_pb2 as pb
from outrider.protos import generation_pb2_grpc as rpc
from outrider.shared.config.schema import Config, DraftConfig, VerifyConfig


def test_fresh_coordinators_share_services_and_leave_nothing() -> None:
    config = Config(
        base=VerifyConfig(path="paced:step=0us", calibrate=False),
        draft=DraftConfig(path="paced:step=0us,agreement=0.5", calibrate=False),
    )
    request = pb.GenerateRequest(
        prompt_token_ids=pb.TokenIds(ids=[5, 6, 7]),
        stopping=pb.StopConditions(max_new_tokens=20),
    )
    texts, targets = [], []
    with deployments(config, {}) as deployed:
        folder = Path(deployed.base.removeprefix("unix:")).parent
        for _ in range(2):
            with fresh_coordinator(deployed) as target:
                targets.append(target)
                with grpc.insecure_channel(target) as channel:
                    stub = rpc.GenerationStub(channel)
                    texts.append(
                        [t for m in stub.Generate(request, timeout=60) for t in m.delta.token_ids]
                    )
            assert not Path(target.removeprefix("unix:")).exists()
        assert Path(deployed.base.removeprefix("unix:")).exists()
    assert texts[0] == texts[1] and len(texts[0]) == 20
    assert len(set(targets)) == 2
    assert not folder.exists()
