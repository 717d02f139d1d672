"""Trains the pair: a base on Python source, then a draft distilled from it. Ends by the clock.

    python train.py --corpus FOLDER --tokenizer FOLDER --prompts heldout_prompts.json --out FOLDER

Stages, each with its own wall-clock budget in seconds and a checkpoint at its end:
1. base: next-token cross-entropy.
2. distill: the draft learns the base's distribution on real source.
3. on-policy: the same on text that the base wrote itself, which is what a draft meets when it
   rides ahead. Sources: Hinton et al. 2015; Kim and Rush 2016; Agarwal et al. 2023 (on-policy
   distillation); Zhou et al. 2023 (DistillSpec).
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import time
from pathlib import Path

import data
import evaluate
import torch
from model import BASE, DRAFT, Llama, load, save
from stages import distill, on_policy, train_base


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--corpus", type=Path, required=True, help="shards written by corpus.py")
    parser.add_argument(
        "--tokenizer", type=Path, required=True, help="folder written by tokenizer.py"
    )
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--base-seconds", type=float, default=250)
    parser.add_argument("--distill-seconds", type=float, default=100)
    parser.add_argument("--onpolicy-seconds", type=float, default=160)
    parser.add_argument(
        "--deadline-seconds",
        type=float,
        default=545,
        help="evaluation is over by then; stages shrink to fit",
    )
    parser.add_argument("--reserve-seconds", type=float, default=30, help="kept for the evaluation")
    parser.add_argument("--batch", type=int, default=96, help="rows a step")
    parser.add_argument("--length", type=int, default=1024, help="tokens a row")
    parser.add_argument(
        "--own-batch", type=int, default=2048, help="rows the base writes at once in stage 3"
    )
    parser.add_argument(
        "--own-length", type=int, default=384, help="tokens of such a row, prompt included"
    )
    parser.add_argument("--shards", type=int, help="read only so many shards (for a trial)")
    parser.add_argument("--max-prompts", type=int)
    parser.add_argument("--eager", action="store_true", help="no torch.compile")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def checkpoint(model: Llama, out: Path, tokenizer: Path) -> Llama:
    """Saves a model with its tokenizer and returns it as a reader will see it, rounded to bf16."""
    save(model, out)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / name, out / name)
    return load(out, model.cos.device, model.dtype)


def against_transformers(folder: Path, ids: torch.Tensor) -> float:
    """Largest difference in logits from Hugging Face's model, both in float32 on the CPU."""
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()
    with torch.no_grad():
        return (theirs(ids).logits - load(folder)(ids)).abs().max().item()


def samples(base: Llama, tokenizer, prompts: list[list[int]], tokens: int = 96) -> None:
    """Prints five greedy completions."""
    for prompt in prompts[:: max(1, len(prompts) // 5)][:5]:
        ids = torch.tensor([prompt], device=base.cos.device)
        with torch.no_grad():
            for _ in range(tokens):
                ids = torch.cat((ids, base(ids)[:, -1:].argmax(-1)), 1)
        new = ids[0, len(prompt) :].tolist()
        print(
            "=" * 72
            + "\n"
            + tokenizer.decode(prompt)
            + "\N{BLACK RIGHT-POINTING TRIANGLE}"
            + tokenizer.decode(new, skip_special_tokens=False),
            flush=True,
        )


def main() -> None:
    args, begun = arguments(), time.monotonic()
    from tokenizers import Tokenizer

    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    cuda = args.device == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    tokenizer = Tokenizer.from_file(str(args.tokenizer / "tokenizer.json"))
    source = data.tokens(args.corpus, "train", tokenizer, args.shards)
    heldout = data.tokens(args.corpus, "heldout", tokenizer, args.shards)
    size = sum(len(text.encode()) for text in data.documents(args.corpus, "heldout", args.shards))
    prompts = [tokenizer.encode(p["text"]).ids for p in json.loads(args.prompts.read_text())][
        : args.max_prompts
    ]
    print(
        f"{len(source)} training tokens, {len(heldout)} held out, {time.monotonic() - begun:.1f} s",
        flush=True,
    )
    source = torch.from_numpy(source.astype("int32")).to(args.device)
    record: dict = {
        "training_tokens": len(source),
        "heldout_tokens": len(heldout),
        "stages": {},
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "device": torch.cuda.get_device_name() if cuda else "cpu",
    }
    manifest = args.corpus / "manifest.json"
    if manifest.exists():
        record["corpus"] = json.loads(manifest.read_text())["totals"]

    def budget(wanted: float) -> float:
        left = args.deadline_seconds - args.reserve_seconds - (time.monotonic() - begun)
        return max(5.0, min(wanted, left))

    def note(stage: str, result: dict) -> None:
        record["stages"][stage] = result
        (args.out / "training.json").write_text(json.dumps(record, indent=1) + "\n")

    args.out.mkdir(parents=True, exist_ok=True)
    settings = {"batch": args.batch, "length": args.length, "compile": cuda and not args.eager}
    base = Llama(BASE, args.device, dtype)
    note("base", train_base(base, source, budget(args.base_seconds), **settings))
    base = checkpoint(base, args.out / "base", args.tokenizer).requires_grad_(False)

    draft = Llama(DRAFT, args.device, dtype)
    note("distill", distill(base, draft, source, budget(args.distill_seconds), **settings))
    checkpoint(draft, args.out / "draft", args.tokenizer)
    note(
        "on_policy",
        on_policy(
            base,
            draft,
            source,
            budget(args.onpolicy_seconds),
            rows=args.own_batch,
            own_length=args.own_length,
            **settings,
        ),
    )
    checkpoint(draft, args.out / "draft", args.tokenizer)

    base, draft = (load(args.out / name, args.device) for name in ("base", "draft"))
    torch.set_float32_matmul_precision("highest")
    result = evaluate.measure(base, draft, heldout, size / len(heldout), prompts)
    (args.out / "evaluation.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result), flush=True)
    samples(base, tokenizer, prompts)
    try:
        ids = torch.tensor([prompts[0]])
        result["largest_difference_from_transformers"] = {
            n: against_transformers(args.out / n, ids) for n in ("base", "draft")
        }
        (args.out / "evaluation.json").write_text(json.dumps(result, indent=1) + "\n")
        print(result["largest_difference_from_transformers"])
    except Exception as error:
        print(f"not compared with transformers: {error}")
    note("total", {"seconds": time.monotonic() - begun})


if __name__ == "__main__":
    main()
