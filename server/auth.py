"""Who is asking, and what they may do. Every path needs a key once there is one, but for those that are open.

Without keys a server on a loopback address trusts its callers, as long as they are on this machine. A
reverse proxy, or a browser that was led here under another name, brings callers who are not.
"""

import hashlib
import hmac
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from server import description
from server.errors import Unauthorized
from server.exchange import exchange_of
from server.settings import Exposure, Settings, is_loopback_name

OPEN_PATHS = frozenset({"/livez", "/readyz"}) | description.PATHS
"""Paths that need no key: the probes, and what describes the API, which a browser asks for without one."""
FORWARDING = frozenset({"forwarded", "via", "x-real-ip"})
"""Headers that proxies add, beside those that begin with `x-forwarded-`."""


@dataclass(frozen=True)
class Access:
    """What a caller may do."""

    name: str
    """Name of the key; empty without keys."""
    may_loosen: bool
    """May ask for a weaker mode than the server's."""
    expose_risk: Exposure
    """How much of the risks the caller sees."""


class KeyRing:
    """The configured keys."""

    def __init__(self, settings: Settings) -> None:
        self._entries = [
            (
                _digest(entry.key.get_secret_value().encode()),
                Access(entry.name, entry.may_loosen, entry.expose_risk or settings.expose_risk or "flag"),
            )
            for entry in settings.api_keys
        ]
        self._is_loopback = settings.is_loopback
        self._local = Access("", may_loosen=True, expose_risk=settings.expose_risk or "full")
        self._anyone = Access("", may_loosen=False, expose_risk=settings.expose_risk or "flag")

    def access(self, headers: Headers) -> Access:
        """Return what the sender of these headers may do. Takes as long for a wrong key as for a right one.

        Raises:
            Unauthorized: if there are keys, and this is none of them.
        """
        if not self._entries:
            return self._local if self._is_loopback and _is_local(headers) else self._anyone
        scheme, _, key = headers.get("authorization", "").partition(" ")
        given = _digest(key.strip().encode("utf-8", "surrogateescape"))
        matches = [access for digest, access in self._entries if hmac.compare_digest(digest, given)]
        if scheme.lower() != "bearer" or not matches:
            raise Unauthorized
        return matches[0]


def _is_local(headers: Headers) -> bool:
    """Tell whether a request to a loopback address was meant for one, and came without a detour."""
    if any(name in FORWARDING or name.startswith("x-forwarded-") for name in headers):
        return False
    hosts = headers.getlist("host")
    try:
        return len(hosts) == 1 and is_loopback_name(urlsplit(f"//{hosts[0]}").hostname or "")
    except ValueError:  # brackets that are no address
        return False


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


class Authenticate:
    """ASGI middleware that lets nobody past without a key, once there is one."""

    def __init__(self, app: ASGIApp, *, keys: KeyRing, open_paths: frozenset[str]) -> None:
        self._app = app
        self._keys = keys
        self._open_paths = open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass an ASGI exchange on, or answer it."""
        if scope["type"] == "http" and scope["path"] not in self._open_paths:
            try:
                exchange_of(scope).access = self._keys.access(Headers(scope=scope))
            except Unauthorized as error:
                await error.response()(scope, receive, send)
                return
        await self._app(scope, receive, send)
