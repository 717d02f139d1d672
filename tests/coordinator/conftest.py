"""A coordinator over toy services, in one process, through real gRPC."""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager, ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from outrider.shared.config.schema import CoordinatorConfig, DraftConfig, VerifyConfig
from outrider_testing import clients, fakes
from outrider_testing.model_services import start_model


@pytest.fixture
def client_of(tmp_path: Path) -> Callable[..., Any]:
    """``async with client_of(base=…, draft=…, **config) as client``: a running coordinator."""
    counter = iter(range(1000))

    def start(
        base: Any, draft: Any = None, observer: Any = None, **settings: Any
    ) -> AbstractAsyncContextManager[clients.Client]:
        config = CoordinatorConfig(
            listen=f"unix:{tmp_path}/c{next(counter)}",
            base_target=base.listen,
            draft_target=None if draft is None else draft.listen,
            **{"tokenizer": str(tmp_path), "drain_seconds": 1.0} | settings,
        )
        return clients.coordinator(config, observer)

    return start


@pytest.fixture
def services(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """``services("draft", agreement=90)``: a running toy service, stopped after the test."""
    made: list[Any] = []
    # A real service has PyTorch before it serves. Here the first grant without a draft would load
    # it, and take seconds of a test's rounds.
    importlib.import_module("outrider.verify_service.alone_rounds")

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
            made[role] = start_model(role, config, f"unix:{folder}/{role}")
            stack.callback(made[role].server.drain, grace=0)
        yield SimpleNamespace(**made, folder=tiny_base)
