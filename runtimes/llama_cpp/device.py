"""What a build of llama.cpp can compute on, and how it is told: the CPU, or a GPU through its CUDA backend.

A build with CUDA would take the GPU without being asked, and with it memory that nobody reckoned with; here
it computes on the CPU unless told otherwise. Knows ggml's registry of backends; not models or sessions.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import llama_cpp.llama_cpp as lib

from fox_edge.errors import FoxEdgeError
from runtimes.base import CPU, CUDA, SessionOptions

# llama_model_params: every layer, and the head with them.
_ALL_LAYERS = -1
# A list of devices that ends at once: with none at all, no product is sent to a GPU, however large.
_NO_DEVICES = (ctypes.c_void_p * 1)(None)


@cache
def cuda_devices() -> int | None:
    """GPUs that llama.cpp's CUDA backend sees; None where it was built without one."""
    library = lib._lib
    library.ggml_backend_reg_by_name.restype = ctypes.c_void_p
    library.ggml_backend_reg_by_name.argtypes = (ctypes.c_char_p,)
    library.ggml_backend_reg_dev_count.restype = ctypes.c_size_t
    library.ggml_backend_reg_dev_count.argtypes = (ctypes.c_void_p,)
    backend = library.ggml_backend_reg_by_name(b"CUDA")
    return int(library.ggml_backend_reg_dev_count(backend)) if backend else None


def check_device(options: SessionOptions) -> None:
    """Raises FoxEdgeError when a GPU is asked for that this build of llama.cpp cannot use."""
    if options.device != CUDA:
        return
    devices = cuda_devices()
    if devices is None:
        raise FoxEdgeError(
            "--device cuda: llama-cpp-python was built here without CUDA; build it with "
            "CMAKE_ARGS=-DGGML_CUDA=on pip install --force-reinstall --no-binary :all: llama-cpp-python"
        )
    if not devices or not lib.llama_supports_gpu_offload():
        raise FoxEdgeError("--device cuda: llama.cpp was built with CUDA, but sees no NVIDIA GPU here")


def choose_device(params: Any, options: SessionOptions) -> None:
    """Write into llama_model_params where weights and KV cache lie."""
    if options.device == CUDA:
        params.n_gpu_layers = _ALL_LAYERS
    elif options.device == CPU or cuda_devices():
        params.n_gpu_layers = 0
        params.devices = ctypes.cast(_NO_DEVICES, ctypes.c_void_p)
