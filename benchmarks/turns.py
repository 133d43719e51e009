"""Requests by a client that rests while they are answered, as one on another machine would."""

from __future__ import annotations

import asyncio
import socket
import time

_ITERATIONS = 8  # of the event loop, from one look at the answers to the next


async def take_turns(address: tuple[str, int], path: str, cookies: list[str], times: int) -> float:
    """Send a request for each cookie, have all of them answered, and so on.

    Client and server are in one thread, so that neither disturbs the other: even two processors
    are often two threads of one core.

    :return: seconds of CPU time that this process took for each answer, at its quickest.
    :raises RuntimeError: if a request is not answered with 200.
    """
    requests = [
        f"GET {path} HTTP/1.1\r\nHost: {address[0]}\r\nCookie: {cookie}\r\n\r\n".encode("ascii")
        for cookie in cookies
    ]
    connections = [socket.create_connection(address) for _ in cookies]
    taken = []
    try:
        for connection in connections:
            connection.setblocking(False)
        for _ in range(1 + times):
            for connection, request in zip(connections, requests, strict=True):
                connection.send(request)
            waiting, seconds = connections, 0.0
            while waiting:
                start = time.process_time()
                for _ in range(_ITERATIONS):
                    await asyncio.sleep(0)
                seconds += time.process_time() - start
                waiting = [connection for connection in waiting if not _is_answered(connection)]
            taken.append(seconds / len(cookies))
    finally:
        for connection in connections:
            connection.close()
    return min(taken[1:])  # in the first, the server had yet to take the connections


def _is_answered(connection: socket.socket) -> bool:
    try:
        answer = connection.recv(2**16)
    except BlockingIOError:
        return False
    if not answer.startswith(b"HTTP/1.1 200 "):
        raise RuntimeError(f"not answered with 200, but with {answer[:20]!r}")
    return True
