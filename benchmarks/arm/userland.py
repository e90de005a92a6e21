"""A small Debian for ARM in a folder, with Python in it.

Its packages come through an apt that has its settings, lists and cache in a folder beside it: signatures are
checked as ever, the machine's own packages are left alone, and nobody need be root. Knows packages; not what
runs in them.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from benchmarks.arm.tools import KEYRING
from fox_edge.errors import FoxEdgeError
from fox_edge.partial import PartialFolder
from fox_edge.progress import say

# Its C library (2.41) is at least as new as that of the systems whose cross compilers link llama.cpp here.
SUITE, GLIBC_MINOR = "trixie", 41
MIRROR = "http://deb.debian.org/debian"
PACKAGES = ("python3", "libstdc++6", "libgomp1")

_APT = """\
APT::Architecture "arm64";
APT::Architectures {{ "arm64"; }};
APT::Install-Recommends "false";
APT::Sandbox::User "root";
Acquire::Languages "none";
Acquire::Retries "2";
Dir "{0}";
Dir::Etc "{0}/etc";
Dir::State "{0}/state";
Dir::State::status "{0}/state/status";
Dir::Cache "{0}/cache";
Dir::Log "{0}/log";
"""


def userland(work: Path) -> Path:
    """The folder that is an ARM system's root; made when it is not there. Raises FoxEdgeError."""
    root = work / f"root-{SUITE}"
    if root.exists():
        return root
    say(f"fetching {', '.join(PACKAGES)} of Debian {SUITE} for arm64")
    with PartialFolder(root) as partial:
        for package in _fetched(work / "apt"):
            run("dpkg-deb", "-x", package, _with_links(partial.path))
        # Programs are told of a processor by this file; the emulator's stands there, not this machine's.
        (partial.path / "proc").mkdir()
        partial.put_in_place()
    return root


def _with_links(root: Path) -> Path:
    """The links of a merged /usr, which belong to no package."""
    for name in ("bin", "lib"):
        (root / "usr" / name).mkdir(parents=True, exist_ok=True)
        if not (root / name).is_symlink():
            (root / name).symlink_to(Path("usr", name))
    return root


def _fetched(apt: Path) -> list[Path]:
    """Debian's packages with all that they depend on, downloaded and checked."""
    apt = apt.resolve()
    for name in ("etc/apt.conf.d", "etc/preferences.d", "etc/trusted.gpg.d", "log"):
        (apt / name).mkdir(parents=True, exist_ok=True)
    for name in ("state/lists/partial", "cache/archives/partial"):
        (apt / name).mkdir(parents=True, exist_ok=True)
    (apt / "state" / "status").touch()
    (apt / "apt.conf").write_text(_APT.format(apt), encoding="utf-8")
    source = f"deb [arch=arm64 signed-by={KEYRING}] {MIRROR} {SUITE} main\n"
    (apt / "etc" / "sources.list").write_text(source, encoding="utf-8")
    environment = {"APT_CONFIG": str(apt / "apt.conf")}
    run("apt-get", "-q", "update", environment=environment)
    run("apt-get", "-q", "-y", "--download-only", "install", *PACKAGES, environment=environment)
    return sorted((apt / "cache" / "archives").glob("*.deb"))


def python_of(root: Path) -> Path:
    """The ARM Python of a userland."""
    return root / "usr" / "bin" / "python3"


def python_version(root: Path) -> str:
    """Its version as pip wants it: 3.13."""
    return (root / "usr" / "bin" / "python3").readlink().name.removeprefix("python")


def run(*command: object, environment: dict[str, str] | None = None) -> str:
    """Run a program to its end and return its stdout; raises FoxEdgeError with its last complaint."""
    words = [str(word) for word in command]
    done = subprocess.run(
        words, capture_output=True, text=True, errors="replace", env=os.environ | (environment or {})
    )
    if done.returncode:
        raise FoxEdgeError(f"{Path(words[0]).name} failed: {last_words(done.stderr or done.stdout)}")
    return done.stdout


def last_words(text: str) -> str:
    """The line of a program's output that says what went wrong: its first error, else its last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.lower().startswith(("error", "e:", "cmake error"))]
    return (errors or lines[-1:] or ["it said nothing"])[0]
