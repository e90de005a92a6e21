"""PyTorch for ARM without NVIDIA's libraries: ExecuTorch's Python bindings want it loaded, and no GPU.

PyPI's builds of PyTorch for ARM are made for NVIDIA's servers and do not load without gigabytes of libraries,
of which nothing is called here. One tiny library fills their names and functions, so that the loader finds
what it asks for. Knows ELF through binutils; not ExecuTorch, whose kernels are all its own.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from benchmarks.arm.userland import python_of, run

# PyTorch's own libraries for GPUs.
_FOR_GPUS = ("libtorch_cuda*.so", "libc10_cuda.so", "libcaffe2_nvrtc.so", "libtorch_nvshmem.so")
# Functions give the address of empty room, whose lowest byte is 0: to be written to where they promise a
# reference, false where they promise an answer, an error where they promise a status.
_STAND_IN = """\
.text
stand_in: adrp x0, room
 add x0, x0, :lo12:room
 ret
.data
.balign 4096
room: .zero 8192
"""
# The beginning of a C++ type's description, of which the name is read (Itanium C++ ABI, 2.9.5).
_TYPE = "_ZTI"
# How PyTorch's Python asks whether it was built for several processes.
_IS_BUILT = re.compile(r'hasattr\(torch\._C, "_\w+_init"\)')


def without_gpu(lib: Path, root: Path) -> list[str]:
    """Let PyTorch's libraries in a folder load without a GPU's; the names of libraries that were filled."""
    for_gpus = [path for pattern in _FOR_GPUS for path in lib.glob(pattern)]
    data = symbols(for_gpus, "--defined-only", kinds="BDRVu")
    for path in for_gpus:
        path.unlink()
    kept = sorted(lib.glob("*.so*"))
    system = sorted((root / "usr" / "lib" / "aarch64-linux-gnu").glob("*.so*"))
    there = {path.name for path in (*kept, *system, *(root / "lib").glob("ld-linux-*"))}
    absent = sorted({name for path in kept for name in needed(path)} - there)
    if absent:
        known = symbols([*kept, *system, python_of(root).resolve()], "--defined-only")
        source, built = lib / "stand_in.s", lib / "stand_in.so"
        source.write_text(assembly(symbols(kept, "--undefined-only", kinds="U") - known, data), "utf-8")
        run("aarch64-linux-gnu-gcc", "-shared", "-nostdlib", "-o", built, source)
        for name in absent:
            shutil.copyfile(built, lib / name)
        source.unlink()
        built.unlink()
    return absent


def without_processes(package: Path) -> None:
    """Let PyTorch be as it is where it was built for a single process.

    What binds its processes to each other calls NVIDIA's libraries as soon as it is loaded.
    """
    for path in (package / "__init__.py", *(package / "distributed").rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        if (single := _IS_BUILT.sub("False", text)) != text:
            path.write_text(single, encoding="utf-8")


def assembly(names: set[str], data: set[str]) -> str:
    """A library that has all names: descriptions of types, room for data, functions that do nothing."""
    lines = [_STAND_IN]
    for name in sorted(names):
        if name.startswith(_TYPE):
            own = f'{name}: .quad room, 1f\n1: .asciz "{name.removeprefix(_TYPE)}"\n.balign 8\n'
        else:
            own = f".set {name}, {'room' if name in data else 'stand_in'}\n"
        lines.append(f".globl {name}\n{own}")
    return "".join(lines)


def needed(library: Path) -> list[str]:
    """Names of the libraries that one asks the loader for."""
    said = run("aarch64-linux-gnu-readelf", "--dynamic", library)
    return re.findall(r"\(NEEDED\).*\[(.+)\]", said)


def symbols(libraries: Iterable[Path], which: str, kinds: str = "") -> set[str]:
    """Names that libraries define or need from others, without versions; all kinds (nm's letters) if ''."""
    found = set()
    for library in libraries:
        for line in run("aarch64-linux-gnu-nm", "--dynamic", which, library).splitlines():
            kind, name = line.split()[-2:]
            if not kinds or kind in kinds:
                found.add(name.partition("@")[0])
    return found
