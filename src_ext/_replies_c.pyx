# cython: language_level=3, binding=False, autotestdict=False
# cython: embedsignature=True, embedsignature.format=clinic
"""Records in what memcached replies, compiled: one pass over the bytes."""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.string cimport memcmp

from . import _replies_py


def read_values(data, position):
    """Read the complete records of a reply to ``get`` from a position on.

    :return: keys with their records; and the position after them, of what is anything else: the
        end, an error, a record that is incomplete, damaged or has flags.
    """
    if type(data) is not bytes or type(position) is not int or position < 0:
        return _replies_py.read_values(data, position)
    cdef const unsigned char* text = <const unsigned char*>PyBytes_AS_STRING(data)
    cdef Py_ssize_t end = PyBytes_GET_SIZE(data), done = min(position, end)
    cdef Py_ssize_t i, key, key_end, digits, size
    values = []
    # Behind the last byte of a bytes object there is a NUL, at which every scan ends.
    while end - done > 6 and memcmp(text + done, b"VALUE ", 6) == 0:
        i = key = done + 6
        while text[i] > c" " and text[i] != 127:
            i += 1
        key_end = i
        if key_end == key or end - i < 3 or memcmp(text + i, b" 0 ", 3) != 0:
            break
        i = digits = i + 3
        size = 0
        while b"0" <= text[i] <= b"9" and i - digits < 9:
            size = size * 10 + (text[i] - c"0")
            i += 1
        if i == digits or end - i < 2 or memcmp(text + i, b"\r\n", 2) != 0:
            break
        i += 2
        if end - i < size + 2 or memcmp(text + i + size, b"\r\n", 2) != 0:
            break
        values.append((
            PyBytes_FromStringAndSize(<const char*>text + key, key_end - key),
            PyBytes_FromStringAndSize(<const char*>text + i, size),
        ))
        done = i + size + 2
    return values, position if not values else done
