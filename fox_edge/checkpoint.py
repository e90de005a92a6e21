"""A Hugging Face checkpoint folder, read lazily: names, shapes, one tensor at a time, a digest; and written.

Decides whether a folder is a Fox and whole. Knows nothing of quantization or of artifacts. Weights stay in
memory-mapped files; what is copied out is a tensor or a few rows at a time.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fox_edge.config import FoxConfig, read_json_object
from fox_edge.errors import CheckpointError, TokenizerError
from fox_edge.locate import locate
from fox_edge.model import Fox
from fox_edge.partial import PartialFolder
from fox_edge.processors import available_cores
from fox_edge.quant import EMBEDDING, HEAD
from fox_edge.safetensors_file import FLOATS, SafetensorsWriter
from fox_edge.shards import open_shards
from fox_edge.tokenizer import TOKENIZER_FILES, Tokenizer

# What is copied, hashed or compared at once.
_PIECE_BYTES = 32 << 20
_HASH_THREADS = 4
# Buffers that older transformers saved and every loader recomputes.
_LEFTOVER = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")

Progress = Callable[[int, int], None]


class _NoInit(TorchFunctionMode):
    """Skips the random initialization of modules: on the meta device it imports half of torch for nothing."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        if getattr(func, "__module__", "") == "torch.nn.init":
            return named["tensor"] if "tensor" in named else args[0]
        return func(*args, **named)


class Checkpoint:
    """An opened checkpoint: complete, of the right shapes, with a tokenizer that fits. Read-only.

    `notes` are one-sentence remarks for the user about what was found odd and how it was taken.
    """

    def __init__(self, path: Path, name: str) -> None:
        self.path, self.name = path, name
        self.notes: list[str] = []
        self._hf = read_json_object(path / "config.json")
        try:
            self.config = FoxConfig.from_hf(self._hf)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from None
        self._shards = open_shards(path)
        self._shapes = self.config.tensor_shapes()
        self._check_tensors()
        self._tokenizer = Tokenizer.from_folder(path)
        self._check_tokenizer()
        self._generation = self._read_generation_config()
        self._digest: str | None = None

    @classmethod
    def open(cls, name_or_path: str | Path) -> Checkpoint:
        """Open 'nano', a folder, or a hub id 'owner/name' (downloaded through huggingface_hub's cache).

        Raises CheckpointError or TokenizerError, one sentence naming file, tensor and numbers.
        """
        path, name = locate(name_or_path)
        return cls(path, name)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Hugging Face name -> shape of every weight, in file order; a tied model has no head."""
        return dict(self._shapes)

    def dtype(self, name: str) -> torch.dtype:
        """The type a tensor is stored in: bfloat16, float16 or float32."""
        return FLOATS[self._shard(name).tensors[name].dtype]

    def tensor(self, name: str) -> Tensor:
        """A view on the memory-mapped file, in the stored type. Not to be written to."""
        return self._shard(name).tensor(name)

    def release(self, name: str) -> None:
        """Give the memory of a tensor's pages back; views stay valid and are read again from the file."""
        self._shard(name).release(name)

    def pieces(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """First row and rows (n, columns), in order, of views of some 32 MiB; a vector is one row.

        Nothing of the file stays in memory: pages are given back behind the reader.
        """
        tensor = self.tensor(name)
        rows = tensor[None] if tensor.dim() == 1 else tensor
        for start, stop in self._row_pieces(name):
            yield start, rows[start:stop]
            self._release_rows(name, start, stop)

    def float_rows(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """A float32 copy of rows [start, stop), (rows, columns); a vector is one row.

        Raises CheckpointError naming the tensor and row for NaN or infinity.
        """
        tensor = self.tensor(name)
        rows = tensor[None] if tensor.dim() == 1 else tensor
        part = rows[start:stop].to(torch.float32, copy=True)
        # A finite sum has finite terms; only a sum that is not needs a second look.
        if not torch.isfinite(part.sum()):
            self._complain_if_not_finite(name, part, start)
        return part

    def check_finite(self, progress: Progress | None = None) -> None:
        """Read every weight once; raises CheckpointError for the first NaN or infinity."""
        total = sum(self._bytes(name) for name in self._shapes)
        done = 0
        for name in self._shapes:
            for start, stop in self._row_pieces(name):
                self.float_rows(name, start, stop)
                self._release_rows(name, start, stop)
            done += self._bytes(name)
            if progress is not None:
                progress(done, total)

    def digest(self) -> str:
        """Hexadecimal sha256 over config, tokenizer files and weights, however the weights are sharded."""
        if self._digest is None:
            whole = hashlib.sha256(json.dumps(self.config.to_hf(), sort_keys=True).encode())
            for path in self.tokenizer_files():
                whole.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
            # hashlib lets go of the interpreter lock, so tensors are hashed side by side.
            with ThreadPoolExecutor(min(_HASH_THREADS, available_cores())) as pool:
                for name, digest in zip(self._shapes, pool.map(self._hash, self._shapes), strict=True):
                    whole.update(f"{name} {self.dtype(name)} {self._shapes[name]} ".encode() + digest)
            self._digest = whole.hexdigest()
        return self._digest

    def tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer."""
        return self._tokenizer

    def tokenizer_files(self) -> list[Path]:
        """The tokenizer's files, in a fixed order: what an artifact carries along."""
        return [self.path / name for name in TOKENIZER_FILES if (self.path / name).is_file()]

    def generation_config(self) -> dict[str, Any]:
        """generation_config.json's fields (or none), with the tokenizer's token ids."""
        return dict(self._generation)

    def load_model(self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Fox:
        """The reference model in `dtype`, for inference. Memory: the model once, and one piece of 32 MiB."""
        with torch.device("meta"), _NoInit():
            model = Fox(self.config)
        for name, shape in self._shapes.items():
            weight = torch.empty(shape, dtype=dtype, device=device)
            rows = weight[None] if weight.dim() == 1 else weight
            for start, part in self.pieces(name):
                rows[start : start + len(part)] = part
            owner, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(owner), attribute, nn.Parameter(weight, requires_grad=False))
        return model.eval()

    def _shard(self, name: str) -> Any:
        if name not in self._shapes:
            raise CheckpointError(
                f"{self.path}: no tensor '{name}' among the {len(self._shapes)} of this model"
            )
        return self._shards[name]

    def _bytes(self, name: str) -> int:
        info = self._shards[name].tensors[name]
        return info.stop - info.start

    def _row_pieces(self, name: str) -> Iterator[tuple[int, int]]:
        """Row ranges of about _PIECE_BYTES that cover a tensor; a vector is one row."""
        shape = self._shapes[name]
        rows = 1 if len(shape) == 1 else shape[0]
        step = max(1, _PIECE_BYTES * rows // max(1, self._bytes(name)))
        for start in range(0, rows, step):
            yield start, min(start + step, rows)

    def _release_rows(self, name: str, start: int, stop: int) -> None:
        row = self._bytes(name) // (1 if len(self._shapes[name]) == 1 else self._shapes[name][0])
        self._shards[name].release(name, start * row, stop * row)

    def _hash(self, name: str) -> bytes:
        digest = hashlib.sha256()
        raw = self.tensor(name).reshape(-1).view(torch.uint8).numpy()
        for start in range(0, raw.size, _PIECE_BYTES):
            digest.update(raw[start : start + _PIECE_BYTES].data)
            self._shards[name].release(name, start, start + _PIECE_BYTES)
        return digest.digest()

    def _complain_if_not_finite(self, name: str, part: Tensor, start: int) -> None:
        bad = (~torch.isfinite(part)).nonzero()
        if len(bad):
            row, column = (int(n) for n in bad[0])
            raise CheckpointError(
                f"{self._shards[name].path}: tensor '{name}' holds {float(part[row, column])} "
                f"at row {start + row}, column {column}"
            )

    def _check_tensors(self) -> None:
        """The weights must be exactly those of the configuration; raises for the first that is not."""
        leftovers = [name for name in self._shards if _LEFTOVER.fullmatch(name)]
        if leftovers:
            self.notes.append(
                f"{len(leftovers)} saved rotary tables (inv_freq) are ignored; they are recomputed"
            )
        for name in leftovers:
            del self._shards[name]
        missing = [name for name in self._shapes if name not in self._shards]
        if missing:
            hint = " (config.json says that it is not tied to the embedding)" if missing == [HEAD] else ""
            raise CheckpointError(
                f"{self.path}: {len(missing)} of {len(self._shapes)} tensors missing, "
                f"first '{missing[0]}'{hint}"
            )
        duplicate = self.config.tied and HEAD in self._shards
        unexpected = [n for n in self._shards if n not in self._shapes and not (duplicate and n == HEAD)]
        if unexpected:
            path = self._shards[unexpected[0]].path
            raise CheckpointError(
                f"{path}: {len(unexpected)} unexpected tensors, first '{unexpected[0]}', "
                f"in a model of {self.config.num_layers} layers"
            )
        for name, shape in self._shapes.items():
            self._check_tensor(name, shape)
        if duplicate:
            self._drop_duplicate_head()

    def _check_tensor(self, name: str, shape: tuple[int, ...]) -> None:
        shard = self._shards[name]
        info = shard.tensors[name]
        if info.shape != shape:
            raise CheckpointError(
                f"{shard.path}: tensor '{name}' has shape {list(info.shape)}, "
                f"but config.json asks for {list(shape)}"
            )
        if info.dtype not in FLOATS:
            raise CheckpointError(
                f"{shard.path}: tensor '{name}' is stored as {info.dtype}, "
                f"but {', '.join(FLOATS)} can be read"
            )

    def _drop_duplicate_head(self) -> None:
        """A tied model's saved head must equal the embedding; it is then forgotten."""
        self._check_tensor(HEAD, self._shapes[EMBEDDING])
        embedding, head = self.tensor(EMBEDDING), self._shards[HEAD].tensor(HEAD)
        for start, stop in self._row_pieces(EMBEDDING):
            if not torch.equal(embedding[start:stop], head[start:stop]):
                differing = (embedding[start:stop] != head[start:stop]).any(dim=1).nonzero()
                raise CheckpointError(
                    f"{self._shards[HEAD].path}: tensor '{HEAD}' differs from '{EMBEDDING}' at row "
                    f"{start + int(differing[0])}, but config.json says that they are tied"
                )
        self._shards[EMBEDDING].release(EMBEDDING)
        self._shards[HEAD].release(HEAD)
        del self._shards[HEAD]
        self.notes.append(f"a duplicate {HEAD} was dropped: it equals the tied embedding")

    def _check_tokenizer(self) -> None:
        pieces, rows = self._tokenizer.vocab_size, self.config.vocab_size
        if pieces > rows:
            raise TokenizerError(
                f"{self.path}: the tokenizer has {pieces} pieces, but the model only {rows} rows"
            )
        if pieces < rows:
            self.notes.append(f"the model has {rows} rows for {pieces} pieces; the rest is padding")
        self.notes += self._tokenizer.notes

    def _read_generation_config(self) -> dict[str, Any]:
        """The fields with the tokenizer's ids in them; notes where config.json or they disagree."""
        path = self.path / "generation_config.json"
        generation = read_json_object(path) if path.is_file() else {}
        t = self._tokenizer
        ours: dict[str, Any] = dict(zip(_TOKEN_IDS, (t.bos_id, t.eos_id, t.pad_id), strict=True))
        said: dict[str, list[str]] = {}  # what is wrong -> the files that say so
        for file, fields in (("config.json", self._hf), (path.name, generation)):
            wrong = [
                f"{key} is {fields[key]} ({ours[key]} in the tokenizer)"
                for key in _TOKEN_IDS[:2]
                if fields.get(key) is not None and not self._agrees(key, fields[key], ours[key])
            ]
            if wrong:
                said.setdefault(", ".join(wrong), []).append(file)
        self.notes += [
            f"{' and '.join(files)}: {what}; the tokenizer decides" for what, files in said.items()
        ]
        stops = sorted(t.stop_ids)
        if len(stops) > 1:
            ours["eos_token_id"] = stops
        return {**generation, **{key: value for key, value in ours.items() if value is not None}}

    def _agrees(self, key: str, theirs: Any, ours: int | None) -> bool:
        if key == "eos_token_id":
            given = theirs if isinstance(theirs, list) else [theirs]
            return all(id in self._tokenizer.stop_ids for id in given)
        return bool(theirs == ours)


def write_checkpoint(
    folder: Path,
    config: FoxConfig,
    tensors: Iterable[tuple[str, Tensor]],
    tokenizer_files: Sequence[Path] = (),
    *,
    dtype: torch.dtype = torch.bfloat16,
    token_ids: Mapping[str, int] | None = None,
    extra_files: Mapping[str, str | bytes] | None = None,
) -> None:
    """Write a checkpoint folder, whole or not at all; `folder` must not exist.

    `tensors` gives (name, tensor), or several times the same name with successive rows; each is written and
    forgotten. `token_ids` ('bos_token_id', ...) go into config.json and generation_config.json;
    `extra_files` are further files by name. Raises CheckpointError.
    """
    if folder.exists():
        raise CheckpointError(f"{folder}: exists already; choose another name")
    ids = dict(token_ids or {})
    try:
        with PartialFolder(folder) as partial:
            need, free = config.num_parameters() * dtype.itemsize, shutil.disk_usage(partial.path).free
            if need > free:
                raise CheckpointError(f"{folder}: needs {need} bytes, but only {free} are free on that disk")
            shapes = config.tensor_shapes()
            with SafetensorsWriter(partial.path / "model.safetensors", shapes, dtype) as writer:
                for name, rows in tensors:
                    writer.write_rows(name, rows)
            stored = {**config.to_hf(), **ids, "torch_dtype": str(dtype).removeprefix("torch.")}
            _write_json(partial.path / "config.json", stored)
            _write_json(partial.path / "generation_config.json", ids)
            for path in tokenizer_files:
                shutil.copyfile(path, partial.path / path.name)
            for name, content in (extra_files or {}).items():
                data = content.encode() if isinstance(content, str) else content
                (partial.path / name).write_bytes(data)
            partial.put_in_place()
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be written ({error.strerror}); nothing was kept") from None


def _write_json(path: Path, fields: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
