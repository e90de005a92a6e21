"""One pytorch_model.bin, read with torch's weights-only loader through a memory map.

The old format of checkpoints, for those that have no safetensors. Pickled code in it is refused by torch.
"""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from torch import Tensor

from fox_edge.errors import CheckpointError
from fox_edge.safetensors_file import FLOATS, TensorInfo

_NAMES = {dtype: name for name, dtype in FLOATS.items()}


class TorchFile:
    """The same face as SafetensorsFile. The map belongs to torch, so `release` has nothing to give back."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except pickle.UnpicklingError:
            raise CheckpointError(
                f"{path}: holds more than tensors, which is refused (pickled code could run)"
            ) from None
        except (OSError, RuntimeError, ValueError, EOFError, KeyError, IndexError, TypeError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CheckpointError(f"{path}: not readable as a PyTorch file ({reason})") from None
        if not isinstance(loaded, dict) or not all(
            isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in loaded.items()
        ):
            raise CheckpointError(f"{path}: holds no dictionary of named tensors")
        self._tensors: dict[str, Tensor] = loaded
        self.tensors = {
            name: TensorInfo(_NAMES.get(t.dtype, str(t.dtype)), tuple(t.shape), 0, t.numel() * t.itemsize)
            for name, t in loaded.items()
        }

    def tensor(self, name: str) -> Tensor:
        """The tensor in its stored type, rows in order."""
        return self._tensors[name].detach().contiguous()

    def release(self, name: str, start: int = 0, stop: int | None = None) -> None:
        """Nothing: the system takes clean pages of the map back when it needs them."""
