"""The Session: a mapping that knows whether it must be saved."""

from __future__ import annotations

import copy
import json
import pickle
from collections import OrderedDict, UserDict
from collections.abc import Callable, MutableMapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiohttp_session import Session, _core
from tests.conftest import Clock
from tests.contract import json_containers, json_values, mutations
from tests.programs import run

NOW = 1_700_000_000


def make(items: dict[str, Any] | None = None, **options: Any) -> Session:
    """Make a session as it is loaded from a store."""
    data = {"created": NOW, "session": items or {}}
    return Session(**{"identity": "id", "data": data, "new": False, **options})


class OnlyGet:
    """Data that have only the method `get`, with a default that must be given."""

    def get(self, key: str, default: Any) -> Any:
        return {"created": NOW, "session": {"a": 1}}.get(key, default)


# Making one


@pytest.mark.parametrize(
    ("data", "new", "expected"),
    [
        # items, new, identity, created
        (None, True, ({}, True, "id", NOW)),
        (None, False, ({}, False, "id", NOW)),
        ({}, False, ({}, True, None, NOW)),
        ({}, True, ({}, True, None, NOW)),
        ({"session": {"a": 1}}, False, ({"a": 1}, False, "id", NOW)),
        ({"created": None, "session": {"a": 1}}, False, ({"a": 1}, False, "id", NOW)),
        ({"created": 5, "session": {"a": 1}}, False, ({"a": 1}, False, "id", 5)),
        ({"created": 5, "session": {"a": 1}}, True, ({"a": 1}, True, "id", NOW)),
        ({"created": 0, "session": {"a": 1}}, False, ({"a": 1}, False, "id", 0)),
        ({"created": 5.5, "session": {}, "more": 1}, False, ({}, False, "id", 5.5)),
        ({"created": 5}, False, ({}, False, "id", 5)),
        ({"created": 5, "session": None}, False, ({}, False, "id", 5)),
        (OnlyGet(), False, ({"a": 1}, False, "id", NOW)),
    ],
)
def test_what_it_makes_of_its_data(
    data: Any, new: bool, expected: tuple[object, ...], clock: Clock
) -> None:
    clock.now += 0.9
    session = Session("id", data=data, new=new)
    assert (dict(session), session.new, session.identity, session.created) == expected
    assert not session._changed


@pytest.mark.parametrize(
    ("created", "max_age", "expired"),
    [
        (NOW - 10, 10, False),
        (NOW - 11, 10, True),
        (NOW - 10.5, 10, True),
        (NOW - 11, None, False),
        (NOW, 0, False),
        (NOW - 1, 0, True),
        (NOW + 50, 10, False),  # the clock was set back
        (0, 10, True),
        (None, 10, True),  # of unknown age
        (None, 2 * NOW, False),
        (None, None, False),
    ],
)
def test_expiry(created: float | None, max_age: int | None, expired: bool, clock: Clock) -> None:
    clock.now += 0.9
    data = {"created": created, "session": {"a": 1}}
    session = Session("id", data=data, new=False, max_age=max_age)
    assert session.empty is expired
    assert (session.identity, session.new, session.max_age) == ("id", False, max_age)
    assert session.created == (NOW if created is None else created)
    assert not session._changed


@pytest.mark.parametrize("identity", [None, "id", 7, ("a", "tuple"), b"bytes"])
def test_an_identity_may_be_of_any_type(identity: Any) -> None:
    assert Session(identity=identity, data=None, new=True).identity == identity


def test_its_arguments_but_the_identity_are_keywords() -> None:
    with pytest.raises(TypeError):
        Session("id", None, True)  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        Session("id", new=True)  # type: ignore[call-arg]


def test_its_items_are_a_copy_of_the_data() -> None:
    items = {"a": 1}
    session = make(items)
    session["b"] = 2
    assert items == {"a": 1}


# A mapping


def test_it_is_a_mutable_mapping() -> None:
    session = make({"a": 1})
    assert isinstance(session, MutableMapping)
    assert issubclass(Session, MutableMapping)
    assert (len(session), list(session), "a" in session, "b" in session) == (1, ["a"], True, False)
    assert ["x"] not in [*session]
    assert (session["a"], session.get("a"), session.get("b"), session.get("b", 2)) == (
        1,
        1,
        None,
        2,
    )
    assert (list(session.keys()), list(session.values()), list(session.items())) == (
        ["a"],
        [1],
        [("a", 1)],
    )
    assert {**session} == {"a": 1}


def test_it_equals_a_mapping_with_the_same_items() -> None:
    assert make({"a": 1}) == {"a": 1}
    assert {"a": 1}.__eq__(make({"a": 1})) is NotImplemented
    assert make({"a": 1}) == make({"a": 1}, identity="other")
    assert make({"a": 1}) != {"a": 2}
    assert make() == {}


def test_it_is_not_hashable() -> None:
    with pytest.raises(TypeError):
        hash(make())


def test_it_is_true_when_it_holds_something() -> None:
    assert make({"a": 1})
    assert not make()


@pytest.mark.parametrize("act", [lambda s: s["b"], lambda s: s.__delitem__("b")])
def test_a_missing_key_is_a_key_error_and_no_change(act: Callable[[Session], object]) -> None:
    session = make({"a": 1})
    with pytest.raises(KeyError) as caught:
        act(session)
    assert caught.value.args == ("b",)
    assert not session._needs_save()


def test_its_repr(clock: Clock) -> None:
    class MySession(Session):
        pass

    session = Session(None, data=None, new=True)
    assert repr(session) == f"<Session [new:True, changed:False, created:{NOW}] {{}}>"
    session["a"] = 1
    assert repr(session) == f"<Session [new:True, changed:True, created:{NOW}] {{'a': 1}}>"
    assert repr(MySession("id", data={"created": 5}, new=False)) == (
        "<MySession [new:False, changed:False, created:5] {}>"
    )


# Changes


@pytest.mark.parametrize(
    ("change", "moves_created"),
    [
        (lambda s: s.__setitem__("b", 2), True),
        (lambda s: s.__setitem__("a", 1), True),  # to the same value
        (lambda s: s.__delitem__("a"), True),
        (lambda s: s.update(b=2), True),
        (lambda s: s.setdefault("b", 2), True),
        (lambda s: s.pop("a"), True),
        (lambda s: s.popitem(), True),
        (lambda s: s.clear(), True),
        (lambda s: s.changed(), False),
        (lambda s: s.invalidate(), False),
    ],
)
def test_a_change_shows_and_may_move_created(
    change: Callable[[Session], object], moves_created: bool, clock: Clock
) -> None:
    session = make({"a": 1})
    clock.now += 7.9
    change(session)
    assert session._changed
    assert session.created == (NOW + 7 if moves_created else NOW)


@pytest.mark.parametrize(
    "act",
    [
        lambda s: s.get("b"),
        lambda s: s.setdefault("a", 2),
        lambda s: s.pop("b", None),
        lambda s: s.update(),
        lambda s: [*s.items(), repr(s), s == {}, s.empty, bool(s), "x" in s],
        lambda s: setattr(s, "max_age", 5),
        lambda s: copy.deepcopy(dict(s)),
    ],
)
def test_reading_changes_nothing(act: Callable[[Session], object]) -> None:
    session = make({"a": 1, "nested": [{}]})
    act(session)
    assert not session._changed
    assert not session._needs_save()


def test_invalidate_empties_it_and_leaves_the_old_items_alone() -> None:
    session = make({"a": 1})
    items = session._mapping
    session.invalidate()
    assert session.empty
    assert session == {}
    assert items == {"a": 1}


def test_an_identity_can_be_set_while_it_is_new() -> None:
    session = Session(None, data=None, new=True)
    session.set_new_identity(7)
    assert session.identity == 7
    with pytest.raises(RuntimeError, match="not new"):
        make().set_new_identity(7)


def test_max_age_can_be_set() -> None:
    session = make()
    assert session.max_age is None
    session.max_age = 5
    assert (session.max_age, session._max_age) == (5, 5)


@pytest.mark.parametrize("name", ["new", "identity", "created", "empty"])
def test_the_other_properties_are_read_only(name: str) -> None:
    with pytest.raises(AttributeError):
        setattr(make(), name, 1)


def test_nested_changes_do_not_show_before_the_save() -> None:
    session = make({"a": {"b": 0}})
    session["a"]["b"] = 1
    assert not session._changed
    assert session.created == NOW
    assert session._needs_save()


@given(data=st.data())
def test_any_nested_change_is_noticed(data: st.DataObject) -> None:
    items = data.draw(st.dictionaries(st.text(), json_containers, min_size=1, max_size=3))
    mutate = data.draw(mutations(items))
    session = make(items)
    assert not session._needs_save()
    mutate(session)
    assert session._needs_save()
    session._was_saved()
    assert not session._needs_save()


def test_who_else_holds_a_value_is_no_change() -> None:
    twice = "twice there!"[:-1]
    text = "a text of its own!"[:-1]
    session = make({"a": [[1], {"k": text, "l": [twice, twice]}], "b": [300.5 + 1]})
    del text
    held = [session["a"][0], session["a"][1], session["a"][1]["k"], session["b"][0]]
    assert not session._needs_save()
    session["a"][1]["l"][1] = "twice there!"[:-1]
    del held
    assert not session._needs_save()


@given(before=json_values, after=json_values)
def test_a_nested_value_of_another_type_or_content_is_noticed(before: Any, after: Any) -> None:
    session = make({"a": [before]})
    session["a"][0] = after
    assert session._needs_save() is (repr(before) != repr(after))


@pytest.mark.parametrize(
    ("before", "after"), [(1, True), (1, 1.0), (0.0, -0.0), (None, False), ("1", 1), ([], {})]
)
def test_values_that_are_equal_but_not_the_same_json_differ(before: Any, after: Any) -> None:
    session = make({"a": [before]})
    session["a"][0] = after
    assert session._needs_save()


class Odd:
    """A value that only a custom encoder can write."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __repr__(self) -> str:
        return f"Odd({self.number})"


@pytest.mark.parametrize(
    ("value", "change"),
    [
        (Odd(1), lambda value: setattr(value, "number", 2)),
        ([Odd(1)], lambda value: setattr(value[0], "number", 2)),
        ({1, 2}, lambda value: value.add(3)),
        (bytearray(b"a"), lambda value: value.append(1)),
        ([{"\ud800": Odd(1)}], lambda value: value[0].clear()),
        ({Odd(1): []}, lambda value: next(iter(value.values())).append(1)),
        ({(1, b"a"): [1]}, lambda value: value[1, b"a"].append(1)),
    ],
)
def test_changes_of_values_that_json_does_not_know(
    value: Any, change: Callable[[Any], object]
) -> None:
    value = copy.deepcopy(value)  # each implementation gets one of its own
    session = make({"a": value})
    assert not session._needs_save()
    change(value)
    assert session._needs_save()


def test_a_circle_is_a_change_like_another() -> None:
    session = make({"a": [1]})
    session["a"].append(session["a"])
    assert session._needs_save()


def test_what_occurs_twice_is_looked_into() -> None:
    shared = [1]
    session = make({"a": shared, "b": {"c": shared}})
    assert not session._needs_save()
    session["a"].append(2)
    assert session._needs_save()


@pytest.mark.parametrize("depth", [1, 199, 200, 201, 254, 255, 500])
def test_a_session_of_any_depth_that_was_only_read_is_not_saved(depth: int) -> None:
    text = f'{{"created":1,"session":{{"a":{"[" * depth}{"]" * depth}}}}}'
    session = _core.restore(text, "id", None)
    assert session is not None
    deepest = session["a"]
    for _ in range(depth - 1):
        deepest = deepest[0]
    assert not session._needs_save()
    deepest.append(1)
    assert session._needs_save()


def test_a_change_that_is_too_deep_to_look_into() -> None:
    session = make({"a": []})
    deepest = session["a"]
    for _ in range(100_000):
        deepest.append([])
        deepest = deepest[0]
    assert session._needs_save()
    while session["a"]:  # or its end would be too deep as well
        session["a"][:] = session["a"].pop()


def test_a_save_starts_over() -> None:
    session = make({"a": [1]})
    session["a"].append(2)
    session["b"] = 1
    session._was_saved()
    assert not session._changed
    assert not session._needs_save()
    session["a"].append(3)
    assert session._needs_save()


# Open to others


def test_protected_attributes_are_writable_from_outside() -> None:
    session = make({"a": 1})
    session._mapping = {"b": 2}
    session._identity = 5
    session._new = True
    session._changed = True
    session._max_age = 3
    session._created = 9
    assert session == {"b": 2}
    assert (session.identity, session.new, session.max_age, session.created) == (5, True, 3, 9)
    assert session._needs_save()
    session._changed = False
    assert not session._changed


def test_other_attributes_can_be_set() -> None:
    session: Any = make()
    session.user = "me"
    assert session.user == "me"
    assert session.__dict__["user"] == "me"
    assert getattr(session, "session", "default") == "default"


def test_subclasses_may_use_and_override_what_they_like() -> None:
    class Upper(Session):
        kind = "upper"

        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self.log: list[str] = []

        def __setitem__(self, key: str, value: Any) -> None:
            self.log.append(key)
            super().__setitem__(key.upper(), value)

        def __getitem__(self, key: str) -> Any:
            return self._mapping[key.upper()]

    session = Upper("id", data={"created": NOW, "session": {"A": 1}}, new=False)
    session.update(b=2)
    assert session._mapping == {"A": 1, "B": 2}
    assert (session["a"], session.get("b"), session.pop("missing", 3)) == (1, 2, 3)
    assert session.log == ["b"]
    assert session._changed


def test_a_session_survives_copy_and_pickle() -> None:
    session = make({"a": [1]})
    session["b"] = 2
    for other in (copy.copy(session), copy.deepcopy(session), pickle.loads(pickle.dumps(session))):
        assert other == session
        assert (other.identity, other.new, other._changed, other.created) == (
            session.identity,
            session.new,
            session._changed,
            session.created,
        )


# Reentrant: what a key, or the end of a value, does to the session in the middle of an operation

TRAP = """
import json, sys
from aiohttp_session import Session, _core

class Trap:
    def __hash__(self):
        return 1
    def __eq__(self, other):
        spring()
        return self is other
    def __repr__(self):
        spring()
        return "Trap"
    def __del__(self):
        spring()

def spring():
    global armed
    if armed:
        armed = False
        act(session)
        for _ in range(20):  # use what was freed
            dict.fromkeys(range(50))

results = {}
for name, act in {
    "invalidate": lambda session: session.invalidate(),
    "replace": lambda session: setattr(session, "_mapping", {"new": 1}),
}.items():
    for operation in json.loads(sys.argv[1]):
        armed = False
        kept, key = Trap(), Trap()
        items = {kept: Trap(), "a": Trap()}
        session = Session("id", data={"created": 1, "session": items}, new=False)
        other = {key: 1, "a": 2}
        del items
        armed = True
        try:
            result = repr(eval(operation))
        except BaseException as error:
            result = type(error).__name__
        armed = False
        results[f"{operation}, {name}"] = result, list(map(str, session)), session._changed
print(json.dumps(results))
"""
OPERATIONS = {
    # what they give
    "session[key]": "KeyError",
    "session.__setitem__(key, 1)": "None",
    "session.__setitem__('a', 1)": "None",
    "session.__delitem__(key)": "KeyError",
    "session.__delitem__('a')": "None",
    "key in session": "False",
    "session == other": "False",
    "session == Session(1, data={'session': other}, new=False)": "False",
    "session.get(key, 5)": "5",
    "session.pop(key)": "KeyError",
    "session.pop(key, 5)": "5",
    "session.pop(kept)": "Trap",
    "session.setdefault(key, 3)": "3",
    "session.update({'a': 1, 'b': 2})": "None",
    "session.update({key: 1, 'b': 2})": "None",
    "session.update(a=1, b=2)": "None",
    "session.clear()": "None",
    "'a' in repr(session)": "True",
}


def spring_traps(implementation: str) -> dict[str, list[Any]]:
    # What is freed is overwritten.
    operations = json.dumps(list(OPERATIONS))
    printed = run(TRAP, operations, implementation=implementation, PYTHONMALLOC="debug")
    results: dict[str, list[Any]] = json.loads(printed)
    return results


def test_a_key_or_a_value_may_change_the_session_under_an_operation(implementation: str) -> None:
    results = spring_traps(implementation)
    assert results == spring_traps("python")
    for operation, expected in OPERATIONS.items():
        for act in ("invalidate", "replace"):
            assert results[f"{operation}, {act}"][0] == expected, operation


# Circles: a walk to a limit of depth takes 2 ** limit steps in these

CIRCLES = """
import json, pickle, sys
from aiohttp_session import Session, _core
from aiohttp_session._core import dumps, encode

def binary():
    circle = []
    circle += [circle, circle]
    return circle

def behind_a_key():
    circle = {}
    circle.update(a=1, b=[circle, {"c": circle}])
    return circle

def in_a_tuple():
    circle = []
    circle += [("a", circle), ("b", circle)]
    return circle

def with_what_json_has_not():
    circle = [{1, 2}, {(1, 2): 3}, b"", frozenset((4,))]
    circle += [circle, circle]
    return circle

def refused(write, session):
    try:
        write({"created": 1, "session": dict(session)})
    except (TypeError, ValueError) as error:
        return type(error).__name__ + ": " + str(error)

results = []
for make in binary, behind_a_key, in_a_tuple, with_what_json_has_not:
    set_ = Session("id", data={"session": {}}, new=False)
    set_["x"] = make()
    grown = Session("id", data={"session": {"x": [1]}}, new=False)
    grown["x"].append(make())
    loaded = Session("id", data={"session": {"x": make()}}, new=False)  # by another decoder
    needs = [session._needs_save() for session in (set_, grown, loaded)]
    results.append([needs, [refused(write, set_) for write in (encode, dumps)]])
    for session in set_, grown, loaded:
        session._was_saved()  # by another encoder
        needs.append(session._needs_save())
        session["x"].append(1) if type(session["x"]) is list else session["x"].update(new=1)
        needs.append(session._needs_save())
        assert pickle.loads(pickle.dumps(session))._needs_save()
print(json.dumps(results))
"""


def test_a_circle_ends_no_walk_too_late(implementation: str) -> None:
    results = json.loads(run(CIRCLES, implementation=implementation))
    assert [messages for _, messages in results] == [
        ["ValueError: session['x'][0]: circular reference"] * 2,
        ["ValueError: session['x']['b'][0]: circular reference"] * 2,
        ["ValueError: session['x'][0][1]: circular reference"] * 2,
        ["TypeError: session['x'][0]: set is not JSON serializable"] * 2,
    ]
    for needs_save, _ in results:
        assert needs_save == [True, True, False, *[False, True] * 3]


@pytest.mark.parametrize("contents", [{}, {"a": object()}, OrderedDict(a=1), UserDict(a=1), None])
def test_only_a_usual_session_has_a_usual_payload(contents: Any) -> None:
    session = Session("id", data={"created": 7, "session": {"a": 1}}, new=False)
    assert _core.payload_of(session, None) == b'{"created":7,"session":{"a":1}}'
    assert _core.payload_of(session, 60) is None
    session._mapping = contents
    assert _core.payload_of(session, None) is None


@pytest.mark.parametrize("created", [-1, 1.5, None, True, 2**53])
def test_a_usual_payload_has_a_time(created: Any) -> None:
    session = Session("id", data={"created": 7, "session": {"a": 1}}, new=False)
    session._created = created
    assert _core.payload_of(session, None) is None
