"""The coordinator put together: connections, tokenizer, limits and the round loop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from outrider.coordinator.requests.prefix_cache import PrefixCache
from outrider.coordinator.requests.sequence import Sequence
from outrider.coordinator.requests.text.tokenizer import Tokenizer
from outrider.coordinator.requests.validation import Limits
from outrider.coordinator.rounds.controller.choose_k import Speculation
from outrider.coordinator.rounds.drafting import Drafting
from outrider.coordinator.rounds.granted import GrantedRounds
from outrider.coordinator.rounds.jobs import Jobs
from outrider.coordinator.rounds.loop import RoundLoop
from outrider.coordinator.rounds.prompt_budget import PromptBudget
from outrider.coordinator.rounds.round import RoundRunner
from outrider.coordinator.rounds.scheduler import Scheduler
from outrider.coordinator.rounds.verifying import Verifying
from outrider.coordinator.server.models import base_tokenizer, check_same_base, check_vocabulary
from outrider.coordinator.services.connection import Connection, DraftConnection, VerifyConnection
from outrider.coordinator.services.endpoint import endpoint_of
from outrider.coordinator.services.mailbox_setup import MailboxSetup
from outrider.coordinator.telemetry.records import NoObserver, Observer, WallClock
from outrider.protos import speculation_pb2 as pb
from outrider.shared.config.schema import CoordinatorConfig
from outrider.shared.core.errors import ConfigError

log = logging.getLogger(__name__)

_REST_SECONDS = 2.0


class Runtime:
    """A running coordinator, without its public server."""

    def __init__(
        self,
        config: CoordinatorConfig,
        *,
        loop: RoundLoop,
        mailbox_setup: MailboxSetup,
        verify_connection: VerifyConnection,
        draft_connection: DraftConnection | None,
        tokenizer: Tokenizer | None,
        speculation: Speculation,
        clock: WallClock,
        observer: Observer,
    ) -> None:
        self.config = config
        self.loop = loop
        self.mailbox_setup = mailbox_setup
        self.verify_connection = verify_connection
        self.draft_connection = draft_connection
        self.tokenizer = tokenizer
        self.speculation = speculation
        self.clock = clock
        self.observer = observer

    @property
    def base(self) -> pb.ServiceInfoResponse:
        """The base's service as it was when last reached."""
        info = self.verify_connection.info
        assert info is not None  # the runtime starts with it
        return info

    @property
    def limits(self) -> Limits:
        """What requests are checked against."""
        base, config = self.base, self.config
        max_k = min(config.max_k, base.max_k)
        return Limits(
            vocab_size=base.model.vocab_size,
            max_positions=base.model.max_positions,
            max_k=max_k,
            slack=max_k + 1,
            arena_longest=base.model.arena_longest,
            eos_token_ids=tuple(base.model.eos_token_ids),
            default_k=None if config.default_k is None else min(config.default_k, max_k),
            default_max_new_tokens=config.default_max_new_tokens,
            max_new_tokens=config.max_new_tokens_limit,
            max_logprobs=config.max_logprobs,
            draft_top=config.draft_top,
        )


@asynccontextmanager
async def running(
    config: CoordinatorConfig,
    *,
    observer: Observer | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> AsyncIterator[Runtime]:
    """Connects, checks, and runs the round loop for the length of the block.

    Raises ``ServiceUnavailable`` when the base can't be reached in time, ``VocabularyMismatch``
    and other ``ConfigError`` for parts that do not fit together.
    """
    observer = NoObserver() if observer is None else observer
    clock = WallClock()
    loop: RoundLoop | None = None

    def verify_changed(up: bool, reason: str) -> None:
        if loop is not None:
            mailbox_setup.changed()
            loop.verify_changed(up, reason)

    def draft_changed(up: bool, reason: str) -> None:
        if loop is not None:
            mailbox_setup.changed()
            loop.draft_changed(up, reason)

    def check_verify(info: pb.ServiceInfoResponse) -> None:
        if verify_connection.info is not None:
            check_same_base(verify_connection.info.model, info.model)

    def check_draft(info: pb.ServiceInfoResponse) -> None:
        if verify_connection.info is not None:
            check_vocabulary(verify_connection.info.model, info.model)

    verify_connection: VerifyConnection = Connection(
        endpoint_of(config, "verify", config.base_target, config.verify_timeout_seconds),
        check=check_verify,
        changed=verify_changed,
    )
    draft_connection: DraftConnection | None = None
    if config.draft_target is not None:
        draft_connection = Connection(
            endpoint_of(config, "draft", config.draft_target, config.draft_timeout_seconds),
            check=check_draft,
            changed=draft_changed,
        )
    mailbox_setup = MailboxSetup(config, verify_connection, draft_connection)
    try:
        async with asyncio.TaskGroup() as tasks:
            # Cancelled one by one at the end, so that leaving the block is not an error.
            background = [tasks.create_task(verify_connection.run(), name="verify connection")]
            try:
                progress("connecting to the base model")
                await verify_connection.reached(config.start_timeout_seconds)
                if draft_connection is not None:
                    background.append(
                        tasks.create_task(draft_connection.run(), name="draft connection")
                    )
                    progress("connecting to the draft model")
                    await _draft_reached(draft_connection, config.draft_start_seconds)
                    await mailbox_setup.first()
                assert verify_connection.info is not None
                progress("loading the tokenizer")
                tokenizer = await asyncio.to_thread(
                    base_tokenizer, config.tokenizer, verify_connection.info.model
                )
                speculation = Speculation(config.max_k)
                loop = _round_loop(
                    config,
                    verify_connection,
                    draft_connection,
                    mailbox_setup,
                    speculation,
                    tokenizer=tokenizer,
                    observer=observer,
                    clock=clock,
                )
                background.append(tasks.create_task(mailbox_setup.run(), name="mailbox setup"))
                background.append(tasks.create_task(loop.run(), name="rounds"))
                yield Runtime(
                    config,
                    loop=loop,
                    mailbox_setup=mailbox_setup,
                    verify_connection=verify_connection,
                    draft_connection=draft_connection,
                    tokenizer=tokenizer,
                    speculation=speculation,
                    clock=clock,
                    observer=observer,
                )
            finally:
                await _at_rest([one for one in (verify_connection, draft_connection) if one])
                for task in background[2:] if draft_connection is not None else background[1:]:
                    task.cancel()
                await verify_connection.close()
                if draft_connection is not None:
                    await draft_connection.close()
                for task in background:
                    task.cancel()
    except BaseExceptionGroup as group:
        # One thing went wrong: say that, not that a group did.
        raise group.exceptions[0] from None


def _round_loop(
    config: CoordinatorConfig,
    verify_connection: VerifyConnection,
    draft_connection: DraftConnection | None,
    mailbox_setup: MailboxSetup,
    speculation: Speculation,
    *,
    tokenizer: Tokenizer | None,
    observer: Observer,
    clock: WallClock,
) -> RoundLoop:
    """The round loop and all that it is made of."""
    drafting = Drafting(
        draft_connection,
        cache=PrefixCache(config.prefix_cache),
        budget=_prompt_budget(config),
        patience=config.draft_patience_seconds,
    )
    verifying = Verifying(verify_connection, PrefixCache(config.prefix_cache))
    granted = GrantedRounds(
        drafting,
        verifying,
        mailbox_setup,
        clock=clock,
        rounds=config.grant_rounds,
        draft_patience=config.draft_patience_seconds,
    )
    budget = _prompt_budget(config)
    scheduler = Scheduler[Sequence](
        max_running=config.max_running, max_waiting=config.max_waiting, budget=budget
    )
    jobs = Jobs(
        scheduler,
        drafting,
        verifying,
        speculation,
        tokenizer=tokenizer,
        observer=observer,
        clock=clock,
        patience=config.verify_patience_seconds,
    )
    rounds = RoundRunner(
        drafting, verifying, speculation, granted, budget, observer=observer, clock=clock
    )
    return RoundLoop(
        scheduler=scheduler,
        jobs=jobs,
        rounds=rounds,
        drafting=drafting,
        verifying=verifying,
        speculation=speculation,
        verify_connection=verify_connection,
        draft_connection=draft_connection,
        observer=observer,
        clock=clock,
        patience=config.verify_patience_seconds,
    )


def _prompt_budget(config: CoordinatorConfig) -> PromptBudget:
    """For one service: each learns what its own prompts take."""
    return PromptBudget(config.prefill_delay_seconds, config.prefill_chunk)


async def _at_rest(connections: list[Connection[Any, Any]]) -> None:
    """Waits until no message is on its way out, but not for ever; see ``Connection.at_rest``."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_REST_SECONDS):
            # While one is waited for, writing to another may begin.
            while not all(one.at_rest.is_set() for one in connections):
                for one in connections:
                    await one.at_rest.wait()


async def _draft_reached(connection: DraftConnection, seconds: float) -> None:
    """Gives the draft a moment; without it rounds run all the same. A mismatch is an error."""
    try:
        await connection.reached(seconds)
    except ConfigError:
        raise
    except Exception as error:
        log.warning("starting without the draft: %s", error)
