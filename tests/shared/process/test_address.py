from __future__ import annotations

import socket
from pathlib import Path

import pytest

from outrider.shared.core.errors import ConfigError
from outrider.shared.process.address import MAX_SOCKET_PATH, Address, claim, parse, release


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("127.0.0.1:50051", Address("127.0.0.1", 50051)),
        ("localhost:0", Address("localhost", 0)),
        ("[::1]:80", Address("::1", 80)),
        ("unix:/run/a b", Address(path=Path("/run/a b"))),
        ("unix:///run/a", Address(path=Path("/run/a"))),
    ],
)
def test_address_parse_reads_what_str_writes(text: str, wanted: Address) -> None:
    assert parse(text) == wanted
    assert parse(str(wanted)) == wanted


def test_address_relative_sockets_become_absolute() -> None:
    assert parse("unix:a/b").path == Path.cwd() / "a/b"


@pytest.mark.parametrize(
    "text", ["", "host", "host:", ":1", "host:65536", "host:-1", "a b:1", "::1:80", "unix:", "h:1x"]
)
def test_address_parse_names_the_forms_it_takes(text: str) -> None:
    with pytest.raises(ConfigError, match="must be host:port"):
        parse(text)


def test_address_parse_refuses_a_socket_path_the_system_would_cut() -> None:
    with pytest.raises(ConfigError, match=f"at most {MAX_SOCKET_PATH} bytes"):
        parse("unix:/" + "x" * MAX_SOCKET_PATH)


def test_address_claim_refuses_a_port_in_use() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port}: the port is in use"):
            claim(parse(f"127.0.0.1:{port}"))
        claim(parse("127.0.0.1:0"))


def test_address_claim_refuses_an_unknown_host() -> None:
    with pytest.raises(ConfigError, match=r"listen: 203\.0\.113\.1:1"):
        claim(parse("203.0.113.1:1"))


def test_address_claim_removes_a_dead_socket_only(short_folder: Path) -> None:
    path = short_folder / "s"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()
        with pytest.raises(ConfigError, match="another server is listening there"):
            claim(Address(path=path))
        release(Address(path=path))
        assert path.exists(), "a live socket is nobody's to remove"
    claim(Address(path=path))
    assert not path.exists()


def test_address_claim_leaves_files_alone(short_folder: Path) -> None:
    path = short_folder / "s"
    path.write_text("precious")
    with pytest.raises(ConfigError, match="not a socket"):
        claim(Address(path=path))
    release(Address(path=path))
    assert path.read_text() == "precious"
    link = short_folder / "link"
    link.symlink_to(path)
    with pytest.raises(ConfigError, match="not a socket"):
        claim(Address(path=link))


def test_address_claim_names_a_missing_folder() -> None:
    with pytest.raises(ConfigError, match="the folder /no/such does not exist"):
        claim(parse("unix:/no/such/s"))
