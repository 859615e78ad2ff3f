"""Who may talk to the page's server: a browser on this machine that was given the address with the token in it.

The server listens on 127.0.0.1 alone. Other users and pages of this machine reach that too, so every path begins with a
token that nobody can guess; a page elsewhere whose name was made to lead here (DNS rebinding) is told by its Host, and
one that sends a form or a request from elsewhere by its Origin and by the kind of its content.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
import secrets
import socket

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from mipo_ray.errors import UserError

HOST = "127.0.0.1"
MOST_BYTES = 256 * 1024  # of a request: a long context, and no more
_SCRIPT, _STYLE = (re.compile(rf"<{tag}>(.*?)</{tag}>", re.DOTALL) for tag in ("script", "style"))


def new_token() -> str:
    """32 random bytes, as a part of an address."""
    return secrets.token_hex(32)


def bound_socket(port: int) -> socket.socket:
    """A socket of this machine alone; 0: a free port. Raises UserError for a port that is taken."""
    found = socket.socket()
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind((HOST, port))
    except (OSError, OverflowError) as error:
        found.close()
        raise UserError(f"--port {port}: expected a port of {HOST} that is free: {error}") from None
    return found


def guard(token: str, port: int) -> Middleware:
    """The middleware that answers nobody else: 421 for another Host, 403 for another Origin, 404 without the token,
    415 for a POST of anything but JSON."""
    hosts = {f"{name}:{port}" for name in (HOST, "localhost")}

    @web.middleware
    async def guarded(request: web.Request, handler: Handler) -> web.StreamResponse:
        host, origin = request.headers.get("Host", ""), request.headers.get("Origin")
        if host not in hosts:
            raise web.HTTPMisdirectedRequest()
        if origin is not None and origin != f"http://{host}":
            raise web.HTTPForbidden()
        given = request.path.split("/")[1]
        if not hmac.compare_digest(given.encode("utf-8", "replace"), token.encode()):
            raise web.HTTPNotFound()
        if request.method == "POST" and request.content_type != "application/json":
            raise web.HTTPUnsupportedMediaType()
        return await handler(request)

    return guarded


def headers_for(page: str) -> dict[str, str]:
    """The headers of every answer. The page's own script and style, known by their hashes, are all that runs; it can
    reach this server alone, stands in no frame, and tells nobody its address."""
    policy = {
        "default-src": "'none'",
        "script-src": _hashes(page, _SCRIPT),
        "style-src": _hashes(page, _STYLE),
        "img-src": "data:",  # the icon, which is empty
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    return {
        "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
        "Cache-Control": "no-store",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Cross-Origin-Opener-Policy": "same-origin",
    }


def _hashes(page: str, inline: re.Pattern[str]) -> str:
    """The content security policy's names of the page's inline scripts or styles."""
    found = inline.findall(page)
    digests = (hashlib.sha256(text.encode("utf-8")).digest() for text in found)
    return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests) or "'none'"
