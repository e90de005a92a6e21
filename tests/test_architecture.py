"""The arrows between the rooms point one way: checkpoint -> export -> artifact -> runtime -> benchmark."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "fox_edge": set(),
    "export": {"fox_edge"},
    "runtimes": {"fox_edge"},
    "benchmarks": {"fox_edge", "runtimes"},
}
FILES = [path for room in MAY_IMPORT for path in sorted((ROOT / room).rglob("*.py"))]


def rooms_imported(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide which room is meant"
            found.add((node.module or "").split(".")[0])
    return found & set(MAY_IMPORT)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_follow_the_arrows(path: Path) -> None:
    room = path.relative_to(ROOT).parts[0]
    allowed = MAY_IMPORT[room] | {room}
    if path == ROOT / "fox_edge" / "cli.py":
        allowed = set(MAY_IMPORT)
    assert rooms_imported(path) <= allowed


def test_the_scan_sees_all_rooms() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in FILES} == set(MAY_IMPORT)


@pytest.mark.parametrize(
    "module", ["runtimes.onnxruntime", "runtimes.llama_cpp", "benchmarks.measure", "benchmarks.answer"]
)
def test_what_runs_beside_a_model_brings_no_pytorch(module: str) -> None:
    """It would take 190 MB of the memory of every process that talks to an export."""
    program = f"import sys, {module}; raise SystemExit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0
