"""The file of a cluster's key pair."""

import os
from pathlib import Path

import msgspec

from cluster.errors import LaunchError
from kv_transfer.curve import CurveKeys

MAX_BYTES = 4096
_OTHERS = 0o077


class KeyFileError(LaunchError):
    """A file of keys cannot be used, or made."""


class _KeyFile(msgspec.Struct, forbid_unknown_fields=True):
    curve_secret_key: str


def make_keys(path: Path) -> CurveKeys:
    """A fresh key pair in a new file that only its owner can read. ``KeyFileError`` where there is a file already."""
    keys = CurveKeys.make()
    write_secret(path, msgspec.json.encode(_KeyFile(keys.secret.decode())) + b"\n")
    return keys


def read_keys(path: Path) -> CurveKeys:
    """The key pair that ``make_keys`` wrote; ``KeyFileError`` where it is none, or others can read it."""
    content = read_secret(path)
    try:
        return CurveKeys.of(msgspec.json.decode(content, type=_KeyFile).curve_secret_key.encode())
    except ValueError:
        # Not what is wrong with it: that may quote the secret.
        raise KeyFileError(f"{path} is no key file; make one with `baton keys`") from None


def write_secret(path: Path, content: bytes) -> None:
    """A new file that only its owner can read."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise KeyFileError(
            f"{path} is there already, and may be in use; remove it, or name another with --out"
        ) from None
    except (OSError, ValueError) as error:
        raise KeyFileError(f"{path} cannot be written: {_reason(error)}") from error
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
    except OSError as error:
        path.unlink()
        raise KeyFileError(f"{path} cannot be written: {_reason(error)}") from error


def read_secret(path: Path, most: int = MAX_BYTES) -> bytes:
    """A file that only its owner can read, of up to ``most`` bytes."""
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            content = file.read(most + 1)
    except (OSError, ValueError) as error:
        raise KeyFileError(f"{path} cannot be read: {_reason(error)}; `baton keys` makes one") from error
    if mode & _OTHERS:
        raise KeyFileError(f"others can read {path}, or write it; run: chmod 600 {path}")
    if len(content) > most:
        raise KeyFileError(f"{path} is larger than {most} bytes, so it is no key file")
    return content


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)
