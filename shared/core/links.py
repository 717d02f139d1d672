"""The links: the ways that proposals and verdicts may take between draft and base.

This table is the one list of them. Configuration, flags, the coordinator, the services, the bench
and the tests read it, and docs/links.md is held against it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

AUTO = "auto"
"""In place of a link's name: the best there is."""
MESSAGES = "grpc"
"""The link that is always there."""

Way = Literal["alone", "host", "device"]
"""How the turns of a grant are taken: by the base without a draft, by the hosts, by the devices."""


TURNS_AHEAD = ((1, 64), (2, 64), (3, 64), (4, 16), (6, 16), (8, 8))
"""K, and up to how many sequences the devices' turns of it are captured before anybody asks. Each
number of sequences costs a capture of tens of milliseconds, which a request would wait for."""


def turns_ahead(sequences: int) -> tuple[int, ...]:
    """The Ks whose turns for so many sequences the devices have captured, rising."""
    return tuple(k for k, most in TURNS_AHEAD if sequences <= most)


@dataclass(frozen=True, slots=True)
class Reached:
    """A model service, as the coordinator reaches it."""

    role: str
    """"draft" or "verify"."""
    target: str
    """Its address."""
    device: str = ""
    """Identity of its device, where that can take turns by itself."""
    is_model: bool = True
    """Not where it proposes from the text alone."""


Objection = Callable[[Reached, Reached], str | None]
"""What speaks against a link between these two, verifier and draft; None where nothing does."""


def nothing_against(verify: Reached, draft: Reached) -> str | None:
    """A link that can be had anywhere."""
    return None


def may_be_apart(verify: Reached, draft: Reached) -> str | None:
    """Why two services may be on two hosts, where memory can't be shared."""
    for one in (verify, draft):
        if not one.target.startswith("unix:"):
            return (
                f"the {one.role} service is reached at {one.target}, not over a unix socket, so it "
                "may be on another host"
            )
    return None


def no_device_memory(verify: Reached, draft: Reached) -> str | None:
    """Why there is none for two services to share."""
    if not draft.is_model:
        return "the draft is no model and has no device memory"
    return may_be_apart(verify, draft)


def not_one_device(verify: Reached, draft: Reached) -> str | None:
    """Why device memory is left to who asks for it by name: that spans two devices as well."""
    if verify.device and verify.device == draft.device:
        return None
    return "draft and base do not run on one device that takes turns by itself"


@dataclass(frozen=True, slots=True)
class Link:
    """One way for proposals and verdicts."""

    name: str
    travels: str
    """How proposals and verdicts travel, for a person."""
    where: str
    """Where it can be had, for a person."""
    way: Way
    """How turns are taken over it."""
    carrier: str = ""
    """``module:Class`` of the ``Carrier`` by which draft and base come to share it; "" where they
    share nothing."""
    beneath: str = MESSAGES
    """The link in use where this one can't be had, and for what it can't do."""
    why_not: Objection = nothing_against
    """Why it isn't worth asking the services for; None where it is."""
    why_by_name: Objection = nothing_against
    """Why only who asks for it by name gets it; None where ``auto`` takes it."""


LINKS: dict[str, Link] = {
    link.name: link
    for link in (
        Link(
            MESSAGES,
            travels="two exchanges of messages a round, through the coordinator",
            where="anywhere",
            way="alone",
        ),
        Link(
            "shm",
            travels="through memory that both processes map; no message in a round",
            where="one host, one user, Linux",
            way="host",
            carrier="outrider.shared.link.carrier:HostMemoryCarrier",
            why_not=may_be_apart,
        ),
        Link(
            "cuda-ipc",
            travels="through device memory; no host between draft and base in a round",
            where="one GPU (by name also two), one host, one user, Linux",
            way="device",
            carrier="outrider.shared.link.device.handshake:DeviceMemoryCarrier",
            beneath="shm",
            why_not=no_device_memory,
            why_by_name=not_one_device,
        ),
    )
}
"""By name, from the one that is always there to the best."""


def wanted(name: str, verify: Reached, draft: Reached) -> tuple[Link, str]:
    """The link to ask the services for, by its name or ``AUTO``, and why it is no better one."""
    if name == AUTO:
        link = next(
            one for one in reversed(LINKS.values()) if one.why_by_name(verify, draft) is None
        )
    else:
        link = LINKS[name]
    reason = ""
    while (against := link.why_not(verify, draft)) is not None:
        link, reason = LINKS[link.beneath], reason or against
    return link, reason
