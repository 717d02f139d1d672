"""Addresses that a server listens on: reading them, and claiming them without stealing."""

from __future__ import annotations

import errno
import re
import socket
import stat
from dataclasses import dataclass
from pathlib import Path

from outrider.shared.core.errors import ConfigError

# sun_path holds 108 bytes on Linux and 104 on macOS, a closing zero byte included.
MAX_SOCKET_PATH = 103


@dataclass(frozen=True, slots=True)
class Address:
    """``host:port`` (``path`` is None) or a unix socket at ``path``."""

    host: str = ""
    port: int = 0
    path: Path | None = None

    def __str__(self) -> str:
        if self.path is not None:
            return f"unix:{self.path}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"

    @property
    def local(self) -> bool:
        """Whether only this host can reach it."""
        return self.path is not None or self.host in ("localhost", "::1", "127.0.0.1")


def parse(text: str) -> Address:
    """Reads ``host:port``, ``[v6]:port`` or ``unix:/path``; raises ``ConfigError``."""
    wanted = "must be host:port, [v6 address]:port or unix:/path"
    if text.startswith("unix:"):
        raw = text[len("unix:") :]
        raw = raw[2:] if raw.startswith("///") else raw  # unix:///path is the URI form
        if not raw or "\0" in raw:
            raise ConfigError(f"listen = {text!r}; {wanted}")
        path = Path(raw).absolute()
        if len(bytes(path)) > MAX_SOCKET_PATH:
            raise ConfigError(
                f"listen = {text!r}; the path of a unix socket must have at most "
                f"{MAX_SOCKET_PATH} bytes, this one has {len(bytes(path))}"
            )
        return Address(path=path)
    match = re.fullmatch(r"(?:\[([0-9a-fA-F:.%]+)\]|([^\s:/\[\]]+)):(\d{1,5})", text)
    if not match or int(match[3]) > 65535:
        raise ConfigError(f"listen = {text!r}; {wanted}, with a port from 0 to 65535")
    return Address(host=match[1] or match[2], port=int(match[3]))


def claim(address: Address) -> None:
    """Makes sure that ``address`` is free to bind; raises ``ConfigError`` saying what is wrong.

    gRPC would silently unlink another server's unix socket and share its TCP port, so this
    looks first. A socket file that nobody listens on any more is removed.
    """
    if address.path is not None:
        _claim_socket(address.path)
    else:
        _claim_port(address)


def release(address: Address) -> None:
    """Removes the unix socket file of a server that has stopped, where there is one."""
    if address.path is not None and _is_socket(address.path) and not _answers(address.path):
        address.path.unlink(missing_ok=True)


def _claim_socket(path: Path) -> None:
    if not path.parent.is_dir():
        raise ConfigError(f"listen: unix:{path}: the folder {path.parent} does not exist")
    if not path.exists() and not path.is_symlink():
        return
    if not _is_socket(path):
        raise ConfigError(f"listen: unix:{path}: there is a file of that name, not a socket")
    if _answers(path):
        raise ConfigError(
            f"listen: unix:{path}: another server is listening there; stop it or choose "
            "another path"
        )
    path.unlink(missing_ok=True)


def _is_socket(path: Path) -> bool:
    try:
        return stat.S_ISSOCK(path.lstat().st_mode)
    except FileNotFoundError:
        return False


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except OSError:
            return True  # busy or not ours: somebody is there
        return True


def _claim_port(address: Address) -> None:
    flags = socket.AI_PASSIVE
    try:
        found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM, flags=flags)
    except OSError as error:
        raise ConfigError(f"listen: {address}: unknown host: {error.strerror or error}") from None
    failure: OSError | None = None
    bound = 0
    for family, kind, protocol, _, where in found:
        try:
            with socket.socket(family, kind, protocol) as probe:
                # Lets a port in TIME_WAIT pass, as gRPC's own listener does.
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(where)
                bound += 1
        except OSError as error:
            failure = error
            if error.errno == errno.EADDRINUSE:
                break
    if failure is None or (bound and failure.errno != errno.EADDRINUSE):
        return
    if failure.errno == errno.EADDRINUSE:
        raise ConfigError(
            f"listen: {address}: the port is in use; stop the other server or choose another "
            "port (0 picks a free one)"
        )
    raise ConfigError(f"listen: {address}: {failure.strerror or failure}")
