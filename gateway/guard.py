"""Deny by default: stands before every route there is, and before those that there are not.

Decides by the path as the router below will see it, and by nothing that a client says of it in a header.
"""

from starlette.types import ASGIApp, Receive, Scope, Send

from gateway.answers import ErrorAnswer
from gateway.auth import EVERYONE, Keyring, Tenant
from gateway.core.errors import AdminOnly, Unauthorized

OPEN = frozenset({("GET", "/health"), ("GET", "/ready")})
"""For load balancers, which have no key."""
FOR_TENANTS = frozenset({"/version", "/openapi.json"})
"""Besides everything in ``/v1/``; all else is for admins."""
_CHALLENGE = [(b"www-authenticate", b"Bearer")]


class Guard:
    """Lets requests through that may be made, with their tenant in ``scope["state"]["tenant"]``."""

    def __init__(self, app: ASGIApp, keyring: Keyring | None) -> None:
        """``keyring``: None where there are no API keys."""
        self._app = app
        self._keyring = keyring

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise AssertionError(f"the gateway speaks HTTP, not {scope['type']}")
        tenant = EVERYONE if self._keyring is None else self._keyring.identify(_authorization(scope))
        app = self._app
        if (scope["method"], scope["path"]) not in OPEN:
            if tenant is None:
                text = "there is no such API key; send one that is known as `Authorization: Bearer KEY`"
                app = ErrorAnswer(Unauthorized(text), _CHALLENGE, close=True)
            elif not _may(tenant, scope["path"]):
                app = ErrorAnswer(AdminOnly("this path is for an admin's key"), close=True)
        scope.setdefault("state", {})["tenant"] = tenant
        await app(scope, receive, send)


def _may(tenant: Tenant, path: str) -> bool:
    return tenant.admin or path.startswith("/v1/") or path in FOR_TENANTS


def _authorization(scope: Scope) -> str | None:
    """None where it is not there exactly once: who reads the first and who reads the last shall not differ."""
    found = [value for name, value in scope["headers"] if name == b"authorization"]
    return found[0].decode("latin-1") if len(found) == 1 else None
