"""A small shop: everything that a session is for, on one page.

python examples/shop.py
python examples/shop.py --storage redis://127.0.0.1:6379
"""

from __future__ import annotations

import argparse
import base64
import secrets
import time
from collections.abc import Awaitable, Callable
from html import escape
from typing import Any, NamedTuple

from aiohttp import web
from yarl import URL

from aiohttp_session import (
    AbstractStorage,
    Handler,
    Session,
    SimpleCookieStorage,
    get_session,
    setup,
)

MAX_AGE = 7 * 24 * 60 * 60  # seconds
MAX_OF_ONE = 99
NAME_LENGTH = 40
AGENT_LENGTH = 200
STORAGE: web.AppKey[Any] = web.AppKey("storage")


class Product(NamedTuple):
    """Something to buy."""

    name: str
    description: str
    cents: int


PRODUCTS = {
    "tea": Product("Green tea", "Sencha, first harvest, 100 g", 890),
    "pot": Product("Teapot", "Cast iron, holds 0.8 litres", 4900),
    "cup": Product("Cup", "Stoneware, glazed by hand", 1450),
}

routes = web.RouteTableDef()


@routes.get("/")
async def show(request: web.Request) -> web.Response:
    """Show the shop, to visitors and customers alike."""
    session = await get_session(request)
    session["visits"] = session.get("visits", 0) + 1
    token = session.setdefault("csrf", secrets.token_urlsafe())
    parts = [
        _header(session, token),
        *(f'<p class="flash">{escape(text)}</p>' for text in session.pop("flash", [])),
        _products(token),
        _cart(session, token),
        await _devices(request.app[STORAGE], session, token),
        f"<footer>Visits in this session: <b>{session['visits']}</b></footer>",
    ]
    return web.Response(text=_page("".join(parts)), content_type="text/html")


@routes.post("/login")
async def log_in(request: web.Request) -> web.Response:
    """Take any name: this shop trusts people."""
    session = await get_session(request)
    name = str((await request.post()).get("name", "")).strip()[:NAME_LENGTH]
    if name:
        # An id that was planted or seen before the login must be worth nothing after it.
        # The reference package can't renew it.
        getattr(session, "regenerate_id", lambda: None)()
        session["csrf"] = secrets.token_urlsafe()
        session["user"] = name
        if _lists_devices(request.app[STORAGE]):
            session.owner = name
            agent = request.headers.get("User-Agent", "")[:AGENT_LENGTH]
            session["device"] = {"id": secrets.token_hex(8), "agent": agent}
        _flash(session, f"Welcome, {name}!")
    else:
        _flash(session, "Please tell us your name.")
    raise web.HTTPSeeOther("/")


@routes.post("/logout")
async def log_out(request: web.Request) -> web.Response:
    """Forget the customer: the session, its record and its cookie are deleted."""
    session = await get_session(request)
    session.invalidate()
    raise web.HTTPSeeOther("/")


@routes.post("/cart/{action:add|remove}/{product}")
async def change_cart(request: web.Request) -> web.Response:
    """Put one piece into the cart, or take all of its kind out."""
    session = await get_session(request)
    key = request.match_info["product"]
    if key not in PRODUCTS:
        raise web.HTTPNotFound
    cart = session.setdefault("cart", {})
    if request.match_info["action"] == "add":
        line = cart.setdefault(key, {"quantity": 0})
        line["quantity"] = min(line["quantity"] + 1, MAX_OF_ONE)
        _flash(session, f"{PRODUCTS[key].name} is in your cart.")
    else:
        cart.pop(key, None)
    # Only the reference package needs to be told of a change inside a value.
    session.changed()
    raise web.HTTPSeeOther("/")


@routes.post("/devices/end")
async def log_out_device(request: web.Request) -> web.Response:
    """End another session of the customer's, by the handle in the form."""
    session, storage = await get_session(request), request.app[STORAGE]
    if not _has_devices(storage, session):
        raise web.HTTPNotFound
    handle = str((await request.post()).get("handle", ""))
    ended = await storage.end_session(session.owner, handle)
    _flash(session, "That device is logged out." if ended else "That device was logged out before.")
    raise web.HTTPSeeOther("/")


@routes.post("/devices/end-others")
async def log_out_others(request: web.Request) -> web.Response:
    """End all sessions of the customer's but this one."""
    session, storage = await get_session(request), request.app[STORAGE]
    if not _has_devices(storage, session):
        raise web.HTTPNotFound
    ended = await storage.end_sessions(session.owner, keep=session)
    _flash(session, f"Devices that were logged out: {ended}.")
    raise web.HTTPSeeOther("/")


def _lists_devices(storage: Any) -> bool:
    """Tell whether a storage can list sessions: neither a cookie nor the reference package can."""
    return hasattr(storage, "sessions_of")


def _has_devices(storage: Any, session: Session) -> bool:
    return _lists_devices(storage) and session.owner is not None


@web.middleware
async def check_forms(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Refuse forms that this shop did not send to this session (CSRF)."""
    if request.method == "POST":
        expected = (await get_session(request)).get("csrf", "")
        given = str((await request.post()).get("csrf", ""))
        if not expected or not secrets.compare_digest(given.encode(), expected.encode()):
            raise web.HTTPForbidden(text="This form is out of date. Go back and load it again.")
    return await handler(request)


async def _set_headers(request: web.Request, response: web.StreamResponse) -> None:
    response.headers["Cache-Control"] = "no-store"
    response.headers["Content-Security-Policy"] = (
        "default-src 'none'; style-src 'unsafe-inline'; form-action 'self'; frame-ancestors 'none'"
    )


def _flash(session: Session, text: str) -> None:
    """Keep a message for the next page."""
    session["flash"] = [*session.get("flash", []), text]


def _page(body: str) -> str:
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Tea shop</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head><body>{body}</body></html>"
    )


def _header(session: Session, token: str) -> str:
    user = session.get("user")
    if user is None:
        form = _form(
            "/login",
            token,
            f'<input name="name" placeholder="Your name" aria-label="Your name" required '
            f'maxlength="{NAME_LENGTH}"><button>Log in</button>',
        )
    else:
        form = _form("/logout", token, f"<b>{escape(user)}</b><button>Log out</button>")
    return f"<header><h1>Tea shop</h1>{form}</header>"


def _products(token: str) -> str:
    cards = (
        f"<article><h2>{escape(product.name)}</h2><p>{escape(product.description)}</p>"
        f"<p class=price>{_money(product.cents)}</p>"
        + _form(f"/cart/add/{key}", token, "<button>Add to cart</button>")
        + "</article>"
        for key, product in PRODUCTS.items()
    )
    return f"<section>{''.join(cards)}</section>"


def _cart(session: Session, token: str) -> str:
    lines = [(key, line["quantity"]) for key, line in session.get("cart", {}).items()]
    if not lines:
        return "<h2>Cart</h2><p>Your cart is empty.</p>"
    rows = (
        f"<tr><td>{escape(PRODUCTS[key].name)}<td>{quantity}"
        f"<td>{_money(quantity * PRODUCTS[key].cents)}"
        f"<td>{_form(f'/cart/remove/{key}', token, '<button class=quiet>Remove</button>')}"
        for key, quantity in lines
    )
    total = sum(quantity * PRODUCTS[key].cents for key, quantity in lines)
    return (
        f"<h2>Cart</h2><table>{''.join(rows)}"
        f"<tr class=total><td>Total<td><td>{_money(total)}<td></table>"
    )


async def _devices(storage: Any, session: Session, token: str) -> str:
    if not _has_devices(storage, session):
        return ""
    sessions = await storage.sessions_of(session.owner)
    rows = (
        f"<tr><td>{escape(info.data['device']['agent']) or 'An unknown browser'}"
        f"<td>since {time.strftime('%Y-%m-%d %H:%M', time.gmtime(info.created))} UTC"
        f"<td>{_end_device(info, session, token)}"
        for info in sessions
    )
    everywhere = ""
    if len(sessions) > 1:
        everywhere = _form("/devices/end-others", token, "<button>Log out all others</button>")
    return f"<h2>Your devices</h2><table class=devices>{''.join(rows)}</table>{everywhere}"


def _end_device(info: Any, session: Session, token: str) -> str:
    if info.data["device"]["id"] == session["device"]["id"]:
        return "this device"
    handle = f'<input type="hidden" name="handle" value="{escape(info.handle)}">'
    return _form("/devices/end", token, f"{handle}<button class=quiet>Log out</button>")


def _form(action: str, token: str, body: str) -> str:
    return (
        f'<form method="post" action="{action}">'
        f'<input type="hidden" name="csrf" value="{escape(token)}">{body}</form>'
    )


def _money(cents: int) -> str:
    return f"€ {cents / 100:.2f}"


STYLE = """
*{box-sizing:border-box}
body{font:16px/1.5 system-ui,"DejaVu Sans",sans-serif;color:#24312b;background:#f6f4ee;
max-width:46rem;margin:0 auto;padding:1.5rem}
header,header form{display:flex;gap:.6rem;align-items:center}
header{justify-content:space-between;border-bottom:1px solid #d8d3c4;padding-bottom:1rem}
h1,h2{margin:0;line-height:1.2}h1{font-size:1.6rem;color:#2f6b4f}h2{font-size:1.1rem}
section{display:grid;grid-template-columns:repeat(auto-fit,minmax(12rem,1fr));gap:1rem;
margin:1.5rem 0}
article{background:#fff;border:1px solid #e4e0d4;border-radius:.6rem;padding:1rem;
display:flex;flex-direction:column}
article p{margin:.3rem 0;color:#5d6a63}article .price{color:inherit;font-weight:600;margin-top:auto}
button{font:inherit;border:0;border-radius:.4rem;padding:.4rem .8rem;background:#2f6b4f;color:#fff;
cursor:pointer}button:hover{background:#24543d}
button.quiet{background:none;color:#8a4b3a;padding:0}button.quiet:hover{text-decoration:underline}
input{font:inherit;padding:.35rem .6rem;border:1px solid #c9c3b2;border-radius:.4rem;
max-width:11rem}
.flash{background:#e4f0e6;border-left:4px solid #2f6b4f;border-radius:.3rem;padding:.5rem .8rem}
table{width:100%;border-collapse:collapse;margin-top:.5rem}
td{padding:.45rem .3rem;border-bottom:1px solid #e4e0d4}td:nth-child(n+2){text-align:right}
.total td{font-weight:600;border-bottom:0}
table~h2{margin-top:2rem}.devices{margin-bottom:.8rem;overflow-wrap:anywhere}
footer{margin-top:2rem;color:#5d6a63;font-size:.9rem}
"""


def make_app(where: str, key: str, *, secure: bool = False) -> web.Application:
    """Make the shop, with its sessions in a storage as named on the command line.

    :param key: 32 bytes in urlsafe base64, for the encrypted cookies.
    :param secure: the shop is served over HTTPS.
    :raises ValueError: for a storage that it doesn't know.
    """
    app = web.Application()
    app[STORAGE] = make_storage(app, where, key, secure=secure)
    setup(app, app[STORAGE])
    app.middlewares.append(check_forms)
    app.on_response_prepare.append(_set_headers)
    app.add_routes(routes)
    return app


def make_storage(
    app: web.Application, where: str, key: str, *, secure: bool = False
) -> AbstractStorage:
    """Make a storage, and have the application close its client in the end."""
    options: Any = {"cookie_name": "SHOP", "max_age": MAX_AGE, "samesite": "Lax"}
    if secure:
        options |= {"cookie_name": "__Host-SHOP", "secure": True}
    url = URL(where)
    if where == "cookie":
        from aiohttp_session.cookie_storage import EncryptedCookieStorage

        return EncryptedCookieStorage(key, **options)
    if where == "simple":
        return SimpleCookieStorage(**options)
    if where == "nacl":
        from aiohttp_session.nacl_storage import NaClCookieStorage

        return NaClCookieStorage(base64.urlsafe_b64decode(key), **options)
    if where == "memory":
        from aiohttp_session.memory_storage import MemoryStorage

        return MemoryStorage(**options)
    if url.scheme in {"redis", "rediss", "unix"}:
        from redis.asyncio import Redis

        from aiohttp_session.redis_storage import RedisStorage

        redis = Redis.from_url(where)
        _close_with(app, redis.aclose)
        return RedisStorage(redis, **options)
    if url.scheme == "memcached":
        import aiomcache

        from aiohttp_session.memcached_storage import MemcachedStorage

        memcached = aiomcache.Client(url.host or "127.0.0.1", url.port or 11211)
        _close_with(app, memcached.close)
        return MemcachedStorage(memcached, **options)
    raise ValueError(f"Unknown storage {where!r}: see --help")


def _close_with(app: web.Application, close: Callable[[], Awaitable[None]]) -> None:
    async def on_cleanup(app: web.Application) -> None:
        await close()

    app.on_cleanup.append(on_cleanup)


def main() -> None:
    """Serve the shop until it is interrupted."""
    parser = argparse.ArgumentParser(description="A small shop, to show sessions.")
    parser.add_argument(
        "--storage",
        default="cookie",
        help="cookie (default), simple, nacl, memory, redis://HOST:PORT or memcached://HOST:PORT",
    )
    parser.add_argument("--key", help="32 bytes in urlsafe base64; by default a new one, each time")
    parser.add_argument("--secure", action="store_true", help="it is served over HTTPS, by a proxy")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8080)
    options = parser.parse_args()
    key = options.key or base64.urlsafe_b64encode(secrets.token_bytes(32)).decode("ascii")
    try:
        app = make_app(options.storage, key, secure=options.secure)
    except ValueError as error:
        parser.error(str(error))
    web.run_app(
        app,
        host=options.host,
        port=options.port,
        print=lambda _: print(
            f"The shop is open at http://{options.host}:{options.port}", flush=True
        ),
    )


if __name__ == "__main__":
    main()
