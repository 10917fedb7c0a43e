"""Who asks: API keys, each of a tenant. HTTP and gRPC alike show one as ``authorization: Bearer KEY``.

Only digests of keys are known here. A key has 256 random bits, so its SHA-256 tells nothing of it, and nobody can guess
one; which of the digests is the right one takes as long to find as that none is.
"""

import hmac
from collections.abc import Iterable
from dataclasses import dataclass, field
from hashlib import sha256

from gateway.core.quotas import Allowance

BEARER = "bearer "
MAX_KEY = 512
"""Characters that are looked at."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tenant:
    """Whose requests share KV, limits and streams."""

    name: str
    digests: tuple[bytes, ...] = field(default=(), repr=False)
    """SHA-256 of each of its keys."""
    admin: bool = False
    """Whether it may see what the others do: status, metrics, traces."""
    allowance: Allowance = field(default_factory=Allowance)


EVERYONE = Tenant(name="default", admin=True)
"""Who asks a gateway without API keys, which is on loopback."""


class Keyring:
    """All keys of a gateway."""

    def __init__(self, tenants: Iterable[Tenant]) -> None:
        self._keys = [(digest, tenant) for tenant in tenants for digest in tenant.digests]

    def identify(self, authorization: str | None) -> Tenant | None:
        """Whose key it is; None for no key, or one that is nobody's."""
        if authorization is None or authorization[: len(BEARER)].lower() != BEARER:
            return None
        shown = digest_of(authorization[len(BEARER) :].strip(" ")[:MAX_KEY])
        found = None
        for digest, tenant in self._keys:  # every one, in the same time each
            if hmac.compare_digest(digest, shown):
                found = tenant
        return found


def digest_of(key: str) -> bytes:
    """What is kept of a key."""
    return sha256(key.encode(errors="replace")).digest()
