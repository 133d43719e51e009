# cython: language_level=3, binding=False, autotestdict=False
# cython: embedsignature=True, embedsignature.format=clinic
"""The session, compiled: an extension type. What subclasses may override is `_session_py`'s way.

A key's ``__eq__`` or a value's ``__del__`` may call any method of the session in the middle of
another one, and so free its contents: whoever hands them to CPython holds them in a local first.

It relies on the GIL, and does not declare itself ``freethreading_compatible``: a free-threaded
interpreter switches the GIL on when it is imported. Two threads that share a session would
otherwise meet in its C attributes, and in dicts that are walked without a lock.
"""

import copyreg
import time
from collections.abc import ItemsView, KeysView, Mapping, MutableMapping, ValuesView
from inspect import signature
from types import GenericAlias

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.dict cimport PyDict_Copy, PyDict_GetItemWithError, PyDict_Next
from cpython.list cimport PyList_GET_ITEM, PyList_GET_SIZE
from cpython.mem cimport PyMem_Free, PyMem_Realloc
from cpython.object cimport Py_EQ, Py_TYPE, PyObject, PyObject_RichCompareBool, PyTypeObject
from cpython.ref cimport Py_INCREF, Py_XDECREF
from cpython.tuple cimport PyTuple_GET_ITEM, PyTuple_GET_SIZE
from libc.string cimport memcmp, memcpy

from . import _session_py
from ._owner import is_owner
from ._payload_c import decode, encode

cdef extern from *:
    """
    /* The public name of the class, and the flag that ``case {...}`` asks for. */
    static void present(PyTypeObject *type) {
        type->tp_name = "aiohttp_session.Session";
        type->tp_flags |= Py_TPFLAGS_MAPPING;
        type->tp_flags &= ~Py_TPFLAGS_SEQUENCE;
        PyType_Modified(type);
    }
    """
    void present(PyTypeObject* type)

cdef extern from "Python.h":
    long long PyLong_AsLongLongAndOverflow(object value, int* overflow)

# How deep a session is looked into here; deeper ones are `_session_py`'s, and the C stack small.
cdef enum:
    MAX_DEPTH = 200
# Beyond it, no float can hold a time in seconds.
cdef long long MAX_TIME = 2**53

# A usual payload.
cdef const char* HEAD = b'{"created":'
cdef const char* NAME = b',"session":{'
cdef enum:
    HEAD_SIZE = 11
    DIGITS = 15  # no number of so many is beyond MAX_TIME
    NAME_SIZE = 11  # without the brace, which is the contents'
    LEAST_SIZE = HEAD_SIZE + 1 + NAME_SIZE + 3

cdef object _MISSING = MutableMapping._MutableMapping__marker
cdef object _UNTAKEN = object()  # in place of a fingerprint, while no container was handed out


@cython.auto_pickle(False)
@cython.freelist(64)
cdef class Session:
    cdef public object _changed, _created, _identity, _max_age, _new
    cdef public object _ended, _fingerprint, _issued, _listed, _owner, _record, _renew
    cdef public object _replaces, _touch
    cdef object _contents
    cdef dict __dict__
    cdef object __weakref__

    __doc__ = _session_py.Session.__doc__
    __signature__ = signature(_session_py.Session)
    __reversed__ = None
    _MutableMapping__marker = _MISSING  # MutableMapping.pop asks for it

    def __cinit__(self):
        self._renew = self._touch = False

    def __init__(self, identity, *, data, new, max_age=None):
        created = stored = None
        if type(data) is dict:
            emptied = not data
            created = _get(<dict>data, "created", None)
        else:
            if data:
                created = data.get("created", None)
            emptied = data == {}
        # Without a known age, a session is as old as Unix time.
        expired = max_age is not None and _now() - (created or 0) > max_age
        if data and not expired:
            stored = data.get("session", None)
        if type(stored) is dict:
            self._contents = PyDict_Copy(stored)
        else:
            contents = self._contents = {}
            contents.update(stored or ())
        self._changed = False
        self._identity = None if emptied else identity
        self._new = new or emptied
        self._max_age = max_age
        self._created = _now() if self._new or created is None else created
        self._fingerprint = _take_fingerprint(self._contents)

    def __repr__(self):
        contents = self._contents
        return (
            f"<{type(self).__name__} [new:{(<object>self).new}, "
            f"changed:{(<object>self)._changed}, "
            f"created:{(<object>self).created}] {contents!r}>"
        )

    @classmethod
    def __class_getitem__(cls, item):
        return GenericAlias(cls, item)

    @property
    def _mapping(self):
        """What the session holds, for whoever may change it."""
        if not self._changed:
            self._take_fingerprint()
        return self._contents

    @_mapping.setter
    def _mapping(self, value):
        self._take_fingerprint()
        self._contents = value

    @property
    def new(self):
        """Whether the session did not come with the request."""
        return self._new

    @property
    def identity(self):
        """The id under which a server storage keeps the session; None until it is first saved."""
        return self._identity

    @property
    def created(self):
        """Unix time in seconds of the creation or of the last change, whichever is later."""
        return self._created

    @property
    def empty(self):
        """Whether the session has neither items nor an owner."""
        contents = self._contents
        return not contents and self._owner is None

    @property
    def owner(self):
        """The application's name for the user whose session this is: 1 to 1,000 characters.

        Set it at login, and a server storage can list and end all sessions of this user; see
        `ServerStorage.sessions_of`. It is kept with the session, until it is set to None, or the
        session is cleared or invalidated.

        :raises TypeError: if it is set to anything but a str or None.
        :raises ValueError: if it is empty, or too long.
        """
        return self._owner

    @owner.setter
    def owner(self, value):
        _session_py.Session.owner.fset(self, value)

    @property
    def max_age(self):
        """Seconds after the last save at which the session expires; None means never."""
        return self._max_age

    @max_age.setter
    def max_age(self, value):
        self._max_age = value

    def changed(self):
        """Mark the session as changed, so that it is saved."""
        self._changed = True

    def invalidate(self):
        """Empty the session; its record and cookie are deleted when the response is sent.

        What is written afterwards is saved under a new id.
        """
        self._changed = True
        self._renew = True
        # What is written from here on is another session.
        self._ended = self._record
        self._issued = self._owner = self._record = None
        self._contents = {}

    def regenerate_id(self):
        """Keep the data, and give the session a new id. The former id stops working.

        Call this method at each login and whenever privileges change, so that an id that was
        planted or seen earlier is worthless (OWASP session management: renew the session id).
        """
        self._changed = True
        self._renew = True

    def set_new_identity(self, identity):
        """Choose the id of a new session.

        :raises RuntimeError: if the session is not new.
        """
        if not self._new:
            raise RuntimeError("Can't change identity for a session which is not new")
        self._identity = identity

    def __len__(self):
        contents = self._contents
        return len(contents)

    def __iter__(self):
        contents = self._contents
        return iter(contents)

    def __contains__(self, key):
        contents = self._contents
        return key in contents

    def __getitem__(self, key):
        contents = self._contents
        return self._hand_out(contents[key])

    def __setitem__(self, key, value):
        contents = self._contents
        contents[key] = value
        self._note_change()

    def __delitem__(self, key):
        contents = self._contents
        del contents[key]
        self._note_change()

    def __eq__(self, other):
        contents = self._contents
        if type(self) is Session and type(contents) is dict:
            others = (<Session>other)._contents if type(other) is Session else other
            if type(others) is dict:
                return contents == others
        return Mapping.__eq__(self, other)

    def get(self, key, default=None):
        """Return the value of a key, or the default if there is none."""
        contents = self._contents
        if self._is_simple():
            return self._hand_out(_get(<dict>contents, key, default))
        return MutableMapping.get(self, key, default)

    @cython.binding(True)  # or inspect could not show the default
    def pop(self, key, default=_MISSING):
        """Delete a key and return its value, or the default if there is none.

        :raises KeyError: if there is neither.
        """
        contents = self._contents
        if not self._is_simple():
            return MutableMapping.pop(self, key, default)
        value = _get(<dict>contents, key, _MISSING)
        if value is not _MISSING:
            self._take_fingerprint()
            del self[key]
            return value
        if default is _MISSING:
            raise KeyError(key)
        return default

    def popitem(self):
        """Delete the oldest key; return it with its value.

        :raises KeyError: if the session is empty.
        """
        return MutableMapping.popitem(self)

    def clear(self):
        """Empty the session and remove its owner; its record is deleted."""
        contents = self._contents
        if not self._is_simple():
            MutableMapping.clear(self)
        elif contents:
            (<dict>contents).clear()
            self._note_change()
            self.clear()  # of what the end of a value has set
        (<object>self).owner = None

    def update(self, other=(), /, **kwds):
        """Set the keys of a mapping, or of an iterable of pairs, and those given by name."""
        if not kwds and type(other) is dict and self._is_simple():
            for key, value in (<dict>other).items():
                contents = self._contents  # at each, as `_session_py` has it
                contents[key] = value
                self._changed = True
            if other:
                self._note_change()
        else:
            MutableMapping.update(self, other, **kwds)

    def setdefault(self, key, default=None):
        """Return the value of a key; set it to the default if there is none."""
        contents = self._contents
        if not self._is_simple():
            return MutableMapping.setdefault(self, key, default)
        value = _get(<dict>contents, key, _MISSING)
        if value is not _MISSING:
            return self._hand_out(value)
        self[key] = default
        return default

    def keys(self):
        """Return a live view of the keys."""
        return KeysView(self)

    def items(self):
        """Return a live view of the pairs of key and value."""
        return ItemsView(self)

    def values(self):
        """Return a live view of the values."""
        return ValuesView(self)

    def _needs_save(self):
        """Tell whether the session must be saved, and note nested changes that nobody announced."""
        return self._must_be_saved()

    cdef bint _must_be_saved(self) except -1:
        if self._changed or self._replaces is not None:
            if self._touch:
                self._created = _now()
            return True
        if (
            self._fingerprint is not None
            and self._fingerprint is not _UNTAKEN
            and _differs(self._fingerprint, self._contents)
        ):
            self._changed = True
        elif not self._touch:
            return False
        self._created = _now()
        return True

    def _was_saved(self):
        """Start over with looking for changes, after a save."""
        self._changed = self._renew = self._touch = False
        self._replaces = None
        self._fingerprint = _take_fingerprint(self._contents)

    def __reduce__(self):
        return copyreg.__newobj__, (type(self),), (<object>self).__getstate__()

    def __getstate__(self):
        self._take_fingerprint()
        contents = self._contents
        state = {
            "_changed": self._changed,
            "_mapping": contents,
            "_identity": self._identity,
            "_new": self._new,
            "_max_age": self._max_age,
            "_created": self._created,
            "_ended": self._ended,
            "_issued": self._issued,
            "_listed": self._listed,
            "_owner": self._owner,
            "_record": self._record,
            "_renew": self._renew,
            "_replaces": self._replaces,
            "_touch": self._touch,
            "_fingerprint": self._fingerprint,
            **(<object>self).__dict__,
        }
        if type(self._fingerprint) is _Contents:
            # As the other implementation has it, or something that it never makes.
            changed = _differs(self._fingerprint, contents)
            state["_fingerprint"] = b"" if changed else _session_py.fingerprint(contents)
        return state

    def __setstate__(self, state):
        for name, value in state.items():
            setattr(self, name, value)

    cdef object _hand_out(self, value):
        """Return a value to somebody who may change it if it is a container."""
        if self._fingerprint is _UNTAKEN and not _is_scalar(value):
            self._take_fingerprint()
        return value

    cdef int _take_fingerprint(self) except -1:
        if self._fingerprint is _UNTAKEN:
            self._fingerprint = _take_fingerprint(self._contents)
        return 0

    cdef bint _is_simple(self) noexcept:
        """Tell whether nothing is overridden, and the contents are a dict's."""
        return type(self) is Session and type(self._contents) is dict

    cdef int _note_change(self) except -1:
        self._changed = True
        self._created = _now()
        return 0


present(<PyTypeObject*>Session)
MutableMapping.register(Session)


def restore(payload, identity, max_age):
    """Make a session of a payload in the usual form: created, session and perhaps max_age.

    :param max_age: the session's, if the payload has none of its own.
    :return: None for any other payload, also for a damaged one and an expired session.
    """
    cdef Session session
    cdef long long number
    owner = listed = None
    stored = _decode_contents(payload, &number)
    if stored is not None:
        created = number
    else:
        try:
            data = decode(payload)
        except (ValueError, RecursionError):
            return None
        if type(data) is not dict:
            return None
        created = _get(<dict>data, "created", None)
        stored = _get(<dict>data, "session", None)
        if len(<dict>data) != 2:
            max_age = _get(<dict>data, "max_age", max_age)
            owner = _get(<dict>data, "owner", None)
            listed = _get(<dict>data, "listed", None)
            if len(<dict>data) != 2 + ("max_age" in data) + ("owner" in data) + ("listed" in data):
                return None
            if owner is not None and not is_owner(owner):
                return None
            if listed is not None and not _is_time(listed):
                return None
    if not (_is_time(created) and type(stored) is dict and (max_age is None or _is_time(max_age))):
        return None
    if max_age is not None and _now() - created > max_age:
        return None
    session = Session.__new__(Session)
    session._changed = session._new = False
    session._created = created
    session._identity = identity
    session._max_age = max_age
    session._contents = stored  # not a copy: nobody else has it
    session._fingerprint = _UNTAKEN
    if owner is not None:
        session._owner = owner
        session._listed = (owner, listed)
    return session


def payload_of(session, max_age):
    """Write a session's payload in the usual form: created and session, as `restore` reads it.

    :param max_age: the storage's.
    :return: None for a session that is empty, or has more to say than that, or can't be written.
    """
    if type(session) is not Session:
        return None
    if (<Session>session)._owner is not None or (<Session>session)._max_age != max_age:
        return None
    cdef long long number
    contents, created = (<Session>session)._contents, (<Session>session)._created
    if not (type(contents) is dict and contents and _is_time(created)):
        return None
    number = created
    if number < 0:
        return None
    try:
        return _write_payload(number, encode(contents))
    except (TypeError, ValueError):
        return None


def unsaved(session):
    """Return what a request has as its session, if that must be saved; else None.

    It may also be None, or somebody's own object, as `get_session` allows.
    """
    if type(session) is Session:
        return session if (<Session>session)._must_be_saved() else None
    if isinstance(session, Session):
        return session if session._needs_save() else None
    return session if getattr(session, "_changed", False) else None


def fingerprint(mapping):
    """Describe the containers among a session's values, so that a change inside shows.

    Other values can only change by being set, which the session sees.

    :return: None if there are no containers, else bytes that are equal for equal contents of
        equal types.
    """
    return _session_py.fingerprint(mapping)


cdef object _decode_contents(payload, long long* created):
    """Read what most payloads are: '{"created":N,"session":{...}}', in just these bytes.

    The contents are decoded alone, which spares the object around them.

    :return: None if it is anything else, or damaged.
    """
    if type(payload) is not bytes:
        return None
    cdef const char* text = PyBytes_AS_STRING(payload)
    cdef Py_ssize_t length = PyBytes_GET_SIZE(payload), i = HEAD_SIZE
    if length < LEAST_SIZE or memcmp(text, HEAD, HEAD_SIZE) != 0:
        return None
    created[0] = 0
    while c"0" <= text[i] <= c"9" and i < HEAD_SIZE + DIGITS:
        created[0] = 10 * created[0] + (text[i] - c"0")
        i += 1
    if i == HEAD_SIZE or text[HEAD_SIZE] == c"0":  # no number, or perhaps none of JSON's
        return None
    if length - i < NAME_SIZE + 3 or memcmp(text + i, NAME, NAME_SIZE + 1) != 0:
        return None
    # With another member behind the contents, which may end so too, these are no JSON alone.
    if text[length - 2] != c"}" or text[length - 1] != c"}":
        return None
    i += NAME_SIZE
    try:
        return decode(PyBytes_FromStringAndSize(text + i, length - i - 1))
    except (ValueError, RecursionError):
        return None


cdef bytes _write_payload(long long created, bytes contents):
    """Write what `_decode_contents` reads."""
    cdef char[64] head  # filled from its end
    cdef char* start = head + sizeof(head) - NAME_SIZE
    cdef Py_ssize_t size = PyBytes_GET_SIZE(contents)
    memcpy(start, NAME, NAME_SIZE)
    while True:
        start -= 1
        start[0] = c"0" + created % 10
        created //= 10
        if created == 0:
            break
    start -= HEAD_SIZE
    memcpy(start, HEAD, HEAD_SIZE)
    cdef Py_ssize_t length = head + sizeof(head) - start
    payload = PyBytes_FromStringAndSize(NULL, length + size + 1)
    cdef char* out = PyBytes_AS_STRING(payload)
    memcpy(out, start, length)
    memcpy(out + length, PyBytes_AS_STRING(contents), size)
    out[length + size] = c"}"
    return payload


cdef object _now():
    return int(time.time())


cdef bint _is_time(value) except -1:
    cdef int overflow
    cdef long long number
    if type(value) is not int:
        return False
    number = PyLong_AsLongLongAndOverflow(value, &overflow)
    return overflow == 0 and -MAX_TIME < number < MAX_TIME


cdef object _get(dict mapping, key, default):
    cdef PyObject* value = PyDict_GetItemWithError(mapping, key)
    return default if value is NULL else <object>value


cdef object _take_fingerprint(mapping):
    """Take down the containers among a session's values: `_differs` tells whether they changed.

    :return: None if there are none, `_Contents` if they are JSON's, else the other
        implementation's fingerprint.
    """
    cdef PyObject* key
    cdef PyObject* value
    cdef Py_ssize_t position = 0
    cdef _Contents contents
    if type(mapping) is dict:
        while PyDict_Next(mapping, &position, &key, &value):
            if not _is_scalar(<object>value):
                break
        else:
            return None
        contents = _Contents.__new__(_Contents)
        if contents.note_values(mapping):
            return contents
    return _session_py.fingerprint(mapping)


cdef bint _differs(old, mapping) except -1:
    if type(old) is _Contents:
        return type(mapping) is not dict or not (<_Contents>old).has_values(mapping)
    return old != _session_py.fingerprint(mapping)


@cython.final
@cython.internal
@cython.auto_pickle(False)
@cython.no_gc
cdef class _Contents:
    """The containers among a session's values at one time, as a flat row of what they hold.

    A container is its type, its items, and a NULL; leaves are the objects themselves. A dict's
    keys and values alternate. Only JSON's types (and tuple and bytes) can be taken down; all
    that is kept is immutable.
    """

    cdef PyObject** row
    cdef Py_ssize_t length, room

    def __dealloc__(self):
        for i in range(self.length):
            Py_XDECREF(self.row[i])
        PyMem_Free(self.row)

    cdef bint note_values(self, dict mapping) except -1:
        """Take down the containers among the values; return False if that can't be done."""
        cdef PyObject* key
        cdef PyObject* value
        cdef Py_ssize_t position = 0
        while PyDict_Next(mapping, &position, &key, &value):
            if not _is_scalar(<object>value) and not self.note(<object>value, 0):
                return False
        return True

    cdef bint note(self, value, int depth) except -1:
        cdef PyObject* key
        cdef PyObject* item
        cdef Py_ssize_t position = 0
        if _is_leaf(value):
            return self.append(<PyObject*>value)
        if depth == MAX_DEPTH:
            return False
        if type(value) is dict:
            self.append(<PyObject*>dict)
            while PyDict_Next(value, &position, &key, &item):
                if not (self.note(<object>key, depth + 1) and self.note(<object>item, depth + 1)):
                    return False
        elif type(value) is list:
            self.append(<PyObject*>list)
            for position in range(PyList_GET_SIZE(value)):
                if not self.note(<object>PyList_GET_ITEM(value, position), depth + 1):
                    return False
        elif type(value) is tuple:
            self.append(<PyObject*>tuple)
            for position in range(PyTuple_GET_SIZE(value)):
                if not self.note(<object>PyTuple_GET_ITEM(value, position), depth + 1):
                    return False
        else:
            return False
        return self.append(NULL)

    cdef bint append(self, PyObject* entry) except -1:
        if self.length == self.room:
            room = self.room * 2 or 32
            row = <PyObject**>PyMem_Realloc(self.row, room * sizeof(PyObject*))
            if row is NULL:
                raise MemoryError
            self.row, self.room = row, room
        if entry is not NULL:
            Py_INCREF(<object>entry)
        self.row[self.length] = entry
        self.length += 1
        return True

    cdef bint has_values(self, dict mapping) except -1:
        """Tell whether these are the containers among the values."""
        cdef PyObject* key
        cdef PyObject* value
        cdef Py_ssize_t position = 0, at = 0
        while PyDict_Next(mapping, &position, &key, &value):
            if not _is_scalar(<object>value) and not self.has(<object>value, &at):
                return False
        return at == self.length

    cdef bint has(self, value, Py_ssize_t* at) except -1:
        """Tell whether a value is what was taken down from an index on, and move that past it."""
        cdef PyObject* key
        cdef PyObject* item
        cdef PyObject* entry
        cdef Py_ssize_t position = 0
        if at[0] >= self.length:
            return False
        entry = self.row[at[0]]
        at[0] += 1
        if _is_leaf(value):
            return entry is not NULL and _is_same_leaf(value, <object>entry)
        if entry is not <PyObject*>Py_TYPE(value):
            return False
        if type(value) is dict:
            while PyDict_Next(value, &position, &key, &item):
                if not (self.has(<object>key, at) and self.has(<object>item, at)):
                    return False
        elif type(value) is list:
            for position in range(PyList_GET_SIZE(value)):
                if not self.has(<object>PyList_GET_ITEM(value, position), at):
                    return False
        else:
            for position in range(PyTuple_GET_SIZE(value)):
                if not self.has(<object>PyTuple_GET_ITEM(value, position), at):
                    return False
        entry = self.row[at[0]]
        at[0] += 1
        return entry is NULL


cdef inline bint _is_scalar(value) noexcept:
    """Tell whether a value can only change by being set."""
    return (
        type(value) is str
        or type(value) is int
        or value is None
        or type(value) is bool
        or type(value) is float
    )


cdef inline bint _is_leaf(value) noexcept:
    return _is_scalar(value) or type(value) is bytes


cdef bint _is_same_leaf(leaf, other) except -1:
    cdef double a, b
    if leaf is other:
        return True
    if type(leaf) is not type(other):
        return False
    if type(leaf) is float:  # by bits: -0.0 is not 0.0, and NaN is NaN
        a, b = leaf, other
        return memcmp(&a, &b, sizeof(double)) == 0
    return PyObject_RichCompareBool(leaf, other, Py_EQ)
