"""PerLoop: the object of the event loop that is running, and of no other."""

from __future__ import annotations

import asyncio
import gc
import os
import sys
from collections.abc import AsyncGenerator
from typing import Any
from weakref import ref

import pytest

from aiohttp_session.stores.per_loop import PerLoop
from tests.programs import run


def test_each_loop_has_its_own_object() -> None:
    objects: PerLoop[list[int]] = PerLoop(list)

    async def get() -> list[int]:
        found = objects.get()
        assert objects.get() is found
        return found

    first, second = asyncio.new_event_loop(), asyncio.new_event_loop()
    one = first.run_until_complete(get())
    two = second.run_until_complete(get())
    assert one is not two
    assert first.run_until_complete(get()) is one
    first.close()
    second.close()


def test_the_object_of_a_loop_goes_with_it(young_heap: None) -> None:
    class Thing:
        pass

    things: PerLoop[Thing] = PerLoop(Thing)
    seen = []

    async def get() -> None:
        seen.append(ref(things.get()))

    for _ in range(2):
        loop = asyncio.new_event_loop()
        loop.run_until_complete(get())
        loop.close()
    del loop
    gc.collect()
    assert seen[0]() is None


async def test_an_object_is_found_whoever_hooks_asynchronous_generators() -> None:
    class Somebody:
        def hook(self, generator: AsyncGenerator[Any, Any]) -> None:
            """Do as an event loop does."""

    objects: PerLoop[list[int]] = PerLoop(list)
    found = objects.get()
    hooks = sys.get_asyncgen_hooks()
    try:
        for somebody in (print, Somebody().hook):  # a function, and a method of no event loop
            hook: Any = somebody
            sys.set_asyncgen_hooks(hook)
            assert objects.get() is found
    finally:
        sys.set_asyncgen_hooks(*hooks)
    assert objects.get() is found


def test_without_a_running_loop_there_is_no_object() -> None:
    objects: PerLoop[list[int]] = PerLoop(list)

    async def get() -> list[int]:
        return objects.get()

    asyncio.run(get())
    with pytest.raises(RuntimeError, match="no running event loop"):
        objects.get()


AFTER_A_FORK = """
import asyncio, os
from aiohttp_session.stores.per_loop import PerLoop

async def get():
    return objects.get()

async def main():
    found = objects.get()
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        assert objects.get() is found
        return
    try:
        objects.get()
    except RuntimeError as error:
        print(error, flush=True)
    else:
        print("its parent's", flush=True)
    print(asyncio.run(get()) is found, flush=True)
    os._exit(0)

objects = PerLoop(object)
asyncio.run(main())
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_child_process_does_not_find_the_object_of_its_parent(implementation: str) -> None:
    printed = run(AFTER_A_FORK, implementation=implementation)
    assert printed == "no running event loop\nFalse\n"
