"""The pair that ships, through the public API of three processes, against Hugging Face.

``OUTRIDER_PAIR_PROMPTS`` sets how many of the held-out prompts; the slow lane takes all.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence

import grpc
import pytest

from outrider.protos import generation_pb2 as pb
from outrider.protos import generation_pb2_grpc as rpc
from outrider.shared import pair

NEW_TOKENS = 128
PROMPTS = int(os.environ.get("OUTRIDER_PAIR_PROMPTS", "24"))


async def stream(
    stub: rpc.GenerationStub, prompt: str, **speculation: int
) -> tuple[list[int], pb.Finished]:
    """All token ids of one greedy generation, and its last message."""
    request = pb.GenerateRequest(
        prompt=prompt,
        stopping=pb.StopConditions(max_new_tokens=NEW_TOKENS, ignore_eos=True),
        speculation=pb.SpeculationParameters(**speculation),
    )
    tokens: list[int] = []
    finished = None
    async for message in stub.Generate(request, timeout=600):
        tokens.extend(message.delta.token_ids)
        if message.HasField("finished"):
            finished = message.finished
    assert finished is not None
    return tokens, finished


async def stream_all(
    target: str, prompts: Sequence[str], **speculation: int
) -> list[tuple[list[int], pb.Finished]]:
    """``stream`` for all prompts, eight at once."""
    gate = asyncio.Semaphore(8)
    async with grpc.aio.insecure_channel(target) as channel:
        stub = rpc.GenerationStub(channel)

        async def one(prompt: str) -> tuple[list[int], pb.Finished]:
            async with gate:
                return await stream(stub, prompt, **speculation)

        return list(await asyncio.gather(*(one(prompt) for prompt in prompts)))


def hugging_face(prompts: Sequence[str]) -> list[list[int]]:
    """Greedy continuations by transformers' own ``generate`` on the base alone, in fp32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)  # the services under test want the other cores
    folder = str(pair.path("base"))
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    made: list[list[int]] = []
    for start in range(0, len(prompts), 32):
        batch = tokenizer(list(prompts[start : start + 32]), return_tensors="pt", padding=True)
        output = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
        )
        made.extend(output[:, batch["input_ids"].shape[1] :].tolist())
    return made


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_pair_greedy_equals_hugging_face(bundled_target: str) -> None:
    prompts = [str(entry["text"]) for entry in pair.heldout_prompts()][:PROMPTS]

    # At the same time: one keeps the services busy, the other a core here.
    streams = stream_all(bundled_target, prompts, k=4)
    ours, expected = await asyncio.gather(streams, asyncio.to_thread(hugging_face, prompts))
    assert len(prompts) == PROMPTS
    different = [i for i in range(PROMPTS) if ours[i][0] != expected[i]]
    assert different == []
    assert all(f.usage.completion_tokens == NEW_TOKENS for _, f in ours)
    # The model card's promise, on prompts from packages that the pair has not seen.
    proposed = sum(finished.speculation.proposed for _, finished in ours)
    accepted = sum(finished.speculation.accepted for _, finished in ours)
    assert accepted / proposed >= 0.6


@pytest.mark.parametrize("k", [0, 1, 8])
async def test_pair_tokens_do_not_depend_on_k(bundled_target: str, k: int) -> None:
    prompts = [str(entry["text"]) for entry in pair.heldout_prompts()][:4]
    adaptive = await stream_all(bundled_target, prompts)
    fixed = await stream_all(bundled_target, prompts, k=k)
    assert [tokens for tokens, _ in fixed] == [tokens for tokens, _ in adaptive]
