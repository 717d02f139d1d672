"""The coordinator over the real engines with tiny random models, in one process."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from outrider.protos import generation_pb2 as pb
from outrider.shared.config.schema import DraftConfig, VerifyConfig
from outrider_testing.clients import ask
from outrider_testing.model_services import start_model
from outrider_testing.waiting import until

Make = Callable[..., Any]


def reference(folder: Path, prompt: list[int], count: int) -> list[int]:
    """What transformers' generate writes with the base alone."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()
    with torch.inference_mode():
        out = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    return out[0, len(prompt) :].tolist()


async def test_models_greedy_equals_transformers_for_every_k(
    model_pair: SimpleNamespace, client_of: Make
) -> None:
    prompts = [[5, 9, 40], [7] * 20, list(range(1, 90))]
    wanted = [reference(model_pair.folder, prompt, 40) for prompt in prompts]

    settings = {"tokenizer": str(model_pair.folder), "prefill_chunk": 32}
    async with client_of(model_pair.verify, model_pair.draft, **settings) as client:
        for k in [*range(9), None]:
            results = await asyncio.gather(
                *(
                    client.generate(ask(prompt, 40, k=k, stopping={"ignore_eos": True}))
                    for prompt in prompts
                )
            )
            assert [result.only.ids for result in results] == wanted
    assert (
        model_pair.verify.engine.info().sequences == model_pair.draft.engine.info().sequences == 0
    )
    assert model_pair.verify.engine.info().arena_tokens_used == 0


async def test_models_same_seed_same_tokens_whatever_k_and_company(
    model_pair: SimpleNamespace, client_of: Make
) -> None:
    async with client_of(
        model_pair.verify, model_pair.draft, tokenizer=str(model_pair.folder)
    ) as client:

        def one(seed: int, k: int | None) -> pb.GenerateRequest:
            return ask(
                [5, 9, 40],
                30,
                k=k,
                temperature=0.9,
                top_k=50,
                repetition_penalty=1.2,
                seed=seed,
                stopping={"ignore_eos": True},
            )

        alone = (await client.generate(one(1, 0))).only.ids
        for k in (1, 4, 8, None):
            results = await asyncio.gather(
                *(client.generate(one(seed, k)) for seed in (1, 2, 1, 3))
            )
            ids = [result.only.ids for result in results]
            assert ids[0] == ids[2] == alone
            assert ids[1] != alone and ids[3] != alone


async def test_models_text_and_logprobs_belong_to_the_tokens(
    model_pair: SimpleNamespace, client_of: Make
) -> None:
    async with client_of(
        model_pair.verify, model_pair.draft, tokenizer=str(model_pair.folder)
    ) as client:
        for k in (0, 3):
            request = pb.GenerateRequest(
                prompt="def add(",
                stopping=pb.StopConditions(max_new_tokens=25, ignore_eos=True),
                speculation=pb.SpeculationParameters(k=k),
                output=pb.OutputOptions(logprobs=2, echo=True),
            )
            one = (await client.generate(request)).only
            from tokenizers import Tokenizer

            backend = Tokenizer.from_file(str(model_pair.folder / "tokenizer.json"))
            assert one.text == "def add(" + backend.decode(one.ids)
            assert len(one.logprobs) == 25
            for token, entry in zip(one.ids, one.logprobs, strict=True):
                assert entry.top[0].token_id == token  # greedy: the likeliest
                assert entry.top[0].logprob == pytest.approx(entry.logprob)


async def test_models_base_that_dies_and_comes_back_changes_no_token(
    tiny_base: Path, tmp_path: Path, client_of: Make
) -> None:
    config = VerifyConfig(
        path=str(tiny_base), device="cpu", dtype="float32", arena_bytes=8 << 20, threads=1
    )
    listen = f"unix:{tmp_path}/verify"
    first = start_model("verify", config, listen)
    server = first.server
    base = SimpleNamespace(listen=listen)

    try:
        async with client_of(base, tokenizer=str(tiny_base)) as client:
            request = ask([5, 9, 40], 200, stopping={"ignore_eos": True})
            whole = (await client.generate(request)).only.ids
            rows = sum(first.rows)
            call = asyncio.create_task(client.generate(request))
            await until(lambda: sum(first.rows) > rows + 20)
            await asyncio.to_thread(server.drain, grace=0)
            server = (await asyncio.to_thread(start_model, "verify", config, listen)).server
            assert (await call).only.ids == whole
    finally:
        server.drain(grace=0)


class Slowly:
    """A runner of a draft that takes its time, other than the model's."""

    def __init__(self, runner: Any, seconds: float) -> None:
        self._runner, self._seconds = runner, seconds

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def forward(self, spans: Any) -> Any:
        time.sleep(self._seconds)
        return self._runner.forward(spans)


async def test_rejection_with_k_and_seed_is_replayed_however_long_the_draft_takes(
    tiny_base: Path, near_base: Path, client_of: Make, tmp_path: Path
) -> None:
    """Prompts of many chunks and samples that share one: the draft is done with them before the
    base, or long after."""
    options = {"device": "cpu", "dtype": "float32", "arena_bytes": 16 << 20, "threads": 1}
    settings = {"tokenizer": str(tiny_base), "prefill_chunk": 32, "draft_patience_seconds": 30.0}
    verify = start_model(
        "verify", VerifyConfig(path=str(tiny_base), **options), f"unix:{tmp_path}/verify"
    )
    told = []
    try:
        for number, seconds in enumerate((0.0, 0.03)):
            draft = start_model(
                "draft",
                DraftConfig(path=str(near_base), **options),
                f"unix:{tmp_path}/draft{number}",
                runner=lambda plain: Slowly(plain, seconds),  # noqa: B023
            )
            try:
                async with client_of(verify, draft, **settings) as client:
                    told.append([await _rejected(client, *one) for one in ((300, 1), (80, 3))])
                    told[-1].append(await _rejected(client, 12, 3))
                # Nor does it stand still over more rows than it takes in at a time.
                assert max(draft.rows) <= 32
            finally:
                draft.server.drain(grace=0)
    finally:
        verify.server.drain(grace=0)
    assert told[0] == told[1]


async def _rejected(client: Any, length: int, samples: int) -> list[tuple[list[int], int]]:
    """The tokens and the rounds of each sample, after a prompt of that length."""
    asked = ask(
        [(7 * i) % 300 for i in range(length)],
        12,
        k=3,
        rule=pb.ACCEPTANCE_RULE_REJECTION,
        temperature=1.2,
        seed=9,
        stopping={"ignore_eos": True},
        output={"num_samples": samples},
    )
    result = await client.generate(asked)
    assert result.error is None
    made = [result.samples[index] for index in range(samples)]
    assert all(one.finished.speculation.accepted for one in made)
    return [(one.ids, one.finished.speculation.rounds) for one in made]


async def test_a_base_of_windows_alone_serves_more_than_its_rings_hold(
    tmp_path: Path, short_folder: Path, client_of: Make, tiny_base: Path
) -> None:
    from outrider_testing.architectures import tiny

    tiny("mistral", {"vocab_size": 320, "max_position_embeddings": 400}).save_pretrained(tmp_path)
    options = {"device": "cpu", "arena_bytes": 16 << 20, "threads": 1, "max_sequences": 1}
    config = VerifyConfig(path=str(tmp_path), prefill_chunk=24, **options)
    verify = start_model("verify", config, f"unix:{short_folder}/verify")
    try:
        async with client_of(verify, tokenizer=str(tiny_base), prefill_chunk=24) as client:
            prompt = list(range(1, 200))
            result = await client.generate(ask(prompt, 40, stopping={"ignore_eos": True}))
            assert result.only.ids == reference(tmp_path, prompt, 40)
            info = await client.info()
            assert info.base.arena_tokens < 239 < info.base.arena_longest
    finally:
        verify.server.drain(grace=0)
