"""From the name a user types to a checkpoint folder on this disk: 'nano', a folder, or a hub id.

Says what a thing is that is no checkpoint. Does not look into weights.
"""

from __future__ import annotations

import re
from pathlib import Path

from fox_edge.errors import CheckpointError

NANO = "nano"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SMALL_FILES = ["*.json", "*.jinja", "tokenizer.model"]


def locate(name_or_path: str | Path) -> tuple[Path, str]:
    """(folder, name to call it by) of a checkpoint; raises CheckpointError in one sentence."""
    text = str(name_or_path)
    path = Path(text).expanduser()
    if text == NANO:
        folder = Path(__file__).parent / NANO
        if not (folder / "config.json").is_file():
            raise CheckpointError(f"{folder}: this installation lacks nano's files; install fox-edge again")
        return folder, NANO
    if path.is_dir():
        _check_folder(path)
        return path, path.resolve().name
    if path.exists():
        raise CheckpointError(f"{path}: {_what_file(path)}, but a checkpoint's folder is due")
    if isinstance(name_or_path, str) and _HUB_ID.fullmatch(text):
        return download(text), text
    raise CheckpointError(f"{path}: no such folder, and not a name on the hub ('owner/name') or 'nano'")


def _check_folder(path: Path) -> None:
    """A folder without config.json is told what it seems to be."""
    if (path / "manifest.json").is_file():
        raise CheckpointError(f"{path}: an exported model, but a checkpoint's folder is due")
    if (path / "config.json").is_file():
        return
    files = sorted(p for p in path.iterdir() if p.is_file())
    if not files:
        raise CheckpointError(f"{path}: an empty folder, but a checkpoint's is due")
    if any(p.suffix == ".gguf" for p in files):
        raise CheckpointError(f"{path}: holds GGUF files, but a checkpoint (config.json, safetensors) is due")
    raise CheckpointError(f"{path}: has no config.json, so it is no checkpoint")


def _what_file(path: Path) -> str:
    with path.open("rb") as file:
        magic = file.read(4)
    return "a GGUF file" if magic == b"GGUF" or path.suffix == ".gguf" else "a file"


def download(repo_id: str) -> Path:
    """The folder of a hub repository in huggingface_hub's cache; only data files are fetched, never code.

    Respects HF_HUB_OFFLINE. Raises CheckpointError in one sentence when it cannot be had.
    """
    import huggingface_hub
    from huggingface_hub import errors

    def fetch(patterns: list[str]) -> Path:
        # Patterns match whole paths, so files in subfolders are named to be left out.
        return Path(
            huggingface_hub.snapshot_download(
                repo_id, allow_patterns=patterns, ignore_patterns=["*/*", "training_args*"]
            )
        )

    try:
        folder = fetch([*_SMALL_FILES, "model*.safetensors"])
        if not any(folder.glob("*.safetensors")):
            folder = fetch([*_SMALL_FILES, "pytorch_model*.bin"])
    except errors.GatedRepoError:
        raise CheckpointError(
            f"{repo_id}: the hub asks for a login and consent to its licence first"
        ) from None
    except errors.RepositoryNotFoundError:
        raise CheckpointError(f"{repo_id}: no such folder, and no such repository on the hub") from None
    except errors.LocalEntryNotFoundError:
        raise CheckpointError(
            f"{repo_id}: no such folder, and the hub cannot be reached (nothing of it is in the local cache)"
        ) from None
    # Network, disk and proxy failures come in many classes; the user needs the one line.
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{repo_id}: download failed ({str(error).splitlines()[0][:200]})") from None
    _check_folder(folder)
    return folder
