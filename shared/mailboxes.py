"""The mailboxes of one service: offered or fetched when the coordinator introduces the two."""

from __future__ import annotations

import threading
from typing import Any

from outrider.protos import speculation_pb2 as pb
from outrider.shared.doorbell import Doorbell
from outrider.shared.errors import CapacityError
from outrider.shared.handover import HandoverFailed, Offer, Offered, fetch
from outrider.shared.mailbox import Layout

MOST_MAILBOXES = 16
"""A coordinator needs one."""


class Mailboxes:
    """Open mailboxes by id. Calls may come from any thread."""

    def __init__(self) -> None:
        self.spin = 0.0
        """Seconds that doorbells made from now on watch before they sleep."""
        self._open: dict[int, Doorbell] = {}
        self._lock = threading.Lock()

    def offer(self, request: pb.OfferMailboxRequest, caller: str) -> pb.OfferMailboxResponse:
        """Makes one and has it wait for its draft; ``caller`` as gRPC names the peer."""
        self._admit(caller)
        layout = Layout(request.max_sequences, request.max_k, request.row_entries)
        made = Offer(layout, self._keep, spin=self.spin).offered
        return pb.OfferMailboxResponse(
            mailbox=made.mailbox,
            layout=made.layout,
            socket=made.socket,
            secret=made.secret,
            boot_id=made.boot_id,
            size=made.size,
        )

    def map(self, request: pb.MapMailboxRequest, caller: str) -> pb.MapMailboxResponse:
        """Fetches one from the verifier that offers it."""
        self._admit(caller)
        offer = request.offer
        offered = Offered(
            offer.mailbox, offer.layout, offer.socket, offer.secret, offer.boot_id, offer.size
        )
        self._keep(offer.mailbox, fetch(offered, spin=self.spin))
        return pb.MapMailboxResponse()

    def get(self, mailbox: int) -> Doorbell | None:
        """The mailbox of that id, while both sides hold it."""
        found = self._open.get(mailbox)
        return found if found is not None and found.alive() else None

    def __len__(self) -> int:
        self._sweep()
        return len(self._open)

    def _admit(self, caller: str) -> None:
        if not caller.startswith("unix:"):
            raise HandoverFailed(
                f"mailboxes are arranged over unix sockets only; this call came from {caller}"
            )
        self._sweep()
        if len(self._open) >= MOST_MAILBOXES:
            raise CapacityError(f"{len(self._open)} mailboxes are open (at most {MOST_MAILBOXES})")

    def _keep(self, mailbox: int, doorbell: Doorbell) -> None:
        with self._lock:
            self._open[mailbox] = doorbell

    def _sweep(self) -> None:
        """Lets go of those that the other side has let go of."""
        with self._lock:
            gone = [key for key, one in self._open.items() if not one.alive()]
            closing: list[Any] = [self._open.pop(key) for key in gone]
        for one in closing:
            one.close()
