"""One case, served: checkpoints on disk, both services and a coordinator in this process."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import random
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from outrider.protos import generation_pb2 as pb
from outrider.shared.config.schema import CoordinatorConfig, DraftConfig, VerifyConfig
from outrider_testing import clients
from outrider_testing.architectures import ARCHITECTURES, LENGTHS, tiny
from outrider_testing.battery.cases import (
    Asked,
    Case,
    draw_case,
    draw_requests,
    follow_up,
)
from outrider_testing.battery.judge import Answer, Judge
from outrider_testing.model_services import start_model
from outrider_testing.tokenizer_families import TEXT, write

_SERVICE: dict[str, Any] = {
    "device": "cpu",
    "dtype": "float32",
    "arena_bytes": 8 << 20,
    "threads": 1,
}


_ROLES = (("verify", "base", VerifyConfig), ("draft", "draft", DraftConfig))


@dataclass
class Outcome:
    """What one case gave."""

    case: Case
    judged: int = 0
    """Samples."""
    tokens: int = 0
    accepted: int = 0
    ties: int = 0
    refused: int = 0
    """Requests that were refused, as they had to be."""
    kinds: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)


def run_case(number: int, folder: Path) -> Outcome:
    """Serves the case of ``number`` from files in ``folder``, asks, and judges the answers."""
    case = draw_case(number)
    outcome = Outcome(case)
    tokenizer = write(case.family, _made(folder / "base"))
    size = tokenizer.get_vocab_size()
    model = _save_models(case, folder, size)
    judge = Judge(model, tokenizer, case.eos)
    texts = [tokenizer.encode(TEXT[start : start + 80]).ids for start in (0, 41, 100, 130)]
    with _services(case, folder) as config:
        asyncio.run(_ask_all(outcome, config, judge, (size, size + case.padding, texts)))
    return outcome


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


def _save_models(case: Case, folder: Path, size: int) -> Any:
    """Base and draft as checkpoints beside their tokenizers; the base itself."""
    base = _tiny(case.architecture, size + case.padding, case.number)
    base.generation_config.eos_token_id = list(case.eos) or None
    base.save_pretrained(folder / "base")
    base.generation_config.eos_token_id = None
    if case.draft == "none":
        return base
    shutil.copytree(folder / "base", folder / "draft", ignore=lambda *_: {"model.safetensors"})
    if case.draft == "near":
        draft = _tiny(case.architecture, size + case.padding, case.number)
        _shake(draft, case.number)
    elif case.draft == "other seed":
        draft = _tiny(case.architecture, size + case.padding, case.number + 1)
    else:
        padding = {"llama": case.padding, "wider": case.padding + 31, "narrower": 0}[case.draft]
        draft = _tiny("Llama", size + padding, case.number + 1)
    draft.save_pretrained(folder / "draft")
    return base


def _tiny(architecture: str, vocab_size: int, seed: int) -> Any:
    kind, changes = (ARCHITECTURES | LENGTHS)[architecture]
    return tiny(kind, {**changes, "vocab_size": vocab_size}, seed)


def _shake(model: Any, seed: int) -> None:
    """So little noise on its weights that it is often right."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight += (0.05 * noise * weight.std(correction=0)).to(weight.dtype)


@contextmanager
def _services(case: Case, folder: Path) -> Iterator[CoordinatorConfig]:
    """Both services; the configuration of a coordinator over them."""
    with ExitStack() as stack:
        targets: dict[str, str | None] = {"draft": None}
        for role, section, kind in (
            ("verify", "base", VerifyConfig),
            ("draft", "draft", DraftConfig),
        ):
            if section == "draft" and case.draft == "none":
                continue
            settings = {**_SERVICE, **case.settings[section]}
            if section == "draft" and case.draft not in ("near", "other seed"):
                settings["runner"] = "auto"
            config = kind(path=str(folder / section), **settings)
            one = start_model(role, config, f"unix:{folder}/{section}.sock")
            stack.callback(one.server.drain, grace=0)
            targets[section] = one.listen
        base = targets["base"]
        assert base is not None
        yield CoordinatorConfig(
            listen=f"unix:{folder}/coordinator.sock",
            base_target=base,
            draft_target=targets["draft"],
            tokenizer=str(folder / "base"),
            link=case.link,
            drain_seconds=1.0,
            **case.settings["coordinator"],
        )


async def _ask_all(
    outcome: Outcome,
    config: CoordinatorConfig,
    judge: Judge,
    known: tuple[int, int, list[list[int]]],
) -> None:
    case = outcome.case
    rng = random.Random(f"follow-ups {case.number}")
    asked = draw_requests(case, *known)
    async with clients.coordinator(config) as client:
        answers = await asyncio.gather(*(client.generate(message_of(one)) for one in asked))
        more = []
        for one, result in zip(asked, answers, strict=True):
            first = result.samples.get(0)
            if first is not None and (next_one := follow_up(rng, one, first.ids, first.text)):
                more.append(next_one)
        answers += await asyncio.gather(*(client.generate(message_of(one)) for one in more))
    for one, result in zip([*asked, *more], answers, strict=True):
        _judge(outcome, judge, one, result)


def _judge(outcome: Outcome, judge: Judge, asked: Asked, result: clients.Result) -> None:
    if result.error is not None:
        outcome.faults.append(f"{result.error.code().name}: {result.error.details()}; {asked}")
        return
    if len(result.samples) != asked.samples:
        outcome.faults.append(f"{len(result.samples)} samples; {asked}")
    for sample in result.samples.values():
        answer = Answer(sample.ids, sample.text, sample.logprobs, sample.finished)
        verdict = judge.judge(asked, answer)
        outcome.judged += 1
        outcome.tokens += len(answer.ids)
        outcome.ties += verdict.tie
        outcome.kinds[asked.rule.word] += 1
        if sample.finished is not None:
            outcome.accepted += sample.finished.speculation.accepted
            outcome.kinds[str(pb.FinishReason.Name(sample.finished.reason))] += 1
        if verdict.wrong:
            outcome.faults.append(f"{verdict.wrong}; {asked}; answered {answer.ids}")


def message_of(asked: Asked) -> pb.GenerateRequest:
    """``asked`` as a client sends it."""
    sampling = dict(asked.sampling)
    bad_words = [pb.TokenIds(ids=word) for word in sampling.pop("bad_words", ())]
    request = clients.ask(
        list(asked.prompt),
        asked.count,
        k=asked.k,
        rule=asked.rule.number,  # type: ignore[arg-type]
        stopping={
            "ignore_eos": asked.ignore_eos,
            "stop": asked.stop,
            "stop_token_ids": asked.stop_ids,
        },
        output={"num_samples": asked.samples, "echo": asked.echo, "logprobs": asked.logprobs},
        resume=list(asked.resume),
        bad_words=bad_words,
        **sampling,
    )
    return request


def describe(case: Case) -> str:
    """One line that says what the case is."""
    return json.dumps(dataclasses.asdict(case))
