"""llama.cpp's libraries for ARM, built here from the sources that llama-cpp-python brings, once per -march.

Only the processor-dependent library is compiled anew for each; what it is loaded by is compiled once. Knows
CMake and llama-cpp-python's package of sources; not what is run with the libraries.
"""

from __future__ import annotations

import re
import shutil
import sys
import tarfile
from pathlib import Path

from benchmarks.arm.userland import run
from benchmarks.arm.wheels import CONSTRAINTS
from fox_edge.errors import FoxEdgeError
from fox_edge.partial import PartialFolder
from fox_edge.processors import available_cores
from fox_edge.progress import say

PACKAGE = "llama-cpp-python"
_TOOLCHAIN = """\
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_C_COMPILER aarch64-linux-gnu-gcc)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER)
"""
_OFF = (
    "GGML_NATIVE",
    *(f"LLAMA_BUILD_{part}" for part in ("COMMON", "TESTS", "TOOLS", "EXAMPLES", "SERVER")),
)


def sources(work: Path) -> Path:
    """llama-cpp-python's unpacked sources, of the version that is installed here; raises FoxEdgeError."""
    folder = work / f"{PACKAGE}-sources"
    if folder.exists():
        return folder
    version = _pinned()
    say(f"fetching the sources of {PACKAGE} {version}")
    with PartialFolder(folder) as partial:
        run(
            *(sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"),
            *("--no-binary=:all:", f"--dest={partial.path}", f"{PACKAGE}=={version}"),
        )
        archive = next(partial.path.glob("*.tar.gz"))
        with tarfile.open(archive) as tar:
            tar.extractall(partial.path, filter="data")
        archive.unlink()
        (unpacked,) = partial.path.iterdir()
        for path in unpacked.iterdir():
            path.rename(partial.path / path.name)
        unpacked.rmdir()
        partial.put_in_place()
    return folder


def _pinned() -> str:
    """The version of llama-cpp-python that constraints.txt names."""
    found = re.search(rf"(?m)^{PACKAGE}==(\S+)$", CONSTRAINTS.read_text(encoding="utf-8"))
    assert found is not None, CONSTRAINTS
    return found[1]


def libraries(work: Path, march: str) -> Path:
    """A folder with libllama and what it needs, for one -march; raises FoxEdgeError."""
    folder = work / "llama-cpp" / march
    if folder.exists():
        return folder
    source, build = sources(work) / "vendor" / "llama.cpp", work / "llama-cpp-build"
    say(f"building llama.cpp for {march}")
    build.mkdir(parents=True, exist_ok=True)
    toolchain = build / "toolchain.cmake"
    toolchain.write_text(_TOOLCHAIN, encoding="utf-8")
    run(
        *("cmake", "-S", source, "-B", build, f"-DCMAKE_TOOLCHAIN_FILE={toolchain.resolve()}"),
        *("-DCMAKE_BUILD_TYPE=Release", "-DBUILD_SHARED_LIBS=ON", f"-DGGML_CPU_ARM_ARCH={march}"),
        # Each finds the others beside itself: in the build's folder lie those of the last -march.
        *("-DCMAKE_BUILD_WITH_INSTALL_RPATH=ON", "-DCMAKE_INSTALL_RPATH=$ORIGIN"),
        *(f"-D{option}=OFF" for option in _OFF),
    )
    run("cmake", "--build", build, "--target", "llama", "--parallel", available_cores())
    with PartialFolder(folder) as partial:
        _collect(build / "bin", partial.path)
        partial.put_in_place()
    return folder


def _collect(built: Path, folder: Path) -> None:
    """The libraries under the names that programs and one another ask for: lib*.so and its soname."""
    names = [path for path in built.glob("lib*.so*") if re.fullmatch(r"lib[\w-]+\.so(\.\d+)?", path.name)]
    if not any(path.name == "libllama.so" for path in names):
        raise FoxEdgeError(f"{built}: the build of llama.cpp left no libllama.so")
    for path in names:
        shutil.copyfile(path.resolve(), folder / path.name)
