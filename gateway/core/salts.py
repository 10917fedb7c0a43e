"""Whose KV may be shared with whom."""

from hashlib import sha256


def cache_salt(tenant: str, wanted: str) -> bytes:
    """32 bytes that two requests have in common only if they are of one tenant, and asked for the same salt: KV is
    shared within a salt, and how soon a first token comes tells whether it was."""
    owner = tenant.encode()
    return sha256(len(owner).to_bytes(8, "little") + owner + wanted.encode()).digest()
