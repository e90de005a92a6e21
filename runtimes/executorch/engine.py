"""Opens an ExecuTorch program: the bindings, their kernels and threads, one loaded method at a time.

Knows ExecuTorch's Python bindings as they are in 1.4, and works around what they do:
- They link against PyTorch and want it imported first; the rest of the executorch package, which would
  bring torchao and PyTorch's exporter, is not touched.
- Every method that is loaded packs its own copy of the weights: one is held at a time.
- All methods of a program plan their memory in the same arenas. What two methods keep at the same place of
  an arena that nothing else uses (program.py makes sure of it) is one cache for both.
- The mapped file is locked in memory; here it is unlocked, so that only what is read is resident.
- The pool of threads is the process's own, and methods that were loaded do not survive a change of it.
Does not know what tokens are.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fox_edge.errors import ArtifactError, FoxEdgeError, MissingPackageError
from fox_edge.heap import trim_heap
from runtimes.mapped_pages import drop_pages

try:
    # Before the bindings, which find its libraries only then.
    import torch
    from executorch.extension.pybindings import _portable_lib as bindings
except ImportError:
    raise MissingPackageError("executorch", "executorch") from None

# Libraries beside the bindings that register kernels when they are loaded: caches and attention, rows of
# quantized embeddings.
_KERNELS = (
    "extension/llm/custom_ops/*custom_ops_aot_lib.*",
    "kernels/quantized/*quantized_ops_aot_lib.*",
)


class Engine:
    """A program that is open, with at most one of its methods loaded.

    Raises ArtifactError when ExecuTorch refuses it, FoxEdgeError when another program of this process is
    open with other threads.
    """

    def __init__(self, path: Path, threads: int) -> None:
        self._path = path
        self._name = ""
        self._method: Any = None
        with _logs() as log:
            _load_kernels()
            _set_threads(threads)
            try:
                self._program: Any = bindings._load_program(
                    str(path), program_verification=bindings.Verification.InternalConsistency
                )
            except RuntimeError as error:
                raise self._refused(error, log) from None
        _OPEN.add(self)
        _unlock(path)

    def use(self, name: str) -> None:
        """Load a method and let go of the other; the caches stay as they are."""
        if name == self._name:
            return
        self._drop_method()
        with _logs() as log:
            try:
                self._method = self._program.load_method(name)
            except RuntimeError as error:
                raise self._refused(error, log) from None
        self._name = name
        # What was read in order to be packed: the packed copy has it now.
        drop_pages(self._path)
        trim_heap()

    @property
    def loaded(self) -> str:
        """The name of the loaded method; '' where there is none."""
        return self._name

    def run(self, tokens: NDArray[np.int64], position: int) -> NDArray[np.float32]:
        """What the loaded method makes of tokens (T,) that begin at a position; valid until the next run."""
        inputs = (torch.from_numpy(tokens)[None], torch.tensor((position,)))
        try:
            with _one_torch_thread():
                (output,) = self._method.call(inputs, clone_outputs=False)
        except RuntimeError as error:
            raise FoxEdgeError(f"{self._path}: ExecuTorch failed at position {position}: {error}") from None
        found: NDArray[np.float32] = output.numpy()[0]
        return found

    def buffer(self, name: str) -> NDArray[Any]:
        """What a method keeps between runs, itself: no copy."""
        assert self._method is not None
        found: NDArray[Any] = self._method.get_attribute(name).numpy()
        return found

    def close(self) -> None:
        """Free method and program; buffers that were handed out are of no use afterwards."""
        self._drop_method()
        self._program = None
        _OPEN.discard(self)
        trim_heap()

    def _drop_method(self) -> None:
        self._name, self._method = "", None

    def _refused(self, error: RuntimeError, log: io.StringIO) -> ArtifactError:
        """ExecuTorch's own words: an error's number, and what it wrote to its log on the way."""
        lines = [line.rpartition("] ")[2].strip() for line in log.getvalue().splitlines()]
        said = next((line for line in lines if line and "cpu" not in line.lower()), str(error))
        return ArtifactError(f"{self._path}: ExecuTorch refuses it: {said[:200]}")


@contextlib.contextmanager
def _one_torch_thread() -> Iterator[None]:
    """The thread that calls ExecuTorch works for it too: as `_one_product_thread`, for this one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


_OPEN: weakref.WeakSet[Engine] = weakref.WeakSet()


def _set_threads(count: int) -> None:
    """Threads for all programs that are opened from now on."""
    now = bindings._threadpool_get_thread_count()
    if now == count:
        return
    if len(_OPEN):
        raise FoxEdgeError(
            f"{count} threads were asked for, but another ExecuTorch program of this process is open with "
            f"{now}, and they share them"
        )
    bindings._unsafe_reset_threadpool(count)


def _load_kernels() -> None:
    """Let the libraries beside the bindings register their kernels; once is enough."""
    root = Path(bindings.__file__).parents[2]
    for pattern in _KERNELS:
        for library in root.glob(pattern):
            ctypes.CDLL(str(library))
    _one_product_thread()


def _one_product_thread() -> None:
    """Attention's matrix products are PyTorch's, where that has MKL: called from ExecuTorch's own threads,
    each would start threads of its own, and these wait by spinning for most of a prompt. MKL's number for
    threads that chose none is set; PyTorch's main thread keeps the number that it has."""
    for library in Path(torch.__file__).parent.glob("lib/libtorch_cpu.*"):
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(str(library)).mkl_serv_set_num_threads(1)
    torch.set_num_threads(torch.get_num_threads())


def _unlock(path: Path) -> None:
    """Undo the lock that the bindings put on the mapped file, and let go of its pages."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).munlockall()
    drop_pages(path)


@contextlib.contextmanager
def _logs() -> Iterator[io.StringIO]:
    """What the bindings log while they load, which says what an error's number means."""
    log, before = io.StringIO(), sys.stderr
    sys.stderr = log
    try:
        yield log
    finally:
        sys.stderr = before
