"""Sessions in a cookie sealed by NaCl."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ._core import Session, decode_standard, encode_standard
from .lifecycle import LifecycleOptions
from .sealed_storage import CookieStorage

try:
    from nacl.bindings import crypto_secretbox, crypto_secretbox_open
    from nacl.exceptions import CryptoError
    from nacl.secret import SecretBox
except ImportError as error:
    raise ImportError("Please install PyNaCl: pip install aiohttp-session[pynacl]") from error

if TYPE_CHECKING:
    from typing_extensions import Unpack


class NaClCookieStorage(CookieStorage):
    """Keep the session in a cookie that is sealed by NaCl's SecretBox (XSalsa20 and Poly1305).

    :param secret_key: 32 bytes. A sequence of keys lets them rotate: the first seals, all open.
    :raises ValueError: if a key is not 32 bytes long.
    :raises TypeError: if a key is not bytes.

    Takes the options of `AbstractStorage` and `LifecycleStorage` as well.
    """

    def __init__(
        self, secret_key: bytes | Sequence[bytes], **options: Unpack[LifecycleOptions]
    ) -> None:
        super().__init__(**options)
        keys = [secret_key] if isinstance(secret_key, (bytes, bytearray, str)) else secret_key
        self._secretboxes = [_secretbox(key) for key in keys]
        if not self._secretboxes:
            raise ValueError("secret_key is an empty sequence: give at least one key")
        self._secretbox = self._secretboxes[0]

    def empty_session(self) -> Session:
        """Make an empty session."""
        return Session(None, data=None, new=True, max_age=self.max_age)

    def seal(self, payload: bytes) -> str:
        """Encrypt a payload with the first key and a random nonce."""
        box = self._secretbox
        if type(box) is SecretBox:
            # What SecretBox.encrypt does, in half the time.
            nonce = os.urandom(SecretBox.NONCE_SIZE)
            sealed = nonce + crypto_secretbox(payload, nonce, bytes(box))
        else:
            sealed = box.encrypt(payload)
        return encode_standard(sealed)

    def open(self, cookie: str) -> tuple[bytes, None] | None:
        """Decrypt a cookie with whichever key fits."""
        try:
            sealed = decode_standard(cookie)
        except ValueError:
            return None
        # An assignment to _secretbox on a live storage retires every key.
        live = self._secretbox is self._secretboxes[0]
        for box in self._secretboxes if live else (self._secretbox,):
            try:
                return _unseal(box, sealed), None
            except (CryptoError, ValueError):
                continue
        return None


def _unseal(box: SecretBox, sealed: bytes) -> bytes:
    if type(box) is not SecretBox:
        return box.decrypt(sealed)
    size = SecretBox.NONCE_SIZE
    return crypto_secretbox_open(sealed[size:], sealed[:size], bytes(box))


def _secretbox(key: bytes) -> SecretBox:
    if not isinstance(key, (bytes, bytearray)):
        raise TypeError(f"A secret key must be 32 bytes, not {type(key).__name__}")
    if len(key) != SecretBox.KEY_SIZE:
        raise ValueError(f"A secret key must be 32 bytes, not {len(key)}. os.urandom(32) makes one")
    return SecretBox(bytes(key))
