"""What the check needs of a Debian or Ubuntu on x86, and the one line that installs what is missing."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from fox_edge.errors import FoxEdgeError

QEMU = ("qemu-aarch64-static", "qemu-aarch64")
# With these keys Debian signs what is fetched; Ubuntu has them in a package of their own.
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
# Debian package -> programs of which one must be there.
PROGRAMS: Mapping[str, tuple[str, ...]] = {
    "qemu-user-static": QEMU,
    "gcc-aarch64-linux-gnu": ("aarch64-linux-gnu-gcc",),
    "g++-aarch64-linux-gnu": ("aarch64-linux-gnu-g++",),
    "cmake": ("cmake",),
    "apt": ("apt-get",),
    "dpkg": ("dpkg-deb",),
}

Which = Callable[[str], str | None]


def missing_packages(which: Which = shutil.which, keyring: Path = KEYRING) -> list[str]:
    """Packages that would have to be installed first."""
    missing = [package for package, names in PROGRAMS.items() if not any(map(which, names))]
    return missing if keyring.is_file() else [*missing, "debian-archive-keyring"]


def need_tools(
    which: Which = shutil.which, keyring: Path = KEYRING, machine: str = platform.machine()
) -> None:
    """Raises FoxEdgeError that names what is missing, and how it is installed."""
    if machine != "x86_64":
        raise FoxEdgeError(
            f"the check emulates ARM on an x86_64 machine, but this one is {machine}: on ARM itself, `make "
            "test` runs the runtimes as they are"
        )
    if not which("apt-get"):
        raise FoxEdgeError(
            "apt-get is not here: the check fetches ARM packages of Debian's, from Debian or Ubuntu"
        )
    if missing := missing_packages(which, keyring):
        names = " ".join(missing)
        raise FoxEdgeError(f"missing here: {', '.join(missing)}; install with: sudo apt-get install {names}")


def qemu(which: Which = shutil.which) -> str:
    """The emulator's path; `need_tools` said that there is one."""
    return next(path for name in QEMU if (path := which(name)))
