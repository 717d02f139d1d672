"""The coordinator over the real engines with tiny random models, in one process."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from outrider.protos import generation_pb2 as pb
from outrider.shared.config import DraftConfig, ServeConfig, VerifyConfig
from outrider.shared.rounds import add_to_server
from outrider.shared.rpc import Server

Make = Callable[..., Any]


def start(role: str, config: Any, listen: str) -> tuple[Any, Any]:
    """One service over the engine that its program would build."""
    if role == "draft":
        from outrider.draft_service.__main__ import build
        from outrider.draft_service.service import make_servicer
    else:
        from outrider.verify_service.__main__ import build
        from outrider.verify_service.service import make_servicer
    servicer = make_servicer()
    engine = build(config, lambda text: None)
    servicer.attach(engine)
    name = role.capitalize()
    server = Server(
        ServeConfig(listen=listen, max_calls=8, reflection=False),
        lambda grpc_server: add_to_server(grpc_server, servicer, name),
        [f"outrider.v1.{name}"],
    )
    server.serving()
    return server, engine


@pytest.fixture(scope="module")
def pair(
    tiny_base: Path, tiny_draft: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[SimpleNamespace]:
    folder = tmp_path_factory.mktemp("pair")
    options = {"device": "cpu", "dtype": "float32", "arena_bytes": 32 << 20, "threads": 1}
    with ExitStack() as stack:
        made = {}
        for role, config in (
            ("verify", VerifyConfig(path=str(tiny_base), **options)),
            ("draft", DraftConfig(path=str(tiny_draft), **options)),
        ):
            listen = f"unix:{folder}/{role}"
            server, engine = start(role, config, listen)
            stack.callback(server.drain, grace=0)
            made[role] = SimpleNamespace(listen=listen, engine=engine)
        yield SimpleNamespace(**made, folder=tiny_base)


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


def test_models_greedy_equals_transformers_for_every_k(
    pair: SimpleNamespace, client_of: Make, ask: Make
) -> None:
    prompts = [[5, 9, 40], [7] * 20, list(range(1, 90))]
    wanted = [reference(pair.folder, prompt, 40) for prompt in prompts]

    async def run() -> None:
        settings = {"tokenizer": str(pair.folder), "prefill_chunk": 32}
        async with client_of(pair.verify, pair.draft, **settings) as client:
            for k in [*range(9), None]:
                results = await asyncio.gather(
                    *(
                        client.generate(ask(prompt, 40, k=k, stopping={"ignore_eos": True}))
                        for prompt in prompts
                    )
                )
                assert [result.only.ids for result in results] == wanted

    asyncio.run(run())
    assert pair.verify.engine.info().sequences == pair.draft.engine.info().sequences == 0
    assert pair.verify.engine.info().arena_tokens_used == 0


def test_models_same_seed_same_tokens_whatever_k_and_company(
    pair: SimpleNamespace, client_of: Make, ask: Make
) -> None:
    async def run() -> None:
        async with client_of(pair.verify, pair.draft, tokenizer=str(pair.folder)) as client:

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

    asyncio.run(run())


def test_models_text_and_logprobs_belong_to_the_tokens(
    pair: SimpleNamespace, client_of: Make
) -> None:
    async def run() -> None:
        async with client_of(pair.verify, pair.draft, tokenizer=str(pair.folder)) as client:
            for k in (0, 3):
                request = pb.GenerateRequest(
                    prompt="def add(",
                    stopping=pb.StopConditions(max_new_tokens=25, ignore_eos=True),
                    speculation=pb.SpeculationParameters(k=k),
                    output=pb.OutputOptions(logprobs=2, echo=True),
                )
                one = (await client.generate(request)).only
                from tokenizers import Tokenizer

                backend = Tokenizer.from_file(str(pair.folder / "tokenizer.json"))
                assert one.text == "def add(" + backend.decode(one.ids)
                assert len(one.logprobs) == 25
                for token, entry in zip(one.ids, one.logprobs, strict=True):
                    assert entry.top[0].token_id == token  # greedy: the likeliest
                    assert entry.top[0].logprob == pytest.approx(entry.logprob)

    asyncio.run(run())


def test_models_base_that_dies_and_comes_back_changes_no_token(
    tiny_base: Path, tmp_path: Path, client_of: Make, ask: Make
) -> None:
    config = VerifyConfig(
        path=str(tiny_base), device="cpu", dtype="float32", arena_bytes=8 << 20, threads=1
    )
    listen = f"unix:{tmp_path}/verify"
    server, _ = start("verify", config, listen)
    base = SimpleNamespace(listen=listen)

    async def run() -> Any:
        nonlocal server
        async with client_of(base, tokenizer=str(tiny_base)) as client:
            request = ask([5, 9, 40], 200, stopping={"ignore_eos": True})
            whole = (await client.generate(request)).only.ids
            call = asyncio.create_task(client.generate(request))
            await asyncio.sleep(0.05)
            await asyncio.to_thread(server.drain, grace=0)
            server, _ = await asyncio.to_thread(start, "verify", config, listen)
            assert (await call).only.ids == whole

    try:
        asyncio.run(run())
    finally:
        server.drain(grace=0)
