"""The way to an artifact's program: manifest, config.json and .pte held against each other before it opens.

What a program must be like to be run here: the two methods and what goes in and out of them, one cache for
both, XNNPACK alone as a delegate, and the sizes that config.json tells. A start checks what can be read off
headers; `fox-edge verify` checks every byte. Knows the container through fox_edge/pte_format.py; not what
runs it.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

from fox_edge.artifact import MANIFEST, Artifact
from fox_edge.config import FoxConfig
from fox_edge.errors import ArtifactError
from fox_edge.pte_format import PteMethod, PteProgram, PteTensor, read_program
from runtimes.base import SCORE_CHUNK
from runtimes.executorch.weights import read_places

FORWARD, SCORE = "forward", "score"
# The delegate that this project exports for; another one would run code that nothing here speaks of.
_BACKEND = "XnnpackBackend"
# What the cache is called in the manifest -> what its keys and values are stored as.
_KV_KINDS = {"float32": "float32", "int8": "int8"}


# What XNNPACK keeps beside each row of a packed matrix: a sum of its integers and a bias.
_ROW_BYTES = 8


@dataclass(frozen=True)
class FoxProgram:
    """A .pte that can be run: what a session and a user are told of it."""

    pte: PteProgram
    config: FoxConfig
    context: int  # positions of its cache
    chunk: int  # tokens that `forward` takes at once
    score_chunk: int
    kv: str
    caches: dict[str, PteTensor]

    @property
    def vocab_size(self) -> int:
        """Length of a row of logits."""
        return self.config.vocab_size

    @property
    def cache_bytes(self) -> int:
        """Keys and values of all positions, with what they are scaled by."""
        return sum(cache.bytes for cache in self.caches.values())

    @property
    def planned_bytes(self) -> int:
        """Arenas of all methods, without the cache: ExecuTorch makes each as long as the longest."""
        arenas = [method.arenas for method in self.pte.methods.values()]
        width = max(map(len, arenas))
        longest = [max(a[i] for a in arenas if i < len(a)) for i in range(width)]
        return sum(longest) - self.cache_bytes

    @property
    def packed_bytes(self) -> int:
        """What XNNPACK packs of the file when a method is loaded: what it reads, and two numbers per row."""
        config = self.config
        attention = config.num_heads * config.head_dim + 2 * config.kv_dim + config.hidden_size
        layer = attention + 2 * config.intermediate_size + config.hidden_size
        rows = config.num_layers * layer + config.vocab_size
        return sum(region.bytes for region in set(self.pte.named.values())) + _ROW_BYTES * rows


def read_artifact_program(artifact: Artifact) -> FoxProgram:
    """The artifact's program, checked; raises ArtifactError with what does not go together."""
    path, pte = artifact.model_path, read_program(artifact.model_path)
    config = FoxConfig.read(artifact.path / "config.json")
    forward, score = (_method(pte, name) for name in (FORWARD, SCORE))
    # A program is exported for fewer positions than the model takes, since its cache is taken as a whole.
    context = artifact.manifest.positions
    for name, told, due in (
        ("get_vocab_size", pte.constant("get_vocab_size"), config.vocab_size),
        ("get_max_context_len", pte.constant("get_max_context_len"), context),
        ("get_max_seq_len", pte.constant("get_max_seq_len"), forward.inputs[0].shape[1]),
        ("the width of forward's logits", forward.outputs[0].shape[-1], config.vocab_size),
        ("the width of score's logits", score.outputs[0].shape[-1], config.vocab_size),
    ):
        if told != due:
            raise ArtifactError(
                f"{path}: {name} is {told}, but {due} is what manifest and config.json say of it"
            )
    caches = _caches(path, forward, score, context)
    program = FoxProgram(
        pte,
        config,
        context=context,
        chunk=forward.inputs[0].shape[1],
        score_chunk=min(SCORE_CHUNK, score.inputs[0].shape[1]),
        kv=_kv(path, caches),
        caches=caches,
    )
    _check_manifest(artifact, program)
    return program


def _method(pte: PteProgram, name: str) -> PteMethod:
    """A method that takes tokens (1, T) and a position (1,), and gives float32; raises ArtifactError."""
    method = pte.methods.get(name)
    if method is None:
        raise ArtifactError(f"{pte.path}: has no method '{name}', but: {', '.join(sorted(pte.methods))}")
    shapes = [(t.type, len(t.shape)) for t in method.inputs if isinstance(t, PteTensor)]
    outputs = [t for t in method.outputs if isinstance(t, PteTensor)]
    # Leading dimensions of one: a conversation at a time.
    fits = (
        shapes == [("int64", 2), ("int64", 1)]
        and len(method.inputs) == 2
        and method.inputs[0].shape[0] == 1
        and method.inputs[1].shape == (1,)
        and len(method.outputs) == len(outputs) == 1
        and outputs[0].type == "float32"
        and outputs[0].shape[:-1] == ((1,) if name == FORWARD else method.inputs[0].shape)
    )
    if not fits:
        raise ArtifactError(f"{pte.path}: {name} does not take tokens and a position and give logits")
    strangers = sorted({backend for backend, _ in method.backends} - {_BACKEND})
    if strangers:
        raise ArtifactError(
            f"{pte.path}: {name} wants the delegate {strangers[0]}, but {_BACKEND} is run here"
        )
    return method


def _caches(path: Path, forward: PteMethod, score: PteMethod, context: int) -> dict[str, PteTensor]:
    """What both methods keep between runs: at the same place, with nothing else beside it."""
    ours, theirs = ({t.name: t for t in m.tensors if t.name and t.memory} for m in (forward, score))
    if not ours or ours != theirs:
        raise ArtifactError(
            f"{path}: forward and score do not share a cache: {len(ours)} and {len(theirs)} tensors "
            "of theirs have names, not the same at the same places"
        )
    arenas = {t.memory[0] for t in ours.values() if t.memory}
    places = sorted((*t.memory, t.bytes) for t in ours.values() if t.memory)
    apart = all(a[0] != b[0] or a[1] + a[2] <= b[1] for a, b in itertools.pairwise(places))
    others = any(
        t.memory and t.memory[0] in arenas and not t.name for m in (forward, score) for t in m.tensors
    )
    if others or not apart:
        raise ArtifactError(f"{path}: something else lies in the memory of the cache")
    for name, cache in ours.items():
        if len(cache.shape) < 2 or cache.shape[:2] != (1, context):
            raise ArtifactError(
                f"{path}: the cache {name} has the shape {list(cache.shape)}, but 1 x {context} "
                "positions are due"
            )
    return ours


def _kv(path: Path, caches: dict[str, PteTensor]) -> str:
    """What keys and values are stored as: the type of the largest parts of the cache."""
    kind = max(caches.values(), key=lambda cache: cache.bytes).type
    if kind not in _KV_KINDS:
        raise ArtifactError(f"{path}: a cache of {kind}, but {' and '.join(_KV_KINDS)} are read")
    return kind


def _check_manifest(artifact: Artifact, program: FoxProgram) -> None:
    """What the manifest's `pte` says of the program is so; raises ArtifactError."""
    told = artifact.manifest.pte or {}
    for key, due in (
        ("context", program.context),
        ("chunk", program.chunk),
        ("kv", program.kv),
    ):
        if told.get(key) != due:
            raise ArtifactError(
                f"{artifact.path / MANIFEST}: pte's {key} is {told.get(key)!r}, but the program's is {due!r}"
            )
    read_places(artifact, program.pte)
