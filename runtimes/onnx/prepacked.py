"""Weights as onnxruntime's kernels want them, packed once and kept beside the artifact.

onnxruntime packs every quantized matrix anew whenever a session opens: seconds of page faults, and a copy of
the weights in memory of its own. What it packed can be saved, and mapped by the next start. The folder

    ARTIFACT/.fox-edge/packed-KEY/   packed.bin (the matrices), index.json (for what, checksums, first logits)

holds packed matrices only; whatever is read as the artifact stores it (the embedding's rows, norms) stays in
the artifact's own files. KEY says for which onnxruntime, processor and files it was made: whatever does not
fit exactly, or is damaged, is made anew. Knows folders, checksums and when to trust them; packing is
packing.py's.

Checksums prove the file, not that onnxruntime finds what it looks for in it; if it did not, it would run on
scrambled weights. Therefore every start also compares the first logits with those that the artifact's own
weights gave.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import re
import secrets
import shutil
import time
import zlib
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fox_edge.artifact import Artifact
from fox_edge.errors import ArtifactError
from fox_edge.progress import Progress, say
from runtimes.artifact_cache import FOLDER, cache_folder, key_of, read_record, write_record
from runtimes.onnx.engine import first_logits, open_engine, ort
from runtimes.onnx.external import External, onnx
from runtimes.onnx.packing import Packer, Slot, checked_key, lay_out, point

_PREFIX, _PARTIAL = "packed-", ".partial"
_PACKED, _INDEX = "packed.bin", "index.json"
SCHEMA = 1
# Smaller models open in a moment without.
MIN_BYTES = 64 << 20
# What is left of a disk for others.
_SPARE_BYTES = 1 << 30
_CHUNK_BYTES = 8 << 20
_ABANDONED_S = 3600
# How far the first logits may be from those of the artifact's own weights, in standard deviations of theirs:
# a quantized KV cache moves them a little, other weights by more than one.
_FAR = 0.3
# What onnxruntime packs to look the saved up is small work; the other processors compare checksums meanwhile.
_MAPPED = {"session.prepack.enable_parallel": "0"}


@dataclass(frozen=True)
class Prepacked:
    """A cache that is whole as far as its index says; `check` reads it all, `holds` runs it."""

    folder: Path
    slots: tuple[Slot, ...]
    keys: dict[str, str]
    checksums: tuple[int, ...]
    logits: NDArray[np.float32]

    def applied(self, model: onnx.ModelProto) -> onnx.ModelProto:
        """The graph with its matrices in the packed file."""
        changed = onnx.ModelProto()
        changed.CopyFrom(model)
        slots = {slot.name: slot for slot in self.slots}
        for tensor in changed.graph.initializer:
            if slot := slots.get(tensor.name):
                point(tensor, _location(self.folder), slot.offset, slot.raw)
                at = f"{self.keys[slot.name]}|{slot.offset};{slot.size};0"
                tensor.external_data.add(key="prepacked_0", value=at)
        return changed

    def check(self, pool: ThreadPoolExecutor) -> list[Future[bool]]:
        """Start to read the packed file and compare its checksums."""
        path = self.folder / _PACKED
        return [pool.submit(_is_whole, path, n, due) for n, due in enumerate(self.checksums)]

    def holds(self, logits: NDArray[np.float32]) -> bool:
        """Whether the first logits of a session on packed weights are those of the artifact's own weights."""
        sample = _sample(logits)
        if sample.shape != self.logits.shape:
            return False
        far = np.linalg.norm(sample - self.logits) / np.sqrt(len(sample))
        return bool(far <= _FAR * self.logits.std())


class PrepackedCache:
    """The packed weights of one artifact on this machine.

    `model` is the artifact's graph. A folder that cannot be written, or is a link, has no cache.
    """

    def __init__(self, artifact: Artifact, model: onnx.ModelProto, threads: int) -> None:
        self._artifact, self._model, self._threads = artifact, model, threads
        self._slots = lay_out(model)
        self._root = artifact.path / FOLDER
        self._made_for = _made_for(artifact, model)
        self._folder = self._root / (_PREFIX + key_of(self._made_for))

    @property
    def worthwhile(self) -> bool:
        """Whether packing takes long enough to keep its result."""
        return (
            sum(slot.raw for slot in self._slots) >= MIN_BYTES
            and cache_folder(self._artifact.path) is not None
        )

    def find(self) -> Prepacked | None:
        """The cache, when index and sizes are what they must be."""
        fields = self._index()
        if fields is None or "refused" in fields:
            return None
        try:
            found = Prepacked(
                self._folder,
                tuple(self._slots),
                {slot.name: checked_key(fields["keys"][slot.name]) for slot in self._slots},
                tuple(int(sum_) for sum_ in fields["checksums"]),
                np.array(fields["logits"], np.float32),
            )
            packed = self._folder / _PACKED
            size = self._slots[-1].offset + self._slots[-1].size
            if packed.is_symlink() or packed.stat().st_size != size:
                return None
            whole = len(found.checksums) == -(-size // _CHUNK_BYTES) and found.logits.ndim == 1
            return found if whole and found.logits.size else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def discard(self) -> None:
        """Delete what is there for this key."""
        if not self._folder.is_symlink():
            shutil.rmtree(self._folder, ignore_errors=True)

    def refuse(self) -> None:
        """Leave word instead of the packed weights that they do not work here: none are made again."""
        self.discard()
        with contextlib.suppress(OSError):
            self._folder.mkdir()
            write_record(self._folder / _INDEX, {"made_for": self._made_for, "refused": True})

    def _index(self) -> dict[str, Any] | None:
        fields = read_record(self._folder / _INDEX)
        return fields if fields is not None and fields.get("made_for") == self._made_for else None

    def make(self, engine: Any) -> bool:
        """Pack every matrix and keep the result; `engine` is a session on the artifact's own weights.

        False, and nothing is left behind, when the folder cannot be written, the disk is too full, or this
        onnxruntime does not save packed weights.
        """
        if "refused" in (self._index() or {}):
            return False
        self.discard()
        try:
            size = self._slots[-1].offset + self._slots[-1].size
            if shutil.disk_usage(self._artifact.path).free < size + _SPARE_BYTES:
                return False
            self._root.mkdir(exist_ok=True)
            partial = self._root / (_PREFIX + secrets.token_hex(8) + _PARTIAL)
            partial.mkdir()
        except OSError:
            return False
        try:
            start = time.monotonic()
            keys = self._pack(partial, size)
            if len(set(keys.values())) != len(self._slots):
                return False
            chunks = -(-size // _CHUNK_BYTES)
            with ThreadPoolExecutor(self._threads) as pool:
                sums = list(pool.map(lambda n: _checksum(partial / _PACKED, n), range(chunks)))
            fields = {
                "made_for": self._made_for,
                "keys": keys,
                "checksums": sums,
                "logits": _sample(first_logits(engine)).tolist(),
            }
            write_record(partial / _INDEX, fields)
            partial.rename(self._folder)
            say(
                f"{self._folder}: {size / 1e6:,.0f} MB of weights packed for this processor and onnxruntime "
                f"{ort.__version__} in {time.monotonic() - start:.1f} s; the next start maps them"
            )
        except (OSError, ArtifactError):
            return False
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        self._remove_others()
        return True

    def _pack(self, folder: Path, size: int) -> dict[str, str]:
        """Fill the packed file; returns onnxruntime's names for what it will look for, by initializer."""
        done = 0
        keys: dict[str, str] = {}
        with (
            (folder / _PACKED).open("w+b") as file,
            ThreadPoolExecutor(self._threads) as pool,
            Progress("packing weights") as progress,
        ):
            file.truncate(size)
            packer = Packer(self._model, self._artifact.path, _location(folder), file.fileno())
            futures = [pool.submit(packer.pack, slot) for slot in self._slots]
            try:
                for slot, future in zip(self._slots, futures, strict=True):
                    keys[slot.name] = future.result()
                    done += slot.size
                    progress.update(done, size)
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise
            os.fsync(file.fileno())
        return keys

    def _remove_others(self) -> None:
        """Delete caches that were made for something else, and what a killed process left."""
        with contextlib.suppress(OSError):
            for path in self._root.glob(_PREFIX + "*"):
                partial = path.name.endswith(_PARTIAL)
                old = time.time() - path.stat().st_mtime > _ABANDONED_S
                if path != self._folder and not path.is_symlink() and (old or not partial):
                    shutil.rmtree(path, ignore_errors=True)


def open_packed(artifact: Artifact, original: onnx.ModelProto, model: onnx.ModelProto, threads: int) -> Any:
    """An onnxruntime session of `model`, on packed weights when there are any; else they are made.

    `original` is the artifact's graph; `model` differs from it in nothing that touches a matrix. Packed
    weights that are damaged are made anew, with a word about it.
    """
    cache = PrepackedCache(artifact, original, threads)
    if cache.worthwhile and (packed := cache.find()) is not None:
        engine = _mapped(artifact, cache, packed, model, threads)
        if engine is not None:
            return engine
    engine = open_engine(model, artifact.path, threads, artifact.model_path)
    if cache.worthwhile:
        cache.make(engine)
    return engine


def _mapped(
    artifact: Artifact, cache: PrepackedCache, packed: Prepacked, model: onnx.ModelProto, threads: int
) -> Any:
    """A session on packed weights, compared with their checksums while it opens; None: not to be used."""
    engine = None
    with ThreadPoolExecutor(threads) as pool:
        checks = packed.check(pool)
        with contextlib.suppress(ArtifactError):
            engine = open_engine(packed.applied(model), artifact.path, threads, artifact.model_path, _MAPPED)
        try:
            whole = all(check.result() for check in checks)
        except OSError:
            whole = False
    if not whole:
        say(f"{packed.folder}: damaged; the weights are packed anew")
        cache.discard()
        return None
    if engine is None or not packed.holds(first_logits(engine)):
        say(
            f"{packed.folder}: onnxruntime {ort.__version__} does not find its packed weights; "
            "going on without"
        )
        cache.refuse()
        return None
    return engine


def _made_for(artifact: Artifact, model: onnx.ModelProto) -> dict[str, Any]:
    """Everything that packed weights depend on."""
    names = {artifact.manifest.model_file}
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            names.add(External.of(tensor, artifact.path).path.name)
    files = {}
    for name in sorted(names):
        status = (artifact.path / name).stat()
        files[name] = [artifact.manifest.files.get(name), status.st_size, status.st_mtime_ns]
    graph = hashlib.sha256(model.SerializeToString(deterministic=True)).hexdigest()
    return {
        "schema": SCHEMA,
        "onnxruntime": [ort.__version__, ort.get_build_info()],
        "processor": [platform.system(), platform.machine(), processor()],
        "files": files,
        "graph": graph,
    }


def processor() -> str:
    """What tells one kind of processor from another, as far as kernels are chosen by it."""
    told = {platform.processor()}
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines():
            if re.match(r"(model name|flags|Features|CPU (implementer|part|variant))\s*:", line):
                told.add(line)
    return hashlib.sha256("\n".join(sorted(told)).encode()).hexdigest()


def _sample(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """At most 1,024 logits, evenly spread."""
    return logits[:: -(-len(logits) // 1024)]


def _is_whole(path: Path, chunk: int, due: int) -> bool:
    return _checksum(path, chunk) == due


def _checksum(path: Path, chunk: int) -> int:
    """CRC-32 of one chunk of a file. Finds what disks and copies do to files three times as fast as sha256
    does; whoever can write here can write the artifact too."""
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    with path.open("rb", buffering=0) as file:
        file.seek(chunk * _CHUNK_BYTES)
        filled = 0
        while filled < len(buffer) and (read := file.readinto(buffer[filled:])):
            filled += read
    return zlib.crc32(buffer[:filled])


def _location(folder: Path) -> str:
    """The packed file as a graph names it, from the artifact's folder."""
    return f"{FOLDER}/{folder.name}/{_PACKED}"
