"""Introduces draft and verifier to each other, so that they share a mailbox.

The coordinator only carries the invitation: the verifier offers a mailbox, the draft is told
where to fetch it. The memory and its descriptor never pass through here. Where it can't be had
the reason is kept, told and logged, and rounds travel over gRPC.
"""

from __future__ import annotations

import asyncio
import logging
import time

from outrider.coordinator.services.connection import DraftConnection, VerifyConnection
from outrider.protos import speculation_pb2 as pb
from outrider.shared.config.schema import CoordinatorConfig
from outrider.shared.core import links
from outrider.shared.core.errors import ConfigError, ServiceUnavailable
from outrider.shared.core.links import AUTO, LINKS, MESSAGES, Link, Reached
from outrider.shared.core.model_facts import read_description

log = logging.getLogger(__name__)

FIRST_PAUSE, LAST_PAUSE = 0.2, 5.0
STEADY_SECONDS = 10.0
"""A mailbox that was lost sooner is not arranged again as readily."""


class MailboxSetup:
    """Keeps a mailbox open between the services while both are there, if one is wanted."""

    def __init__(
        self,
        config: CoordinatorConfig,
        verify_connection: VerifyConnection,
        draft_connection: DraftConnection | None,
    ) -> None:
        self._verify_connection = verify_connection
        self._draft_connection = draft_connection
        self._wanted = config.link
        self.limits = pb.OfferMailboxRequest(
            max_sequences=config.max_running,
            max_k=max(1, config.max_k),
            row_entries=config.draft_top,
        )
        """What one round in the mailbox may hold."""
        self._changed = asyncio.Event()
        self._since = 0.0
        self.mailbox = 0
        """The open mailbox; 0: none."""
        self.link = MESSAGES
        """Name of the link in use."""
        self.reason = ""
        """Why it is no better one, where it might be."""

    def changed(self) -> None:
        """A service came or went: what it had mapped is gone with it."""
        self._drop("a service was lost")

    def lost(self, reason: str) -> None:
        """The mailbox is of no more use; another one is arranged."""
        log.warning("draft and verifier have lost their mailbox: %s", reason)
        self._drop(reason)

    async def first(self) -> None:
        """Tries once; raises ``ConfigError`` where the link was asked for by name and failed."""
        await self._set_up()
        if self._wanted not in (AUTO, self.link) and self._both_up:
            raise ConfigError(f"link = {self._wanted!r} can't be had: {self.reason}")

    async def run(self) -> None:
        """Arranges a mailbox whenever there is none and both services are up."""
        pause = FIRST_PAUSE
        while True:
            await self._changed.wait()
            self._changed.clear()
            if time.monotonic() - self._since > STEADY_SECONDS:
                pause = FIRST_PAUSE
            while not self.mailbox and self._both_up and self._possible():
                await asyncio.sleep(pause)
                await self._set_up()
                pause = min(2 * pause, LAST_PAUSE)

    @property
    def _both_up(self) -> bool:
        draft = self._draft_connection
        return self._verify_connection.up and draft is not None and draft.up

    def _drop(self, reason: str) -> None:
        self.mailbox, self.link, self.reason = 0, MESSAGES, reason
        self._changed.set()

    def _asked_for(self) -> tuple[Link, str]:
        """The link to ask the services for, and why it is no better one; both are up."""
        assert self._draft_connection is not None
        verify, draft = (_reached(one) for one in (self._verify_connection, self._draft_connection))
        return links.wanted(self._wanted, verify, draft)

    def _possible(self) -> bool:
        """Whether the services are to share anything; sets the reason where not."""
        link, reason = self._asked_for()
        if not link.carrier:
            self.reason = reason
        return bool(link.carrier)

    async def _set_up(self) -> None:
        draft = self._draft_connection
        if self.mailbox or draft is None or not self._both_up or not self._possible():
            return
        link, reason = self._asked_for()
        while link.carrier:
            request = pb.OfferMailboxRequest(link=link.name)
            request.MergeFrom(self.limits)
            try:
                offer = await self._verify_connection.ask("OfferMailbox", request)
                mapped = await draft.ask("MapMailbox", pb.MapMailboxRequest(offer=offer))
            except ServiceUnavailable as error:
                if str(error) != self.reason:
                    self._note_lack(link, str(error))
                link, reason = LINKS[link.beneath], reason or str(error)
            else:
                self.mailbox, self.link = offer.mailbox, mapped.link
                self._since = time.monotonic()
                log.info("draft and verifier share a mailbox of %d bytes", offer.size)
                if mapped.link != link.name:
                    self._note_lack(link, mapped.reason)
                reason = reason or mapped.reason
                break
        self.reason = reason

    def _note_lack(self, link: Link, reason: str) -> None:
        level = logging.WARNING if self._wanted == AUTO else logging.ERROR
        log.log(level, "draft and verifier do without the link %s: %s", link.name, reason)


def _reached(connection: DraftConnection | VerifyConnection) -> Reached:
    """The service as it was when last reached."""
    role, target, info = connection.role, connection.endpoint.target, connection.info
    if info is None:
        return Reached(role, target)
    return Reached(role, target, info.device_uuid, read_description(info.model).is_model)
