"""Reads a model's weights from safetensors, one tensor at a time; nothing in a checkpoint is ever executed."""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from engine.core.errors import ModelError

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
        self._files: dict[str, object] = {}
        self._where = _index(folder)
        self._unread = set(self._where)

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """One tensor, converted; ``ModelError`` where it is missing or of another shape."""
        if name not in self._where:
            raise ModelError(f"{self._folder}: the checkpoint has no tensor {name}")
        file = self._where[name]
        try:
            if file not in self._files:
                self._files[file] = self._stack.enter_context(safe_open(self._folder / file, framework="pt"))
            tensor: torch.Tensor = self._files[file].get_tensor(name)  # type: ignore[attr-defined]
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{self._folder / file} cannot be read: {error}") from error
        if tuple(tensor.shape) != shape:
            raise ModelError(f"{self._folder}: {name} is {tuple(tensor.shape)}, but config.json asks for {shape}")
        self._unread.discard(name)
        return tensor.to(dtype)

    def take_rows(
        self, names: list[str], rows: list[int], columns: tuple[int, ...], dtype: torch.dtype
    ) -> torch.Tensor:
        """Several tensors under each other in one: merged projections."""
        merged = torch.empty((sum(rows), *columns), dtype=dtype)
        start = 0
        for name, count in zip(names, rows, strict=True):
            merged[start : start + count] = self.take(name, (count, *columns), dtype)
            start += count
        return merged

    def unread(self) -> Iterator[str]:
        """Tensors that nobody asked for; those that can be computed are not counted."""
        return (name for name in sorted(self._unread) if not name.endswith("rotary_emb.inv_freq"))


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
