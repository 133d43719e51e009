"""Options as the OWASP Session Management Cheat Sheet would have them."""

from __future__ import annotations

from typing import Literal, overload

from ._options import Unpack
from .lifecycle import LifecycleOptions
from .server_storage import ServerOptions

_MINUTE = 60  # seconds
_HOUR = 60 * _MINUTE


@overload
def recommended(
    *, server: Literal[True] = True, **changes: Unpack[ServerOptions]
) -> ServerOptions: ...


@overload
def recommended(
    *, server: Literal[False], **changes: Unpack[LifecycleOptions]
) -> LifecycleOptions: ...


def recommended(*, server: bool = True, **changes: Unpack[ServerOptions]) -> ServerOptions:
    """Return the options that OWASP recommends for logins, for a site on HTTPS.

    As in ``RedisStorage(client, **recommended())``, and
    ``EncryptedCookieStorage(key, **recommended(server=False))``. The cookie's name gives nothing
    away and binds it to this host; it is sent over HTTPS only, hidden from scripts, and left out
    of what other sites embed or post. A session expires after 30 minutes without use (``max_age``;
    a request that only reads counts once a minute, ``touch_after``), and in any case 8 hours after
    its creation (``lifetime``).

    Over plain HTTP, browsers drop such a cookie, though some make an exception for localhost: for
    development use ``recommended(cookie_name="id", secure=False)``.

    :param server: for a server storage, which then also keeps records under hashes of their ids.
    :param changes: options to add, or to use instead of these.

    Source: OWASP Session Management Cheat Sheet, "Session ID Name Fingerprinting", "Cookies" and
    "Session Expiration".
    """
    options = ServerOptions(
        cookie_name="__Host-id",
        secure=True,
        httponly=True,
        samesite="Lax",
        max_age=30 * _MINUTE,
        touch_after=_MINUTE,
        lifetime=8 * _HOUR,
    )
    if server:
        options["hash_ids"] = True
    options.update(changes)
    return options
