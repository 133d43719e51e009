"""What the standards and browsers ask of a cookie (RFC 6265bis)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_PREFIXES = ("__host-", "__http-", "__secure-")  # in any case; "__Host-Http-" begins as the first
_ends_name = re.compile(r"[\s;=\x00-\x1f\x7f]").search
_ends_attribute = re.compile(r"[^ -~]|;").search


def has_prefix(name: str) -> bool:
    """Tell whether browsers take a cookie of this name only from the host itself, or over HTTPS."""
    return name.lower().startswith(_PREFIXES)


def check_texts(name: str, domain: str | None, path: str | None) -> None:
    """Check what a cookie is written with, for what would end it (RFC 6265bis, 4.1.1).

    Other names that are no token ``http.cookies`` refuses when a cookie is written.

    :raises ValueError: for such a character, and for other than ASCII in the domain and path.
    """
    if not name or _ends_name(name):
        raise ValueError(
            "cookie_name must be a name without blanks, control characters, ';' and '=', "
            f"not {name!r}"
        )
    for option, text in (("domain", domain), ("path", path)):
        if text is not None and _ends_attribute(str(text)):
            raise ValueError(f"{option} must be printable ASCII without a semicolon, not {text!r}")


def objection(name: str, params: Mapping[str, Any]) -> str | None:
    """Say what browsers have against a cookie; None if they take it as it is.

    :param params: arguments of ``response.set_cookie``.
    """
    secure, samesite = params.get("secure"), params.get("samesite")
    if (needs := _unmet_needs(name, params)) is not None:
        return f"Browsers drop the cookie: cookie_name {name!r} needs {needs}"
    if params.get("partitioned") and not secure:
        return "Browsers drop a cookie with partitioned=True that has not secure=True"
    if not samesite:
        return None
    if str(samesite).lower() not in {"strict", "lax", "none"}:
        return (
            f"Browsers ignore samesite={samesite!r} and do as they do without: "
            "they know 'Strict', 'Lax' and 'None'"
        )
    if str(samesite).lower() == "none" and not secure:
        return "Browsers drop a cookie with samesite='None' that has not secure=True"
    return None


def _unmet_needs(name: str, params: Mapping[str, Any]) -> str | None:
    """Return what a name's prefix asks of the other options, unless they have it (4.1.3)."""
    lower, secure, http_only = name.lower(), params.get("secure"), params.get("httponly")
    one_host = params.get("path", "/") == "/" and not params.get("domain")
    rules = (
        (
            "__host-http-",
            "secure=True, httponly=True, path='/' and no domain",
            secure and http_only and one_host,
        ),
        ("__host-", "secure=True, path='/' and no domain", secure and one_host),
        ("__http-", "secure=True and httponly=True", secure and http_only),
        ("__secure-", "secure=True", secure),
    )
    for prefix, needs, met in rules:
        if lower.startswith(prefix):
            return None if met else needs
    return None
