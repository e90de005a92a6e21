"""What is missing is told in one sentence with the line that installs it."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.arm.tools import PROGRAMS, need_tools, qemu
from fox_edge.errors import FoxEdgeError


def which(*absent: str):
    """A machine that has every program but these."""
    return lambda name: None if name in absent else f"/usr/bin/{name}"


@pytest.fixture
def keyring(tmp_path: Path) -> Path:
    path = tmp_path / "keys.gpg"
    path.touch()
    return path


def test_nothing_is_missing(keyring: Path) -> None:
    need_tools(which(), keyring, "x86_64")
    assert qemu(which()) == "/usr/bin/qemu-aarch64-static"
    assert qemu(which("qemu-aarch64-static")) == "/usr/bin/qemu-aarch64"


def test_one_of_two_names_is_enough(keyring: Path) -> None:
    need_tools(which("qemu-aarch64-static"), keyring, "x86_64")


def test_what_is_missing_is_one_sentence(keyring: Path, tmp_path: Path) -> None:
    absent = which("qemu-aarch64-static", "qemu-aarch64", "aarch64-linux-gnu-g++", "cmake")
    with pytest.raises(FoxEdgeError) as caught:
        need_tools(absent, tmp_path / "nowhere", "x86_64")
    assert str(caught.value) == (
        "missing here: qemu-user-static, g++-aarch64-linux-gnu, cmake, debian-archive-keyring; install with: "
        "sudo apt-get install qemu-user-static g++-aarch64-linux-gnu cmake debian-archive-keyring"
    )


def test_every_package_can_be_missing(keyring: Path) -> None:
    for package, names in PROGRAMS.items():
        if package != "apt":
            with pytest.raises(FoxEdgeError, match=f"missing here: {package}".replace("+", r"\+")):
                need_tools(which(*names), keyring, "x86_64")


def test_systems_that_it_is_not_for(keyring: Path) -> None:
    with pytest.raises(FoxEdgeError, match="this one is aarch64: on ARM itself, `make test`"):
        need_tools(which(), keyring, "aarch64")
    with pytest.raises(FoxEdgeError, match="apt-get is not here"):
        need_tools(which("apt-get"), keyring, "x86_64")
