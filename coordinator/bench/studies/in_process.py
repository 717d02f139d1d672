"""Draft and base in one process: the yardstick for what splitting them costs.

The engines, the arithmetic of turns and the work per round are those of the services; what is
missing is everything between them: messages, memory shared between processes, streaming, text.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from outrider.coordinator.bench.workload import Run, Workload
from outrider.draft_service.granted import DraftRounds
from outrider.protos import speculation_pb2 as pb
from outrider.shared.config.schema import Config
from outrider.shared.core import rules
from outrider.shared.core.types import Decoding, OpenSequence, ProposeItem, VerifyItem
from outrider.shared.process import library_env
from outrider.verify_service.granted import VerifyRounds


class InProcess:
    """Both models, loaded here."""

    def __init__(self, config: Config) -> None:
        library_env.before_torch(config.base.threads)
        # Imported late: torch must find the environment that was set above.
        from outrider.draft_service import __main__ as draft
        from outrider.verify_service import __main__ as verify

        self._engines = {
            "draft": draft.build(config.draft, lambda text: None),
            "verify": verify.build(config.base, lambda text: None),
        }
        self._sequence = 0

    def describe(self) -> dict[str, dict[str, object]]:
        """Both models, as the plain study describes them."""
        roles = {"base": "verify", "draft": "draft"}
        return {name: asdict(self._engines[role].info().facts) for name, role in roles.items()}

    def run(self, workload: Workload, prompts: Sequence[Sequence[int]], k: int) -> Run:
        """All prompts of the workload, one after the other; ids in place of text."""
        run = Run()
        began = time.perf_counter()
        for index, prompt in enumerate(prompts):
            decoding = Decoding(
                temperature=workload.temperature,
                prompt_len=len(prompt),
                seed=workload.seed + index,
                rule=rules.asked(workload.rule, workload.temperature),
            )
            run.outputs.append(self._generate(run, workload, prompt, decoding, k))
        run.seconds = time.perf_counter() - began
        return run

    def _generate(
        self, run: Run, workload: Workload, prompt: Sequence[int], decoding: Decoding, k: int
    ) -> tuple[int, ...]:
        self._sequence += 1
        limit = len(prompt) + workload.max_new_tokens
        verify = self._engines["verify"].connect()
        draft = self._engines["draft"].connect()
        began = time.perf_counter()
        opening = OpenSequence(self._sequence, 1, limit + max(k, 1) + 1, decoding)
        verify.open(opening)
        if k:
            draft.open(replace(opening))
        try:
            self._take_in(verify, draft if k else None, prompt)
            # The pending token is the prompt's last; everything before it is taken in.
            at, append = len(prompt) - 1, (prompt[-1],)
            granted = pb.GrantedSequence(k=k, limit=limit)
            base = VerifyRounds(verify, [VerifyItem(self._sequence, 1, at, append)], [granted])
            mine = DraftRounds(draft, [ProposeItem(self._sequence, 1, at, append, k)] if k else [])
            tokens: list[int] = []
            while not base.stopped:
                self._round(run, base, mine if k else None, tokens)
                if len(run.first_token_seconds) < len(run.outputs) + 1:
                    run.first_token_seconds.append(time.perf_counter() - began)
        finally:
            verify.release()
            draft.release()
        run.tokens += len(tokens)
        return tuple(tokens)

    def _take_in(self, verify: Any, draft: Any, prompt: Sequence[int]) -> None:
        head = tuple(prompt[:-1])
        if head:
            verify.round([VerifyItem(self._sequence, 1, 0, head, extend_only=True)])
            if draft is not None:
                draft.round([ProposeItem(self._sequence, 1, 0, head, 0)])

    @staticmethod
    def _round(run: Run, base: Any, mine: Any, tokens: list[int]) -> None:
        began = time.perf_counter()
        proposals: Any = []
        if mine is not None:
            proposed = mine.propose()
            proposals = proposed.answers
            run.draft_seconds += proposed.model_seconds
        result = base.judge(proposals)
        (verdict,) = result.answers
        if mine is not None:
            mine.judged(base.judgements(result.answers))
        offered = base.items[0].proposal
        tokens.extend((*offered[: verdict.num_accepted], verdict.next_token))
        run.rounds += 1
        run.proposed += len(offered)
        run.accepted += verdict.num_accepted
        run.verify_seconds += result.model_seconds
        spent = time.perf_counter() - began
        run.overhead_seconds += spent - result.model_seconds
        if mine is not None:
            run.overhead_seconds -= proposed.model_seconds
