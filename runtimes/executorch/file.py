"""What is in a .pte artifact, for verification: read without running the model, and without ExecuTorch.

Knows the container, the places of weights, and the files beside it that tell of tokens; the special ids are
those that the program itself tells ExecuTorch's runners.
"""

from __future__ import annotations

import hashlib
import mmap

import numpy as np

from fox_edge.artifact import Artifact
from fox_edge.errors import ArtifactError, VerificationError
from fox_edge.pte_format import PteTensor, Region
from fox_edge.quant import EMBEDDING
from runtimes.base import Logits
from runtimes.executorch.program import FORWARD, SCORE, read_artifact_program
from runtimes.executorch.weights import Place, read_places
from runtimes.side_files import SideFiles

# Weights that one step decodes: numpy makes several temporaries of this many float32.
_STEP_WEIGHTS = 1 << 20
# What lies between segments at most, so that each begins at a whole number of it.
_PADDING = 4096


class PteFile:
    """A ModelFile over an artifact's .pte."""

    def __init__(self, artifact: Artifact) -> None:
        self._path = artifact.model_path
        self._program = read_artifact_program(artifact)
        self._places = read_places(artifact, self._program.pte)
        self._side = SideFiles(artifact.path)
        with self._path.open("rb") as file:
            self._data: mmap.mmap | None = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def tensor_names(self) -> list[str]:
        """Hugging Face names of the tensors in the file; a tied matrix appears once."""
        return list(self._places)

    def stored(self, name: str) -> tuple[str, int]:
        """The type that a tensor has in the file, and its bytes, scales included."""
        place = self._place(name)
        return place.type, sum(region.bytes for region in place.regions)

    def rows(self, name: str, start: int, stop: int) -> Logits:
        """Dequantized rows [start, stop) of a tensor, float32; a vector is one row."""
        place = self._place(name)
        if not 0 <= start <= stop <= place.rows:
            raise ValueError(f"{name}: rows {start} to {stop} of {place.rows}")
        if self._data is None:
            raise ArtifactError(f"{self._path}: is closed")
        out = np.empty((stop - start, place.columns), np.float32)
        step = max(1, _STEP_WEIGHTS // place.columns)
        for at in range(start, stop, step):
            end = min(stop, at + step)
            out[at - start : end - start] = place.decode(self._data, at, end)
        return out

    def tie(self) -> str:
        """One sentence that proves that embedding and head are one byte range.

        The head is a piece of data that XNNPACK reads; the embedding is what the programs look rows up in:
        constants of as many rows as the vocabulary. Raises VerificationError where those are elsewhere, or
        where the file has room for a second copy.
        """
        place, pte = self._place(EMBEDDING), self._program.pte
        head = {place.offset: place.numbers, place.scales_offset: place.scales}
        for name in (FORWARD, SCORE):
            tables = [t for t in pte.methods[name].tensors if _is_table(t, place.rows)]
            if not any(t.constant == place.offset and t.bytes == place.numbers.bytes for t in tables):
                raise VerificationError(
                    f"{self._path}: {name} does not look rows up in the head's bytes, from {place.offset} on"
                )
            for table in tables:
                if table.constant not in head or table.bytes != head[table.constant].bytes:
                    raise VerificationError(
                        f"{self._path}: {name} looks up rows in {table.bytes} bytes from {table.constant} "
                        "on, which are not the head's: two copies"
                    )
        self._check_key(place.numbers)
        self._once(place)
        return (
            f"embedding and head read the same {place.numbers.bytes} bytes of {self._path.name}, from "
            f"{place.offset} on, and the same scales; the file's {len(self._data or b'')} bytes hold "
            "them once"
        )

    def _check_key(self, region: Region) -> None:
        """XNNPACK finds the head's bytes by a name, which is their own digest."""
        assert self._data is not None
        keys = [key for key, named in self._program.pte.named.items() if named == region]
        with memoryview(self._data) as view, view[region.offset : region.offset + region.bytes] as part:
            found = hashlib.sha256(part).hexdigest()
        if keys != [found]:
            raise VerificationError(
                f"{self._path}: the head's bytes are called {', '.join(keys)[:80] or 'nothing'}, but their "
                f"sha256 is {found}"
            )

    def _once(self, place: Place) -> None:
        """No other data is as long, and what belongs to nothing is less than the matrix."""
        pte, config = self._program.pte, self._program.config
        rotary = (self._program.context, config.head_dim // 2)
        # A segment is a claim upon bytes, also where it lies over others'.
        ranges = sorted({*pte.named.values(), *(r for p in self._places.values() for r in p.regions)})
        for region in ranges:
            inside = place.offset <= region.offset < place.offset + place.numbers.bytes
            if region.bytes >= place.numbers.bytes and not inside and self._same(region, place.numbers):
                raise VerificationError(
                    f"{self._path}: the embedding is there twice, at {place.offset} and at {region.offset}"
                )
        methods = pte.methods.values()
        tables = {
            Region(t.constant, t.bytes)
            for m in methods
            for t in m.tensors
            if t.shape == rotary and t.constant
        }
        payloads = {region for m in methods for _, region in m.backends}
        size, used, end = len(self._data or b""), 0, 0
        for region in sorted({*ranges, *tables, *payloads}):
            used += max(0, region.offset + region.bytes - max(region.offset, end))
            end = max(end, region.offset + region.bytes)
        if size - used >= place.numbers.bytes + len(pte.segments) * _PADDING:
            raise VerificationError(
                f"{self._path}: {size - used} of its {size} bytes belong to no tensor: room for a second copy"
            )

    def _same(self, one: Region, other: Region) -> bool:
        assert self._data is not None
        first, second = (np.frombuffer(self._data, np.uint8, other.bytes, r.offset) for r in (one, other))
        return bool(np.array_equal(first, second))

    def tokenize(self, text: str, special: bool) -> list[int]:
        """Token ids by the folder's own tokenizer files, without <bos>."""
        return self._side.tokenize(text, special)

    def special_ids(self) -> dict[str, int | None]:
        """<bos> and <eos> as the program tells them, the others as the files beside it do.

        Of several ids that end a text the one counts that the files tell, else the first.
        """
        ids = self._side.special_ids()
        for role, method in (("bos", "get_bos_id"), ("eos", "get_eos_ids")):
            found = self._program.pte.constant(method)
            told = found if isinstance(found, list) else [found]
            if ids[role] not in told:
                ids[role] = told[0]
        return ids

    def chat_template(self) -> str | None:
        """The chat template beside the model."""
        return self._side.chat_template()

    def close(self) -> None:
        """Let go of the file."""
        if self._data is not None:
            data, self._data = self._data, None
            data.close()

    def _place(self, name: str) -> Place:
        if name not in self._places:
            raise ArtifactError(f"{self._path}: has no place for {name}")
        return self._places[name]


def _is_table(tensor: PteTensor, rows: int) -> bool:
    """Whether a constant has a row per token."""
    return tensor.constant is not None and len(tensor.shape) == 2 and tensor.shape[0] == rows
