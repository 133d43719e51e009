# cython: language_level=3, binding=False, autotestdict=False
# cython: embedsignature=True, embedsignature.format=clinic
"""Records that a process keeps for as long as it is told of their changes, compiled."""

from collections import OrderedDict
from time import monotonic

cimport cython
from cpython.dict cimport PyDict_GetItemWithError
from cpython.object cimport PyObject

from . import _records_py

cdef Py_ssize_t MAX_SIZE = _records_py.MAX_SIZE


@cython.final
cdef class KeptRecords:
    cdef readonly object by_key  # in the order of their use: an OrderedDict
    cdef public Py_ssize_t bytes
    cdef readonly Py_ssize_t hits, misses
    cdef readonly dict _tokens, _changing
    cdef Py_ssize_t _max_records, _max_bytes
    cdef object _move_to_end  # by_key's own
    cdef object __weakref__

    __doc__ = _records_py.KeptRecords.__doc__

    def __init__(self, max_records, max_bytes):
        self.by_key = OrderedDict()
        self._move_to_end = self.by_key.move_to_end
        self._max_records = max_records
        self._max_bytes = max_bytes
        self._tokens = {}
        self._changing = {}

    def get(self, key):
        """Return a record that is kept, if it is to be relied upon."""
        cdef PyObject* kept = PyDict_GetItemWithError(self.by_key, key)
        if kept is NULL:
            self.misses += 1
            return None
        payload, link = <tuple>kept
        if monotonic() >= link.until:
            self.misses += 1
            return None
        self._move_to_end(key)
        self.hits += 1
        return payload

    def ask(self, key):
        """Return a token for an answer that is about to be asked for; None if it can't be kept."""
        return None if key in self._changing else self._tokens.setdefault(key, [key])

    def ask_behind(self, key):
        """Return a token for a question right behind a change, by the same way; None as `ask`.

        Nothing that was asked for before is kept.
        """
        self._drop(key)
        if key in self._changing:
            return None
        token = self._tokens[key] = [key]
        return token

    def keep(self, token, payload, link):
        """Keep an answer if its token is still good, and it isn't too large.

        :param payload: None for what is not to be kept.
        :param link: what it came by; None if that is not to be relied upon.
        """
        [key] = token
        cdef PyObject* good = PyDict_GetItemWithError(self._tokens, key)
        if good is not <PyObject*>token:
            return
        del self._tokens[key]
        self._drop(key)
        if payload is None or link is None or len(payload) > MAX_SIZE:
            return
        self.by_key[key] = (payload, link)
        self.bytes += len(key) + len(payload)
        while self.bytes > self._max_bytes or len(self.by_key) > self._max_records:
            self._drop(next(iter(self.by_key)))

    def forget(self, key):
        """Drop a record that was changed, and keep no answer that is due."""
        self._tokens.pop(key, None)
        self._drop(key)

    def drop(self, key):
        """Drop a record that was changed before any answer that is due was given."""
        self._drop(key)

    # What is seldom done.
    forget_link = _records_py.KeptRecords.forget_link
    begin_change = _records_py.KeptRecords.begin_change
    end_change = _records_py.KeptRecords.end_change

    cdef _drop(self, key):
        cdef PyObject* kept = PyDict_GetItemWithError(self.by_key, key)
        if kept is not NULL:  # mostly it isn't there any more
            payload, _ = <tuple>kept
            del self.by_key[key]
            self.bytes -= len(key) + len(payload)
