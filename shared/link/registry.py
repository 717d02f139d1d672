"""The mailboxes of one service: offered or fetched when the coordinator introduces the two."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from outrider.protos import speculation_pb2 as pb
from outrider.shared.core.errors import CapacityError, InvalidRequest
from outrider.shared.link.carrier import carrier_of
from outrider.shared.link.doorbell import Doorbell
from outrider.shared.link.handshake import OFFER_SECONDS, HandoverFailed, Offered
from outrider.shared.link.mailbox import MOST_K, MOST_ROW_ENTRIES, MOST_SEQUENCES, Layout

if TYPE_CHECKING:
    from outrider.shared.link.device.handshake import DeviceSide

log = logging.getLogger(__name__)

MOST_MAILBOXES = 16
"""A coordinator needs one."""
PREPARE_SECONDS = 8.0
"""How long the answer that a mailbox is mapped waits until both sides are prepared."""
IDLE_SECONDS = 60.0
"""Where all are open, one that no grant named for so long makes room: its coordinator may have
gone without a word, and asks for another one if it has not."""

_LIMITS: Mapping[str, int] = {
    "max_sequences": MOST_SEQUENCES,
    "max_k": MOST_K,
    "row_entries": MOST_ROW_ENTRIES,
}


class Mailboxes:
    """Open mailboxes by id. Calls may come from any thread."""

    def __init__(self) -> None:
        self.spin = 0.0
        """Seconds that doorbells made from now on watch before they sleep."""
        self.device: DeviceSide | None = None
        """What there is of device memory."""
        self.prepare: Callable[[Doorbell], None] = lambda doorbell: None
        """What is done with a mailbox that has device memory before it is used."""
        self._open: dict[int, Doorbell] = {}
        self._offered: dict[int, float] = {}
        """When those were offered that no draft has fetched yet."""
        self._used: dict[int, float] = {}
        """When each open one was last used; infinite while a grant uses it."""
        self._lock = threading.Lock()

    def offer(self, request: pb.OfferMailboxRequest, caller: str) -> pb.OfferMailboxResponse:
        """Makes one and has it wait for its draft; ``caller`` as gRPC names the peer."""
        self._admit(caller)
        for name, most in _LIMITS.items():
            value = getattr(request, name)
            if not 1 <= value <= most:
                raise InvalidRequest(name, value, f"in 1..{most}")
        layout = Layout(request.max_sequences, request.max_k, request.row_entries)
        carrier = carrier_of(request.link, self.spin, self.device)
        made = carrier.offer(layout, self._keep)
        with self._lock:
            self._offered[made.mailbox] = time.monotonic()
        return pb.OfferMailboxResponse(
            mailbox=made.mailbox,
            layout=made.layout,
            socket=made.socket,
            secret=made.secret,
            boot_id=made.boot_id,
            size=made.size,
            link=made.link,
        )

    def map(self, request: pb.MapMailboxRequest, caller: str) -> pb.MapMailboxResponse:
        """Fetches one from the verifier that offers it."""
        self._admit(caller)
        offer = request.offer
        offered = Offered(
            offer.mailbox, offer.layout, offer.socket, offer.secret, offer.boot_id, offer.size,
            offer.link,
        )  # fmt: skip
        doorbell = carrier_of(offer.link, self.spin, self.device).fetch(offered)
        self._keep(offer.mailbox, doorbell)
        # Grants that come sooner wait as well; but whoever asks wants to know when all is ready.
        doorbell.await_prepared(PREPARE_SECONDS)
        return pb.MapMailboxResponse(link=doorbell.link, reason=doorbell.reason)

    def get(self, mailbox: int) -> Doorbell | None:
        """The mailbox of that id, while both sides hold it."""
        found = self._open.get(mailbox)
        return found if found is not None and found.alive() else None

    @contextmanager
    def used(self, mailbox: int) -> Iterator[Doorbell | None]:
        """``get``; within, it does not make room for another one."""
        self._mark(mailbox, math.inf)
        try:
            yield self.get(mailbox)
        finally:
            self._mark(mailbox, time.monotonic())

    def close(self, mailboxes: Iterable[int]) -> None:
        """Lets go of ``mailboxes``, as far as they are open here; the other sides hear of it."""
        with self._lock:
            closing = [self._open.pop(key) for key in mailboxes if key in self._open]
            self._used = {key: self._used[key] for key in self._open}
        for one in closing:
            one.close()

    def __len__(self) -> int:
        self._sweep()
        return len(self._open)

    def _admit(self, caller: str) -> None:
        if not caller.startswith("unix:"):
            raise HandoverFailed(
                f"mailboxes are arranged over unix sockets only; this call came from {caller}"
            )
        self._sweep()
        with self._lock:
            now = time.monotonic()
            self._offered = {k: at for k, at in self._offered.items() if now - at < OFFER_SECONDS}
            held = len(self._open) + len(self._offered)
            if held < MOST_MAILBOXES:
                return
            since, oldest = min(((at, key) for key, at in self._used.items()), default=(now, 0))
        if now - since < IDLE_SECONDS:
            raise CapacityError(f"{held} mailboxes are open or offered (at most {MOST_MAILBOXES})")
        self.close([oldest])

    def _keep(self, mailbox: int, doorbell: Doorbell) -> None:
        """Takes in a mailbox, and prepares it on a thread: it may take seconds, the other side
        waits for this one's word, and both can prepare at once."""
        doorbell.unset_prepared()
        with self._lock:
            self._offered.pop(mailbox, None)
            replaced = self._open.get(mailbox)
            self._open[mailbox] = doorbell
            self._used[mailbox] = time.monotonic()
        if replaced is not None:
            replaced.close()
        if doorbell.device is None:
            doorbell.set_prepared()
            return
        name = "mailbox preparation"
        threading.Thread(
            target=self._prepare, args=(mailbox, doorbell), name=name, daemon=True
        ).start()

    def _prepare(self, mailbox: int, doorbell: Doorbell) -> None:
        try:
            self.prepare(doorbell)
        except Exception:
            log.exception("mailbox %d could not be prepared", mailbox)  # it may do without
        finally:
            doorbell.set_prepared()

    def _mark(self, mailbox: int, until: float) -> None:
        with self._lock:
            if mailbox in self._open:
                self._used[mailbox] = until

    def _sweep(self) -> None:
        """Lets go of those that the other side has let go of."""
        with self._lock:
            gone = [key for key, one in self._open.items() if not one.alive()]
        self.close(gone)
