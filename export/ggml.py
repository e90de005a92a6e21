"""ggml's own quantizers, called through ctypes in the library that llama-cpp-python installs.

Knows one C function and how to find it; not tensors' names, files, or which type anything should get.
ctypes lets go of the interpreter lock during the call, so threads quantize side by side.
"""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fox_edge.errors import FoxEdgeError, MissingPackageError, RecipeError
from fox_edge.quant import QuantType

# enum ggml_type in ggml.h: numbers that are part of the GGUF file format and never change.
TYPE_NUMBERS: dict[str, int] = {
    "f32": 0,
    "f16": 1,
    "q4_0": 2,
    "q4_1": 3,
    "q5_0": 6,
    "q5_1": 7,
    "q8_0": 8,
    "q2_k": 10,
    "q3_k": 11,
    "q4_k": 12,
    "q5_k": 13,
    "q6_k": 14,
    "iq2_xxs": 16,
    "iq2_xs": 17,
    "iq3_xxs": 18,
    "iq1_s": 19,
    "iq4_nl": 20,
    "iq3_s": 21,
    "iq2_s": 22,
    "iq4_xs": 23,
    "iq1_m": 29,
    "bf16": 30,
    "tq1_0": 34,
    "tq2_0": 35,
    "mxfp4": 39,
    "nvfp4": 40,
    "q1_0": 41,
}
# ggml ends the process when it is asked for one of these without importance.
NEED_IMPORTANCE = ("iq2_xxs", "iq2_xs", "iq1_s")


def library_path() -> Path:
    """Where llama-cpp-python keeps libggml-base; raises MissingPackageError without that package."""
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or not spec.submodule_search_locations:
        raise MissingPackageError("llama-cpp-python", "gguf")
    folder = Path(next(iter(spec.submodule_search_locations))) / "lib"
    suffix = "dylib" if sys.platform == "darwin" else "so"
    path = folder / f"libggml-base.{suffix}"
    if not path.is_file():
        raise FoxEdgeError(f"{path}: llama-cpp-python is installed without this library; reinstall it")
    return path


@cache
def library() -> ctypes.CDLL:
    """The loaded library, its functions typed."""
    path = library_path()
    try:
        loaded = ctypes.CDLL(str(path))
        loaded.ggml_quantize_chunk.restype = ctypes.c_size_t
        loaded.ggml_quantize_chunk.argtypes = [
            ctypes.c_int,  # type
            ctypes.c_void_p,  # src: float32 rows
            ctypes.c_void_p,  # dst: blocks
            ctypes.c_int64,  # first weight, of src and dst alike
            ctypes.c_int64,  # rows
            ctypes.c_int64,  # weights per row
            ctypes.c_void_p,  # importance per column, or null
        ]
        loaded.ggml_row_size.restype = ctypes.c_size_t
        loaded.ggml_row_size.argtypes = [ctypes.c_int, ctypes.c_int64]
    except (OSError, AttributeError) as error:
        raise FoxEdgeError(f"{path}: not usable as ggml's library ({error})") from None
    return loaded


def quantize(
    type_: QuantType,
    rows: NDArray[np.float32],
    importance: NDArray[np.float32] | None = None,
    tensor: str = "rows",
) -> NDArray[np.uint8]:
    """Quantize float32 rows (n, columns) to ggml's blocks (n, bytes of a row).

    `importance` (columns,) weighs the columns' errors; types in NEED_IMPORTANCE must have one. Raises
    RecipeError naming `tensor` when a row is no whole number of blocks. Every value must be finite: ggml does
    not check.
    """
    number, (n, columns) = TYPE_NUMBERS[type_.name], rows.shape
    row_bytes = type_.row_bytes(tensor, columns)
    if library().ggml_row_size(number, columns) != row_bytes:
        raise FoxEdgeError(
            f"{tensor}: a {type_.name} row of {columns} weights takes {row_bytes} bytes here, but "
            f"{library().ggml_row_size(number, columns)} in {library_path()}"
        )
    source = np.ascontiguousarray(rows, dtype=np.float32)
    blocks = np.empty((n, row_bytes), dtype=np.uint8)
    weights = None
    if importance is None and type_.name in NEED_IMPORTANCE:
        raise RecipeError(
            f"{tensor}: {type_.name} is rounded by what its columns are worth, which --rounding nearest does "
            "not know"
        )
    if importance is not None:
        weights = np.ascontiguousarray(importance, dtype=np.float32)
        if weights.shape != (columns,):
            raise ValueError(f"{tensor}: importance of shape {weights.shape} for {columns} columns")
    written = library().ggml_quantize_chunk(
        number,
        source.ctypes.data,
        blocks.ctypes.data,
        0,
        n,
        columns,
        None if weights is None else weights.ctypes.data,
    )
    if written != blocks.nbytes:
        raise FoxEdgeError(
            f"{tensor}: ggml wrote {written} bytes of {type_.name}, but {blocks.nbytes} are due"
        )
    return blocks
