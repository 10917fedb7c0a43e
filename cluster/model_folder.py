"""A model on another host: its folder there, and whether it is the same model."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import LaunchError

MODEL_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "tokenizer.model"]
"""What a served model needs; nothing that could be run."""
_HEADER_BYTES = 1 << 20
"""Of each file of weights: names, shapes, dtypes and places of its tensors."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """Where a host finds the model."""

    folder: str
    """On the launcher's host, and on others too, unless it comes from the Hub."""
    hub_id: str = ""
    """Empty where the topology names a folder."""
    revision: str = ""
    """Of the Hub's repository."""
    fingerprint: str
    """See ``fingerprint``."""


def fingerprint(folder: Path) -> str:
    """The same for the same configuration and the same layout and size of weights. Their values are not read, which
    would take minutes."""
    digest = hashlib.blake2b(digest_size=16)
    for file in (folder / "config.json", folder / "tokenizer.json", *sorted(folder.glob("*.safetensors"))):
        if file.is_file():
            with file.open("rb") as stream:
                digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
                digest.update(stream.read(_HEADER_BYTES))
    return digest.hexdigest()


def locate(source: ModelSource, host: str) -> Path:
    """The model's folder on this host, which people call ``host``; fetched from the Hub where it comes from there.
    ``LaunchError`` where it is not here, or another one is."""
    folder = _from_hub(source, host) if source.hub_id else Path(source.folder)
    if not (folder / "config.json").is_file():
        advice = "copy it there (file_mounts of the cluster's YAML does so), or name a Hugging Face id"
        raise LaunchError(f"{host} lacks the model: there is no folder {folder}; {advice}")
    if fingerprint(folder) != source.fingerprint:
        raise LaunchError(f"{host} has another model in {folder} than the launcher's host; copy the same one to both")
    return folder


def _from_hub(source: ModelSource, host: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source.hub_id, revision=source.revision, allow_patterns=MODEL_FILES)).resolve()
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise LaunchError(f"{host} lacks the model: {source.hub_id} is not to be had from the Hub: {reason}") from error
