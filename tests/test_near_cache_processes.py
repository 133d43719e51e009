"""Near caches of several processes on one Redis: nobody sees what is gone for longer than allowed.

No clock decides here. What Redis has announced before a process asks it for anything has been heard
with the answer: from then on the old is not allowed. A connection that is held up is not to be
trusted after 2 seconds of a clock that the test puts forward.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Coroutine, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test
from redis.asyncio import RedisCluster

from benchmarks import servers
from benchmarks.servers import HOST, Server
from tests.proxy import Proxy
from tests.waiting import until

if TYPE_CHECKING:
    from typing_extensions import Self

pytestmark = pytest.mark.once

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.once  # all is left to other processes
FAULTS = {"ConnectionError", "ConnectionResetError", "UnsettledError", "TimeoutError"}


class FaultError(Exception):
    """An operation failed as it may when its connection is lost."""


class Process:
    """A process with a near cache, by way of a proxy where there is one."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @classmethod
    async def start(cls, kind: str, port: int) -> Process:
        return cls(
            await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "tests.near_process", kind, str(port)),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                cwd=ROOT,
            )
        )

    async def ask(self, command: str, *arguments: object) -> Any:
        """Have it do something, and return the answer.

        :raises FaultError: if it failed as it may when a connection is lost.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([command, *arguments]).encode() + b"\n")
        answer = json.loads(await self._process.stdout.readline())
        if "error" in answer:
            assert answer["error"] in FAULTS, answer
            raise FaultError
        return answer["result"]

    def pause(self) -> None:
        """Stop it in the middle of whatever it does."""
        os.kill(self._process.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        """Let it continue."""
        os.kill(self._process.pid, signal.SIGCONT)

    async def close(self) -> None:
        assert self._process.stdin is not None
        try:
            with contextlib.suppress(FaultError):
                await self.ask("close")
        finally:  # it leaves nothing to the next test, whatever has become of it
            self._process.stdin.close()
            status = await self._process.wait()
        assert status == 0


class World:
    """Two processes, each by a proxy of its own, and a server that can be restarted."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.port = servers.free_port()
        self._running = contextlib.ExitStack()
        self.processes: list[Process] = []
        self.proxies: list[Proxy] = []

    def run(self, doing: Coroutine[Any, Any, Any]) -> Any:
        return self.loop.run_until_complete(doing)

    def __enter__(self) -> Self:
        self.start_server()
        for _ in range(2):
            proxy = Proxy(self.port)
            self.run(proxy.listen())
            self.proxies.append(proxy)
            self.processes.append(self.run(Process.start("redis", proxy.port)))
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            self.run(process.close())
        for proxy in self.proxies:
            self.run(proxy.refuse())
        self._running.close()
        self.run(self.loop.shutdown_asyncgens())
        self.loop.close()

    def start_server(self) -> None:
        self._server = self._running.enter_context(servers.redis(port=self.port))

    def restart_server(self) -> None:
        self._running.close()
        self.start_server()

    def look(self, command: str, *arguments: object) -> bytes:
        """Ask the server itself."""
        return servers.ask(self._server, command, *arguments)


_world: World
_processes = st.integers(0, 1)
_ways = st.integers(0, 3)
_sessions = st.integers(0, 1)


class NearCaches(RuleBasedStateMachine):
    """Requests and faults in any order, one after another."""

    def __init__(self) -> None:
        super().__init__()
        _world.look("FLUSHALL")
        self.users: list[str] = []
        self.ids: dict[str, str] = {}  # of the sessions, by user
        self.former: list[tuple[str, str]] = []  # users and ids that are over
        self.value = 0
        # Ids and values that a process may be told of yet.
        self.stale: list[set[tuple[str, int | None]]] = [set(), set()]
        for process in (0, 1):
            self.settle(process)

    def ask(self, process: int, command: str, *arguments: object) -> Any:
        return _world.run(_world.processes[process].ask(command, *arguments))

    def truth(self, identity: str) -> int | None:
        """Return the item of a session, by the server itself."""
        record = _world.look("GET", f"AIOHTTP_SESSION_{identity}")
        session = json.loads(record).get("session", {}) if record else {}
        return int(session["n"]) if session else None

    def allow_old(self, identity: str, *but: int) -> None:
        """Take down that the other processes need not know yet what is about to happen."""
        for process in (0, 1):
            if process not in but:
                self.stale[process].add((identity, self.truth(identity)))

    def user(self, number: int) -> str | None:
        return self.users[number % len(self.users)] if self.users else None

    @contextlib.contextmanager
    def watched(self, process: int, identity: str, way: int) -> Iterator[None]:
        """Have the other process keep a session before it is changed, and hear of that."""
        other = 1 - process
        if way & 1:
            self.load_id(other, identity)
            self.load_id(other, identity)
        yield
        if way & 2:
            self.settle(other)
            self.load_id(other, identity)

    def load_id(self, process: int, identity: str) -> None:
        with contextlib.suppress(FaultError):
            self.check(process, identity, self.ask(process, "load", identity))

    def check(self, process: int, identity: str, found: dict[str, Any] | None) -> None:
        owners = {identity: user for user, identity in [*self.ids.items(), *self.former]}
        value = None
        if found is not None:
            assert found["user"] == owners[identity]
            value = found["n"]
        if value != self.truth(identity):
            assert (identity, value) in self.stale[process]

    @rule(process=_processes)
    def log_in(self, process: int) -> None:
        if len(self.users) < 2:
            user = f"user{len(self.users)}"
            with contextlib.suppress(FaultError):
                self.ids[user] = self.ask(process, "log_in", user)
                self.users.append(user)

    @rule(process=_processes, number=_sessions)
    def load(self, process: int, number: int) -> None:
        user = self.user(number)
        if user is not None:
            self.load_id(process, self.ids[user])

    @rule(process=_processes, number=_sessions)
    def load_by_a_former_id(self, process: int, number: int) -> None:
        if self.former:
            _, identity = self.former[number % len(self.former)]
            self.load_id(process, identity)

    @rule(process=_processes, number=_sessions, way=_ways)
    def write(self, process: int, number: int, way: int) -> None:
        user = self.user(number)
        if user is not None:
            with self.watched(process, self.ids[user], way):
                self.write_id(process, self.ids[user])

    def write_id(self, process: int, identity: str) -> None:
        self.value += 1
        before = self.truth(identity)
        self.allow_old(identity, process)
        try:
            self.ask(process, "write", identity, self.value)
        except FaultError:
            assert self.truth(identity) in {before, self.value}
            self.stale[process].add((identity, before))
        else:
            # A session that was ended stays so, whatever the process knew of it.
            assert self.truth(identity) == (None if before is None else self.value)
            self.stale[process] = {old for old in self.stale[process] if old[0] != identity}

    @rule(process=_processes, number=_sessions, way=_ways)
    def move(self, process: int, number: int, way: int) -> None:
        user = self.user(number)
        if user is not None:
            with self.watched(process, self.ids[user], way):
                self.move_user(process, user)

    def move_user(self, process: int, user: str) -> None:
        old, before = self.ids[user], self.truth(self.ids[user])
        self.allow_old(old)
        with contextlib.suppress(FaultError):
            new = self.ask(process, "move", old)
            self.stale[process] = {entry for entry in self.stale[process] if entry[0] != old}
            if before is None:
                assert new is None or self.truth(new) is None
            elif new is not None:
                assert self.truth(old) is None
                assert self.truth(new) is not None
                self.former.append((user, old))
                self.ids[user] = new

    @rule(process=_processes, number=_sessions, way=_ways)
    def log_out(self, process: int, number: int, way: int) -> None:
        user = self.user(number)
        if user is not None:
            with self.watched(process, self.ids[user], way):
                self.log_out_id(process, self.ids[user])

    def log_out_id(self, process: int, identity: str) -> None:
        self.allow_old(identity)
        with contextlib.suppress(FaultError):
            self.ask(process, "log_out", identity)
            assert self.truth(identity) is None
            self.stale[process] = {old for old in self.stale[process] if old[0] != identity}
            self.check(process, identity, self.ask(process, "load", identity))

    @rule(process=_processes)
    def cancelled_requests(self, process: int) -> None:
        identities = list(self.ids.values())
        for identity in identities:
            self.allow_old(identity)
            for turn in range(3):
                self.stale[0].add((identity, -1 - turn))
                self.stale[1].add((identity, -1 - turn))
        with contextlib.suppress(FaultError):
            self.ask(process, "storm", identities)
            self.settle(process)

    @rule(process=_processes)
    def settle(self, process: int) -> None:
        """Hear what was announced: from here on nothing old is allowed."""
        with contextlib.suppress(FaultError):
            self.ask(process, "settle")
            self.stale[process].clear()

    @rule(process=_processes)
    def flush(self, process: int) -> None:
        for identity in self.ids.values():
            self.load_id(process, identity)
            self.allow_old(identity)
        _world.look("FLUSHALL")
        self.settle(process)
        for identity in self.ids.values():
            self.load_id(process, identity)

    @precondition(lambda self: self.ids)
    @rule(process=_processes, number=_sessions, is_killed=st.booleans())
    def lose_connections(self, process: int, number: int, is_killed: bool) -> None:
        """Have a process lose its connections, by the network or the server."""
        user = self.user(number)
        assert user is not None
        identity = self.ids[user]
        self.load_id(process, identity)
        if is_killed:
            _world.look("CLIENT KILL TYPE normal SKIPME yes")
        else:
            _world.run(_world.proxies[process].cut())
        self.write_id(1 - process, identity)
        self.settle(process)
        self.load_id(process, identity)

    @rule(process=_processes, number=_sessions)
    def pause(self, process: int, number: int) -> None:
        """Stop a process while another one ends a session."""
        user = self.user(number)
        if user is not None:
            self.load_id(process, self.ids[user])
            _world.processes[process].pause()
            try:
                self.log_out_id(1 - process, self.ids[user])
            finally:
                _world.processes[process].go_on()
            self.load(process, number)

    @precondition(lambda self: self.ids)
    @rule(process=_processes, number=_sessions)
    def black_hole(self, process: int, number: int) -> None:
        """Hold what the server says to a process, and have its time run out."""
        user = self.user(number)
        assert user is not None
        identity, proxy = self.ids[user], _world.proxies[process]
        self.load_id(process, identity)
        proxy.hold()
        try:
            with contextlib.suppress(FaultError):
                self.allow_old(identity, 1 - process)
                self.ask(1 - process, "log_out", identity)
            gone = self.truth(identity) is None
            self.ask(process, "advance", 2.0)
            self.ask(process, "begin_load", identity)
        finally:
            proxy.resume()
        with contextlib.suppress(FaultError):
            found = self.ask(process, "end_load", identity)
            assert found is None if gone else found is not None

    @rule()
    def restart(self) -> None:
        """Have the server lose everything."""
        for identity in self.ids.values():
            self.allow_old(identity)
        _world.restart_server()
        self.settle(0)
        self.settle(1)


def test_no_process_is_told_of_what_is_gone() -> None:
    global _world
    profile = settings.get_profile("storages")
    with World() as _world:
        run_state_machine_as_test(
            NearCaches,
            settings=settings(
                profile,
                stateful_step_count=30,
                deadline=None,
                suppress_health_check=list(HealthCheck),
            ),
        )


@contextlib.asynccontextmanager
async def processes(kind: str, port: int) -> AsyncIterator[tuple[Process, Process]]:
    started = [await Process.start(kind, port) for _ in range(2)]
    try:
        yield started[0], started[1]
    finally:
        for process in started:
            await process.close()


async def answer_of(process: Process, command: str, *arguments: object) -> Any:
    """Ask until no connection is lost on the way."""
    while True:
        with contextlib.suppress(FaultError):
            return await process.ask(command, *arguments)


KEYS = [f"{{slot}}{i}" for i in range(9)]


async def check_coherence(here: Process, there: Process) -> None:
    """Check that each of two processes learns of what the other one does, and serves hits."""
    for key in KEYS:
        await answer_of(here, "create", key, "1")
    for process in (here, there):
        await answer_of(process, "settle", "{slot}")
        for key in KEYS * 2:
            assert await answer_of(process, "read", key) == "1"
        hits = (await process.ask("info"))["hits"]
        for key in KEYS:
            assert await process.ask("read", key) == "1"
        assert (await process.ask("info"))["hits"] == hits + len(KEYS)
    for number, key in enumerate(KEYS):
        if number % 3 == 0:
            await answer_of(there, "delete", key)
        elif number % 3 == 1:
            await answer_of(there, "create", key, "2")
        else:
            await answer_of(there, "swap", key, "1", "2")
    for process in (here, there):
        await process.ask("settle", "{slot}")
        found = [await process.ask("read", key) for key in KEYS]
        assert found == [None, "2", "2"] * (len(KEYS) // 3)


@pytest.mark.parametrize("start", [servers.redis, servers.valkey])
async def test_changes_by_every_verb_are_heard_of(start: Any) -> None:
    """By a script on Redis, by SET IFEQ on Valkey."""
    with contextlib.ExitStack() as stack:
        try:
            server = stack.enter_context(start())
        except servers.MissingServerError as error:
            pytest.skip(str(error))
        async with processes("redis", server.port) as (here, there):
            for _ in range(2):
                await check_coherence(here, there)
                await check_coherence(there, here)


async def test_a_slot_that_moves_to_another_node() -> None:
    with servers.redis_cluster() as nodes:
        client: Any = RedisCluster(host=HOST, port=nodes[0].port)
        await client.initialize()
        slot = client.keyslot("{slot}")
        source = client.get_node_from_key("{slot}")
        target = next(node for node in client.get_primaries() if node.port != source.port)
        await client.aclose()
        by_port = {node.port: node for node in nodes}
        async with processes("cluster", nodes[0].port) as (here, there):
            await check_coherence(here, there)
            for key in KEYS:
                await here.ask("create", key, "old")
                await there.ask("read", key)
            await asyncio.to_thread(move_slot, slot, by_port[source.port], by_port[target.port])
            # `here` has not heard of it; what it kept is gone all the same, by the move.
            await answer_of(there, "create", KEYS[0], "new")
            await answer_of(there, "delete", KEYS[1])
            await answer_of(here, "settle", "{slot}")
            assert await here.ask("read", KEYS[0]) == "new"
            assert await here.ask("read", KEYS[1]) is None
            assert await here.ask("read", KEYS[2]) == "old"
            await check_coherence(here, there)


def move_slot(slot: int, source: Server, target: Server) -> None:
    """Move a slot with all its keys."""
    ids = [servers.ask(node, "CLUSTER MYID").decode().strip() for node in (source, target)]
    servers.ask(target, "CLUSTER SETSLOT", slot, "IMPORTING", ids[0])
    servers.ask(source, "CLUSTER SETSLOT", slot, "MIGRATING", ids[1])
    servers.ask(source, "MIGRATE", HOST, target.port, '""', 0, 5000, "KEYS", *KEYS)
    for node in (target, source):
        servers.ask(node, "CLUSTER SETSLOT", slot, "NODE", ids[1])


async def test_a_failover_by_sentinel() -> None:
    with servers.redis_sentinel("sessions") as (primary, replica, sentinel):
        async with processes("sentinel", sentinel.port) as (here, there):
            await check_coherence(here, there)
            for key in KEYS:
                await here.ask("create", key, "old")
                await there.ask("read", key)
            await until(lambda: servers.ask(primary, "WAIT", 1, 1000) == b":1\r\n")
            servers.ask(sentinel, "SENTINEL FAILOVER", "sessions")
            await until(lambda: has_role(replica, b"master"))
            await until(lambda: has_role(primary, b"slave"))
            await answer_of(there, "create", KEYS[0], "new")
            await answer_of(here, "settle", "{slot}")
            assert await here.ask("read", KEYS[0]) == "new"
            await check_coherence(here, there)


def has_role(server: Server, role: bytes) -> bool:
    """Tell whether a server has a role by now."""
    with contextlib.suppress(ConnectionError):  # Sentinel has all connections closed
        return b"role:" + role in servers.ask(server, "INFO replication")
    return False
