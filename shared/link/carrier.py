"""Carriers: what a service does so that draft and base come to share a link."""

from __future__ import annotations

import importlib
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from outrider.shared.core.errors import InvalidRequest
from outrider.shared.core.links import LINKS, Link
from outrider.shared.link.doorbell import Doorbell, Side
from outrider.shared.link.handshake import Beside, Offer, Offered, fetch
from outrider.shared.link.mailbox import Layout

if TYPE_CHECKING:
    from outrider.shared.link.device.handshake import DeviceSide


class Carrier(Protocol):
    """One service's part in setting up a link; made anew for each mailbox."""

    def __init__(self, link: Link, spin: float, device: DeviceSide | None) -> None:
        """``spin``: seconds, see ``Doorbell``; ``device``: what there is of device memory."""

    def offer(self, layout: Layout, claimed: Callable[[int, Doorbell], None]) -> Offered:
        """The verifier's: a mailbox that waits for its draft.

        ``claimed(mailbox, doorbell)`` is called, on any thread, before the draft goes on.
        """
        ...

    def fetch(self, offered: Offered) -> Doorbell:
        """The draft's; raises ``HandoverFailed`` saying why it can't be had.

        The doorbell says which link the two now share: this one, or one beneath it and why.
        """
        ...


class HostMemoryCarrier:
    """The carrier of links over a mailbox in shared memory; see ``Carrier``."""

    def __init__(self, link: Link, spin: float, device: DeviceSide | None) -> None:
        self._link, self._spin, self._device = link, spin, device

    def offer(self, layout: Layout, claimed: Callable[[int, Doorbell], None]) -> Offered:
        """See ``Carrier``."""
        offer = Offer(
            layout, claimed, spin=self._spin, link=self._link.name, exchange=self._exchange
        )
        return offer.offered

    def fetch(self, offered: Offered) -> Doorbell:
        """See ``Carrier``."""
        return fetch(offered, spin=self._spin, exchange=self._exchange)

    def _exchange(self, peer: socket.socket, layout: Layout, side: Side) -> Beside:
        """The mailbox is all that is shared."""
        return Beside(self._link.name)


def carrier_of(name: str, spin: float, device: DeviceSide | None) -> Carrier:
    """The carrier of the link ``name``; raises ``InvalidRequest`` where it has none."""
    link = LINKS.get(name)
    if link is None or not link.carrier:
        shared = ", ".join(one.name for one in LINKS.values() if one.carrier)
        raise InvalidRequest("link", name, f"one of {shared}")
    # Imported late: a service whose link needs no device should not load torch to listen.
    module, _, kind = link.carrier.partition(":")
    made: Carrier = getattr(importlib.import_module(module), kind)(link, spin, device)
    return made
