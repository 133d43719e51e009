"""Sessions in a cookie sealed by NaCl."""

from __future__ import annotations

import os
from collections.abc import Sequence

from ._core import Session, decode_standard, encode_standard
from ._options import Unpack, show_options
from .lifecycle import LifecycleOptions
from .sealed_storage import CookieStorage

try:
    from nacl.bindings import crypto_secretbox, crypto_secretbox_open
    from nacl.exceptions import CryptoError
    from nacl.secret import SecretBox
except ImportError as _error:
    raise ImportError("Please install PyNaCl: pip install aiohttp-session[pynacl]") from _error

_NONCE_SIZE = SecretBox.NONCE_SIZE


@show_options
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
        boxes = [_secretbox(key) for key in keys]
        if not boxes:
            raise ValueError("secret_key is an empty sequence: give at least one key")
        self._secretbox = boxes[0]
        # An assignment to _secretbox on a live storage retires every key.
        self._keyed = boxes[0]
        self._keys = [bytes(box) for box in boxes]

    def empty_session(self) -> Session:
        """Make an empty session."""
        return Session(None, data=None, new=True, max_age=self.max_age)

    def seal(self, payload: bytes) -> str:
        """Encrypt a payload with the first key and a random nonce."""
        keys = self._keys if self._secretbox is self._keyed else _keys_of(self._secretbox)
        if not keys:
            return encode_standard(self._secretbox.encrypt(payload))
        # What SecretBox.encrypt does, in half the time.
        nonce = os.urandom(_NONCE_SIZE)
        return encode_standard(nonce + crypto_secretbox(payload, nonce, keys[0]))

    def open(self, cookie: str) -> tuple[bytes, None] | None:
        """Decrypt a cookie with whichever key fits."""
        keys = self._keys if self._secretbox is self._keyed else _keys_of(self._secretbox)
        try:
            sealed = decode_standard(cookie)
            if not keys:
                return self._secretbox.decrypt(sealed), None
        except (CryptoError, ValueError):
            return None
        nonce, ciphertext = sealed[:_NONCE_SIZE], sealed[_NONCE_SIZE:]
        for key in keys:
            try:
                return crypto_secretbox_open(ciphertext, nonce, key), None
            except (CryptoError, ValueError):
                continue
        return None


def _keys_of(box: SecretBox) -> list[bytes]:
    """Return the key of a box that was assigned, if it is a SecretBox and no other kind."""
    return [bytes(box)] if type(box) is SecretBox else []


def _secretbox(key: bytes) -> SecretBox:
    if not isinstance(key, (bytes, bytearray)):
        raise TypeError(f"A secret key must be 32 bytes, not {type(key).__name__}")
    if len(key) != SecretBox.KEY_SIZE:
        raise ValueError(f"A secret key must be 32 bytes, not {len(key)}. os.urandom(32) makes one")
    return SecretBox(bytes(key))
