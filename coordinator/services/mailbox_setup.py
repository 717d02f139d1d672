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
from outrider.shared.core.errors import ConfigError, ServiceUnavailable

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
        self._targets = (config.base_target, config.draft_target)
        self._changed = asyncio.Event()
        self._since = 0.0
        self.mailbox = 0
        """The open mailbox; 0: none."""
        self.on_device = False
        """Whether draft and verifier share device memory too."""
        self.reason = ""
        """Why there is none, or no device memory, where it might be."""

    @property
    def link(self) -> str:
        """The link in use."""
        if not self.mailbox:
            return "grpc"
        return "cuda-ipc" if self.on_device else "shm"

    def changed(self) -> None:
        """A service came or went: what it had mapped is gone with it."""
        self.mailbox, self.on_device, self.reason = 0, False, "a service was lost"
        self._changed.set()

    def lost(self, reason: str) -> None:
        """The mailbox is of no more use; another one is arranged."""
        log.warning("draft and verifier have lost their mailbox: %s", reason)
        self.mailbox, self.on_device, self.reason = 0, False, reason
        self._changed.set()

    async def first(self) -> None:
        """Tries once; raises ``ConfigError`` where the link was asked for by name and failed."""
        await self._set_up()
        wanted = self._wanted in ("shm", "cuda-ipc")
        if wanted and self._both_up and self.link != self._wanted:
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

    @property
    def _on_one_device(self) -> bool:
        """Whether device memory is asked for: by name, or since both run on one device, which
        takes turns by itself. Two devices are left to who asks by name."""
        if self._wanted != "auto":
            return self._wanted == "cuda-ipc"
        connections = (self._verify_connection, self._draft_connection)
        found = {one.info.device_uuid if one and one.info else "" for one in connections}
        return len(found) == 1 and "" not in found

    def _possible(self) -> bool:
        """Whether it is worth asking at all; sets the reason where not."""
        if self._wanted == "grpc":
            self.reason = ""
            return False
        for role, target in zip(("verify", "draft"), self._targets, strict=True):
            if target is not None and not target.startswith("unix:"):
                self.reason = (
                    f"the {role} service is reached at {target}, not over a unix socket, so it "
                    "may be on another host"
                )
                return False
        return True

    async def _set_up(self) -> None:
        draft = self._draft_connection
        if self.mailbox or draft is None or not self._both_up or not self._possible():
            return
        request = pb.OfferMailboxRequest(on_device=self._on_one_device)
        request.MergeFrom(self.limits)
        try:
            offer = await self._verify_connection.ask("OfferMailbox", request)
            mapped = await draft.ask("MapMailbox", pb.MapMailboxRequest(offer=offer))
        except ServiceUnavailable as error:
            if str(error) != self.reason:
                level = logging.WARNING if self._wanted == "auto" else logging.ERROR
                log.log(level, "no shared memory between draft and verifier: %s", error)
            self.reason = str(error)
        else:
            self.mailbox, self.on_device = offer.mailbox, mapped.on_device
            self.reason = mapped.reason
            self._since = time.monotonic()
            log.info("draft and verifier share a mailbox of %d bytes", offer.size)
            if offer.on_device and not mapped.on_device:
                level = logging.WARNING if self._wanted == "auto" else logging.ERROR
                log.log(level, "no device memory between draft and verifier: %s", mapped.reason)
