# cython: language_level=3, binding=False, autotestdict=False
# cython: embedsignature=True, embedsignature.format=clinic
"""What belongs to an event loop, compiled: an object for each, and futures that share a callback."""

import os
import threading
from asyncio import CancelledError, InvalidStateError, current_task, get_running_loop
from contextvars import Context, copy_context
from weakref import WeakKeyDictionary, ref

cimport cython
from cpython.object cimport PyObject, PyTypeObject
from cpython.ref cimport Py_INCREF

from . import _futures_py

cdef extern from *:
    """
    /* What `await` calls for a value, before it asks the iterator for its next one. */
    static void set_send(PyTypeObject *type, sendfunc send) {
        type->tp_as_async->am_send = send;
    }

    /* An event loop has hooks of its own for asynchronous generators, in the thread in which it
       runs and as long as it does. */
    static int is_known_to_run(PyObject *loop) {
    #if PY_VERSION_HEX < 0x030C0000
        PyObject *hook = PyThreadState_Get()->async_gen_firstiter;
        return hook != NULL && PyMethod_Check(hook) && PyMethod_GET_SELF(hook) == loop;
    #else
        return 0;
    #endif
    }
    """
    ctypedef enum PySendResult:
        PYGEN_RETURN
        PYGEN_ERROR
        PYGEN_NEXT

    ctypedef PySendResult (*sendfunc)(PyObject*, PyObject*, PyObject**) except PYGEN_ERROR
    void set_send(PyTypeObject* type, sendfunc send)
    bint is_known_to_run(object loop) noexcept


# How many forks led to this process.
cdef int forks = 0


def _count_fork():
    global forks
    forks += 1


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_count_fork)


@cython.final
cdef class PerLoop:
    cdef readonly object _make, _objects, _lock
    cdef public tuple _latest
    cdef int _forks  # as they were when the latest loop was seen to run

    __doc__ = _futures_py.PerLoop.__doc__

    def __init__(self, make):
        self._make = make
        self._objects = WeakKeyDictionary()
        self._lock = threading.Lock()
        self._latest = (lambda: None, None)

    def get(self):
        """Return the object of the running loop.

        :raises RuntimeError: if none is running.
        """
        loop_of, value = self._latest
        loop = loop_of()
        # Before Python 3.12, get_running_loop asks the system for the process's id each time.
        if loop is None or self._forks != forks or not is_known_to_run(loop):
            running = get_running_loop()
            if running is not loop:
                value = self._find(running)
            self._forks = forks
        return value

    _find = _futures_py.PerLoop._find


@cython.final
cdef class FutureGroup:
    cdef object _loop  # a weak reference
    cdef object _context  # an empty one, or the loop would copy one each time
    cdef list _calls  # to be made: a callback, its context and its future
    cdef bint _is_held  # by who makes them before long; else the loop does in its next turn

    __doc__ = _futures_py.FutureGroup.__doc__

    def __init__(self, loop):
        self._loop = ref(loop)
        self._context = Context()
        self._calls = []

    def create_future(self):
        """Make a future."""
        cdef _Future future = _Future.__new__(_Future)
        future._group = self
        return future

    def hold(self):
        """Have callbacks wait until `release`."""
        self._is_held = True

    def release(self):
        """Make the calls that are due, now if nothing but the loop is running."""
        self._is_held = False
        if self._calls:
            loop = self._loop()
            if current_task(loop) is None:
                self._call()
            else:
                loop.call_soon(self._call, context=self._context)

    cdef _call_soon(self, callback, context, future):
        if not (self._calls or self._is_held):
            self._loop().call_soon(self._call, context=self._context)
        self._calls.append((callback, context, future))

    def _call(self):
        cdef list calls = self._calls
        self._calls = []
        calls.reverse()
        while calls:
            callback, context, future = calls.pop()
            try:
                context.run(callback, future)
            except (KeyboardInterrupt, SystemExit):
                while calls:
                    callback, context, future = calls.pop()
                    self._call_soon(callback, context, future)
                raise
            except BaseException as error:
                self._loop().call_exception_handler({
                    "message": f"Exception in callback {callback!r}",
                    "exception": error,
                    "future": future,
                })


cdef enum State:
    PENDING
    CANCELLED
    FINISHED


@cython.final
@cython.auto_pickle(False)
@cython.freelist(256)
cdef class _Future:
    """A future of a `FutureGroup`: does what `asyncio.Future` does."""

    cdef public object _asyncio_future_blocking  # by which tasks know that it is one
    cdef FutureGroup _group
    cdef State _state
    cdef object _result, _exception, _message
    cdef object _callback, _context  # the first: most have no other
    cdef list _others
    cdef object __weakref__

    def __cinit__(self):
        self._asyncio_future_blocking = False

    def __repr__(self):
        # Not with its result, as asyncio's: that would be a session.
        return f"<Future {('pending', 'cancelled', 'finished')[self._state]}>"

    def __await__(self):
        return self

    def __iter__(self):
        return self

    def __next__(self):
        if self._state != PENDING:
            raise StopIteration(self._take())
        return self._wait()

    cdef _wait(self):
        if self._asyncio_future_blocking:
            raise RuntimeError("await wasn't used with future")
        self._asyncio_future_blocking = True
        return self

    def get_loop(self):
        """Return the event loop."""
        return self._group._loop()

    def done(self):
        """Tell whether it has a result or an exception, or was cancelled."""
        return self._state != PENDING

    def cancelled(self):
        """Tell whether it was cancelled."""
        return self._state == CANCELLED

    def result(self):
        """Return the result, or raise the exception."""
        return self._take()

    cdef _take(self):
        if self._state != FINISHED:
            raise self._unfinished("Result is not set.")
        if self._exception is not None:
            raise self._exception
        return self._result

    def exception(self):
        """Return the exception, or None."""
        if self._state != FINISHED:
            raise self._unfinished("Exception is not set.")
        return self._exception

    cdef _unfinished(self, str text):
        if self._state == PENDING:
            return InvalidStateError(text)
        return CancelledError() if self._message is None else CancelledError(self._message)

    def set_result(self, result):
        """Give it a result."""
        self._end(FINISHED)
        self._result = result

    def set_exception(self, exception):
        """Give it an exception in place of a result."""
        self._end(FINISHED)
        self._exception = exception

    def cancel(self, msg=None):
        """Cancel it; return False if it was done."""
        if self._state != PENDING:
            return False
        self._end(CANCELLED)
        self._message = msg
        return True

    cdef _end(self, State state):
        if self._state != PENDING:
            raise InvalidStateError("invalid state")
        self._state = state
        if self._callback is None:
            return
        self._group._call_soon(self._callback, self._context, self)
        self._callback = self._context = None
        if self._others is not None:
            for callback, context in self._others:
                self._group._call_soon(callback, context, self)
            self._others = None

    def add_done_callback(self, callback, *, context=None):
        """Have a function called with it when it is done."""
        if context is None:
            context = copy_context()
        if self._state != PENDING:
            self._group._call_soon(callback, context, self)
        elif self._callback is None:
            self._callback, self._context = callback, context
        elif self._others is None:
            self._others = [(callback, context)]
        else:
            self._others.append((callback, context))

    def remove_done_callback(self, callback):
        """Forget a function, and return how often it would have been called."""
        if self._callback is None:
            return 0
        every = [(self._callback, self._context), *(self._others or ())]
        left = [each for each in every if each[0] != callback]
        self._callback, self._context = left[0] if left else (None, None)
        self._others = left[1:] or None
        return len(every) - len(left)


def answer(pending, replies):
    """Give each reply to the future that is next, unless nobody waits for that any more.

    :param pending: entries with their futures in second place; they are taken off.
    :raises IndexError: if there are more replies than entries.
    """
    next_entry = pending.popleft
    for reply in replies:
        _give(next_entry()[1], reply)


def answer_tracked(pending, tokens, replies, records, link):
    """Do as `answer` does, and keep or drop records.

    :param tokens: for each entry: the token by which its reply is kept, a function that takes the
        reply, or None.
    :param replies: a str among them is not one, but the key of a record that was changed.
    :param link: what the replies came by; None if it is not to be relied upon.
    """
    next_entry, next_token = pending.popleft, tokens.popleft
    keep, drop = records.keep, records.drop
    for reply in replies:
        if type(reply) is str:
            drop(reply)
            continue
        future = next_entry()[1]
        token = next_token()
        if type(token) is list:
            keep(token, reply if type(reply) is bytes else None, link)
        elif token is not None:
            token(reply)
        _give(future, reply)


cdef int _give(future, reply) except -1:
    if type(future) is not _Future:
        if not future.done():
            future.set_result(reply)
    elif (<_Future>future)._state == PENDING:
        (<_Future>future)._end(FINISHED)
        (<_Future>future)._result = reply
    return 0


# What `await` does with one. It ends with neither an exception object nor a traceback, which would
# take a quarter of a microsecond.


cdef PySendResult _send(PyObject* self, PyObject* value, PyObject** result) except PYGEN_ERROR:
    cdef bint is_done = (<_Future>self)._state != PENDING
    result[0] = NULL
    given = (<_Future>self)._take() if is_done else (<_Future>self)._wait()
    Py_INCREF(given)
    result[0] = <PyObject*>given
    return PYGEN_RETURN if is_done else PYGEN_NEXT


set_send(<PyTypeObject*>_Future, &_send)
