"""What every runtime gives: a session that turns tokens into logits, and nothing else.

Sampling, stop tokens, streaming and chat are written once above it (generate.py, chat/). A runtime
module knows its library; it does not know how an artifact was made.
"""

from __future__ import annotations

import importlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from fox_edge.artifact import MANIFEST, Artifact
from fox_edge.errors import ContextOverflowError, FoxEdgeError
from fox_edge.progress import say

if TYPE_CHECKING:
    from runtimes.onnx.foreign import ForeignOnnx
    from runtimes.sampling import Choice

Logits = NDArray[np.float32]

# What may compute (`SessionOptions.device`).
CPU, CUDA = "cpu", "cuda"

# Rows of logits that `score` holds at once: 64 x 256,000 float32 are 66 MB.
SCORE_CHUNK = 64


@runtime_checkable
class Session(Protocol):
    """A model opened for one conversation of at most `context` tokens. All logits are float32."""

    context: int
    vocab_size: int

    @property
    def length(self) -> int:
        """Tokens in the KV cache."""
        ...

    def prefill(self, tokens: Sequence[int]) -> Logits:
        """Append tokens (at least one) to the cache; logits (vocab,) after the last.

        Raises ContextOverflowError before touching the cache when they do not fit.
        """
        ...

    def step(self, token: int) -> Logits:
        """Append one token; logits (vocab,) after it."""
        ...

    def score(self, tokens: Sequence[int], start: int = 0) -> Iterator[Logits]:
        """Append tokens; logits after each of `tokens[start:]` in chunks (n, vocab), n <= SCORE_CHUNK."""
        ...

    def truncate(self, length: int) -> None:
        """Keep only the first `length` cached tokens."""
        ...

    def reset(self) -> None:
        """Empty the cache."""
        ...

    def close(self) -> None:
        """Free the model; the session is of no use afterwards."""
        ...


@runtime_checkable
class SharingSession(Session, Protocol):
    """A session that can open other conversations on the weights that it has loaded.

    The weights are freed when the last of them is closed, whichever that is.
    """

    def another(self) -> SharingSession:
        """Another conversation, empty, of the same context, on the same weights."""
        ...

    def copy_prefix(self, source: SharingSession, length: int) -> None:
        """Hold the first `length` tokens of a conversation on the same weights, and nothing else.

        They are copied, bit by bit, not computed. Raises FoxEdgeError when the source has fewer tokens.
        """
        ...


@runtime_checkable
class BatchingSession(SharingSession, Protocol):
    """A session whose conversations can take a step together: the weights are read once for all of them.

    It can choose tokens where the logits are (`sampling.choose` says how), so that no row has to be moved. A
    choice gives the token's id, or -1 where the logits are not numbers.
    """

    # Tokens of a prompt that may run between two steps of others.
    prefill_chunk: int

    def step_many(
        self,
        conversations: Sequence[BatchingSession],
        tokens: Sequence[int],
        choices: Sequence[Choice | None] | None = None,
    ) -> list[Logits | int]:
        """Append one token to each of several conversations on these weights; self may be among them.

        For each, the logits (vocab,) after it or, where there is a choice, the id of the token chosen.
        Raises FoxEdgeError (ContextOverflowError where one is full) with all of them left as they were.
        """
        ...

    def prefill_choose(self, tokens: Sequence[int], choice: Choice) -> int:
        """Append tokens, as `prefill` does; the id of the token chosen after the last."""
        ...


class TimedTurn(NamedTuple):
    """One turn of a conversation by the clock: tokens computed of its prompt, and seconds.

    `stamps_s` are the times at which each token of the answer was there; the first one comes of the prompt.
    """

    prompt_tokens: int
    asked_s: float
    prompt_s: float
    stamps_s: list[float]


class Occupied(NamedTuple):
    """Bytes of memory: at most so far, now by what it is, before any model was opened (None: not told)."""

    peak: int
    anonymous: int | None
    file: int | None
    empty: int | None


@runtime_checkable
class RemoteSession(Session, Protocol):
    """A session in a program of its own, which runs whole conversations and reads its own clock.

    Asking it for a token at a time would time the asking. `load_s` is what opening the model took there.
    """

    load_s: float

    def converse(self, turns: Sequence[Sequence[int]], decode_tokens: int) -> list[TimedTurn]:
        """One conversation, from an empty cache; every turn is answered with a token and so many more."""
        ...

    def occupied(self) -> Occupied:
        """What that program holds in memory."""
        ...


@dataclass(frozen=True)
class SessionOptions:
    """What a user may choose when opening a session. None: the runtime's own good default."""

    context: int | None = None
    threads: int | None = None
    # What the KV cache stores, by a name that the runtime knows ('f16', 'q8_0', 'int8'). Any but the default
    # changes answers a little.
    kv: str | None = None
    # llama.cpp only: threads for prompts where they shall be others than for decoding; attention in one pass
    # over the cache (a quantized cache needs it); whether weights are repacked at load for this processor's
    # kernels (a copy in memory); whether the file is mapped or read.
    prompt_threads: int | None = None
    flash_attention: bool | None = None
    repack: bool | None = None
    mmap: bool | None = None
    # ONNX only: 1 computes products in float32, 4 (what exports ask for) on activations rounded to int8.
    accuracy_level: int | None = None
    # How many tokens are guessed from what came before (lookup.py): 'auto': as many as pay; None: none.
    speculate: int | Literal["auto"] | None = None
    # What computes: 'cpu' or 'cuda'. None: the GPU for what is named cuda:..., else the CPU.
    device: str | None = None
    # Conversations that will share the weights (`SharingSession.another`): memory is reckoned for all.
    conversations: int = 1
    # Whether an answer's bits shall not depend on who else is asking: on a GPU a batch then has rows for all
    # of them, whoever takes a step, and llama.cpp takes no more into a pass than leaves all bits alike.
    fixed_batch: bool = True
    # Whether what is kept beside the artifact (packed weights, tuned choices) may be used and added to.
    cache: bool = True


class TokenFile(Protocol):
    """What a model's files tell a runtime about tokens."""

    def tokenize(self, text: str, special: bool) -> list[int]:
        """Token ids as the runtime makes them, without <bos>; `special`: special tokens are recognized."""
        ...

    def special_ids(self) -> dict[str, int | None]:
        """The ids under 'bos', 'eos', 'pad', 'unk' that the file tells a runtime."""
        ...

    def chat_template(self) -> str | None:
        """The chat template that the model carries."""
        ...


class ModelFile(TokenFile, Protocol):
    """What is in an artifact's model file, for verification: read without running the model."""

    def tensor_names(self) -> list[str]:
        """Hugging Face names of the tensors in the file; a tied matrix appears once, as the embedding."""
        ...

    def stored(self, name: str) -> tuple[str, int]:
        """The name of the type that a tensor has in the file, and its bytes there."""
        ...

    def rows(self, name: str, start: int, stop: int) -> Logits:
        """Dequantized rows [start, stop) of a tensor, float32, in the checkpoint's own layout.

        A vector is one row.
        """
        ...

    def tie(self) -> str:
        """One sentence that proves that embedding and head are one byte range.

        Raises VerificationError when the file holds two.
        """
        ...

    def close(self) -> None:
        """Let go of the file."""
        ...


# Choices that only some runtimes have.
_SPECIAL = ("prompt_threads", "flash_attention", "repack", "mmap", "accuracy_level")


def check_choices(
    options: SessionOptions,
    runtime: str,
    kv: Sequence[str],
    takes: Collection[str] = (),
    devices: Sequence[str] = (CPU,),
) -> None:
    """Raises FoxEdgeError for a choice that a runtime does not have.

    `kv` are the types that its KV cache may have, the default first; `takes` names the others of its choices;
    `devices` are what it can compute on.
    """
    if options.device is not None and options.device not in devices:
        raise FoxEdgeError(f"--device {options.device}: {runtime} computes on {' or '.join(devices)}")
    if options.kv is not None and options.kv not in kv:
        raise FoxEdgeError(f"--kv {options.kv}: {runtime} has {' or '.join(kv)}")
    for name in _SPECIAL:
        value = getattr(options, name)
        if value is not None and name not in takes:
            word = ("off", "on")[value] if isinstance(value, bool) else value
            raise FoxEdgeError(f"--{name.replace('_', '-')} {word}: {runtime} has no such choice")


def check_tokens(session: Session, tokens: Sequence[int]) -> None:
    """What every session refuses before it touches its cache.

    Raises ContextOverflowError when the tokens do not fit, FoxEdgeError when there are none or an id is not
    in the vocabulary.
    """
    if not len(tokens):
        raise FoxEdgeError("a model needs at least one token to go on from")
    if session.length + len(tokens) > session.context:
        raise ContextOverflowError(
            f"{session.length} tokens and {len(tokens)} more do not fit a context of {session.context}"
        )
    if not 0 <= min(tokens) <= max(tokens) < session.vocab_size:
        raise FoxEdgeError(
            f"token ids {min(tokens)} to {max(tokens)} are not all in a vocabulary of {session.vocab_size}"
        )


# Artifact format -> "module:class" of its ModelFile; constructed with (Artifact,).
MODEL_FILES: dict[str, str] = {
    "gguf": "runtimes.llama_cpp.gguf_file:GgufFile",
    "onnx": "runtimes.onnx.file:OnnxFile",
    "pte": "runtimes.executorch.file:PteFile",
}


class Runtime(NamedTuple):
    """One row of the registry: what a runtime is called, and the class that opens a model in it.

    `session` is "module:class", constructed with (what it `opens`, SessionOptions), and has a static `need`.
    "model" is an artifact or a checkpoint, whichever the path holds. A class whose sessions are in a device's
    memory has a static `room`, too. `quant` is what a checkpoint's weights
    become. `kv` is whose types its cache has (kv_types), where that is not the artifact's format. `converts`:
    weights lie in memory otherwise than in the file, and the session class's `held_bytes` tells how many.
    `batch` is how many conversations an evaluation lets step together if nobody says another number; 0 where
    they cannot. `remote`: its sessions are `RemoteSession`s.
    """

    name: str
    session: str
    opens: Literal["artifact", "checkpoint", "foreign", "model"] = "artifact"
    quant: str = "bf16"
    kv: str | None = None
    converts: bool = False
    batch: int = 0
    remote: bool = False


# A new runtime is one row here: of RUNTIMES where it has an artifact format of its own (and kv_types.KV_TYPES
# says what its cache stores), of PREFIXES where a user's word chooses it.

# Artifact format -> the runtime that opens it.
RUNTIMES: dict[str, Runtime] = {
    "gguf": Runtime("llama.cpp", "runtimes.llama_cpp.session:LlamaCppSession", batch=1),
    "onnx": Runtime("onnxruntime", "runtimes.onnx.session:OnnxSession"),
    "pte": Runtime("executorch", "runtimes.executorch.session:PteSession"),
}

# How a user names a checkpoint that PyTorch is to open: torch:nano.
TORCH_PREFIX = "torch:"
# Opens a fox_edge.checkpoint.Checkpoint.
TORCH_RUNTIME = Runtime("torch", "runtimes.torch:TorchSession", "checkpoint")
_ON_GPU = "runtimes.cuda.session"
# The beginning of what a user names -> the runtime that opens the rest.
PREFIXES: dict[str, Runtime] = {
    TORCH_PREFIX: TORCH_RUNTIME,
    "cuda:": Runtime("cuda", f"{_ON_GPU}:CudaSession", "model", "bf16", "torch", True, 64),
    "cuda-int8:": Runtime("cuda", f"{_ON_GPU}:CudaInt8Session", "checkpoint", "int8", "torch", True, 64),
    "cuda-int4:": Runtime("cuda", f"{_ON_GPU}:CudaInt4Session", "checkpoint", "int4", "torch", True, 64),
    "browser:": Runtime("browser", "runtimes.browser.session:BrowserSession", remote=True),
}

# Opens an onnx_foreign.ForeignOnnx: an ONNX model of another tool.
FOREIGN_ONNX = Runtime("onnxruntime", "runtimes.onnx.foreign_session:ForeignSession", "foreign")


def split_prefix(spec: str) -> tuple[Runtime | None, str]:
    """The runtime that a user's word asks for, None without such a word, and the rest of it."""
    for prefix, runtime in PREFIXES.items():
        if spec.startswith(prefix):
            return runtime, spec.removeprefix(prefix)
    return None, spec


def runtime_name(format: str) -> str:
    """The runtime that opens an artifact of this format."""
    return runtime_of_format(format).name


def usual_batch(runtime: str) -> int:
    """`Runtime.batch` of the runtime of this name."""
    return max(row.batch for row in (*RUNTIMES.values(), *PREFIXES.values()) if row.name == runtime)


def open_model(path: Path) -> Artifact | ForeignOnnx:
    """What a user's path names: an artifact, or another tool's ONNX model; raises ArtifactError."""
    if not is_foreign(path):
        return Artifact.open(path)
    foreign: ForeignOnnx = load("runtimes.onnx.foreign:ForeignOnnx").open(path)
    return foreign


def open_in(runtime: Runtime, model: Any, options: SessionOptions) -> Session:
    """Open what a runtime `opens` in it, guessing ahead where the options say so; imports it only now."""
    session: Session = load("runtimes.lookup:speculating")(load(runtime.session)(model, options), options)
    return session


def open_session(model: Artifact | ForeignOnnx, options: SessionOptions | None = None) -> Session:
    """Open a model in the runtime of its format; imports that runtime only now.

    What was tuned for this machine fills in for choices that were not made, and the user is told.
    Raises MissingPackageError naming the extra, ArtifactError for a damaged model file.
    """
    options = options or SessionOptions()
    if not isinstance(model, Artifact):
        foreign: Session = load(FOREIGN_ONNX.session)(model, options)
        return foreign
    entry = runtime_of_format(model.manifest.format)
    options, remark = load("runtimes.tuning:with_tuning")(model, options)
    if remark:
        say(remark)
    return open_in(entry, model, options)


def open_model_file(artifact: Artifact) -> ModelFile:
    """Open an artifact's model file for looking into it; raises ArtifactError for a damaged one."""
    runtime_name(artifact.manifest.format)
    file: ModelFile = load(MODEL_FILES[artifact.manifest.format])(artifact)
    return file


def is_artifact(path: Path) -> bool:
    """Whether a user's path is a folder with a manifest of ours."""
    return (path / MANIFEST).is_file()


def is_foreign(path: Path) -> bool:
    """Whether a user's path is an .onnx file, or a folder of them without a manifest of ours.

    `open_model` describes it.
    """
    if path.is_file():
        return path.suffix == ".onnx"
    return path.is_dir() and not (path / MANIFEST).exists() and any(path.glob("*.onnx"))


def load(spec: str) -> Any:
    """Import 'module:attribute'."""
    module, attribute = spec.split(":")
    return getattr(importlib.import_module(module), attribute)


def runtime_of_format(format: str) -> Runtime:
    """The row of an artifact's format; raises FoxEdgeError listing the formats that there are."""
    if format not in RUNTIMES:
        raise FoxEdgeError(f"no runtime opens the format '{format}'; known: {', '.join(RUNTIMES)}")
    return RUNTIMES[format]
