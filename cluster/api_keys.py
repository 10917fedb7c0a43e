"""The file of a gateway's API keys: JSON, for each tenant the digests of its keys and what it may ask for.

    {"tenants": {"alice": {"keys": ["<sha256>"], "admin": false, "max_concurrent_requests": 32}}}

It holds no key; who can write it can let himself in.
"""

import contextlib
import fcntl
import os
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from cluster.keys import KeyFileError, read_secret
from gateway.auth import Tenant, digest_of
from gateway.core.quotas import Allowance

MAX_BYTES = 4 << 20
TENANT = r"\A[A-Za-z0-9][A-Za-z0-9_.@-]{0,99}\Z"
_Most = Annotated[int, Meta(ge=1, le=10**12)]


class _Entry(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    keys: list[Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z")]] = []
    admin: bool = False
    max_concurrent_requests: _Most | None = None
    requests_per_minute: _Most | None = None
    tokens_per_minute: _Most | None = None

    def tenant(self, name: str) -> Tenant:
        limits = (self.max_concurrent_requests, self.requests_per_minute, self.tokens_per_minute)
        allowance = Allowance(
            max_concurrent_requests=limits[0], requests_per_minute=limits[1], tokens_per_minute=limits[2]
        )
        digests = tuple(bytes.fromhex(key) for key in self.keys)
        return Tenant(name=name, digests=digests, admin=self.admin, allowance=allowance)


class _File(msgspec.Struct, forbid_unknown_fields=True):
    tenants: dict[Annotated[str, Meta(pattern=TENANT)], _Entry] = {}


def read_api_keys(path: Path) -> tuple[Tenant, ...]:
    """All tenants; ``KeyFileError`` where there is none with a key, or others can read or write the file."""
    tenants = tuple(entry.tenant(name) for name, entry in _read(path).tenants.items())
    digests = [digest for tenant in tenants for digest in tenant.digests]
    if not digests:
        raise KeyFileError(f"{path} holds no key; make one with `baton keys api TENANT`")
    if len(set(digests)) < len(digests):
        raise KeyFileError(f"{path} names one key twice; remove it from one of the tenants")
    return tenants


def add_key(path: Path, tenant: str, **changes: Any) -> str:
    """A fresh key for ``tenant``, whose digest is in ``path`` from now on; ``changes``: of ``admin`` and its limits,
    None for none. ``KeyFileError`` where that cannot be."""
    with _one_at_a_time(path.parent):
        return _add_key(path, tenant, changes)


def _add_key(path: Path, tenant: str, changes: dict[str, Any]) -> str:
    known = _read(path) if path.exists() else _File()
    key = f"bt-{secrets.token_urlsafe(32)}"
    entry = known.tenants.get(tenant, _Entry())
    wanted = {name: value for name, value in changes.items() if value is not None}
    entry = msgspec.structs.replace(entry, keys=[*entry.keys, digest_of(key).hex()], **wanted)
    known = _File({**known.tenants, tenant: entry})
    content = msgspec.json.format(msgspec.json.encode(known), indent=2)
    try:
        msgspec.json.decode(content, type=_File)
    except msgspec.ValidationError as error:
        raise KeyFileError(f"{tenant!r} cannot be a tenant: {error}") from error
    _replace(path, content + b"\n")
    return key


@contextlib.contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Between reading a file and replacing it nobody else does the same."""
    try:
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise KeyFileError(f"{folder} is no folder to write to: {error.strerror}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _read(path: Path) -> _File:
    content = read_secret(path, MAX_BYTES)
    try:
        return msgspec.json.decode(content, type=_File)
    except ValueError as error:  # names a place and a type, no value
        raise KeyFileError(f"{path} is no file of API keys: {error}") from error


def _replace(path: Path, content: bytes) -> None:
    """All of it or nothing; only its owner can read it."""
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}-", delete=False) as file:
            try:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
                os.replace(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise
    except OSError as error:
        raise KeyFileError(f"{path} cannot be written: {error.strerror}") from error
