# cython: language_level=3, binding=False, autotestdict=False
# cython: embedsignature=True, embedsignature.format=clinic
"""Sessions as JSON text, compiled: what orjson does without loss is found in one walk over the
value, or over the text; the rest is `_payload_py`'s.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from cpython.dict cimport PyDict_Next
from cpython.float cimport PyFloat_AS_DOUBLE
from cpython.list cimport PyList_GET_ITEM, PyList_GET_SIZE
from cpython.object cimport PyObject
from cpython.tuple cimport PyTuple_GET_ITEM, PyTuple_GET_SIZE
from libc.string cimport memcpy

from . import _payload_py

cdef extern from "Python.h":
    bint PyUnicode_IS_ASCII(object text)
    unsigned char* PyUnicode_1BYTE_DATA(object text)
    Py_ssize_t PyUnicode_GET_LENGTH(object text)
    str PyUnicode_New(Py_ssize_t size, Py_UCS4 maxchar)
    long long PyLong_AsLongLongAndOverflow(object value, int* overflow)

cdef const char* HEX = b"0123456789abcdef"

cdef object _orjson_dumps = getattr(_payload_py.orjson, "dumps", None)
cdef object _orjson_loads = getattr(_payload_py.orjson, "loads", None)

# orjson goes no deeper; and the C stack stays small.
cdef enum:
    MAX_DEPTH = 255
    # A longer run of digits may be an integer of more than 64 bits.
    SAFE_DIGITS = 18


def encode(data):
    """Write JSON in as few bytes as possible, UTF-8.

    :raises TypeError: for a value that JSON can't hold; the message names the path to it.
    :raises ValueError: for a circular reference.
    """
    if _orjson_dumps is not None and _is_plain(data, 0):
        try:
            return _orjson_dumps(data)
        except TypeError:  # too deep, or a lone surrogate
            pass
    return _payload_py._dump(data).encode("ascii")


def dumps(data):
    """Write JSON as compact, printable ASCII text, for a cookie; raises as `encode` does."""
    return _escape(encode(data))


def decode(text):
    """Read JSON as ``json.loads`` does, to the same result.

    :raises ValueError: if it is no JSON, or no UTF-8.
    """
    if type(text) is bytes:
        fits = _fits_64_bits(<const unsigned char*>PyBytes_AS_STRING(text), PyBytes_GET_SIZE(text))
    elif type(text) is str and PyUnicode_IS_ASCII(text):
        fits = _fits_64_bits(PyUnicode_1BYTE_DATA(text), PyUnicode_GET_LENGTH(text))
    else:
        return _payload_py.decode(text)
    if fits and _orjson_loads is not None:
        try:
            return _orjson_loads(text)
        except ValueError:  # NaN, 1E400, a lone surrogate; or no JSON at all
            pass
    return _payload_py._load(text)


cdef bint _is_plain(object value, int depth) except -1:
    """Tell whether orjson writes the value just as json does, or refuses it."""
    cdef PyObject* key
    cdef PyObject* item
    cdef Py_ssize_t position = 0
    cdef double number
    if type(value) is str or value is None or type(value) is bool:
        return True
    if type(value) is int:
        return _is_64_bits(value)
    if type(value) is float:
        number = PyFloat_AS_DOUBLE(value)
        return number - number == 0.0  # false for NaN and the infinities
    if depth == MAX_DEPTH:
        return False
    if type(value) is dict:
        while PyDict_Next(value, &position, &key, &item):
            if type(<object>key) is not str or not _is_plain(<object>item, depth + 1):
                return False
        return True
    if type(value) is list:
        for position in range(PyList_GET_SIZE(value)):
            if not _is_plain(<object>PyList_GET_ITEM(value, position), depth + 1):
                return False
        return True
    if type(value) is tuple:
        for position in range(PyTuple_GET_SIZE(value)):
            if not _is_plain(<object>PyTuple_GET_ITEM(value, position), depth + 1):
                return False
        return True
    return False


cdef str _escape(bytes json):
    """Write what is not printable ASCII in the strings of JSON as ``\\uXXXX``, for UTF-16."""
    cdef const unsigned char* text = <const unsigned char*>PyBytes_AS_STRING(json)
    cdef Py_ssize_t length = PyBytes_GET_SIZE(json), size = length, i = 0
    cdef Py_ssize_t start
    cdef unsigned int code
    while True:
        i = _skip_ascii(text, i, length)
        if i == length:
            break
        # A character of two or three bytes takes six, one of four takes twelve, DEL takes six.
        size += 5 if text[i] == 0x7F else -1 if text[i] < 0xC0 else 11 if text[i] >= 0xF0 else 5
        i += 1
    escaped = PyUnicode_New(size, 127)
    cdef unsigned char* out = PyUnicode_1BYTE_DATA(escaped)
    if size == length:
        memcpy(out, text, length)
        return escaped
    i = 0
    while True:
        start, i = i, _skip_ascii(text, i, length)
        memcpy(out, text + start, i - start)
        out += i - start
        if i == length:
            break
        code = text[i]
        i += 1
        if code >= 0xF0:
            code = (
                (code & 7) << 18 | (text[i] & 63) << 12 | (text[i + 1] & 63) << 6 | text[i + 2] & 63
            )
            i += 3
            out = _write_escape(out, 0xD7C0 + (code >> 10))
            code = 0xDC00 | code & 0x3FF
        elif code >= 0xE0:
            code = (code & 15) << 12 | (text[i] & 63) << 6 | text[i + 1] & 63
            i += 2
        elif code >= 0xC0:
            code = (code & 31) << 6 | text[i] & 63
            i += 1
        out = _write_escape(out, code)
    return escaped


cdef Py_ssize_t _skip_ascii(const unsigned char* text, Py_ssize_t i, Py_ssize_t end) noexcept:
    # Eight characters at a time: one that is DEL has the top bit when 1 is added, others beyond
    # ASCII have it already. What carries into the next byte comes from such a one.
    cdef unsigned long long each = 0x0101010101010101, eight
    while end - i >= 8:
        memcpy(&eight, text + i, 8)
        if (eight | (eight + each)) & (0x80 * each):
            break
        i += 8
    while i < end and text[i] < 0x7F:
        i += 1
    return i


cdef unsigned char* _write_escape(unsigned char* out, unsigned int unit) noexcept:
    out[0] = c"\\"
    out[1] = c"u"
    cdef int i
    for i in range(4):
        out[2 + i] = HEX[unit >> (12 - 4 * i) & 15]
    return out + 6


cdef bint _is_64_bits(object value) except -1:
    cdef int overflow
    PyLong_AsLongLongAndOverflow(value, &overflow)
    if overflow > 0:
        return value <= 0xFFFF_FFFF_FFFF_FFFF
    return overflow == 0


cdef bint _fits_64_bits(const unsigned char* text, Py_ssize_t length) noexcept:
    """Tell whether no run of digits is so long that orjson could make a float of an integer."""
    cdef Py_ssize_t position = SAFE_DIGITS
    cdef Py_ssize_t start, stop
    # A run that is too long has a digit at one of these positions at least.
    while position < length:
        if b"0" <= text[position] <= b"9":
            start = stop = position
            while start > 0 and b"0" <= text[start - 1] <= b"9":
                start -= 1
            while stop < length and b"0" <= text[stop] <= b"9":
                stop += 1
            if stop - start > SAFE_DIGITS:
                return False
        position += SAFE_DIGITS + 1
    return True
