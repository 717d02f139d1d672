"""The tokens that come out are the base's own, whatever the draft, K and company."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from outrider.protos import generation_pb2 as pb
from outrider_testing import fakes
from outrider_testing.clients import ask


@pytest.mark.parametrize("agreement", [0, 70, 100])
async def test_service_tokens_equal_plain_decoding_for_every_k(
    services: Callable[..., Any], client_of: Callable[..., Any], agreement: int
) -> None:
    base, draft = services("verify"), services("draft", agreement=agreement)
    prompt = [5, 6, 7, 8]

    async with client_of(base, draft) as client:
        for k in [*range(9), None]:
            result = (await client.generate(ask(prompt, 40, k=k))).only
            assert result.ids == fakes.plain(prompt, 40)
            assert result.finished.reason == pb.FINISH_REASON_MAX_TOKENS
            assert result.finished.usage.completion_tokens == 40
            speculation = result.finished.speculation
            if agreement == 100:
                assert speculation.accepted == speculation.proposed
            if agreement == 0:
                assert speculation.accepted == 0
            if k == 0:
                assert speculation.proposed == 0
    assert base.toy.live == draft.toy.live == 0
