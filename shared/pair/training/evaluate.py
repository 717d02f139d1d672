"""Measures a pair: held-out loss, and how often the base accepts the draft's greedy tokens.

    python evaluate.py --pair FOLDER --corpus FOLDER --prompts heldout_prompts.json

Acceptance is exact although nothing is drafted: on the base's own greedy text, a proposal
that starts at position p is accepted as far as the draft's argmax, given the base's prefix,
agrees with the base's next token. So one draft forward over the text replays every round.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from generate import Generator
from model import Llama, load

MAX_K = 8


@torch.no_grad()
def loss(
    model: Llama, tokens: np.ndarray, length: int = 512, batch: int = 16, batches: int = 32
) -> float:
    """Mean cross-entropy, nats a token, over evenly spaced windows of `length` tokens."""
    device, total, count = model.cos.device, 0.0, 0
    starts = np.linspace(0, len(tokens) - length - 2, batch * batches).astype(np.int64)
    for group in starts.reshape(batches, batch):
        ids = torch.from_numpy(
            np.stack([tokens[s : s + length + 1] for s in group]).astype(np.int64)
        ).to(device)
        logits = model(ids[:, :-1]).float()
        total += F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").item()
        count += ids[:, 1:].numel()
    return total / count


@torch.no_grad()
def agreements(
    base: Llama, draft: Llama, prompts: list[list[int]], new_tokens: int, graph: bool = True
) -> list[list[bool]]:
    """For each prompt and each of the base's next greedy tokens: would the draft have said it?

    A row ends with the base's first END (id 0), which counts.
    """
    device = base.cos.device
    widest = max(map(len, prompts))
    padded = torch.zeros(len(prompts), widest, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        padded[row, : len(prompt)] = torch.tensor(prompt)
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    generator = Generator(base, len(prompts), widest + new_tokens, torch.float32, graph)
    text = generator.run(padded.to(device), lengths, torch.zeros(len(prompts), device=device))
    guesses = torch.cat([draft(part).argmax(-1) for part in text.split(64)])
    same, text, rows = (guesses[:, :-1] == text[:, 1:]).cpu(), text.cpu(), []
    for row, prompt in enumerate(prompts):
        new = text[row, len(prompt) : len(prompt) + new_tokens].tolist()
        keep = new.index(0) + 1 if 0 in new else len(new)
        rows.append(same[row, len(prompt) - 1 : len(prompt) - 1 + keep].tolist())
    return rows


def replay(rows: list[list[bool]], k: int) -> dict:
    """Plays the rounds of speculation length k. A round near the end proposes only what is left."""
    proposed = accepted = emitted = rounds = 0
    hits, tries = [0] * k, [0] * k
    for row in rows:
        at = 0
        while at < len(row):
            width = min(k, len(row) - at)
            run = next((i for i in range(width) if not row[at + i]), width)
            for i in range(width):
                tries[i] += 1
                hits[i] += i < run
            step = min(run + 1, len(row) - at)
            proposed, accepted, emitted, rounds, at = (
                proposed + width,
                accepted + run,
                emitted + step,
                rounds + 1,
                at + step,
            )
    return {
        "k": k,
        "acceptance_rate": accepted / max(1, proposed),
        "mean_accepted_length": emitted / max(1, rounds),
        "accepted_by_position": [h / max(1, t) for h, t in zip(hits, tries, strict=True)],
    }


def measure(
    base: Llama,
    draft: Llama,
    heldout: np.ndarray,
    bytes_per_token: float,
    prompts: list[list[int]],
    new_tokens: int = 128,
    graph: bool = True,
) -> dict:
    """Everything `evaluation.json` holds. Weights should already be rounded to bf16."""
    result: dict = {"arithmetic": "float32 on bf16 weights", "bytes_per_token": bytes_per_token}
    for name, model in (("base", base), ("draft", draft)):
        nats = loss(model, heldout)
        result[name] = {
            "heldout_nats_per_token": nats,
            "heldout_bits_per_byte": nats / math.log(2) / bytes_per_token,
            "parameters": sum(p.numel() for p in model.parameters()),
        }
    rows = agreements(base, draft, prompts, new_tokens, graph)
    result["acceptance"] = {
        "prompts": len(prompts),
        "new_tokens": new_tokens,
        "agreement": sum(map(sum, rows)) / sum(map(len, rows)),
        "speculation": [replay(rows, k) for k in range(1, MAX_K + 1)],
    }
    return result


def main() -> None:
    import data
    from tokenizers import Tokenizer

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--pair", type=Path, required=True, help="the folder that holds base/ and draft/"
    )
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(args.pair / "base" / "tokenizer.json"))
    heldout = data.tokens(args.corpus, "heldout", tokenizer)
    size = sum(len(text.encode()) for text in data.documents(args.corpus, "heldout"))
    prompts = [tokenizer.encode(p["text"]).ids for p in json.loads(args.prompts.read_text())]
    base, draft = (load(args.pair / name, args.device) for name in ("base", "draft"))
    result = measure(base, draft, heldout, size / len(heldout), prompts, args.new_tokens)
    (args.pair / "evaluation.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
