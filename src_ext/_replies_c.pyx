# cython: language_level=3, binding=False, autotestdict=False
# cython: embedsignature=True, embedsignature.format=clinic
"""What memcached and Redis reply, and Redis is sent, compiled: one pass over the bytes."""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.unicode cimport PyUnicode_DecodeASCII
from cpython.tuple cimport PyTuple_GET_ITEM, PyTuple_GET_SIZE
from libc.string cimport memcmp, memcpy

from . import _replies_py

cdef extern from "Python.h":
    bint PyUnicode_IS_ASCII(object text)
    unsigned char* PyUnicode_1BYTE_DATA(object text)
    Py_ssize_t PyUnicode_GET_LENGTH(object text)
    long long PyLong_AsLongLongAndOverflow(object value, int* overflow)

cdef const char* _INVALIDATION = b">2\r\n$10\r\ninvalidate\r\n*1\r\n$"

cdef enum:
    MAX_TTL = 0x7FFF_FFFF  # seconds
    DIGEST_SIZE = 40  # of SHA-1, in hex

# Behind the last byte of a bytes object there is a NUL, at which every scan ends.


def write_command(*arguments):
    """Write a command of Redis."""
    cdef Py_ssize_t count = PyTuple_GET_SIZE(arguments), size = 1 + _count_digits(count) + 2
    cdef Py_ssize_t i
    for i in range(count):
        argument = <object>PyTuple_GET_ITEM(arguments, i)
        if type(argument) is not bytes:
            return _replies_py.write_command(*arguments)
        size += _argument_size(PyBytes_GET_SIZE(argument))
    command = PyBytes_FromStringAndSize(NULL, size)
    cdef unsigned char* out = _write_size(<unsigned char*>PyBytes_AS_STRING(command), c"*", count)
    for i in range(count):
        argument = <object>PyTuple_GET_ITEM(arguments, i)
        out = _write_argument(out, PyBytes_AS_STRING(argument), PyBytes_GET_SIZE(argument))
    return command


def write_get(key):
    """Write GET, a command of Redis."""
    if type(key) is not str or not PyUnicode_IS_ASCII(key):
        return _replies_py.write_get(key)
    cdef Py_ssize_t length = PyUnicode_GET_LENGTH(key)
    command = PyBytes_FromStringAndSize(NULL, 4 + _argument_size(3) + _argument_size(length))
    cdef unsigned char* out = <unsigned char*>PyBytes_AS_STRING(command)
    out = _write_argument(_write_size(out, c"*", 2), b"GET", 3)
    _write_argument(out, <const char*>PyUnicode_1BYTE_DATA(key), length)
    return command


def write_set(key, payload, ttl, condition):
    """Write SET, a command of Redis.

    :param ttl: in seconds; None for ever.
    :param condition: ``XX``, if there is a record already; ``NX``, if there is none; or empty.
    """
    cdef int is_odd = 0, count = 3
    cdef long long seconds = 0
    if type(key) is not str or type(payload) is not bytes or type(condition) is not bytes:
        return _replies_py.write_set(key, payload, ttl, condition)
    if type(ttl) is int:
        seconds = PyLong_AsLongLongAndOverflow(ttl, &is_odd)
    elif ttl is not None:
        is_odd = True
    if is_odd or not 0 <= seconds <= MAX_TTL or not PyUnicode_IS_ASCII(key):
        return _replies_py.write_set(key, payload, ttl, condition)
    cdef Py_ssize_t length = PyUnicode_GET_LENGTH(key), payload_size = PyBytes_GET_SIZE(payload)
    cdef Py_ssize_t condition_size = PyBytes_GET_SIZE(condition)
    cdef Py_ssize_t size = 4 + _argument_size(3) + _argument_size(length)
    size += _argument_size(payload_size)
    if ttl is not None:
        count += 2
        size += _argument_size(2) + _argument_size(_count_digits(seconds))
    if condition_size:
        count += 1
        size += _argument_size(condition_size)
    command = PyBytes_FromStringAndSize(NULL, size)
    cdef unsigned char* out = <unsigned char*>PyBytes_AS_STRING(command)
    out = _write_argument(_write_size(out, c"*", count), b"SET", 3)
    out = _write_argument(out, <const char*>PyUnicode_1BYTE_DATA(key), length)
    out = _write_argument(out, PyBytes_AS_STRING(payload), payload_size)
    if ttl is not None:
        out = _write_argument(out, b"EX", 2)
        out = _write_size(out, c"$", _count_digits(seconds))
        out = _end_line(_write_number(out, seconds))
    if condition_size:
        _write_argument(out, PyBytes_AS_STRING(condition), condition_size)
    return command


def write_swap(key, expected, payload, ttl, script):
    """Write a command of Redis that replaces a record if it is the expected one.

    :param ttl: in seconds; None for ever.
    :param script: the digest of a script for EVALSHA, or a script for EVAL, which takes the key,
        the expected record, the payload and the TTL, if there is one; empty for SET with IFEQ.
    """
    cdef int is_odd = 0, count
    cdef long long seconds = 0
    if type(key) is not str or type(payload) is not bytes or type(script) is not bytes:
        return _replies_py.write_swap(key, expected, payload, ttl, script)
    if type(ttl) is int:
        seconds = PyLong_AsLongLongAndOverflow(ttl, &is_odd)
    elif ttl is not None:
        is_odd = True
    if type(expected) is not bytes or not PyUnicode_IS_ASCII(key):
        is_odd = True
    if is_odd or not 0 <= seconds <= MAX_TTL:
        return _replies_py.write_swap(key, expected, payload, ttl, script)
    cdef Py_ssize_t length = PyUnicode_GET_LENGTH(key), payload_size = PyBytes_GET_SIZE(payload)
    cdef Py_ssize_t expected_size = PyBytes_GET_SIZE(expected)
    cdef Py_ssize_t script_size = PyBytes_GET_SIZE(script)
    cdef Py_ssize_t size = 4 + _argument_size(length) + _argument_size(payload_size)
    size += _argument_size(expected_size)
    cdef int is_set = script_size == 0, name_size = 7 if script_size == DIGEST_SIZE else 4
    if is_set:
        count = 5
        size += _argument_size(3) + _argument_size(4)
    else:
        count = 6
        size += _argument_size(name_size) + _argument_size(script_size) + _argument_size(1)
    if ttl is not None:
        count += 1 + is_set
        size += _argument_size(_count_digits(seconds)) + (_argument_size(2) if is_set else 0)
    command = PyBytes_FromStringAndSize(NULL, size)
    cdef unsigned char* out = <unsigned char*>PyBytes_AS_STRING(command)
    out = _write_size(out, c"*", count)
    if is_set:
        out = _write_argument(out, b"SET", 3)
    else:
        out = _write_argument(out, b"EVALSHA" if name_size == 7 else b"EVAL", name_size)
        out = _write_argument(out, PyBytes_AS_STRING(script), script_size)
        out = _write_argument(out, b"1", 1)
    out = _write_argument(out, <const char*>PyUnicode_1BYTE_DATA(key), length)
    if not is_set:
        out = _write_argument(out, PyBytes_AS_STRING(expected), expected_size)
    out = _write_argument(out, PyBytes_AS_STRING(payload), payload_size)
    if ttl is not None:
        if is_set:
            out = _write_argument(out, b"EX", 2)
        out = _write_size(out, c"$", _count_digits(seconds))
        out = _end_line(_write_number(out, seconds))
    if is_set:
        out = _write_argument(out, b"IFEQ", 4)
        _write_argument(out, PyBytes_AS_STRING(expected), expected_size)
    return command


def read_values(data, position):
    """Read the complete records of memcached's reply to ``gets`` from a position on.

    :return: keys with their records and their tokens for ``cas``; and the position after them, of
        what is anything else: the end, an error, a record that is incomplete, damaged or has flags.
    """
    if not _is_usual(data, position):
        return _replies_py.read_values(data, position)
    cdef const unsigned char* text = <const unsigned char*>PyBytes_AS_STRING(data)
    cdef Py_ssize_t end = PyBytes_GET_SIZE(data), done = position
    cdef Py_ssize_t i, key, key_end, token, token_end
    cdef long long size
    values = []
    while end - done > 6 and memcmp(text + done, b"VALUE ", 6) == 0:
        i = key = done + 6
        while text[i] > c" " and text[i] != 127:
            i += 1
        key_end = i
        if key_end == key or end - i < 3 or memcmp(text + i, b" 0 ", 3) != 0:
            break
        i = _read_digits(text, i + 3, 9, &size)
        if i == 0 or text[i] != c" ":
            break
        token = i + 1
        i = token_end = _skip_digits(text, token, 20)
        if i == token or not _is_line_end(text, i, end):
            break
        i += 2
        if end - i < size + 2 or not _is_line_end(text, i + size, end):
            break
        values.append((
            PyBytes_FromStringAndSize(<const char*>text + key, key_end - key),
            PyBytes_FromStringAndSize(<const char*>text + i, size),
            PyBytes_FromStringAndSize(<const char*>text + token, token_end - token),
        ))
        done = i + size + 2
    return values, done


def read_replies(data, position):
    """Read the complete replies of Redis from a position on: strings, integers and nulls.

    :return: the replies; and the position after them, of what is anything else: an error, another
        type, a reply that is incomplete or damaged.
    """
    if not _is_usual(data, position):
        return _replies_py.read_replies(data, position)
    return _read_resp(data, position, False)


def read_tracked(data, position):
    """Read replies as `read_replies` does, and messages that one key was invalidated among them.

    :return: the replies, with the keys in the place of the messages, as str; and the position.
    """
    if not _is_usual(data, position):
        return _replies_py.read_tracked(data, position)
    return _read_resp(data, position, True)


cdef _read_resp(bytes data, Py_ssize_t position, bint is_tracked):
    cdef const unsigned char* text = <const unsigned char*>PyBytes_AS_STRING(data)
    cdef Py_ssize_t end = PyBytes_GET_SIZE(data), done = position
    cdef Py_ssize_t i, key
    cdef long long number
    replies = []
    while done < end:
        i = done + 1
        if text[done] == c"$" and text[i] != c"-":
            i = _read_digits(text, i, 9, &number)
            if i == 0 or not _is_line_end(text, i, end):
                break
            i += 2
            if end - i < number + 2:
                break
            reply = PyBytes_FromStringAndSize(<const char*>text + i, number)
            i += number
        elif text[done] == c"$" and end - done > 2 and text[done + 2] == c"1":
            reply = None
            i = done + 3
        elif text[done] == c"_":
            reply = None
        elif text[done] == c":":
            if text[i] == c"-":
                i += 1
            i = _read_digits(text, i, 18, &number)
            if i == 0:
                break
            reply = -number if text[done + 1] == c"-" else number
        elif text[done] == c"+":
            while i < end and text[i] != c"\r" and text[i] != c"\n":
                i += 1
            reply = PyBytes_FromStringAndSize(<const char*>text + done + 1, i - done - 1)
        elif is_tracked and end - done > 26 and memcmp(text + done, _INVALIDATION, 26) == 0:
            i = _read_digits(text, done + 26, 9, &number)
            if i == 0 or not _is_line_end(text, i, end):
                break
            key = i + 2
            i = key
            while c"!" <= text[i] <= c"~":
                i += 1
            if i == key or i - key != number:
                break
            reply = PyUnicode_DecodeASCII(<const char*>text + key, number, NULL)
        else:
            break
        if not _is_line_end(text, i, end):
            break
        replies.append(reply)
        done = i + 2
    return replies, done


cdef bint _is_usual(data, position) except -1:
    return type(data) is bytes and type(position) is int and 0 <= position <= len(data)


cdef bint _is_line_end(const unsigned char* text, Py_ssize_t i, Py_ssize_t end) noexcept:
    return end - i >= 2 and text[i] == c"\r" and text[i + 1] == c"\n"


cdef Py_ssize_t _read_digits(
    const unsigned char* text, Py_ssize_t i, int most, long long* number
) noexcept:
    """Read a number of so many digits at the most; return the position after it, 0 for none."""
    cdef Py_ssize_t start = i
    number[0] = 0
    while c"0" <= text[i] <= c"9" and i - start < most:
        number[0] = number[0] * 10 + (text[i] - c"0")
        i += 1
    return 0 if i == start else i


cdef Py_ssize_t _skip_digits(const unsigned char* text, Py_ssize_t i, int most) noexcept:
    """Return the position after a number of so many digits at the most."""
    cdef Py_ssize_t start = i
    while c"0" <= text[i] <= c"9" and i - start < most:
        i += 1
    return i


cdef int _count_digits(Py_ssize_t number) noexcept:
    cdef int count = 1
    while number > 9:
        number //= 10
        count += 1
    return count


cdef unsigned char* _write_size(unsigned char* out, unsigned char kind, Py_ssize_t size) noexcept:
    """Write what stands before so many arguments, or so many bytes; return where that ends."""
    out[0] = kind
    return _end_line(_write_number(out + 1, size))


cdef unsigned char* _write_number(unsigned char* out, Py_ssize_t number) noexcept:
    cdef int i, count = _count_digits(number)
    for i in range(count - 1, -1, -1):
        out[i] = c"0" + number % 10
        number //= 10
    return out + count


cdef Py_ssize_t _argument_size(Py_ssize_t length) noexcept:
    return 1 + _count_digits(length) + 2 + length + 2


cdef unsigned char* _write_argument(
    unsigned char* out, const char* text, Py_ssize_t length
) noexcept:
    out = _write_size(out, c"$", length)
    memcpy(out, text, length)
    return _end_line(out + length)


cdef unsigned char* _end_line(unsigned char* out) noexcept:
    out[0] = c"\r"
    out[1] = c"\n"
    return out + 2
