"""The arrows between the rooms point one way: checkpoint -> export -> artifact -> runtime -> benchmark."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import benchmarks

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "fox_edge": set(),
    "export": {"fox_edge"},
    "runtimes": {"fox_edge"},
    "benchmarks": {"fox_edge", "runtimes"},
}
FILES = [path for room in MAY_IMPORT for path in sorted((ROOT / room).rglob("*.py"))]
# The rooms of benchmarks, each above those that it may import from.
ORDER = re.findall(r"(?m)^    (\w+)  ", benchmarks.__doc__ or "")
IN_ROOMS = [path for path in FILES if path.parents[1] == ROOT / "benchmarks"]


def names_imported(path: Path) -> Iterator[str]:
    """What a file imports, in full: 'room.module', or 'room.module.name' for a name taken from it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide which room is meant"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def rooms_imported(path: Path) -> set[str]:
    return {name.split(".")[0] for name in names_imported(path)} & set(MAY_IMPORT)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_follow_the_arrows(path: Path) -> None:
    room = path.relative_to(ROOT).parts[0]
    allowed = MAY_IMPORT[room] | {room}
    if path == ROOT / "fox_edge" / "cli.py":
        allowed = set(MAY_IMPORT)
    assert rooms_imported(path) <= allowed


@pytest.mark.parametrize("path", IN_ROOMS, ids=lambda p: str(p.relative_to(ROOT)))
def test_rooms_of_benchmarks_stand_on_those_before_them(path: Path) -> None:
    ours = [name.split(".") for name in names_imported(path) if name.split(".")[0] == "benchmarks"]
    assert {parts[1] for parts in ours} <= set(ORDER[: ORDER.index(path.parent.name) + 1])


def test_the_order_names_every_room_of_benchmarks() -> None:
    rooms = [path.parent.name for path in (ROOT / "benchmarks").glob("*/__init__.py")]
    assert sorted(ORDER) == sorted(rooms) == sorted({path.parent.name for path in IN_ROOMS})


def test_every_folder_of_modules_is_installed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    told = project["tool"]["setuptools"]["packages"]
    assert sorted(told) == sorted({".".join(path.parent.relative_to(ROOT).parts) for path in FILES})


def test_the_scan_sees_all_rooms() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in FILES} == set(MAY_IMPORT)


@pytest.mark.parametrize(
    "module",
    [
        "runtimes.onnx.session",
        "runtimes.llama_cpp.session",
        "benchmarks.latency.measure",
        "benchmarks.accuracy.answer",
    ],
)
def test_what_runs_beside_a_model_brings_no_pytorch(module: str) -> None:
    """It would take 190 MB of the memory of every process that talks to an export."""
    program = f"import sys, {module}; raise SystemExit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0
