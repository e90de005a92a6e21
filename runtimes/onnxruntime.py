"""An ONNX artifact as a session: ONNX Runtime on the CPU, keys and values updated in place.

Knows ONNX Runtime and the graph's inputs and outputs. Does not know how the artifact was made, nor what
tokens mean.

The KV buffers are as long as the context and are bound as past and present at once, so a step copies none
of them; their pages become real memory only as the context fills. The attention mask's length alone tells the
graph how much of them is in use, so forgetting is a smaller number.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fox_edge.artifact import Artifact
from fox_edge.errors import ArtifactError, ContextOverflowError, FoxEdgeError, MissingPackageError
from fox_edge.processors import physical_cores
from runtimes.base import SCORE_CHUNK, Logits, SessionOptions, check_tokens
from runtimes.onnx_external import read_graph

try:
    import onnxruntime as ort
except ImportError:
    raise MissingPackageError("onnxruntime", "onnx") from None

# Tokens of a prompt that run at once: bounds the activations, long enough for the fast matrix kernels.
PREFILL_CHUNK = 256
_QUIET = 3  # onnxruntime's log level for errors only


class OnnxSession:
    """One conversation with an ONNX artifact; see `runtimes.base.Session`.

    Raises ArtifactError for a damaged model, ContextOverflowError when more positions are asked for than
    the model has.
    """

    def __init__(self, artifact: Artifact, options: SessionOptions | None = None) -> None:
        options = options or SessionOptions()
        limit = artifact.manifest.context
        self.context = limit if options.context is None else options.context
        if not 0 < self.context <= limit:
            raise ContextOverflowError(
                f"a context of {self.context} positions was asked for; this model has 1 to {limit}"
            )
        graph = read_graph(artifact.model_path).graph
        self.length = 0
        self._session: Any = _open(artifact.model_path, options.threads or physical_cores())
        self._binding = self._session.io_binding()
        dims = {value.name: value.type.tensor_type.shape.dim for value in graph.output}
        self.vocab_size: int = dims["logits"][2].dim_value
        self._bind_cache(
            [
                (name, (1, dim[1].dim_value, self.context, dim[3].dim_value))
                for name, dim in dims.items()
                if name.startswith("present.")
            ]
        )
        self._tokens = np.zeros(max(PREFILL_CHUNK, SCORE_CHUNK), np.int64)
        self._mask = np.ones(self.context, np.int64)
        self._keep = np.ones((), np.int64)
        self._logits = np.empty((1, self.vocab_size), np.float32)
        self._bind("logits_to_keep", self._keep, ())

    def prefill(self, tokens: Sequence[int]) -> Logits:
        """Append tokens to the cache in chunks; logits (vocab,) after the last."""
        ids = self._check(tokens)
        for first in range(0, len(ids), PREFILL_CHUNK):
            self._run(ids[first : first + PREFILL_CHUNK], self._logits)
        return self._logits[0].copy()

    def step(self, token: int) -> Logits:
        """Append one token; logits (vocab,) after it."""
        return self.prefill((token,))

    def score(self, tokens: Sequence[int], start: int = 0) -> Iterator[Logits]:
        """Logits after each of `tokens[start:]`: chunks (n, vocab), n <= SCORE_CHUNK."""
        return self._score(self._check(tokens), start)

    def _score(self, ids: NDArray[np.int64], start: int) -> Iterator[Logits]:
        """`score` after its checks, which come with the call and not with the first row."""
        for first in range(0, min(start, len(ids)), PREFILL_CHUNK):
            self._run(ids[first : min(first + PREFILL_CHUNK, start)], self._logits)
        for first in range(start, len(ids), SCORE_CHUNK):
            chunk = ids[first : first + SCORE_CHUNK]
            logits = np.empty((len(chunk), self.vocab_size), np.float32)
            self._run(chunk, logits)
            yield logits

    def truncate(self, length: int) -> None:
        """Keep only the first `length` cached tokens."""
        self.length = min(self.length, max(0, length))

    def reset(self) -> None:
        """Empty the cache."""
        self.truncate(0)

    def close(self) -> None:
        """Free the model and the KV buffers."""
        self._binding = self._session = None
        self._cache: list[Any] = []

    def _bind_cache(self, shapes: list[tuple[str, tuple[int, ...]]]) -> None:
        """One buffer per layer and part, past and present in one."""
        self._cache = []
        for name, shape in shapes:
            buffer = ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, np.float32))
            self._binding.bind_ortvalue_input("past_key_values" + name.removeprefix("present"), buffer)
            self._binding.bind_ortvalue_output(name, buffer)
            self._cache.append(buffer)

    def _bind(self, name: str, array: NDArray[np.int64], shape: tuple[int, ...]) -> None:
        """Let an input read the beginning of a preallocated array."""
        self._binding.bind_input(name, "cpu", 0, np.int64, shape, array.ctypes.data)

    def _check(self, tokens: Sequence[int]) -> NDArray[np.int64]:
        """The tokens as an array, once it is sure that they can be appended."""
        if self._session is None:
            raise FoxEdgeError("this session is closed")
        check_tokens(self, tokens)
        return np.asarray(tokens, np.int64)

    def _run(self, ids: NDArray[np.int64], logits: Logits) -> None:
        """Append a chunk; fill `logits` (kept, vocab) with those of its last positions."""
        count = len(ids)
        self._tokens[:count] = ids
        self._keep[...] = len(logits)
        self._bind("input_ids", self._tokens, (1, count))
        self._bind("attention_mask", self._mask, (1, self.length + count))
        self._binding.bind_output("logits", "cpu", 0, np.float32, (1, *logits.shape), logits.ctypes.data)
        self._session.run_with_iobinding(self._binding)
        self.length += count


def _open(path: Path, threads: int) -> Any:
    """An onnxruntime session with the settings that decode fast and keep memory low."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = _QUIET
    # Patterns of memory use are remembered per input shape, and every step of a conversation has its own.
    options.enable_mem_pattern = False
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        # onnxruntime raises its own kinds and plain RuntimeErrors alike; all of them speak of this file.
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ArtifactError(f"{path}: onnxruntime cannot open it ({reason})") from error
