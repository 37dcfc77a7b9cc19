"""Tests reach no other machine: a dataset that tries to download in a test fails at once, and says so."""

from __future__ import annotations

import socket

import pytest


def test_other_machines_are_out_of_reach() -> None:
    # 192.0.2.0/24 is set aside for documentation (RFC 5737): nothing answers there.
    with socket.socket() as client, pytest.raises(OSError, match="tests have no network"):
        client.connect(("192.0.2.1", 80))
    with pytest.raises(socket.gaierror, match="tests have no network"):
        socket.getaddrinfo("example.invalid", 80)


def test_this_machine_is_within_reach() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket() as client:
        client.connect(server.getsockname())
        assert client.getpeername() == server.getsockname()
