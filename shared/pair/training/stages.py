"""The three stages of training. Each runs until its clock ends and returns what to record."""

from __future__ import annotations

import collections
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from generate import Generator
from model import Llama
from optim import Clock, Optimiser, rate
from torch import Tensor

LOG_EVERY = 50
AHEAD = 3  # steps the CPU may run ahead of the GPU, so that the schedule follows the real clock


def guarded(function: Callable, compile: bool) -> Callable:
    """`function` compiled; eager, and a line that says so, once a call or backward pass fails.

    The trial's gradients stay in `.grad`, so the first step sees them twice, which clipping undoes.
    """
    if not compile:
        return function
    chosen: list[Callable] = []

    def call(*inputs):
        if not chosen:
            try:
                compiled = torch.compile(function, dynamic=False)
                out = compiled(*inputs)
                loss = out[0] if isinstance(out, tuple) else out
                if loss.requires_grad:
                    loss.backward()  # the backward graph is compiled here, not in the forward pass
                chosen.append(compiled)
            except Exception as error:
                print(
                    f"torch.compile failed, going on without it: "
                    f"{type(error).__name__}: {str(error)[:300]}",
                    flush=True,
                )
                chosen.append(function)
        return chosen[0](*inputs)

    return call


def windows(source: Tensor, rows: int, length: int) -> Tensor:
    """Random windows [rows, length], int64, of source [tokens]; drawn on its own device."""
    starts = torch.randint(source.numel() - length, (rows, 1), device=source.device)
    return source[starts + torch.arange(length, device=source.device)].long()


def loop(
    name: str,
    model: Llama,
    optimiser: Optimiser,
    clock: Clock,
    step_loss: Callable[[], tuple[Tensor, Tensor]],
    tokens_per_step: int,
    decay_from: float,
    warmup: int = 100,
) -> dict:
    """Steps until the clock ends. `step_loss()` gives (loss, second figure), both scalar tensors.

    A loss that is not finite puts the weights back to the last good ones and halves the rate.
    """
    step, damping, pending, history = 0, 1.0, collections.deque(), []
    good = {n: p.detach().clone() for n, p in model.named_parameters()}
    first = clock.elapsed()
    while (progress := clock.progress()) < 1.0 or step == 0:
        loss, extra = step_loss()
        loss.backward()
        optimiser.step(damping * rate(step, progress, warmup, decay_from))
        step += 1
        if loss.is_cuda:
            event = torch.cuda.Event()
            event.record()
            pending.append(event)
            if len(pending) > AHEAD:
                pending.popleft().synchronize()
        if step % LOG_EVERY == 0 or step in (1, 10):
            value = loss.item()
            if math.isfinite(value):
                good = {n: p.detach().clone() for n, p in model.named_parameters()}
            else:
                damping *= 0.5
                print(
                    f"{name}: the loss is not finite at step {step}; "
                    "back to the last good weights, half the rate",
                    flush=True,
                )
                with torch.no_grad():
                    for n, p in model.named_parameters():
                        p.copy_(good[n])
                optimiser.reset()
            speed = step * tokens_per_step / max(1e-6, clock.elapsed() - first)
            history.append(
                (step, round(clock.elapsed(), 1), round(value, 4), round(extra.item(), 4))
            )
            if step % (4 * LOG_EVERY) == 0 or step <= LOG_EVERY:
                print(
                    f"{name} step {step} {clock.elapsed():.0f} s loss {value:.4f} "
                    f"({extra.item():.4f}) {speed / 1e6:.3f} M tokens/s",
                    flush=True,
                )
    value, second = loss.item(), extra.item()
    print(
        f"{name} ends: step {step} {clock.elapsed():.0f} s loss {value:.4f} ({second:.4f})",
        flush=True,
    )
    return {
        "steps": step,
        "tokens": step * tokens_per_step,
        "seconds": round(clock.elapsed(), 1),
        "loss": value,
        "second_figure": second,
        "history": history[:: max(1, len(history) // 60)],
    }


def train_base(
    base: Llama, source: Tensor, seconds: float, batch: int, length: int, compile: bool
) -> dict:
    """Cross-entropy on random windows of the source."""
    clock = Clock(seconds)

    def cross_entropy(ids: Tensor) -> Tensor:
        return F.cross_entropy(base(ids[:, :-1]).flatten(0, 1).float(), ids[:, 1:].flatten())

    run = guarded(cross_entropy, compile)

    def step_loss():
        loss = run(windows(source, batch, length + 1))
        return loss, loss.detach()

    return loop("base", base, Optimiser(base, 0.02, 3e-3), clock, step_loss, batch * length, 0.35)


def distilling(
    base: Llama, draft: Llama, hard: float, compile: bool
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(ids [rows, length], weight [rows, length]) -> (loss, agreement of the argmax).

    loss = (1 - hard) * KL(base || draft) + hard * cross-entropy with the base's argmax, each
    position counted by `weight`, in nats. Temperature 1, because that is what is served.
    """

    def teach(ids: Tensor) -> Tensor:
        return base(ids)

    def learn(ids: Tensor, taught: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        said, taught = draft(ids).float(), taught.float()
        log_q, log_p = said.log_softmax(-1), taught.log_softmax(-1)
        best = taught.argmax(-1, keepdim=True)
        kl = (log_p.exp() * (log_p - log_q)).sum(-1)
        ce = -log_q.gather(-1, best).squeeze(-1)
        agree = (said.argmax(-1, keepdim=True) == best).squeeze(-1).float()
        total = weight.sum()
        return ((1 - hard) * kl + hard * ce).mul(weight).sum() / total, (
            agree * weight
        ).sum() / total

    teacher, student = guarded(teach, compile), guarded(learn, compile)

    def both(ids: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            taught = teacher(ids)
        loss, agree = student(ids, taught, weight)
        return loss, agree.detach()

    return both


def distill(
    base: Llama,
    draft: Llama,
    source: Tensor,
    seconds: float,
    batch: int,
    length: int,
    compile: bool,
) -> dict:
    """The draft learns from the base on random windows of the source."""
    clock = Clock(seconds)
    both = distilling(base, draft, 0.3, compile)
    rows = max(1, batch // 2)  # a small model gains more from steps than from large batches
    weight = torch.ones(rows, length, device=source.device)
    return loop(
        "distill",
        draft,
        Optimiser(draft, 0.02, 4e-3),
        clock,
        lambda: both(windows(source, rows, length), weight),
        rows * length,
        0.5,
    )


def write_own(
    base: Llama, source: Tensor, clock: Clock, share: float, rows: int, length: int
) -> tuple[Tensor, Tensor]:
    """Text the base writes after random prompts: ids [n, length] and prompt lengths [n].

    Two thirds greedy, the rest at a temperature of 0.3 to 1. Writes until `share` of the clock.
    """
    device = source.device
    generator = Generator(base, rows, length, base.dtype)
    texts, lengths = [], []
    widest = min(128, length // 2)
    while not texts or clock.progress() < share:
        prompts = windows(source, rows, widest)
        size = torch.randint(16, widest + 1, (rows,), device=device)
        temperature = torch.rand(rows, device=device) * 0.7 + 0.3
        temperature = torch.where(torch.rand(rows, device=device) < 0.67, 0.0, temperature)
        texts.append(generator.run(prompts, size, temperature).to(torch.int32))
        lengths.append(size)
        if len(texts) == 1:
            print(
                f"the base writes: first {rows} rows of {length} done at {clock.elapsed():.1f} s",
                flush=True,
            )
    return torch.cat(texts), torch.cat(lengths)


def on_policy(
    base: Llama,
    draft: Llama,
    source: Tensor,
    seconds: float,
    rows: int,
    own_length: int,
    batch: int,
    length: int,
    compile: bool,
) -> dict:
    """Distils on the base's own text (three quarters of each batch) and real source (the rest)."""
    clock = Clock(seconds)
    texts, lengths = write_own(base, source, clock, 0.35, rows, own_length)
    written = int((own_length - lengths).sum())
    print(f"the base wrote {written} tokens in {clock.elapsed():.1f} s", flush=True)
    total = max(4, batch * length // own_length // 2)
    own, real = total - total // 4, total // 4
    place = torch.arange(own_length, device=source.device)
    both = distilling(base, draft, 0.5, compile)
    clock = Clock(max(5.0, seconds - clock.elapsed()))

    def step_loss():
        pick = torch.randint(len(texts), (own,), device=source.device)
        ids = torch.cat((texts[pick].long(), windows(source, real, own_length)))
        weight = torch.where(place[None] >= lengths[pick, None] - 1, 1.0, 0.25)
        return both(
            ids, torch.cat((weight, torch.full((real, own_length), 0.5, device=source.device)))
        )

    result = loop(
        "on-policy",
        draft,
        Optimiser(draft, 0.01, 2e-3),
        clock,
        step_loss,
        total * own_length,
        0.2,
        warmup=50,
    )
    return {"written_tokens": written, **result}
