"""Run hot functions so often that a lost reference or buffer shows.

python -m tests.leaks.watch NAME... prints what it saw of each, and names those that leak; with no
NAME, of all.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import gc
import os
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROUNDS = 10
# In a round; fewer where examples are fewer too, which still shows every leak of a block a call.
CALLS = int(10_000 * min(1, float(os.environ.get("AIOHTTP_SESSION_EXAMPLES") or 1)))
ALLOWED_BLOCKS = 50  # Python's own caches move a little
ALLOWED_REFERENCES = 10  # a constant such as b"GET" is also used elsewhere; a leak loses one a call
ALLOWED_KIB = 1024

LEAKED: list[object] = []


class Loop:
    """As much of an event loop as a future needs."""

    def __init__(self) -> None:
        self._calls: list[Callable[[], object]] = []

    def call_soon(self, call: Callable[[], object], *, context: object) -> None:
        self._calls.append(call)

    def call_exception_handler(self, context: dict[str, object]) -> None:
        """Take no notice of an exception."""

    def is_closed(self) -> bool:
        return False

    def turn(self) -> None:
        self._calls.pop()()


def find(objects: Any, loop: Any) -> None:
    """Find a loop's object, as if the loop was running."""
    hooks = sys.get_asyncgen_hooks()
    asyncio._set_running_loop(loop)
    sys.set_asyncgen_hooks(loop.turn)
    objects.get(), objects.get()
    sys.set_asyncgen_hooks(*hooks)
    asyncio._set_running_loop(None)


def in_all_ways(write_swap: Callable[..., bytes]) -> Callable[..., None]:
    """Return a function that writes a swap in each way, with each kind of TTL."""

    def write(key: str, expected: Any, payload: bytes) -> None:
        for script in (b"", b"0123456789" * 4, b"return 1"):
            for ttl in (None, 60, 2**40):
                write_swap(key, expected, payload, ttl, script)

    return write


def cases() -> dict[str, tuple[Callable[..., Any], list[tuple[Any, ...]]]]:
    """Return what can be watched: functions, and the arguments that they are called with."""
    from cryptography.hazmat.primitives.ciphers import Cipher
    from cryptography.hazmat.primitives.ciphers.algorithms import AES
    from cryptography.hazmat.primitives.ciphers.modes import CBC
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.hmac import HMAC

    from aiohttp_session import (
        _cookies_c,
        _futures_c,
        _payload_c,
        _records_c,
        _records_py,
        _replies_c,
        _sealing_c,
        _session_c,
    )

    data = {"created": 10**9, "session": {"a": [1, 2.5, {"b": (None, "x" * 50)}], "c": "d"}}
    big = [2**70, float("nan")]

    def use(data: Any) -> None:
        session = _session_c.Session("id", data=data, new=False, max_age=10**10)
        session["x"] = [1]
        session.foreign = session  # type: ignore[attr-defined]  # a circle, for the collector
        session.get("x"), session.pop("x", None), session.setdefault("y", {})
        session.update({"z": 1})
        session._needs_save()
        session._was_saved()
        session["a"].append(1)
        session._needs_save()
        session["a"].pop()
        session.clear()
        del session.foreign  # type: ignore[attr-defined]

    def restore(payload: Any) -> None:
        session = _session_c.restore(payload, "id", None)
        if session is not None:
            session["b"], session["a"].append(1)
            session._needs_save()
            _session_c.payload_of(session, None), _session_c.payload_of(session, 9)
            session["a"].append(b"no JSON")
            _session_c.payload_of(session, None)

    def write_set(key: str, payload: bytes) -> None:
        _replies_c.write_set(key, payload, None, b"")
        _replies_c.write_set(key, payload, 60, b"XX")
        _replies_c.write_set(key, payload, 2**40, b"XX")

    kept, link = _records_c.KeptRecords(2, 60), _records_py.Link()
    link.until = float("inf")

    def keep(key: str, payload: bytes | None) -> None:
        kept.keep(kept.ask(key) or [key], payload, link)
        kept.keep(kept.ask_behind(key) or [key], payload, link)
        kept.get("a"), kept.get("b")
        kept.begin_change("c")
        kept.end_change("c")

    objects: _futures_c.PerLoop[list[int]] = _futures_c.PerLoop(list)
    loop = Loop()
    group = _futures_c.FutureGroup(loop)  # type: ignore[arg-type]

    def use_future(end: Callable[[Any], object]) -> None:
        future = group.create_future()
        steps = future.__await__()
        next(steps)
        future.add_done_callback(int)  # type: ignore[arg-type]  # raises TypeError
        future.add_done_callback(repr)
        future.add_done_callback(str)
        future.remove_done_callback(repr)
        end(future)
        loop.turn()
        group.hold()
        other = group.create_future()
        other.add_done_callback(repr)
        end(other)
        group.release()
        with contextlib.suppress(StopIteration, asyncio.CancelledError):
            next(steps)

    def answer(*replies: object) -> None:
        pending = collections.deque((None, group.create_future()) for _ in replies)
        _futures_c.answer(pending, replies)
        pending = collections.deque((None, group.create_future()) for _ in replies)
        tokens = collections.deque([kept.ask("a"), None, repr])
        with contextlib.suppress(IndexError):
            _futures_c.answer_tracked(pending, tokens, replies, kept, link)  # type: ignore[arg-type]

    def refuse(*_: bytes) -> bytes:
        raise KeyError

    def fernet_key(secret: bytes = bytes(range(32))) -> _sealing_c.FernetKey:
        cipher = Cipher(AES(secret[16:]), CBC(bytes(16)))
        return _sealing_c.FernetKey(HMAC(secret[:16], SHA256()), cipher)

    key = fernet_key()
    token = _sealing_c.seal_fernet(key, bytes(16), 1, b"{}")

    return {
        "find_cookie": (
            _cookies_c.find_cookie,
            [("a=1; N=xyz; b=2", "N"), (r'N="\"\054\303"; a', "N"), (r'N="\001"', "N"), ("é", "N")],
        ),
        "find_strict": (
            _cookies_c.find_strict,
            [("a=1; N=xyz", "N"), (r'N="\"\054\303"; a', "N"), ("N=1; N=2", "N"), ("é", "N")],
        ),
        "Future": (
            use_future,
            [
                (lambda future: future.set_result(b"record"),),
                (lambda future: future.set_result((b"record", b"7")),),
                (lambda future: future.set_exception(TypeError()),),
                (lambda future: future.cancel("over"),),
            ],
        ),
        "answer": (
            answer,
            [(b"record",), (2**40, b"two", "key"), (b"x", 2**41, b"3", b"one too many")],
        ),
        "PerLoop": (find, [(objects, Loop()) for _ in range(2)]),
        "write_get": (_replies_c.write_get, [("key",), ("ké",)]),
        "write_set": (write_set, [("key", b"record"), ("ké", b"a record")]),
        "write_swap": (
            in_all_ways(_replies_c.write_swap),
            [("key", b"expected", b"record"), ("ké", b"", b"a record"), ("key", "no bytes", b"")],
        ),
        "write_command": (_replies_c.write_command, [(b"GET", b"key"), (b"GET", "key"), ()]),
        "KeptRecords": (keep, [("a", b"x"), ("b", b""), ("a", bytes(99))]),
        "join_token": (
            _cookies_c.join_token,
            [("N_", "id", 9), ("é_", "id", 9), ("N_", "id", 1), ("N_", "é", 9), ("N_", 1, 9)],
        ),
        "quote": (_cookies_c.quote, [("plain",), ('{"a": 1, "b": ";"}',), ("é",)]),
        "same_items": (
            _cookies_c.same_items,
            [({"a": 1}, {"a": 1}), ({"a": 1}, {"a": 2}), ({}, []), ({"a": ()}, {"b": ()})],
        ),
        "seal_siv": (
            _sealing_c.seal_siv,
            [(lambda _, message, __: message, bytes(12), 1, b"{}", "N"), (len, b"", 1, b"", "é")],
        ),
        "open_siv": (
            _sealing_c.open_siv,
            [
                ([refuse, lambda _, text, __: text], "AQ" + "A" * 58, "N", KeyError),
                ([refuse], "AQ" + "A" * 58, "é", LookupError),
                ([], "AQ", "N", KeyError),
                ([], "é", "N", KeyError),
            ],
        ),
        "encode_standard": (_sealing_c.encode_standard, [(b"ab",), ("",)]),
        "decode_standard": (_sealing_c.decode_standard, [("YWI=",), ("YWJ=",), ("é",)]),
        "FernetKey": (fernet_key, [()]),
        "seal_fernet": (
            _sealing_c.seal_fernet,
            [(key, bytes(16), 1, b"{}"), (key, b"", 1, b"{}"), (key, bytes(16), 1, "{}")],
        ),
        "open_fernet": (
            _sealing_c.open_fernet,
            [((fernet_key(bytes(32)), key), token) for token in (token, token[:-4], "\n" + token)],
        ),
        "read_fernet": (_sealing_c.read_fernet, [(token,), ("gAAA",), ("AAAA",), ("é",)]),
        "encode": (_payload_c.encode, [(data,), ([1, (2,)],), (big,), ({1: object()},)]),
        "dumps": (_payload_c.dumps, [(data,), (["é"],), ({"a": {1}},)]),
        "decode": (_payload_c.decode, [(b'{"a":[1,2.5]}',), ('["x"]',), ("9" * 30,), (b"\xff",)]),
        "read_values": (
            _replies_c.read_values,
            [
                (b"VALUE k 0 2 7\r\nab\r\nVALUE l 0 1 8\r\nc\r\nEND\r\n", 0),
                (b"VALUE k 0 9 7\r\n", 0),
            ],
        ),
        "read_tracked": (
            _replies_c.read_tracked,
            [
                (b"+OK\r\n>2\r\n$10\r\ninvalidate\r\n*1\r\n$1\r\nk\r\n$1\r\na\r\n", 0),
                (b":1\r\n>2\r\n$10\r\ninvalidate\r\n_\r\n", 0),
            ],
        ),
        "read_replies": (
            _replies_c.read_replies,
            [(b"$2\r\nab\r\n:-7\r\n+OK\r\n$-1\r\n_\r\n", 0), (b"$9\r\nab", 0), (b"-ERR\r\n", 0)],
        ),
        "session": (use, [(data,)]),
        "restore": (restore, [(b'{"created":1,"session":{"a":["x"],"b":1}}',), ("[]",), (b"{",)]),
        "broken": (LEAKED.append, [(bytearray(1),)]),  # shows that the watch can find a leak
    }


def watch(function: Callable[..., Any], calls: list[tuple[Any, ...]]) -> list[tuple[int, int, int]]:
    """Return, for each round, the allocated blocks, references to the arguments, and KiB."""
    seen = []
    for _ in range(ROUNDS):
        for _ in range(CALLS // len(calls)):
            for arguments in calls:
                with contextlib.suppress(TypeError, ValueError):
                    function(*arguments)
        gc.collect()
        references = sum(sys.getrefcount(value) for arguments in calls for value in arguments)
        seen.append((sys.getallocatedblocks(), references, _resident()))
    return seen


def _resident() -> int:
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().split("VmRSS:")[1].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def leaks(name: str) -> bool:
    """Watch one function, and tell whether it leaks."""
    seen = watch(*cases()[name])
    for blocks, references, kib in seen:
        print(f"{name}: {blocks} blocks, {references} references, {kib} KiB")
    # The first rounds fill caches.
    (blocks, references, kib), *_, last = seen[len(seen) // 3 :]
    return (
        last[0] - blocks > ALLOWED_BLOCKS
        or abs(last[1] - references) > ALLOWED_REFERENCES
        or last[2] - kib > ALLOWED_KIB
    )


if __name__ == "__main__":
    for name in sys.argv[1:] or cases():
        if leaks(name):
            print(f"{name} leaks")
