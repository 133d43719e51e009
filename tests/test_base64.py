"""Base64 as it stands in cookies."""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from aiohttp_session._core import decode_base64, decode_standard, encode_base64, encode_standard


@settings(settings.get_profile("texts"))
@given(st.binary(max_size=100))
def test_bytes_are_written_as_base64_writes_them(data: bytes) -> None:
    text = encode_base64(data)
    assert text == base64.urlsafe_b64encode(data).rstrip(b"=").decode()
    if data:
        assert decode_base64(text) == data


@settings(settings.get_profile("texts"))
@given(st.text("AQgwBz09-_+/= \n\x00é€", max_size=12) | st.text(max_size=6))
@example("")
@example("A")
@example("AB")  # bits left over
@example("AAB")
@example("AA==")
def test_only_the_canonical_form_is_read(text: str) -> None:
    if is_canonical(text):
        assert encode_base64(decode_base64(text)) == text
    else:
        with pytest.raises(ValueError, match=r"^The text is not canonical urlsafe base64$"):
            decode_base64(text)


def is_canonical(text: str) -> bool:
    try:
        data = base64.b64decode(text + "=" * (-len(text) % 4), b"-_", validate=True)
    except ValueError:
        return False
    return data != b"" and base64.urlsafe_b64encode(data).rstrip(b"=").decode() == text


@settings(settings.get_profile("texts"))
@given(st.binary(max_size=100))
def test_standard_base64_is_written_as_base64_writes_it(data: bytes) -> None:
    text = encode_standard(data)
    assert text == base64.b64encode(data).decode()
    assert decode_standard(text) == data


@settings(settings.get_profile("texts"))
@given(st.text("AQgwBz09-_+/= \n\x00é€", max_size=12) | st.text(max_size=6))
@example("A")
@example("AA")
@example("AB==")  # bits left over
@example("AAB=")
@example("A===")
@example("====")
@example("=")
@example("AA==AA==")
@example("AAAA====")
@example("AA=A")
def test_only_the_canonical_form_of_standard_base64_is_read(text: str) -> None:
    try:
        is_canonical = base64.b64encode(base64.b64decode(text, validate=True)).decode() == text
    except ValueError:
        is_canonical = False
    if is_canonical:
        assert encode_standard(decode_standard(text)) == text
    else:
        with pytest.raises(ValueError, match=r"^The text is not canonical base64$"):
            decode_standard(text)


@pytest.mark.parametrize("encode", [encode_base64, encode_standard])
@pytest.mark.parametrize("data", ["text", None, 1])
def test_only_bytes_are_written(encode: Callable[[Any], str], data: object) -> None:
    with pytest.raises(TypeError):
        encode(data)
