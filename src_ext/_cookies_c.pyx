# cython: language_level=3, binding=False, autotestdict=False
# cython: embedsignature=True, embedsignature.format=clinic
"""Cookie text, in and out, compiled: one pass over the bytes. What is unusual is `_cookies_py`'s."""

from cpython.dict cimport PyDict_Next
from cpython.mem cimport PyMem_Free, PyMem_Malloc
from cpython.object cimport PyObject
from libc.string cimport memchr, memcmp, memcpy

from . import _cookies_py

cdef extern from "Python.h":
    bint PyUnicode_IS_ASCII(object text)
    unsigned char* PyUnicode_1BYTE_DATA(object text)
    Py_ssize_t PyUnicode_GET_LENGTH(object text)
    str PyUnicode_New(Py_ssize_t size, Py_UCS4 maxchar)
    str PyUnicode_DecodeLatin1(const char* text, Py_ssize_t size, const char* errors)
    str PyUnicode_Substring(object text, Py_ssize_t start, Py_ssize_t end)

cdef object _dict_equals = dict.__eq__

cdef enum Kind:  # of a character, as bits
    TOKEN = 1  # may be in a name that find_cookie looks for
    NAME = 2  # may be in any cookie's name, as aiohttp reads it
    VALUE = 4  # may be in a value without quotes
    QUOTED = 8  # printable
    BARE = 16  # needs no quotes when written
    PLAIN = 32  # needs no escape when written in quotes

cdef unsigned char[256] KINDS

cdef unsigned char[256] SIZES  # what a character takes when it is written in quotes


cdef void _classify() noexcept:
    for code in range(256):
        char = chr(code)
        kinds = 0
        if 32 <= code < 127:
            kinds |= QUOTED
            if char not in ' ;"\\':
                kinds |= VALUE
                if char != "=":
                    kinds |= NAME
            if char.isalnum() or char in "!#$%&'*+-.^_`|~":
                kinds |= TOKEN
            if kinds & TOKEN or char == ":":
                kinds |= BARE
            if char not in '",;\\':
                kinds |= PLAIN
        KINDS[code] = kinds
        SIZES[code] = 1 if kinds & PLAIN else 2 if char in '"\\' else 4


_classify()


def find_cookie(header, name):
    """Find the value of one cookie in a Cookie header.

    :param header: the first Cookie header of a request.
    :param name: the cookie's name.
    :return: what ``request.cookies.get(name)`` returns in aiohttp 3.13.3 and later, or False when
        the header (or the name) has a shape that is left to aiohttp's own parser.
    """
    if not (type(header) is str and type(name) is str):
        return _cookies_py.find_cookie(header, name)
    if not (PyUnicode_IS_ASCII(header) and PyUnicode_IS_ASCII(name)):
        return False
    cdef Py_ssize_t wanted_length = PyUnicode_GET_LENGTH(name)
    cdef const unsigned char* wanted = PyUnicode_1BYTE_DATA(name)
    cdef const unsigned char* text = PyUnicode_1BYTE_DATA(header)
    cdef Py_ssize_t end = PyUnicode_GET_LENGTH(header)
    cdef Py_ssize_t i = 0, start, name_end, value_start, value_end
    cdef bint spaced, is_wanted
    found = None

    if not _is_token(wanted, wanted_length):
        return False
    # The ends need no check: the byte after an ASCII str's text is 0, which is of no kind.
    while True:
        while text[i] == c" " or text[i] == c";":
            i += 1
        if i == end:
            break
        start = i
        while KINDS[text[i]] & NAME:
            i += 1
        name_end = i
        is_wanted = i - start == wanted_length and not memcmp(text + start, wanted, wanted_length)
        if text[i] == c'"' or text[i] == c"\\":
            # aiohttp drops such a name, up to the semicolon.
            i = _skip_printable(text, i)
            if i < end and text[i] != c";":
                return False
            continue
        while text[i] == c" ":
            i += 1
        if text[i] != c"=":
            if i == name_end and i < end and text[i] != c";":
                return False
            value_start = value_end = i
        elif name_end == start:
            while KINDS[text[i]] & VALUE:
                i += 1
            if i < end and text[i] != c";":
                return False
            continue
        else:
            i += 1
            spaced = i - 1 != name_end or text[i] == c" "
            while text[i] == c" ":
                i += 1
            value_start = i
            if text[i] == c'"':
                i = _skip_value(text, i + 1, end)
                if text[i] == c'"':  # all of it, as of base64: there is nothing to unquote
                    value_start += 1
                    value_end = i
                    i += 1
                else:
                    i = value_start + 1
                    if is_wanted:
                        found = _read_quoted(text, &i, end)
                        is_wanted = False  # no more
                    else:
                        _skip_quoted(text, &i)
                    if text[i] != c'"':
                        return False
                    i += 1
                if i < end and text[i] != c";" and text[i] != c" ":
                    return False
            else:
                i = _skip_value(text, i, end)
                value_end = i
                if text[i] == c" ":
                    # It could be a date, which may hold spaces.
                    if i - value_start == 3 or i > value_start and text[i - 1] == c",":
                        return False
                elif text[i] == c'"' or text[i] == c"\\":
                    # aiohttp takes all up to the semicolon.
                    if spaced:
                        return False
                    i = _skip_printable(text, i)
                    if i < end and text[i] != c";":
                        return False
                    value_end = i
                    while text[value_end - 1] == c" ":
                        value_end -= 1
                elif i < end and text[i] != c";":
                    return False
        if is_wanted:
            found = PyUnicode_Substring(header, value_start, value_end)
    return found


def find_strict(header, name):
    """Find the value of one cookie in a Cookie header as browsers write it (RFC 6265bis, 5.8.3).

    A pair ends at a semicolon and nowhere else, its name goes up to the first ``=``, and spaces
    and tabs around either are no part of them.

    :return: without the quotes and escapes of `quote`; None if the header has no such cookie,
        False if it has several.
    """
    if not (type(header) is str and type(name) is str):
        return _cookies_py.find_strict(header, name)
    if not (PyUnicode_IS_ASCII(header) and PyUnicode_IS_ASCII(name)):
        return _cookies_py.find_strict(header, name)
    cdef Py_ssize_t wanted_length = PyUnicode_GET_LENGTH(name)
    cdef const unsigned char* wanted = PyUnicode_1BYTE_DATA(name)
    cdef const unsigned char* text = PyUnicode_1BYTE_DATA(header)
    cdef const unsigned char* end = text + PyUnicode_GET_LENGTH(header)
    cdef const unsigned char* stop
    cdef const unsigned char* found = NULL
    cdef const unsigned char* found_end = NULL
    if not _is_token(wanted, wanted_length):
        return _cookies_py.find_strict(header, name)
    # The ends need no check: the byte after an ASCII str's text is 0.
    while True:
        text = _skip_blanks(text)
        stop = <const unsigned char*>memchr(text, c";", end - text)
        if stop is NULL:
            stop = end
        if stop - text > wanted_length and not memcmp(text, wanted, wanted_length):
            text = _skip_blanks(text + wanted_length)
            if text[0] == c"=":
                if found is not NULL:
                    return False
                found, found_end = _skip_blanks(text + 1), stop
        if stop == end:
            break
        text = stop + 1
    if found is NULL:
        return None
    while found_end > found and (found_end[-1] == c" " or found_end[-1] == c"\t"):
        found_end -= 1
    if found_end - found < 2 or found[0] != c'"' or found_end[-1] != c'"':
        return PyUnicode_DecodeLatin1(<const char*>found, found_end - found, NULL)
    return _unquote(found + 1, found_end - found - 2)


def quote(value):
    """Write a cookie value as ``http.cookies`` does.

    Values outside of the token alphabet go into double quotes, with octal escapes.

    :return: None for what is no printable ASCII: versions of ``http.cookies`` differ about it.
    """
    if type(value) is not str or not PyUnicode_IS_ASCII(value):
        return None
    cdef const unsigned char* text = PyUnicode_1BYTE_DATA(value)
    cdef Py_ssize_t length = PyUnicode_GET_LENGTH(value)
    cdef Py_ssize_t i = 0, size
    while KINDS[text[i]] & BARE:  # the byte after the text is 0
        i += 1
    if i == length and length:
        return value
    size = i + 2
    for i in range(i, length):
        size += SIZES[text[i]]
    quoted = PyUnicode_New(size, 127)
    return quoted if _write_quoted(text, length, PyUnicode_1BYTE_DATA(quoted)) else None


def join_token(str prefix not None, text, Py_ssize_t limit):
    """Return a prefix with a text behind it, such as a session id; None if that is no token.

    :param limit: characters that the text may have.
    """
    if type(text) is not str or not PyUnicode_IS_ASCII(text):
        return None
    cdef const unsigned char* start = PyUnicode_1BYTE_DATA(text)
    cdef Py_ssize_t length = PyUnicode_GET_LENGTH(text), i = 0
    while KINDS[start[i]] & BARE:  # the byte after the text is 0
        i += 1
    return prefix + <str>text if 0 < length == i and length <= limit else None


def same_items(one, other):
    """Tell whether a dict has the items of another one, whatever a subclass makes of ``==``.

    It is quick to see for a copy.
    """
    cdef PyObject* key
    cdef PyObject* value
    cdef PyObject* other_key
    cdef PyObject* other_value
    cdef Py_ssize_t position = 0, other_position = 0
    if isinstance(one, dict) and isinstance(other, dict) and len(<dict>one) == len(<dict>other):
        # The same objects in the same order; nothing is called that could change either.
        while PyDict_Next(one, &position, &key, &value):
            PyDict_Next(other, &other_position, &other_key, &other_value)
            if key is not other_key or value is not other_value:
                break
        else:
            return True
    return _dict_equals(one, other) is True


cdef bint _write_quoted(
    const unsigned char* text, Py_ssize_t length, unsigned char* out
) noexcept:
    """Write a value in quotes; return False if a character can't be written."""
    cdef const unsigned char* end = text + length
    out[0] = c'"'
    out += 1
    while True:
        while KINDS[text[0]] & PLAIN:
            out[0] = text[0]
            out += 1
            text += 1
        if text == end:
            break
        if not KINDS[text[0]] & QUOTED:
            return False
        out[0] = c"\\"
        if text[0] == c'"' or text[0] == c"\\":
            out[1] = text[0]
            out += 2
        else:  # a comma or semicolon
            out[1] = c"0"
            out[2] = c"0" + (text[0] >> 3)
            out[3] = c"0" + (text[0] & 7)
            out += 4
        text += 1
    out[0] = c'"'
    return True


cdef bint _is_token(const unsigned char* text, Py_ssize_t length) noexcept:
    cdef Py_ssize_t i
    for i in range(length):
        if not KINDS[text[i]] & TOKEN:
            return False
    return length > 0


cdef const unsigned char* _skip_blanks(const unsigned char* text) noexcept:
    while text[0] == c" " or text[0] == c"\t":
        text += 1
    return text


cdef Py_ssize_t _skip_value(const unsigned char* text, Py_ssize_t i, Py_ssize_t end) noexcept:
    # Eight characters of ASCII at a time: the top bit of each byte of `plain` says whether it is
    # above the space, and not DEL nor one of three others. No byte carries into the next.
    cdef unsigned long long each = 0x0101010101010101, top = 0x80 * each, eight, plain
    while end - i >= 8:
        memcpy(&eight, text + i, 8)
        plain = (eight + 0x5F * each) & ~(eight + each)
        plain &= (eight ^ c";" * each) + 0x7F * each
        plain &= (eight ^ c'"' * each) + 0x7F * each
        plain &= (eight ^ c"\\" * each) + 0x7F * each
        if plain & top != top:
            break
        i += 8
    while KINDS[text[i]] & VALUE:
        i += 1
    return i


cdef Py_ssize_t _skip_printable(const unsigned char* text, Py_ssize_t i) noexcept:
    while KINDS[text[i]] & QUOTED and text[i] != c";":
        i += 1
    return i


cdef void _skip_quoted(const unsigned char* text, Py_ssize_t* at) noexcept:
    """Move to the quote that closes a value, or to what is not printable in it."""
    cdef Py_ssize_t i = at[0]
    while text[i] != c'"':
        if text[i] == c"\\":
            i += 1
        if not KINDS[text[i]] & QUOTED:
            break
        i += 1
    at[0] = i


cdef object _read_quoted(const unsigned char* text, Py_ssize_t* at, Py_ssize_t end):
    """Undo the escapes of a quoted value, and move to the quote that closes it.

    At a character that is not printable the move ends, and the result is worth nothing.

    :return: the value; False if it hides a control character: newer versions of Python refuse it.
    """
    cdef Py_ssize_t i = at[0], size = 0
    cdef unsigned char code
    cdef bint hides = False
    cdef unsigned char* out = <unsigned char*>PyMem_Malloc(end - i + 1)
    if out is NULL:
        raise MemoryError
    try:
        while True:
            code = text[i]
            if not KINDS[code] & PLAIN:
                if code == c"\\":
                    if not KINDS[text[i + 1]] & QUOTED:
                        i += 1
                        break
                    if _is_octal(text + i + 1):
                        code = _from_octal(text + i + 1)
                        hides |= code < 32 or code == 127
                        i += 3
                    else:
                        i += 1
                        code = text[i]
                elif code == c'"' or not KINDS[code] & QUOTED:
                    break
            out[size] = code
            size += 1
            i += 1
        at[0] = i
        return False if hides else PyUnicode_DecodeLatin1(<const char*>out, size, NULL)
    finally:
        PyMem_Free(out)


cdef object _unquote(const unsigned char* text, Py_ssize_t length):
    """Undo the escapes of a quoted value, which a quote follows; there may be others within."""
    cdef Py_ssize_t i = 0, size = 0
    cdef unsigned char code
    cdef unsigned char* out = <unsigned char*>PyMem_Malloc(length + 1)
    if out is NULL:
        raise MemoryError
    try:
        while i < length:
            code = text[i]
            i += 1
            if code == c"\\" and i < length and text[i] != c"\n":
                if _is_octal(text + i):
                    code = _from_octal(text + i)
                    i += 3
                else:
                    code = text[i]
                    i += 1
            out[size] = code
            size += 1
        return PyUnicode_DecodeLatin1(<const char*>out, size, NULL)
    finally:
        PyMem_Free(out)


cdef inline bint _is_octal(const unsigned char* text) noexcept:
    return c"0" <= text[0] <= c"3" and c"0" <= text[1] <= c"7" and c"0" <= text[2] <= c"7"


cdef inline unsigned char _from_octal(const unsigned char* text) noexcept:
    return ((text[0] - c"0") << 6) + ((text[1] - c"0") << 3) + text[2] - c"0"
