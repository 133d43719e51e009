"""The contexts that Fernet keys keep: who uses them, how often, and what becomes of them."""

from __future__ import annotations

import base64
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from cryptography.fernet import Fernet
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CBC
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.hmac import HMAC

from aiohttp_session import cookie_storage
from aiohttp_session._core import FernetKey, open_fernet, seal_fernet
from aiohttp_session.cookie_storage import EncryptedCookieStorage
from tests.contract import KEY

FERNET = Fernet(base64.urlsafe_b64encode(KEY))


class Watched:
    """A cipher whose contexts tell what is done with them; and its MAC."""

    def __init__(
        self, key: bytes, watch: Callable[[str, object, Callable[[], bytes]], bytes]
    ) -> None:
        self.watch = watch
        self.mac = HMAC(key[:16], SHA256())
        self.cipher = Cipher(AES(key[16:]), CBC(bytes(16)))

    def key(self) -> FernetKey:
        mac: Any = _WatchedMac(self, self.mac)
        cipher: Any = self
        return FernetKey(mac, cipher)

    def encryptor(self) -> _WatchedContext:
        return _WatchedContext(self, "encrypt", self.cipher.encryptor())

    def decryptor(self) -> _WatchedContext:
        return _WatchedContext(self, "decrypt", self.cipher.decryptor())


class _WatchedContext:
    def __init__(self, owner: Watched, verb: str, context: Any) -> None:
        self.owner, self.verb, self.context = owner, verb, context

    def update(self, data: bytes) -> bytes:
        def work() -> bytes:
            result: bytes = self.context.update(data)
            return result

        return self.owner.watch(self.verb, self, work)


class _WatchedMac:
    def __init__(self, owner: Watched, mac: HMAC) -> None:
        self.owner, self.mac = owner, mac

    def copy(self) -> _WatchedMac:
        return _WatchedMac(self.owner, self.mac.copy())

    def update(self, data: bytes) -> None:
        self.mac.update(data)

    def finalize(self) -> bytes:
        return self.owner.watch("sign", self, self.mac.finalize)


def counted(number: int) -> tuple[tuple[FernetKey, ...], Counter[str]]:
    """Make keys whose operations are counted."""
    done: Counter[str] = Counter()

    def watch(verb: str, which: object, work: Callable[[], bytes]) -> bytes:
        done[verb] += 1
        return work()

    return tuple(Watched(bytes([n] * 32), watch).key() for n in range(number)), done


@pytest.mark.parametrize("which", [0, 1, 4])
def test_a_token_pays_for_the_keys_before_its_own_with_a_mac_each(which: int) -> None:
    keys, done = counted(5)
    token = seal_fernet(keys[which], bytes(16), 7, b"{}")
    assert done == {"encrypt": 1, "sign": 1}
    done.clear()
    assert open_fernet(keys, token) == (b"{}", 7)
    assert done == {"sign": which + 1, "decrypt": 1}


SIZE = 65_536


@pytest.mark.parametrize(
    ("garbage", "macs"),
    [
        ("x" * SIZE, 0),
        ("g" * SIZE, 0),  # another version
        ("gAAA" + "A" * (SIZE - 4), 0),  # no whole blocks
        ("gAAA" + "é" * SIZE, 0),
        ("=" * SIZE, 0),
        ("~" * SIZE, 0),
        ("gAAA" + "." * SIZE, 0),
        ("gAAA" + "A" * (4 * 16 * 1000 + 72), 2),  # could be a token of either key
    ],
)
def test_garbage_is_signed_at_the_most(garbage: str, macs: int) -> None:
    keys, done = counted(2)
    assert open_fernet(keys, garbage) is None
    assert done == Counter(sign=macs)


def test_calls_that_overlap_never_share_a_context() -> None:
    both, used = threading.Barrier(2), []

    def watch(verb: str, which: object, work: Callable[[], bytes]) -> bytes:
        if verb != "sign":
            used.append((verb, which))
            both.wait(60)
        return work()

    key = Watched(KEY, watch).key()

    def visit(number: int) -> None:
        for _ in range(3):
            payload = b"%d" % number
            token = seal_fernet(key, os.urandom(16), 7, payload)
            assert FERNET.decrypt(token) == payload
            assert open_fernet((key,), token) == (payload, 7)

    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(visit, range(2))) == [None, None]
    for first, second in zip(used[::2], used[1::2], strict=True):
        assert first[0] == second[0]
        assert first[1] != second[1]
    assert len(set(used)) == 4  # and they are kept


def test_a_call_within_a_call_has_contexts_of_its_own() -> None:
    # As a signal handler or a finalizer may make one.
    inner: list[object] = []

    def watch(verb: str, which: object, work: Callable[[], bytes]) -> bytes:
        if len(inner) < 2:
            inner.append(None)
            token = seal_fernet(key, os.urandom(16), 7, b"inner")
            inner.append(open_fernet((key,), token))
        return work()

    key = Watched(KEY, watch).key()
    token = seal_fernet(key, os.urandom(16), 7, b"outer")
    assert FERNET.decrypt(token) == b"outer"
    assert open_fernet((key,), token) == (b"outer", 7)
    assert (b"inner", 7) in inner


@pytest.mark.parametrize("verb", ["encrypt", "decrypt", "sign"])
@pytest.mark.parametrize("is_fed", [False, True])
def test_a_context_that_failed_is_not_used_again(verb: str, is_fed: bool) -> None:
    failing: list[str] = []
    failed: list[object] = []

    def watch(done: str, which: object, work: Callable[[], bytes]) -> bytes:
        assert which not in failed
        if done in failing:
            failing.clear()
            failed.append(which)
            if is_fed:
                work()
            raise MemoryError
        return work()

    key = Watched(KEY, watch).key()

    def round_trip() -> None:
        token = seal_fernet(key, os.urandom(16), 7, b"{}")
        assert FERNET.decrypt(token) == b"{}"
        assert open_fernet((key,), token) == (b"{}", 7)

    round_trip()
    failing.append(verb)
    with pytest.raises(MemoryError):
        round_trip()
    assert len(failed) == 1
    round_trip()


def test_threads_seal_and_open_at_once() -> None:
    storage = EncryptedCookieStorage([KEY, bytes(32)])

    def visit(number: int) -> set[str]:
        ivs = set()
        for size in range(200):
            payload = b"%d" % number * size
            token = storage.seal(payload)
            assert FERNET.decrypt(token) == payload
            opened = storage.open(token)
            assert opened is not None
            assert opened[0] == payload
            ivs.add(token[12:33])
        return ivs

    with ThreadPoolExecutor(8) as threads:
        assert len(set().union(*threads.map(visit, range(8)))) == 8 * 200


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_nothing_is_repeated_in_a_forked_process() -> None:
    script = """
import os
from aiohttp_session.cookie_storage import EncryptedCookieStorage

storage = EncryptedCookieStorage(bytes(range(32)))
old = storage.seal(b"{}")
assert storage.open(old)[0] == b"{}"
is_child = os.fork() == 0
tokens = [storage.seal(b"{}") for _ in range(20)]
for token in [old, *tokens]:
    assert storage.open(token)[0] == b"{}"
if not is_child:
    assert os.wait()[1] == 0
print(*tokens, flush=True)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    tokens = run.stdout.split()
    raw = [base64.urlsafe_b64decode(token) for token in tokens]
    assert len({token[9:25] for token in raw}) == 40
    assert len({token[25:41] for token in raw}) == 40
    assert {FERNET.decrypt(token) for token in tokens} == {b"{}"}


@pytest.mark.parametrize("block", [b"", bytes(15), bytes(17)])
def test_a_block_has_16_bytes(block: bytes) -> None:
    [key], done = counted(1)
    with pytest.raises(ValueError, match=r"^A random block for Fernet is 16 bytes$"):
        seal_fernet(key, block, 7, b"{}")
    assert not done


def test_keys_are_made_into_contexts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    storage = EncryptedCookieStorage([KEY, bytes(32)])
    storage.open(storage.seal(b"{}"))

    def refuse(*arguments: Any) -> None:
        pytest.fail("a context was made again")

    for name in ("HMAC", "Cipher", "AES", "CBC"):
        monkeypatch.setattr(cookie_storage, name, refuse)
    assert storage.open(storage.seal(b"{}")) is not None
