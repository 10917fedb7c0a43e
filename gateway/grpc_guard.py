"""Deny by default for gRPC: who shows no key hears so before any of its messages is read, whatever the method."""

from contextvars import ContextVar

import grpc

from gateway.auth import EVERYONE, Keyring, Tenant
from gateway.core.errors import AdminOnly, Unauthorized

OPEN = frozenset({"/grpc.health.v1.Health/Check"})
"""For load balancers, which have no key. Not ``Watch``, which lasts for as long as its client likes."""
OPEN_WITHIN = 1.0
"""Seconds that their messages may take to come: who shows no key shall not hold for long what all calls share."""
FOR_ADMINS = frozenset({"/vllm.grpc.engine.VllmEngine/GetLoads"})
"""What shows the load that others make, as ``/status`` of HTTP does."""
CALLER: ContextVar[Tenant] = ContextVar("caller")
"""Whose the call is that runs."""


class Guard:
    def __init__(self, keyring: Keyring | None) -> None:
        """``keyring``: None where there are no API keys."""
        self._keyring = keyring

    def admit(self, details: grpc.HandlerCallDetails) -> Tenant:
        """Whose call it is. Raises ``GatewayError``."""
        tenant = EVERYONE if self._keyring is None else self._keyring.identify(_authorization(details))
        if details.method in OPEN:
            return tenant or EVERYONE
        if tenant is None:
            raise Unauthorized("there is no such API key; send one that is known as metadata authorization: Bearer KEY")
        if details.method in FOR_ADMINS and not tenant.admin:
            raise AdminOnly("this method is for an admin's key")
        return tenant


def _authorization(details: grpc.HandlerCallDetails) -> str | None:
    """None where it is not there exactly once: who reads the first and who reads the last shall not differ."""
    found = [value for name, value in details.invocation_metadata or () if name == "authorization"]
    return found[0] if len(found) == 1 and isinstance(found[0], str) else None
