"""Send requests over HTTP and note how long each took. Started by scripts/bench/load.py, as a process of its
own. It shares the cores with the server, so it is plain sockets. Connections stay open; each sends its next
request when it has the answer to the one before, after an answer other than 200 a little later, as a client
does that is told to come back."""

import json
import re
import selectors
import socket
import sys
import time
from pathlib import Path

import numpy as np

PAUSE = 0.1  # seconds after an answer other than 200
PATIENCE = 10.0  # seconds after the end of a phase for the answers that are due
LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)
BROKEN = 0  # status of a request whose connection was lost, or was not answered at the end


def whole(answer: bytes) -> int:
    """The status of an answer with a Content-Length, or 0 while a part of it is missing"""
    head, end, body = answer.partition(b"\r\n\r\n")
    if not end or len(body) < int(LENGTH.search(head)[1]):
        return 0
    return int(head.split(b" ", 2)[1])


class Connection:
    """One connection and the request that it waits for. Raises OSError if the server refuses it."""

    def __init__(self, port: int, number: int):
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.number = number  # of the request that comes next
        self.answer, self.sent, self.waiting = b"", 0.0, False

    def send(self, requests: list[bytes]) -> None:
        self.answer, self.sent, self.waiting = b"", time.perf_counter(), True
        self.socket.sendall(requests[self.number % len(requests)])
        self.number += 1

    def receive(self) -> int | None:
        """The status of a whole answer, None while it is not whole, BROKEN for a lost connection"""
        try:
            part = self.socket.recv(65536)
        except OSError:
            part = b""
        self.answer += part
        return (whole(self.answer) or None) if part else BROKEN


class Phase:
    """So many connections to a server for so many seconds. `rows` are (time at the end, milliseconds,
    status), one per request."""

    def __init__(self, port: int, requests: list[bytes], seconds: float, connections: int):
        self.port, self.requests, self.rows = port, requests, []
        self.end = time.perf_counter() + seconds
        self.selector, self.later = selectors.DefaultSelector(), []  # later: (when to send again, connection)
        for number in range(connections):
            self.open(number)

    def open(self, number: int) -> None:
        connection = Connection(self.port, number)
        self.selector.register(connection.socket, selectors.EVENT_READ, connection)
        connection.send(self.requests)

    def connections(self) -> list[Connection]:
        return [key.data for key in self.selector.get_map().values()]

    def run(self) -> None:
        while (now := time.perf_counter()) < self.end + PATIENCE:
            if now >= self.end and not any(connection.waiting for connection in self.connections()):
                break
            while self.later and self.later[0][0] <= now < self.end:
                self.later.pop(0)[1].send(self.requests)
            for key, _ in self.selector.select(timeout=PAUSE / 10):
                if (status := key.data.receive()) is not None:
                    self.answered(key.data, status)
        for connection in self.connections():
            if connection.waiting:
                self.note(connection, BROKEN)
            connection.socket.close()

    def note(self, connection: Connection, status: int) -> None:
        now, connection.waiting = time.perf_counter(), False
        self.rows.append((now, 1e3 * (now - connection.sent), status))

    def answered(self, connection: Connection, status: int) -> None:
        """Note it, and send the next request now or later, over a new connection if this one is lost."""
        self.note(connection, status)
        now = time.perf_counter()
        if status == BROKEN:
            self.selector.unregister(connection.socket)
            connection.socket.close()
            if now < self.end:
                time.sleep(PAUSE)
                self.open(connection.number)
        elif now < self.end and status == 200:
            connection.send(self.requests)
        elif now < self.end:
            self.later.append((now + PAUSE, connection))


def main(spec: dict) -> np.ndarray:
    """Rows (n, 3) of seconds since the beginning, milliseconds and status"""
    requests, rows, begin = [text.encode() for text in spec["requests"]], [], time.perf_counter()
    for seconds, connections in spec["phases"]:
        phase = Phase(spec["port"], requests, seconds, connections)
        phase.run()
        rows += phase.rows
    return np.array(rows) - [begin, 0, 0]


if __name__ == "__main__":
    spec = json.loads(Path(sys.argv[1]).read_text())
    np.save(spec["result"], main(spec))
