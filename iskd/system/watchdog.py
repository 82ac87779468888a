"""Watchdog of the processes of a run: when one dies, the others stop instead of waiting in a collective for ever.

Every process holds one TCP connection to rank 0. The kernel closes the connections of a process that dies, however it
died, and keep-alive probes notice a machine that is gone: at most 45 seconds, with no heart beats that a busy process
could miss. torch's own timeout is ten minutes with NCCL and thirty with gloo.
"""

from __future__ import annotations

import math
import os
import secrets
import select
import socket
import sys
import threading
import time
from contextlib import suppress

from iskd.system.ranks import Ranks

_BYE, _FAILED, _DEAD = "bye", "failed", "dead"
_TOKEN, _MESSAGE = 16, 32  # bytes
#: Seconds that a process has to fail in its own words after another one has failed.
GRACE = 20.0
#: Seconds between the end of a process's collectives and that of its connection here, at most.
_CLOSING = 2.0


class Watchdog:
    """Watches the other ranks from `start` to `close`.

    Args:
        ranks: the processes of the run.
        advice: what the message ends with: how to go on.
    """

    def __init__(self, ranks: Ranks, advice: str) -> None:
        self._ranks, self._advice = ranks, advice
        self._peers: dict[socket.socket, int] = {}
        self._watched: dict[socket.socket, int] = {}  # those that have said nothing yet
        self._wake: socket.socket | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Connect everybody with rank 0 and watch in a thread of its own. A collective; nothing on one process."""
        if self._ranks.size == 1 or self._thread is not None:
            return
        if self._ranks.rank == 0:
            self._host()
        else:
            self._join()
        for peer in self._peers:
            _keep_alive(peer)
        self._watched = dict(self._peers)
        self._wake, woken = socket.socketpair()
        self._thread = threading.Thread(target=self._watch, args=(woken,), name="rank-watchdog", daemon=True)
        self._thread.start()

    def close(self, *, failed: bool = False) -> None:
        """Leave: in peace, or because of an exception, which the others may meet as well or be waiting for in vain."""
        if self._thread is not None and self._wake is not None:
            self._wake.close()
            self._thread.join()
            self._thread = self._wake = None
            if failed:
                self._name_the_dead()
            for peer in self._peers:
                _send(peer, f"{_FAILED} {self._ranks.rank}" if failed else f"{_BYE} {self._ranks.rank}")
                peer.close()
            self._peers = {}

    def _host(self) -> None:
        token, address = secrets.token_bytes(_TOKEN), os.environ.get("MASTER_ADDR", "127.0.0.1")
        with socket.create_server((address if address in ("127.0.0.1", "localhost") else "", 0)) as server:
            self._ranks.first((address, server.getsockname()[1], token.hex()))
            server.settimeout(60)
            while len(self._peers) < self._ranks.size - 1:
                peer, _ = server.accept()
                peer.settimeout(10)
                said = _receive(peer, _TOKEN + 4)
                if secrets.compare_digest(said[:_TOKEN], token):
                    self._peers[peer] = int.from_bytes(said[_TOKEN:], "big")
                else:
                    peer.close()  # not one of ours

    def _join(self) -> None:
        host, port, token = self._ranks.first(None)
        peer = socket.create_connection((host, port), timeout=60)
        peer.sendall(bytes.fromhex(token) + self._ranks.rank.to_bytes(4, "big"))
        self._peers[peer] = 0

    def _watch(self, woken: socket.socket) -> None:
        watched, failed, deadline = self._watched, 0, math.inf
        with woken:
            while watched or deadline < math.inf:
                wait = None if deadline == math.inf else max(0.0, deadline - time.monotonic())
                ready, _, _ = select.select([woken, *watched], [], [], wait)
                if woken in ready:
                    return
                if not ready:
                    self._stop(failed)
                for peer in ready:
                    word, _, rank = _receive(peer).decode().partition(" ")
                    if word == _BYE:
                        del watched[peer]
                    elif word == _FAILED:
                        failed, deadline = int(rank), min(deadline, time.monotonic() + GRACE)
                        self._tell(f"{_FAILED} {failed}")
                        del watched[peer]
                    else:
                        self._stop(int(rank) if word == _DEAD else watched[peer])

    def _stop(self, dead: int) -> None:
        """Tell the others and end the process at once: its main thread may be waiting for the dead one."""
        self._say(dead)
        os._exit(1)

    def _name_the_dead(self) -> None:
        """A collective may fail before the watching thread has seen why: its own words name no rank."""
        ready, _, _ = select.select([*self._watched], [], [], _CLOSING) if self._watched else ([], [], [])
        for peer in ready:
            word, _, rank = _receive(peer).decode().partition(" ")
            if word not in (_BYE, _FAILED):
                self._say(int(rank) if word == _DEAD else self._watched[peer])

    def _say(self, dead: int) -> None:
        self._tell(f"{_DEAD} {dead}")
        sys.stderr.write(
            f"rank {dead} died, so rank {self._ranks.rank} stops as well; see the last lines of rank {dead} for the "
            f"reason. {self._advice}\n"
        )
        sys.stderr.flush()

    def _tell(self, message: str) -> None:
        if self._ranks.rank == 0:
            for peer in self._peers:
                _send(peer, message)


def _send(peer: socket.socket, message: str) -> None:
    with suppress(OSError):  # it is gone, which its own connection tells
        peer.sendall(f"{message:<{_MESSAGE}}".encode())


def _receive(peer: socket.socket, size: int = _MESSAGE) -> bytes:
    """One message; empty when the peer is gone or says nothing in time."""
    try:
        return peer.recv(size, socket.MSG_WAITALL)
    except OSError:
        return b""


def _keep_alive(peer: socket.socket) -> None:
    """Probe a silent peer after 15 seconds and give it up after three probes, ten seconds apart."""
    peer.settimeout(None)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 15), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):  # Linux; elsewhere the system's own times
            peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
