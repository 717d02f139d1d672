"""One byte-level BPE tokenizer for both models, made for Python source.

    python tokenizer.py --corpus FOLDER --out FOLDER

Every byte has a token, so nothing is unknown and decoding returns the text exactly. A line
break takes the indentation after it into the same token; digits stand alone.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from data import documents

VOCAB_SIZE = 8192
END = "<|endoftext|>"
MAX_POSITIONS = 1024

# Line breaks with the indentation that follows; words with a leading blank or underscores;
# single digits; punctuation; blanks (the last one stays with the word it stands before).
PIECES = r"""[\r\n]+[ \t]*| ?_*\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|[ \t]+(?![^\s])|[ \t]+(?=[ \t])|\s"""


def train(texts: Iterator[str]):
    """Learns the merges. Returns a `tokenizers.Tokenizer` with `VOCAB_SIZE` entries, END = 0."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE,
            special_tokens=[END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            max_token_length=32,
            show_progress=False,
        ),
    )
    return tokenizer


def save(tokenizer, out: Path) -> None:
    """Writes `tokenizer.json` and `tokenizer_config.json`, as `AutoTokenizer` loads them."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / "tokenizer.json"), pretty=False)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END,
        "eos_token": END,
        "pad_token": END,
        "model_max_length": MAX_POSITIONS,
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--megabytes", type=float, default=40, help="how much training text to learn from"
    )
    args = parser.parse_args()

    def sample() -> Iterator[str]:
        left = args.megabytes * 1e6
        for text in documents(args.corpus, "train"):
            left -= len(text)
            if left < 0:
                return
            yield text

    tokenizer = train(sample())
    save(tokenizer, args.out)
    sizes = [0, 0]
    for number, text in enumerate(documents(args.corpus, "heldout")):
        ids = tokenizer.encode(text).ids
        if tokenizer.decode(ids, skip_special_tokens=False) != text:
            raise SystemExit(f"held-out document {number} does not survive encoding and decoding")
        sizes[0] += len(text.encode())
        sizes[1] += len(ids)
    print(
        f"{tokenizer.get_vocab_size()} tokens, {sizes[0] / sizes[1]:.3f} held-out bytes per token, "
        "exact round trip"
    )


if __name__ == "__main__":
    main()
