# cython: language_level=3, binding=False, autotestdict=False, auto_pickle=False
# cython: embedsignature=True, embedsignature.format=clinic
"""Sealed cookies, and their base64, compiled: what is unusual is `_sealing_py`'s."""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.string cimport memcpy, memset
cimport cython

from hmac import compare_digest

from . import _sealing_py

cdef extern from "Python.h":
    bint PyUnicode_IS_ASCII(object text)
    unsigned char* PyUnicode_1BYTE_DATA(object text)
    Py_ssize_t PyUnicode_GET_LENGTH(object text)
    str PyUnicode_New(Py_ssize_t size, Py_UCS4 maxchar)

cdef const char* URLSAFE = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
cdef const char* STANDARD = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"

# What digits of base64 are worth, by alphabet: for each of four digits, and each character that it
# may be, three bytes that it has a part in, and a fourth that is 255 if the character is no digit.
cdef unsigned int[4 * 256] URLSAFE_VALUES
cdef unsigned int[4 * 256] STANDARD_VALUES
cdef unsigned int[4 * 256] EITHER_VALUES

cdef enum:
    # Sizes in bytes: of a cookie that is sealed with AES-GCM-SIV,
    NONCE_SIZE = 12
    SIV_BODY = 1 + NONCE_SIZE
    TAG_SIZE = 16
    TIME_SIZE = 8
    # and of a Fernet token.
    FERNET_HEAD = 1 + TIME_SIZE
    BLOCK_SIZE = 16
    MAC_SIZE = 32
    FERNET_FRAME = FERNET_HEAD + BLOCK_SIZE + MAC_SIZE

cdef unsigned char SIV_VERSION = _sealing_py.SIV_VERSION[0]
cdef unsigned char FERNET_VERSION = _sealing_py.FERNET_VERSION[0]
cdef str NOT_BASE64 = _sealing_py.NOT_BASE64
cdef str NOT_STANDARD = _sealing_py.NOT_STANDARD
cdef str BAD_NONCE = _sealing_py.BAD_NONCE
cdef str BAD_BLOCK = _sealing_py.BAD_BLOCK


cdef void _fill(unsigned int* values, const char* digits) noexcept:
    cdef int value, place, bits
    cdef unsigned char* parts
    for value in range(64):
        for place in range(4):
            parts = <unsigned char*>&values[256 * place + <unsigned char>digits[value]]
            bits = value << 18 - 6 * place
            parts[0], parts[1], parts[2], parts[3] = bits >> 16, bits >> 8, bits, 0


cdef void _fill_tables() noexcept:
    memset(URLSAFE_VALUES, 255, sizeof(URLSAFE_VALUES))
    memset(STANDARD_VALUES, 255, sizeof(STANDARD_VALUES))
    memset(EITHER_VALUES, 255, sizeof(EITHER_VALUES))
    _fill(URLSAFE_VALUES, URLSAFE)
    _fill(STANDARD_VALUES, STANDARD)
    _fill(EITHER_VALUES, URLSAFE)
    _fill(EITHER_VALUES, STANDARD)


_fill_tables()


def encode_base64(data):
    """Write bytes as urlsafe base64 without padding (RFC 4648, 5)."""
    if type(data) is not bytes:
        return _sealing_py.encode_base64(data)
    return _encode(_start(data), PyBytes_GET_SIZE(data), URLSAFE, False)


cpdef bytes decode_base64(text):
    """Read urlsafe base64 without padding, only in the one form that `encode_base64` writes.

    :raises ValueError: for any other text.
    """
    if type(text) is not str or not PyUnicode_IS_ASCII(text):
        return _sealing_py.decode_base64(text)
    cdef Py_ssize_t size = PyUnicode_GET_LENGTH(text)
    if size == 0 or size % 4 == 1:
        raise ValueError(NOT_BASE64)
    data = PyBytes_FromStringAndSize(NULL, _decoded_size(size))
    if _decode(PyUnicode_1BYTE_DATA(text), size, URLSAFE_VALUES, _start(data)) != 0:
        raise ValueError(NOT_BASE64)
    return data


def encode_standard(data):
    """Write bytes as standard base64 with padding (RFC 4648, 4)."""
    if type(data) is not bytes:
        return _sealing_py.encode_standard(data)
    return _encode(_start(data), PyBytes_GET_SIZE(data), STANDARD, True)


def decode_standard(text):
    """Read standard base64, only in the one form that `encode_standard` writes.

    :raises ValueError: for any other text.
    """
    if type(text) is not str or not PyUnicode_IS_ASCII(text):
        return _sealing_py.decode_standard(text)
    cdef Py_ssize_t size = PyUnicode_GET_LENGTH(text)
    cdef const unsigned char* source = PyUnicode_1BYTE_DATA(text)
    if size % 4:
        raise ValueError(NOT_STANDARD)
    size = _without_padding(source, size)
    data = PyBytes_FromStringAndSize(NULL, _decoded_size(size))
    if _decode(source, size, STANDARD_VALUES, _start(data)) != 0:
        raise ValueError(NOT_STANDARD)
    return data


cdef inline unsigned char* _start(bytes data) noexcept:
    return <unsigned char*>PyBytes_AS_STRING(data)


cdef inline Py_ssize_t _decoded_size(Py_ssize_t digits) noexcept:
    return digits // 4 * 3 + (digits % 4 * 3 >> 2)


cdef inline Py_ssize_t _without_padding(const unsigned char* text, Py_ssize_t size) noexcept:
    """Return the number of digits in a text of base64 whose length is a multiple of four."""
    if size and text[size - 1] == c"=":
        size -= 2 if text[size - 2] == c"=" else 1
    return size


cdef str _encode(
    const unsigned char* source, Py_ssize_t size, const char* digits, bint is_padded
):
    cdef Py_ssize_t i, rest = size % 3
    cdef unsigned int bits
    cdef Py_ssize_t last = 0 if rest == 0 else 4 if is_padded else rest + 1
    text = PyUnicode_New(size // 3 * 4 + last, 127)
    cdef unsigned char* out = PyUnicode_1BYTE_DATA(text)
    for i in range(0, size - 2, 3):
        bits = source[i] << 16 | source[i + 1] << 8 | source[i + 2]
        out[0] = digits[bits >> 18]
        out[1] = digits[bits >> 12 & 63]
        out[2] = digits[bits >> 6 & 63]
        out[3] = digits[bits & 63]
        out += 4
    if rest == 0:
        return text
    i = size - rest
    out[0] = digits[source[i] >> 2]
    if rest == 1:
        out[1] = digits[(source[i] & 3) << 4]
    else:
        out[1] = digits[(source[i] & 3) << 4 | source[i + 1] >> 4]
        out[2] = digits[(source[i + 1] & 15) << 2]
    if is_padded:
        out[3] = c"="
        if rest == 1:
            out[2] = c"="
    return text


cdef int _decode(
    const unsigned char* source,
    Py_ssize_t size,
    const unsigned int* values,
    unsigned char* out,
) noexcept:
    """Decode digits, and return the bits that are left over; -1 if one of them is no digit.

    :param out: has a byte more than is decoded, as bytes objects have: it is 0 afterwards.
    """
    cdef Py_ssize_t i
    cdef unsigned int four, all = 0
    cdef unsigned char* parts = <unsigned char*>&four
    cdef unsigned char* alls = <unsigned char*>&all
    for i in range(0, size - 3, 4):
        four = values[source[i]] | values[256 + source[i + 1]]
        four |= values[512 + source[i + 2]] | values[768 + source[i + 3]]
        all |= four
        memcpy(out, &four, 4)
        out += 3
    i = size - size % 4
    four = 0
    if size % 4 > 1:
        four = values[source[i]] | values[256 + source[i + 1]]
        if size % 4 == 3:
            four |= values[512 + source[i + 2]]
    all |= four
    if alls[3]:
        return -1
    if size % 4 == 2:
        out[0] = parts[0]
        return parts[1]
    if size % 4 == 3:
        out[0], out[1] = parts[0], parts[1]
        return parts[2]
    return 0


def seal_siv(
    encrypt,
    bytes nonce not None,
    unsigned long long sealed_at,
    bytes payload not None,
    str name not None,
):
    """Make the cookie of a payload.

    :param encrypt: an AES-GCM-SIV cipher's.
    :param nonce: 12 bytes.
    :param sealed_at: Unix time in seconds.
    :param name: the cookie's: it is worth nothing under another one.
    :raises ValueError: for a nonce of another size.
    """
    if PyBytes_GET_SIZE(nonce) != NONCE_SIZE:
        raise ValueError(BAD_NONCE)
    cdef Py_ssize_t size = PyBytes_GET_SIZE(payload)
    cdef bytes message = PyBytes_FromStringAndSize(NULL, TIME_SIZE + size)
    _write_time(_start(message), sealed_at)
    memcpy(_start(message) + TIME_SIZE, PyBytes_AS_STRING(payload), size)
    cdef bytes ciphertext = _as_bytes(encrypt(nonce, message, _associated(name)))
    size = PyBytes_GET_SIZE(ciphertext)
    cdef bytes sealed = PyBytes_FromStringAndSize(NULL, SIV_BODY + size)
    cdef unsigned char* out = _start(sealed)
    out[0] = SIV_VERSION
    memcpy(out + 1, PyBytes_AS_STRING(nonce), NONCE_SIZE)
    memcpy(out + SIV_BODY, PyBytes_AS_STRING(ciphertext), size)
    return _encode(out, SIV_BODY + size, URLSAFE, False)


def open_siv(decrypts, cookie, str name not None, wrong):
    """Return the payload of a cookie that `seal_siv` made, and the Unix time of its sealing.

    :param decrypts: the ciphers', of which one may fit.
    :param name: the cookie's.
    :param wrong: what they raise if they don't.
    :return: None for a text that is no such cookie, or if none of them fits.
    """
    cdef bytes sealed, nonce, ciphertext, message
    cdef const unsigned char* text
    cdef Py_ssize_t size
    try:
        sealed = decode_base64(cookie)
    except ValueError:
        return None
    text, size = _start(sealed), PyBytes_GET_SIZE(sealed)
    if size < SIV_BODY + TAG_SIZE or text[0] != SIV_VERSION:
        return None
    nonce = PyBytes_FromStringAndSize(<const char*>text + 1, NONCE_SIZE)
    ciphertext = PyBytes_FromStringAndSize(<const char*>text + SIV_BODY, size - SIV_BODY)
    associated = _associated(name)
    for decrypt in decrypts:
        try:
            message = _as_bytes(decrypt(nonce, ciphertext, associated))
        except wrong:
            continue
        text, size = _start(message), PyBytes_GET_SIZE(message)
        if size < TIME_SIZE:
            return None
        payload = PyBytes_FromStringAndSize(<const char*>text + TIME_SIZE, size - TIME_SIZE)
        return payload, _read_time(text)
    return None


cdef bytes _associated(str name):
    """Return what is authenticated with the cookie of a name."""
    if not PyUnicode_IS_ASCII(name):
        return _sealing_py._associated(name)
    cdef Py_ssize_t size = PyUnicode_GET_LENGTH(name)
    cdef bytes associated = PyBytes_FromStringAndSize(NULL, 1 + size)
    _start(associated)[0] = SIV_VERSION
    memcpy(_start(associated) + 1, PyUnicode_1BYTE_DATA(name), size)
    return associated


@cython.final
cdef class FernetKey:
    """A Fernet key with its contexts, which are made once: that is most of what a token costs.

    Each call takes a context for itself, and puts it back when that has done its work. So threads
    don't share one, and one that failed in the middle isn't used again.

    :param mac: HMAC-SHA256 with the signing key, which has seen nothing yet.
    :param cipher: AES-128-CBC with the encryption key, and any IV.
    """

    cdef object _copy_mac
    cdef object _cipher
    cdef list _encryptors  # the `update` of those that are not in use
    cdef list _decryptors

    def __init__(self, mac, cipher):
        self._copy_mac = mac.copy
        self._cipher = cipher
        self._encryptors = []
        self._decryptors = []

    cdef bytes _sign(self, bytes data):
        mac = self._copy_mac()
        mac.update(data)
        return _as_bytes(mac.finalize())

    # Why the first block is as it is, in both directions: see `_sealing_py`.

    cdef bytes _encrypt(self, bytes blocks):
        update = self._encryptors.pop() if self._encryptors else self._cipher.encryptor().update
        cdef bytes encrypted = _as_bytes(update(blocks))
        self._encryptors.append(update)
        return encrypted

    cdef bytes _decrypt(self, bytes blocks):
        update = self._decryptors.pop() if self._decryptors else self._cipher.decryptor().update
        cdef bytes decrypted = _as_bytes(update(blocks))
        self._decryptors.append(update)
        return decrypted


def seal_fernet(
    FernetKey key not None, bytes block not None, unsigned long long sealed_at, payload
):
    """Make the Fernet token of a payload.

    :param block: 16 bytes, random and for this token alone.
    :param sealed_at: Unix time in seconds.
    :raises ValueError: for a block of another size.
    :raises TypeError: if the payload is not bytes.
    """
    if PyBytes_GET_SIZE(block) != BLOCK_SIZE:
        raise ValueError(BAD_BLOCK)
    if not isinstance(payload, bytes):
        raise TypeError(f"A payload must be bytes, not {type(payload).__name__}")
    cdef Py_ssize_t size = PyBytes_GET_SIZE(payload)
    cdef int missing = BLOCK_SIZE - size % BLOCK_SIZE
    cdef bytes blocks = PyBytes_FromStringAndSize(NULL, BLOCK_SIZE + size + missing)
    cdef unsigned char* out = _start(blocks)
    memcpy(out, PyBytes_AS_STRING(block), BLOCK_SIZE)
    memcpy(out + BLOCK_SIZE, PyBytes_AS_STRING(payload), size)
    memset(out + BLOCK_SIZE + size, missing, missing)

    cdef bytes encrypted = key._encrypt(blocks)
    size = PyBytes_GET_SIZE(encrypted)
    cdef bytes signed = PyBytes_FromStringAndSize(NULL, FERNET_HEAD + size)
    out = _start(signed)
    out[0] = FERNET_VERSION
    _write_time(out + 1, sealed_at)
    memcpy(out + FERNET_HEAD, PyBytes_AS_STRING(encrypted), size)
    cdef bytes token = signed + key._sign(signed)
    return _encode(_start(token), PyBytes_GET_SIZE(token), URLSAFE, True)


def open_fernet(keys, token):
    """Return the payload of a Fernet token that one of the keys made, and its Unix time.

    None for any other text: the tokens taken are those that `cryptography.fernet` takes.
    """
    cdef bytes data = read_fernet(token)
    if data is None:
        return None
    cdef const unsigned char* text = _start(data)
    cdef Py_ssize_t size = PyBytes_GET_SIZE(data) - MAC_SIZE
    cdef bytes signed = PyBytes_FromStringAndSize(<const char*>text, size)
    cdef bytes mac = PyBytes_FromStringAndSize(<const char*>text + size, MAC_SIZE)
    cdef bytes blocks
    cdef FernetKey key
    for key in keys:
        if compare_digest(key._sign(signed), mac):
            blocks = PyBytes_FromStringAndSize(<const char*>text + FERNET_HEAD, size - FERNET_HEAD)
            payload = _unpad(key._decrypt(blocks))
            if payload is not None:
                return payload, _read_time(text + 1)
    return None


cpdef bytes read_fernet(token):
    """Return what a Fernet token is the base64 of, or None if no key can have made it."""
    if type(token) is not str or not PyUnicode_IS_ASCII(token):
        return _sealing_py.read_fernet(token)
    cdef const unsigned char* text = PyUnicode_1BYTE_DATA(token)
    cdef Py_ssize_t size = PyUnicode_GET_LENGTH(token), digits
    if size == 0 or size % 4 or text[0] != c"g":
        return _sealing_py.read_fernet(token)
    digits = _without_padding(text, size)
    data = PyBytes_FromStringAndSize(NULL, _decoded_size(digits))
    if _decode(text, digits, EITHER_VALUES, _start(data)) < 0:
        return _sealing_py.read_fernet(token)
    size = PyBytes_GET_SIZE(data) - FERNET_FRAME
    if size <= 0 or size % BLOCK_SIZE or _start(data)[0] != FERNET_VERSION:
        return None
    return data


cdef bytes _unpad(bytes blocks):
    """Take off the first block, and the padding (RFC 5652, 6.3); None if that is damaged."""
    cdef const unsigned char* text = _start(blocks)
    cdef Py_ssize_t size = PyBytes_GET_SIZE(blocks)
    cdef unsigned char missing, i
    if size < 2 * BLOCK_SIZE:
        return None
    missing = text[size - 1]
    if not 0 < missing <= BLOCK_SIZE:
        return None
    for i in range(2, missing + 1):
        if text[size - i] != missing:
            return None
    return PyBytes_FromStringAndSize(<const char*>text + BLOCK_SIZE, size - BLOCK_SIZE - missing)


cdef void _write_time(unsigned char* out, unsigned long long seconds) noexcept:
    cdef int i
    for i in range(TIME_SIZE):
        out[i] = <unsigned char>(seconds >> 8 * (TIME_SIZE - 1 - i))


cdef unsigned long long _read_time(const unsigned char* text) noexcept:
    cdef unsigned long long seconds = 0
    cdef int i
    for i in range(TIME_SIZE):
        seconds = seconds << 8 | text[i]
    return seconds


cdef bytes _as_bytes(value):
    if type(value) is not bytes:
        raise TypeError(f"Expected bytes got {type(value)}")
    return value
