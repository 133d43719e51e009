"""Records in what memcached replies."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from aiohttp_session._core import read_values

RECORDS = st.lists(
    st.tuples(st.from_regex(rb"[!-~]{1,20}", fullmatch=True), st.binary(max_size=30)), max_size=4
)


def write(records: list[tuple[bytes, bytes]]) -> bytes:
    return b"".join(b"VALUE %b 0 %d\r\n%b\r\n" % (key, len(value), value) for key, value in records)


@settings(settings.get_profile("texts"))
@given(before=st.binary(max_size=5), records=RECORDS, rest=st.sampled_from([b"", b"END\r\n"]))
def test_all_records_are_read(
    before: bytes, records: list[tuple[bytes, bytes]], rest: bytes
) -> None:
    reply = before + write(records)
    assert read_values(reply + rest, len(before)) == (records, len(reply))


@given(RECORDS)
@example([(b"key", b"\r\nEND\r\nVALUE x 0 1\r\n")])
def test_a_record_that_is_cut_off_is_left(records: list[tuple[bytes, bytes]]) -> None:
    ends = [len(write(records[:count])) for count in range(len(records) + 1)]
    reply = write(records)
    for cut in range(len(reply) + 1):
        whole = sum(end <= cut for end in ends) - 1
        assert read_values(reply[:cut], 0) == (records[:whole], ends[whole])


@pytest.mark.parametrize(
    "other",
    [
        *(
            b"END\r\n",
            b"ERROR\r\n",
            b"STORED\r\n",
            b"SERVER_ERROR out of memory\r\n",
            b"VALUE \r\n",
        ),
        *(b"VALUE k 1 1\r\na\r\n", b"VALUE k 00 1\r\na\r\n", b"VALUE k 0 1 7\r\na\r\n"),
        *(b"VALUE k 0 \r\na\r\n", b"VALUE k 0 -1\r\na\r\n", b"VALUE k 0 +1\r\na\r\n"),
        *(b"VALUE k 0 1\na\r\n", b"VALUE k 0 1\r\nab\r\n", b"VALUE k 0 2\r\na\r\n"),
        *(b"VALUE  0 1\r\na\r\n", b"VALUE k\x7f 0 1\r\na\r\n", b"VALUE k\tl 0 1\r\na\r\n"),
        *(
            b"VALUE k 0 0000000001\r\na\r\n",
            b"VALUE k 0 9999999999\r\na\r\n",
            b"value k 0 1\r\na\r\n",
        ),
    ],
)
def test_anything_else_is_left(other: bytes) -> None:
    assert read_values(other, 0) == ([], 0)
    first = write([(b"k", b"v")])
    assert read_values(first + other, 0) == ([(b"k", b"v")], len(first))
