"""Thousands of short requests leave things where they were.

``OUTRIDER_SOAK_REQUESTS`` sets how many.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import grpc
import pytest

from outrider.protos import generation_pb2 as pb
from outrider.protos import generation_pb2_grpc as rpc
from outrider.protos import speculation_pb2 as internal
from outrider.protos import speculation_pb2_grpc as internal_rpc
from outrider_testing.waiting import until

REQUESTS = int(os.environ.get("OUTRIDER_SOAK_REQUESTS", "4000"))
MOST_DRIFT = REQUESTS * (8 << 20) // 10_000
"""Bytes: what a leak of some 800 in each request would come to."""
AT_ONCE = 32


async def run_requests(target: str, count: int) -> None:
    """``count`` generations of one to three tokens, ``AT_ONCE`` at a time."""
    async with grpc.aio.insecure_channel(target) as channel:
        stub = rpc.GenerationStub(channel)

        async def worker(first: int) -> None:
            for i in range(first, count, AT_ONCE):
                request = pb.GenerateRequest(
                    prompt_token_ids=pb.TokenIds(ids=[1 + i % 200, 5, 9][: 1 + i % 3]),
                    stopping=pb.StopConditions(max_new_tokens=1 + i % 3, ignore_eos=True),
                    speculation=pb.SpeculationParameters(k=i % 3),
                )
                last = None
                async for message in stub.Generate(request, timeout=60):
                    last = message
                assert last is not None and last.HasField("finished")

        await asyncio.gather(*(worker(i) for i in range(AT_ONCE)))


async def state(target: str) -> dict[str, int]:
    """Streams and memory of both services, once they hold nothing."""
    folder = Path(target.removeprefix("unix:")).parent
    found: dict[str, int] = {}
    for name, make in (("base", internal_rpc.VerifyStub), ("draft", internal_rpc.DraftStub)):
        async with grpc.aio.insecure_channel(f"unix:{folder}/{name}") as channel:
            stub = make(channel)

            async def free(stub: Any = stub) -> bool:
                info = await stub.Info(internal.ServiceInfoRequest())
                return info.model.arena_tokens_used == info.sequences == 0

            await until(free)
            info = await stub.Info(internal.ServiceInfoRequest())
            found |= {
                f"{name} streams": info.streams,
                f"{name} memory": info.resident_bytes,
            }
    async with grpc.aio.insecure_channel(target) as channel:
        about = await rpc.GenerationStub(channel).Info(pb.InfoRequest())
        found |= {"running": about.running, "waiting": about.waiting}
    return found


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_services_are_as_before_after_thousands_of_requests(tiny_target: str) -> None:
    await run_requests(tiny_target, 1_000)  # caches and pools grow to their size
    before = await state(tiny_target)
    await run_requests(tiny_target, REQUESTS)
    after = await state(tiny_target)
    print({key: after[key] - before[key] for key in before})
    memory = [key for key in before if key.endswith("memory")]
    assert {k: v for k, v in after.items() if k not in memory} == {
        k: v for k, v in before.items() if k not in memory
    }
    for key in memory:
        assert after[key] - before[key] < MOST_DRIFT, key
