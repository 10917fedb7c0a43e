"""Reads a model's weights from safetensors, one tensor at a time; nothing in a checkpoint is ever executed.

A rank reads only its own rows and columns, straight into the place where they stay; what it has read of a file is let
go of at once, so that loading takes the memory of one copy.
"""

import ctypes
import json
import mmap
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from engine.core.errors import ModelError

_libc = ctypes.CDLL(None)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)

WANTED_FILES = ("*.safetensors", "*.json", "tokenizer.model", "*.jinja")


def resolve_model(model: str) -> Path:
    """The folder of ``model``: a folder itself, or a Hugging Face id, which is fetched (or found in the cache)."""
    folder = Path(model)
    if folder.is_dir():
        return folder.resolve()
    if folder.exists() or model.startswith((".", "/")) or model.count("/") > 1:
        raise ModelError(f"{model} is no folder with a model")
    from huggingface_hub import snapshot_download  # heavy, and only needed here
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, allow_patterns=list(WANTED_FILES)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"{model} is neither a folder nor a Hugging Face model that can be fetched: {error}"
        ) from error


class Checkpoint:
    """The tensors of a folder by name, read when asked for. A context manager."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stack = ExitStack()
        self._files: dict[str, Any] = {}
        self._where = _index(folder)
        self._unread = set(self._where)

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        if hasattr(_libc, "malloc_trim"):  # glibc keeps what was freed between the weights
            _libc.malloc_trim(0)

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def take(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        *,
        rows: range | None = None,
        columns: range | None = None,
    ) -> torch.Tensor:
        """A tensor of that ``shape``, or its ``rows`` and ``columns``, converted.

        ``ModelError`` where it is missing or of another shape.
        """
        rows = range(shape[0]) if rows is None else rows
        sides = (len(rows), *shape[1:]) if columns is None else (len(rows), len(columns))
        out = torch.empty(sides, dtype=dtype)
        self._read(name, shape, rows, columns, out)
        return out

    def take_rows(
        self, names: list[str], counts: list[int], shares: list[range], columns: tuple[int, ...], dtype: torch.dtype
    ) -> torch.Tensor:
        """``shares[i]`` of the ``counts[i]`` rows of several tensors, under each other in one: merged projections."""
        merged = torch.empty((sum(len(share) for share in shares), *columns), dtype=dtype)
        start = 0
        for name, count, share in zip(names, counts, shares, strict=True):
            self._read(name, (count, *columns), share, None, merged[start : start + len(share)])
            start += len(share)
        return merged

    def _read(self, name: str, shape: tuple[int, ...], rows: range, columns: range | None, out: torch.Tensor) -> None:
        if name not in self._where:
            raise ModelError(f"{self._folder}: the checkpoint has no tensor {name}")
        file = self._where[name]
        try:
            if file not in self._files:
                self._files[file] = self._stack.enter_context(safe_open(self._folder / file, framework="pt"))
            found = self._files[file].get_slice(name)
            if (stored := tuple(found.get_shape())) != shape:
                raise ModelError(f"{self._folder}: {name} is {stored}, but config.json asks for {shape}")
            wanted = slice(rows.start, rows.stop)
            part = found[wanted] if columns is None else found[wanted, columns.start : columns.stop]
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{self._folder / file} cannot be read: {error}") from error
        out.copy_(part)
        _let_go(part)
        self._unread.discard(name)

    def skip(self, *names: str) -> None:
        """These belong to another rank."""
        self._unread.difference_update(names)

    def unread(self) -> Iterator[str]:
        """Tensors that nobody asked for; those that can be computed are not counted."""
        return (name for name in sorted(self._unread) if not name.endswith("rotary_emb.inv_freq"))


def _let_go(view: torch.Tensor) -> None:
    """Take the pages of the mapped file behind ``view`` out of this process's memory; the system's cache keeps them."""
    storage = view.untyped_storage()
    start = storage.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    _libc.madvise(start, storage.data_ptr() + storage.nbytes() - start, mmap.MADV_DONTNEED)


def _index(folder: Path) -> dict[str, str]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            where = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        except (ValueError, KeyError, TypeError) as error:
            raise ModelError(f"{index} is no index of safetensors: {error}") from error
        if any(Path(file).name != file for file in where.values()):
            raise ModelError(f"{index} names files outside its folder")
        return dict(where)
    single = folder / "model.safetensors"
    if not single.is_file():
        raise ModelError(
            f"{folder} has no model.safetensors and no model.safetensors.index.json; other formats are not read"
        )
    try:
        with safe_open(single, framework="pt") as file:
            return dict.fromkeys(file.keys(), single.name)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{single} cannot be read: {error}") from error
