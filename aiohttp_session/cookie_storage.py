"""Sessions in an encrypted cookie."""

from __future__ import annotations

import base64
import os
import struct
import time
from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias, cast

from ._core import (
    FernetKey,
    decode_base64,
    open_fernet,
    open_siv,
    read_fernet,
    seal_fernet,
    seal_siv,
)
from ._options import Unpack, show_options
from ._sealing_py import BLOCK_SIZE, NONCE_SIZE
from .lifecycle import LifecycleOptions
from .sealed_storage import CookieStorage

try:
    from cryptography.exceptions import InvalidTag, UnsupportedAlgorithm
    from cryptography.fernet import Fernet, InvalidToken, MultiFernet
    from cryptography.hazmat.primitives.ciphers import Cipher
    from cryptography.hazmat.primitives.ciphers.aead import AESGCMSIV
    from cryptography.hazmat.primitives.ciphers.algorithms import AES
    from cryptography.hazmat.primitives.ciphers.modes import CBC
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.hmac import HMAC
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF
except ImportError as _error:
    raise ImportError(
        "Please install cryptography: pip install aiohttp-session[secure]"
    ) from _error

Key: TypeAlias = str | bytes | bytearray

_KEY_SIZE = 32  # bytes
_DRAW = struct.Struct(f"{NONCE_SIZE}s" * 64)  # of nonces, from random bytes
_SIV_LETTER = "A"  # what such a cookie begins with; Fernet tokens begin with "g"


@show_options
class EncryptedCookieStorage(CookieStorage):
    """Keep the session in a cookie that is encrypted and authenticated.

    :param secret_key: 32 bytes, or the same in urlsafe base64 as a str. A sequence of keys lets
        them rotate: the first seals, all open. A `Fernet` or `MultiFernet` is used as it is, and
        so is one that is assigned to `_fernet` later. Give each storage a key of its own: with
        a shared one, a user can present the cookie of one to the other.
    :param cipher: how cookies are sealed: ``"fernet"`` (AES-128-CBC with HMAC-SHA256, as the
        reference package does), or ``"aes-256-gcm-siv"`` (RFC 8452), which makes smaller cookies,
        bound to the cookie's name. Both are read, so a fleet can be moved from one to the other;
        only `Fernet` objects read and write Fernet alone.
    :param accept_fernet: read cookies that are sealed with Fernet. False is the last step of a
        move to AES-256-GCM-SIV: until then, any Fernet token that the key ever made is a session.
    :raises ValueError: if a key is not 32 bytes, the cipher is unavailable, or the storage could
        not read what it seals.
    :raises TypeError: if a key is of another type.

    Takes the options of `AbstractStorage` and `LifecycleStorage` as well.
    """

    def __init__(
        self,
        secret_key: Key | Fernet | MultiFernet | Sequence[Key],
        *,
        cipher: Literal["fernet", "aes-256-gcm-siv"] = "fernet",
        accept_fernet: bool = True,
        **options: Unpack[LifecycleOptions],
    ) -> None:
        super().__init__(**options)
        if cipher not in {"fernet", "aes-256-gcm-siv"}:
            raise ValueError(f"cipher must be 'fernet' or 'aes-256-gcm-siv', not {cipher!r}")
        if cipher == "fernet" and not accept_fernet:
            raise ValueError("accept_fernet=False needs cipher='aes-256-gcm-siv'")
        self._accepts_fernet = accept_fernet
        self._seals_with_siv = cipher != "fernet"
        # Of AES-GCM-SIV.
        self._encrypt: Callable[[bytes, bytes, bytes], bytes]
        self._decrypts: tuple[Callable[[bytes, bytes, bytes], bytes], ...] = ()
        self._keys: tuple[FernetKey, ...] = ()
        # Typed as in the reference package: it is read there, and knows only one key.
        self._fernet: Fernet
        if isinstance(secret_key, (Fernet, MultiFernet)):
            if cipher != "fernet":
                raise ValueError(f"cipher {cipher!r} needs the secret key, not a Fernet object")
            self._fernet = cast("Fernet", secret_key)
            self._keyed = None
            return
        keys = [secret_key] if isinstance(secret_key, (str, bytes, bytearray)) else secret_key
        secrets = [_secret(key) for key in keys]
        if not secrets:
            raise ValueError("secret_key is an empty sequence: give at least one key")
        fernets = [Fernet(base64.urlsafe_b64encode(secret)) for secret in secrets]
        self._fernet = fernets[0] if len(fernets) == 1 else cast("Fernet", MultiFernet(fernets))
        # An assignment to _fernet on a live storage retires what was made of the keys.
        self._keyed = self._fernet
        self._keys = tuple(_fernet_key(secret) for secret in secrets)
        try:
            ciphers = [AESGCMSIV(_derive(secret)) for secret in secrets]
        except UnsupportedAlgorithm as error:
            if cipher != "fernet":
                raise ValueError(f"cipher {cipher!r} needs OpenSSL 3.2 or later") from error
        else:
            self._encrypt = ciphers[0].encrypt
            self._decrypts = tuple(cipher.decrypt for cipher in ciphers)

    def seal(self, payload: bytes) -> str:
        """Encrypt a payload with the first key."""
        if self._fernet is not self._keyed:
            return self._fernet.encrypt(payload).decode("ascii")
        now = int(time.time())
        if self._seals_with_siv:
            return seal_siv(self._encrypt, _draw_nonce(), now, payload, self._cookie_name)
        return seal_fernet(self._keys[0], os.urandom(BLOCK_SIZE), now, payload)

    def open(self, cookie: str) -> tuple[bytes, int] | None:
        """Decrypt a cookie with whichever key fits."""
        if self._fernet is not self._keyed:
            return _open_with(self._fernet, cookie)
        if cookie[:1] == _SIV_LETTER:
            return open_siv(self._decrypts, cookie, self._cookie_name, InvalidTag)
        return open_fernet(self._keys, cookie) if self._accepts_fernet else None


def _open_with(fernet: Fernet, cookie: str) -> tuple[bytes, int] | None:
    """Decrypt a token with an object that was given, and not a key."""
    try:
        payload = fernet.decrypt(cookie.encode("ascii"))
    except (InvalidToken, ValueError):
        return None
    try:
        head: bytes | None = decode_base64(cookie[:12])
    except ValueError:  # digits of the standard alphabet, or other characters between them
        head = read_fernet(cookie)
    # The head of a token: a version byte and the time.
    return None if head is None else (payload, int.from_bytes(head[1:9], "big"))


def _fernet_key(secret: bytes) -> FernetKey:
    """Give a key what seals and opens its tokens: the first half signs, the second encrypts."""
    half = _KEY_SIZE // 2
    # Which IV is of no account: see FernetKey.
    return FernetKey(HMAC(secret[:half], SHA256()), Cipher(AES(secret[half:]), CBC(bytes(half))))


# Nonces to come: a system call for each would cost a fifth of what the encryption does. (Were one
# used twice, in a copy of the process that Python does not know of, AES-GCM-SIV would betray no
# more than that two cookies are the same.)
_nonces: list[bytes] = []
if hasattr(os, "register_at_fork"):  # pragma: no branch - not on Windows
    os.register_at_fork(after_in_child=_nonces.clear)


def _draw_nonce() -> bytes:
    while True:
        try:
            return _nonces.pop()
        except IndexError:  # also when other threads were faster
            _nonces.extend(_DRAW.unpack(os.urandom(_DRAW.size)))


def _secret(key: Key) -> bytes:
    """Return the 32 bytes of a key."""
    if not isinstance(key, (str, bytes, bytearray)):
        raise TypeError(f"A secret key must be bytes or str, not {type(key).__name__}")
    try:
        secret = base64.urlsafe_b64decode(key) if isinstance(key, str) else bytes(key)
    except ValueError:
        secret = b""
    if len(secret) != _KEY_SIZE:
        raise ValueError(
            "A secret key must be 32 bytes, or 32 bytes in urlsafe base64 as a str. "
            "Fernet.generate_key().decode() makes one"
        )
    return secret


def _derive(secret: bytes) -> bytes:
    """Make the key of the second cipher, so that no key serves two."""
    return HKDF(SHA256(), _KEY_SIZE, salt=None, info=b"aiohttp-session aes-256-gcm-siv").derive(
        secret
    )
