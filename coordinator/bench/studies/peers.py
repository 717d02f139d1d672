"""What the user would run instead: transformers' ``generate`` on the same checkpoints.

It runs in a process of its own, with the environment and the threads that a user's program would
have, and waits while our variants run; each repeat asks it for the same prompts. Run as a program
it is that process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from outrider.coordinator.bench.workload import Run, Workload
from outrider.shared.core.errors import ConfigError

ALONE = "transformers"
ASSISTED = "transformers, assisted"
LOOKUP = "transformers, prompt lookup"
LOOKUP_TOKENS = 10
"""Tokens of a proposal there, the number that its documentation uses."""


class Peers:
    """The process, from its start to ``close``. One request at a time."""

    def __init__(self, base: str, draft: str, dtype: str, prompts: Sequence[Sequence[int]]) -> None:
        """``base``, ``draft``: folders or hub ids; without a draft, "", proposals are looked up in
        the text there, too. ``prompts``: token ids. Raises ``ConfigError`` where it can't load
        them."""
        self.names = (ALONE, ASSISTED if draft else LOOKUP)
        # What is set for our own processes (see ``library_env``) is not what a user has.
        clean = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", __name__, base, draft, dtype],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # progress and warnings; an error comes as an answer
            text=True,
            env=clean,
        )
        self._prompts = [list(one) for one in prompts]
        self._answer()  # that it is ready

    def run(self, name: str, workload: Workload) -> Run:
        """All prompts of the workload, one after the other."""
        assert self._process.stdin is not None
        asked = {
            "variant": name,
            "prompts": self._prompts,
            "max_new_tokens": workload.max_new_tokens,
            "temperature": workload.temperature,
        }
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        answer = self._answer()
        outputs = [tuple(one) for one in answer["outputs"]]
        return Run(
            seconds=answer["seconds"],
            tokens=sum(len(one) for one in outputs),
            outputs=outputs,
        )

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self.close()
            raise ConfigError(f"transformers ended with status {self._process.returncode}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            self.close()
            raise ConfigError(f"transformers: {answer['error']}")
        return answer

    def close(self) -> None:
        """Ends the process."""
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()
        self._process.wait(30)


def _serve(base: str, draft: str, dtype: str) -> None:
    """Answers lines of JSON until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer

    def answer(value: dict[str, Any]) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    try:
        import torch
        import transformers
        from transformers import AutoModelForCausalLM

        transformers.logging.set_verbosity_error()
        load = AutoModelForCausalLM.from_pretrained
        paths = [path for path in (base, draft) if path]
        models = [load(path, dtype=getattr(torch, dtype)).eval() for path in paths]
    except Exception as error:  # the other side says it in one line
        answer({"error": f"{type(error).__name__}: {error}"})
        return
    answer({})
    for line in sys.stdin:
        asked = json.loads(line)
        options: dict[str, Any] = {
            "max_new_tokens": asked["max_new_tokens"],
            "min_new_tokens": asked["max_new_tokens"],
            "do_sample": asked["temperature"] > 0,
            "pad_token_id": 0,
        }
        if asked["temperature"] > 0:
            options |= {"temperature": asked["temperature"], "top_k": 0, "top_p": 1.0}
        if asked["variant"] == ASSISTED:
            options["assistant_model"] = models[1]
        if asked["variant"] == LOOKUP:
            options["prompt_lookup_num_tokens"] = LOOKUP_TOKENS
        outputs = []
        began = time.perf_counter()
        for ids in asked["prompts"]:
            prompt = torch.tensor([ids])
            with torch.inference_mode():
                whole = models[0].generate(
                    prompt, attention_mask=torch.ones_like(prompt), **options
                )
            outputs.append(whole[0, len(ids) :].tolist())
        answer({"seconds": time.perf_counter() - began, "outputs": outputs})


if __name__ == "__main__":
    _serve(*sys.argv[1:])
