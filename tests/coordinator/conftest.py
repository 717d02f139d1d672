"""A coordinator over toy services, in one process, through real gRPC."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import grpc
import grpc.aio
import pytest

from outrider.coordinator.server import service
from outrider.protos import generation_pb2 as pb
from outrider.protos import generation_pb2_grpc as pb_grpc
from outrider.shared.config.schema import CoordinatorConfig, DraftConfig, ServeConfig, VerifyConfig


class Result:
    """What one call gave."""

    def __init__(self) -> None:
        self.samples: dict[int, SimpleNamespace] = {}
        self.messages: list[pb.GenerateResponse] = []
        self.error: grpc.aio.AioRpcError | None = None

    def add(self, message: pb.GenerateResponse) -> None:
        self.messages.append(message)
        one = self.samples.setdefault(
            message.sample_index,
            SimpleNamespace(
                started=None, text="", ids=[], origins=[], logprobs=[], finished=None, deltas=0
            ),
        )
        kind = message.WhichOneof("event")
        assert one.finished is None, "nothing comes after Finished"
        if kind == "started":
            assert one.started is None
            one.started = message.started
        else:
            assert one.started is not None, "Started comes first"
        if kind == "delta":
            one.deltas += 1
            one.text += message.delta.text
            one.ids.extend(message.delta.token_ids)
            one.origins.extend(message.delta.origins)
            one.logprobs.extend(message.delta.logprobs)
        elif kind == "finished":
            one.finished = message.finished

    @property
    def only(self) -> Any:
        """The single sample; raises the call's error where there is one."""
        if self.error is not None:
            raise self.error
        (one,) = self.samples.values()
        return one


class Client:
    """A client of the coordinator under test."""

    def __init__(self, channel: grpc.aio.Channel, target: str, stop: asyncio.Event) -> None:
        self.stub = pb_grpc.GenerationStub(channel)
        self.target = target
        self.stop = stop

    async def info(self) -> pb.InfoResponse:
        return await self.stub.Info(pb.InfoRequest())

    async def generate(self, request: pb.GenerateRequest, **options: Any) -> Result:
        """Runs one request to its end; an error is kept in the result."""
        result = Result()
        try:
            async for message in self.stub.Generate(request, **options):
                result.add(message)
        except grpc.aio.AioRpcError as error:
            result.error = error
        return result


@pytest.fixture
def client_of(tmp_path: Path) -> Callable[..., Any]:
    """``async with client_of(base=…, draft=…, **config) as client``: a running coordinator."""
    counter = iter(range(1000))

    @asynccontextmanager
    async def start(
        base: Any, draft: Any = None, observer: Any = None, **settings: Any
    ) -> AsyncIterator[Client]:
        listen = f"unix:{tmp_path}/c{next(counter)}"
        settings = {"tokenizer": str(tmp_path), "drain_seconds": 1.0} | settings
        config = CoordinatorConfig(
            listen=listen,
            base_target=base.listen,
            draft_target=None if draft is None else draft.listen,
            **settings,
        )
        stop = asyncio.Event()
        ready: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        task = asyncio.create_task(
            service.serve(config, stop=stop, observer=observer, ready=ready.set_result)
        )
        try:
            done, _ = await asyncio.wait((task, ready), return_when=asyncio.FIRST_COMPLETED)
            if task in done:
                await task
            async with grpc.aio.insecure_channel(listen) as channel:
                yield Client(channel, listen, stop)
        finally:
            stop.set()
            await asyncio.gather(task, return_exceptions=True)

    return start


@pytest.fixture
def services(fakes: ModuleType, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """``services("draft", agreement=90)``: a running toy service, stopped after the test."""
    made: list[Any] = []

    def start(role: str, **toy: Any) -> Any:
        # The model's "folder" exists and holds no tokenizer: requests carry ids.
        toy.setdefault("model", str(tmp_path))
        one = fakes.ToyService(role, f"unix:{tmp_path}/{role}{len(made)}", fakes.Toy(**toy))
        made.append(one)
        return one

    yield start
    for one in made:
        if one.toy.hold is not None:
            one.toy.hold.set()
        one.kill()


def ids_request(ids: list[int], **parts: Any) -> pb.GenerateRequest:
    """A request by token ids."""
    return pb.GenerateRequest(prompt_token_ids=pb.TokenIds(ids=ids), **parts)


@pytest.fixture
def ask() -> Callable[..., pb.GenerateRequest]:
    """``ask(ids, n, k=…, temperature=…, seed=…, …)``: a request by token ids."""

    def make(
        ids: list[int],
        n: int = 32,
        *,
        k: int | None = None,
        stopping: dict[str, Any] | None = None,
        output: dict[str, Any] | None = None,
        resume: list[int] | None = None,
        rule: int = 0,
        **sampling: Any,
    ) -> pb.GenerateRequest:
        request = pb.GenerateRequest(
            prompt_token_ids=pb.TokenIds(ids=ids),
            sampling=pb.SamplingParameters(**sampling),
            stopping=pb.StopConditions(max_new_tokens=n, **(stopping or {})),
            speculation=pb.SpeculationParameters(k=k, rule=rule),
            output=pb.OutputOptions(**(output or {})),
        )
        if resume:
            request.resume_token_ids.ids.extend(resume)
        return request

    return make


def _start_model(
    role: str,
    config: Any,
    listen: str,
    runner: Callable[[Any], Any] = lambda plain: plain,
    device: Any = None,
) -> SimpleNamespace:
    """One service over the engine that its program would build.

    ``runner``: makes another runner of the engine's; ``device``: see ``RoundsServicer.attach``.
    ``rows``: of each round. ``free``: of each round that it ran by itself, the number of the
    grant's message and the items.
    """
    from outrider.shared.process.grpc_server import Server
    from outrider.shared.rounds.servicer import FreeRoundMessage, add_to_server

    if role == "draft":
        from outrider.draft_service.__main__ import build
        from outrider.draft_service.service import make_servicer
    else:
        from outrider.verify_service.__main__ import build
        from outrider.verify_service.service import make_servicer
    servicer = make_servicer()
    engine = build(config, lambda text: None)
    engine.runner = runner(engine.runner)
    rows: list[int] = []
    run = engine.run

    def counted(work: Any) -> Any:
        # Before the answer goes out: a test may look as soon as it has come.
        answers, count = run(work)
        rows.append(count)
        return answers, count

    free: list[tuple[int, list[Any]]] = []

    def seen(message: Any, items: Any, *_: Any) -> None:
        if isinstance(message, FreeRoundMessage):
            free.append((message.round, list(items)))

    engine.run = counted
    servicer.attach(engine, device=device)
    servicer.watch(seen)
    name = role.capitalize()
    server = Server(
        ServeConfig(listen=listen, max_calls=8, reflection=False),
        lambda grpc_server: add_to_server(grpc_server, servicer, name),
        [f"outrider.v1.{name}"],
    )
    server.serving()
    return SimpleNamespace(server=server, engine=engine, listen=listen, rows=rows, free=free)


@pytest.fixture(scope="session")
def start_model() -> Callable[..., SimpleNamespace]:
    """``start_model("verify", config, address)``: a service over a real engine."""
    return _start_model


@pytest.fixture(scope="session")
def near_base(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A draft that is the base with a little noise, so it is right now and then."""
    import torch
    from safetensors.torch import load_file, save_file

    draft = shutil.copytree(tiny_base, tmp_path_factory.mktemp("near") / "near")
    generator = torch.Generator().manual_seed(3)
    tensors = load_file(str(tiny_base / "model.safetensors"))
    for name, tensor in tensors.items():
        tensors[name] = tensor + 0.04 * torch.randn(tensor.shape, generator=generator)
    save_file(tensors, str(draft / "model.safetensors"), metadata={"format": "pt"})
    return draft


@pytest.fixture(scope="module")
def model_pair(
    tiny_base: Path, tiny_draft: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[SimpleNamespace]:
    """Both services over real engines with tiny random models, in this process."""
    folder = tmp_path_factory.mktemp("pair")
    options = {"device": "cpu", "dtype": "float32", "arena_bytes": 32 << 20, "threads": 1}
    with ExitStack() as stack:
        made = {}
        for role, config in (
            ("verify", VerifyConfig(path=str(tiny_base), **options)),
            ("draft", DraftConfig(path=str(tiny_draft), **options)),
        ):
            made[role] = _start_model(role, config, f"unix:{folder}/{role}")
            stack.callback(made[role].server.drain, grace=0)
        yield SimpleNamespace(**made, folder=tiny_base)
