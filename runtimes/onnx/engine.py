"""Opens a graph in onnxruntime: one place for the settings that decode fast and keep memory low.

A graph is always handed over from memory, with the folder that its data files are in, so that it may have
been rewritten since it was read (rewrite.py, prepacked.py). Knows onnxruntime's options; not what a
graph computes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fox_edge.errors import ArtifactError, FoxEdgeError, MissingPackageError
from runtimes.base import CUDA, SessionOptions
from runtimes.onnx.external import onnx

try:
    import onnxruntime as ort
except ImportError:
    raise MissingPackageError("onnxruntime", "onnx") from None

_QUIET = 3  # onnxruntime's log level for errors only
_CPU_PROVIDER, _CUDA_PROVIDER = "CPUExecutionProvider", "CUDAExecutionProvider"


def check_device(options: SessionOptions) -> None:
    """Raises FoxEdgeError when a GPU is asked for that this build of onnxruntime cannot use."""
    if options.device == CUDA and _CUDA_PROVIDER not in ort.get_available_providers():
        raise FoxEdgeError(
            f"--device cuda: onnxruntime {ort.__version__} has no {_CUDA_PROVIDER} here; the package "
            "onnxruntime-gpu, in the place of onnxruntime, brings it"
        )


def open_on(
    model: bytes | str, options: ort.SessionOptions, device: str | None, name: Path
) -> ort.InferenceSession:
    """An onnxruntime session that computes on a device; what its CUDA provider cannot do, the CPU does.

    Raises FoxEdgeError where that provider does not start, and onnxruntime's own errors.
    """
    providers = [_CUDA_PROVIDER, _CPU_PROVIDER] if device == CUDA else [_CPU_PROVIDER]
    session = ort.InferenceSession(model, options, providers=providers)
    # onnxruntime only warns, and goes on with the CPU alone.
    if providers[0] not in session.get_providers():
        raise FoxEdgeError(
            f"{name}: onnxruntime's {providers[0]} does not start here; it needs an NVIDIA driver, and the "
            "CUDA and cuDNN libraries that it was built for"
        )
    return session


def open_engine(
    model: onnx.ModelProto,
    folder: Path,
    threads: int,
    name: Path,
    extra: Mapping[str, str] | None = None,
    save_to: Path | None = None,
    device: str | None = None,
) -> Any:
    """An onnxruntime session of a graph whose data files are in `folder`.

    `name` is what an error speaks of, `extra` are more of onnxruntime's own settings; `save_to` is where
    onnxruntime writes the graph as it will run it; `device` is as in SessionOptions. Raises ArtifactError for
    a graph that it refuses.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = _QUIET
    # Patterns of memory use are remembered per input shape, and every step of a conversation has its own.
    options.enable_mem_pattern = False
    settings = {
        "session.model_external_initializers_file_folder_path": str(folder),
        # Matrices are packed side by side when a session opens: half the time on two cores.
        "session.prepack.enable_parallel": "1",
        **(extra or {}),
    }
    for key, value in settings.items():
        options.add_session_config_entry(key, value)
    if save_to is not None:
        options.optimized_model_filepath = str(save_to)
    try:
        return open_on(model.SerializeToString(), options, device, name)
    except FoxEdgeError:
        raise
    except Exception as error:
        # onnxruntime raises its own kinds and plain RuntimeErrors alike; all of them speak of this file.
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ArtifactError(f"{name}: onnxruntime cannot open it ({reason})") from error


_ELEMENTS: dict[str, type[np.generic]] = {"tensor(float)": np.float32, "tensor(int8)": np.int8}


def cache_shapes(engine: Any) -> dict[str, tuple[int, int, type[np.generic]]]:
    """Of every `present.*` output: KV heads, head dimension and element type."""
    return {
        out.name: (int(out.shape[1]), int(out.shape[3]), _ELEMENTS[out.type])
        for out in engine.get_outputs()
        if out.name.startswith("present.")
    }


def past_name(present: str) -> str:
    """The input that a `present.*` output becomes in the next step."""
    return "past_key_values" + present.removeprefix("present")


def first_logits(engine: Any) -> NDArray[np.float32]:
    """Logits (vocab,) after one token from the middle of the vocabulary, in an empty cache."""
    vocab_size = next(out.shape[2] for out in engine.get_outputs() if out.name == "logits")
    tokens = np.array([[vocab_size // 2]], np.int64)
    feed: dict[str, NDArray[Any]] = {"input_ids": tokens, "attention_mask": np.ones_like(tokens)}
    for name, (heads, width, kind) in cache_shapes(engine).items():
        feed[past_name(name)] = np.zeros((1, heads, 0, width), kind)
    logits: NDArray[np.float32] = engine.run(["logits"], feed)[0][0, -1]
    return logits
