"""Which files of a checkpoint folder hold which tensors.

Finds one or sharded safetensors, else pytorch_model.bin, and opens them. Knows names and places, not which
tensors a Fox must have.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Protocol

from torch import Tensor

from fox_edge.config import read_json_object
from fox_edge.errors import CheckpointError
from fox_edge.safetensors_file import SafetensorsFile, TensorInfo
from fox_edge.torch_file import TorchFile

_MAX_INDEX_BYTES = 64 << 20
# In the order in which Hugging Face looks.
_SAFETENSORS, _TORCH = "model.safetensors", "pytorch_model.bin"


class Shard(Protocol):
    """An opened weights file."""

    path: Path
    tensors: dict[str, TensorInfo]

    def tensor(self, name: str) -> Tensor:
        """A tensor in its stored type, to be read only."""
        ...

    def release(self, name: str, start: int = 0, stop: int | None = None) -> None:
        """Give the memory of bytes [start, stop) of a tensor back."""
        ...


def open_shards(folder: Path) -> dict[str, Shard]:
    """Tensor name -> the opened file that holds it.

    Raises CheckpointError when there are no weights, a shard is missing or damaged, the index leaves the
    folder or contradicts the shards, or two shards hold one tensor.
    """
    for name in (_SAFETENSORS, _TORCH):
        if (folder / name).is_file():
            return _by_tensor([_open(folder / name)])
        index = folder / f"{name}.index.json"
        if index.is_file():
            return _open_index(folder, index)
    raise CheckpointError(f"{folder}: has no weights ({_SAFETENSORS}, a sharded one, or {_TORCH})")


def _open(path: Path) -> Shard:
    return TorchFile(path) if path.suffix == ".bin" else SafetensorsFile(path)


def _open_index(folder: Path, index: Path) -> dict[str, Shard]:
    weight_map = read_json_object(index, _MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: has no 'weight_map'")
    files: dict[str, Shard] = {}
    for name, file in weight_map.items():
        # Only plain names: an index must not reach for files outside its folder.
        if not isinstance(file, str) or not re.fullmatch(
            r"[A-Za-z0-9][A-Za-z0-9._-]*\.(safetensors|bin)", file
        ):
            raise CheckpointError(
                f"{index}: places tensor '{name}' in {file!r}, which is no shard of this folder"
            )
        if file not in files:
            if not (folder / file).is_file():
                raise CheckpointError(f"{index}: names the shard {file}, which is missing")
            files[file] = _open(folder / file)
        if name not in files[file].tensors:
            raise CheckpointError(f"{index}: places tensor '{name}' in {file}, which does not hold it")
    return _by_tensor(list(files.values()))


def _by_tensor(shards: list[Shard]) -> dict[str, Shard]:
    found: dict[str, Shard] = {}
    for shard in shards:
        for name in shard.tensors:
            if name in found:
                raise CheckpointError(f"{shard.path}: tensor '{name}' is in {found[name].path.name} too")
            found[name] = shard
    return found
