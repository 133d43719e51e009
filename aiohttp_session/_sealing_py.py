"""Sealed cookies, and their base64: the reference implementation of ``_sealing_c``.

The ciphers and the MAC are a library's, and come as arguments; what stands here is how a token is
put together, and taken apart.
"""

from __future__ import annotations

import string
import struct
from binascii import a2b_base64, b2a_base64
from collections.abc import Callable, Iterable
from hmac import compare_digest
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext
    from cryptography.hazmat.primitives.ciphers.modes import CBC
    from cryptography.hazmat.primitives.hmac import HMAC

__all__ = (
    "FernetKey",
    "decode_base64",
    "decode_standard",
    "encode_base64",
    "encode_standard",
    "open_fernet",
    "open_siv",
    "read_fernet",
    "seal_fernet",
    "seal_siv",
)

_DIGITS = f"{string.ascii_letters}{string.digits}+/-_"
# Which characters a text of urlsafe base64 ends with, by what its length is over a multiple of 4.
_ENDS = (f"{string.ascii_letters}{string.digits}-_", "", "AQgw", "AEIMQUYcgkosw048")
NOT_BASE64 = "The text is not canonical urlsafe base64"
NOT_STANDARD = "The text is not canonical base64"

# An AES-GCM-SIV cookie is the urlsafe base64, without padding, of a version byte, a nonce, and
# the sealed Unix time (8 bytes, big-endian) and payload.
SIV_VERSION = b"\x01"
BAD_NONCE = "A nonce for AES-GCM-SIV is 12 bytes"
NONCE_SIZE = 12  # bytes
_SIV_BODY = len(SIV_VERSION) + NONCE_SIZE
_TAG_SIZE = 16  # bytes
_TIME = struct.Struct(">Q")

# A Fernet token is the urlsafe base64, with padding, of a version byte, the Unix time (8 bytes,
# big-endian), an IV, the encrypted payload, and a MAC of all that.
FERNET_VERSION = b"\x80"
BAD_BLOCK = "A random block for Fernet is 16 bytes"
BLOCK_SIZE = 16  # bytes
_FERNET_HEAD = len(FERNET_VERSION) + _TIME.size
_MAC_SIZE = 32
_FERNET_FRAME = _FERNET_HEAD + BLOCK_SIZE + _MAC_SIZE
_PADDINGS = {size: bytes([size] * size) for size in range(1, BLOCK_SIZE + 1)}  # RFC 5652, 6.3


def encode_base64(data: bytes) -> str:
    """Write bytes as urlsafe base64 without padding (RFC 4648, 5)."""
    text = b2a_base64(data, newline=False).decode("ascii")
    return text.rstrip("=").replace("+", "-").replace("/", "_")


def decode_base64(text: str) -> bytes:
    """Read urlsafe base64 without padding, only in the one form that `encode_base64` writes.

    :raises ValueError: for any other text.
    """
    rest = len(text) % 4
    if text and text[-1] in _ENDS[rest] and "+" not in text and "/" not in text:
        try:
            data = a2b_base64(text.replace("-", "+").replace("_", "/") + "=="[: -rest % 4])
        except ValueError:
            data = b""
        if len(data) == len(text) * 3 // 4:  # a2b_base64 skips what is not in its alphabet
            return data
    raise ValueError(NOT_BASE64)


def encode_standard(data: bytes) -> str:
    """Write bytes as standard base64 with padding (RFC 4648, 4)."""
    return b2a_base64(data, newline=False).decode("ascii")


def decode_standard(text: str) -> bytes:
    """Read standard base64, only in the one form that `encode_standard` writes.

    :raises ValueError: for any other text.
    """
    try:
        data = a2b_base64(text)
    except ValueError:
        raise ValueError(NOT_STANDARD) from None
    if encode_standard(data) != text:
        raise ValueError(NOT_STANDARD)
    return data


def seal_siv(
    encrypt: Callable[[bytes, bytes, bytes], bytes],
    nonce: bytes,
    sealed_at: int,
    payload: bytes,
    name: str,
) -> str:
    """Make the cookie of a payload.

    :param encrypt: an AES-GCM-SIV cipher's.
    :param nonce: 12 bytes.
    :param sealed_at: Unix time in seconds.
    :param name: the cookie's: it is worth nothing under another one.
    :raises ValueError: for a nonce of another size.
    """
    if len(nonce) != NONCE_SIZE:
        raise ValueError(BAD_NONCE)
    sealed = encrypt(nonce, _TIME.pack(sealed_at) + payload, _associated(name))
    return encode_base64(SIV_VERSION + nonce + sealed)


def open_siv(
    decrypts: Iterable[Callable[[bytes, bytes, bytes], bytes]],
    cookie: str,
    name: str,
    wrong: type[Exception],
) -> tuple[bytes, int] | None:
    """Return the payload of a cookie that `seal_siv` made, and the Unix time of its sealing.

    :param decrypts: the ciphers', of which one may fit.
    :param name: the cookie's.
    :param wrong: what they raise if they don't.
    :return: None for a text that is no such cookie, or if none of them fits.
    """
    try:
        sealed = decode_base64(cookie)
    except ValueError:
        return None
    if len(sealed) < _SIV_BODY + _TAG_SIZE or not sealed.startswith(SIV_VERSION):
        return None
    nonce, ciphertext = sealed[1:_SIV_BODY], sealed[_SIV_BODY:]
    associated = _associated(name)
    for decrypt in decrypts:
        try:
            message = decrypt(nonce, ciphertext, associated)
        except wrong:
            continue
        if len(message) < _TIME.size:
            return None
        return message[_TIME.size :], _TIME.unpack_from(message)[0]
    return None


def _associated(name: str) -> bytes:
    """Return what is authenticated with the cookie of a name."""
    return SIV_VERSION + name.encode("utf-8")


class FernetKey:
    """A Fernet key with its contexts, which are made once: that is most of what a token costs.

    Each call takes a context for itself, and puts it back when that has done its work. So threads
    don't share one, and one that failed in the middle isn't used again.

    :param mac: HMAC-SHA256 with the signing key, which has seen nothing yet.
    :param cipher: AES-128-CBC with the encryption key, and any IV.
    """

    __slots__ = ("_cipher", "_decryptors", "_encryptors", "_mac")

    def __init__(self, mac: HMAC, cipher: Cipher[CBC]) -> None:
        self._mac = mac
        self._cipher = cipher
        self._encryptors: list[CipherContext] = []  # those that are not in use
        self._decryptors: list[CipherContext] = []

    def _sign(self, data: bytes) -> bytes:
        mac = self._mac.copy()
        mac.update(data)
        return mac.finalize()

    def _encrypt(self, blocks: bytes) -> bytes:
        """Encrypt blocks of which the first is random: its ciphertext is the IV of the others.

        What the context encrypted before mixes into the first block, which stays as random as it
        was.
        """
        try:
            context = self._encryptors.pop()
        except IndexError:
            context = self._cipher.encryptor()
        encrypted = context.update(blocks)
        self._encryptors.append(context)
        return encrypted

    def _decrypt(self, blocks: bytes) -> bytes:
        """Decrypt an IV and what follows it; what becomes of the IV itself means nothing.

        What the context decrypted before mixes into that first block alone.
        """
        try:
            context = self._decryptors.pop()
        except IndexError:
            context = self._cipher.decryptor()
        decrypted = context.update(blocks)
        self._decryptors.append(context)
        return decrypted


def seal_fernet(key: FernetKey, block: bytes, sealed_at: int, payload: bytes) -> str:
    """Make the Fernet token of a payload.

    :param block: 16 bytes, random and for this token alone.
    :param sealed_at: Unix time in seconds.
    :raises ValueError: for a block of another size.
    :raises TypeError: if the payload is not bytes.
    """
    if len(block) != BLOCK_SIZE:
        raise ValueError(BAD_BLOCK)
    if not isinstance(payload, bytes):
        raise TypeError(f"A payload must be bytes, not {type(payload).__name__}")
    padding = _PADDINGS[BLOCK_SIZE - len(payload) % BLOCK_SIZE]
    encrypted = key._encrypt(block + payload + padding)
    signed = FERNET_VERSION + _TIME.pack(sealed_at) + encrypted
    text = b2a_base64(signed + key._sign(signed), newline=False).decode("ascii")
    return text.replace("+", "-").replace("/", "_")


def open_fernet(keys: Iterable[FernetKey], token: str) -> tuple[bytes, int] | None:
    """Return the payload of a Fernet token that one of the keys made, and its Unix time.

    None for any other text: the tokens taken are those that `cryptography.fernet` takes.
    """
    data = read_fernet(token)
    if data is None:
        return None
    signed, mac = data[:-_MAC_SIZE], data[-_MAC_SIZE:]
    for key in keys:
        if compare_digest(key._sign(signed), mac):
            payload = _unpad(key._decrypt(signed[_FERNET_HEAD:]))
            if payload is not None:
                return payload, _TIME.unpack_from(data, 1)[0]
    return None


def read_fernet(token: str) -> bytes | None:
    """Return what a Fernet token is the base64 of, or None if no key can have made it."""
    # The version is in the first two digits. What is no digit is skipped, as ever.
    if token[:1] != "g" and token[:1] in _DIGITS:
        return None
    try:
        data = a2b_base64(token.replace("-", "+").replace("_", "/"))
    except ValueError:
        return None
    size = len(data) - _FERNET_FRAME
    if size <= 0 or size % BLOCK_SIZE or not data.startswith(FERNET_VERSION):
        return None
    return data


def _unpad(blocks: bytes) -> bytes | None:
    """Take off the first block, and the padding; None if that is damaged."""
    padding = _PADDINGS.get(blocks[-1])
    if padding is None or not blocks.endswith(padding):
        return None
    return blocks[BLOCK_SIZE : -len(padding)]
