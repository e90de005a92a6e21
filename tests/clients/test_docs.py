"""What docs/onnx-clients.md and docs/browser.md tell a reader to type works, and their figures are true."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from export.onnx_clients import GENAI_CONFIG, GENAI_MODEL
from fox_edge.artifact import Artifact
from fox_edge.cli import parse
from fox_edge.tokenizer import Tokenizer
from runtimes.base import SessionOptions, open_session
from runtimes.browser.server import HERE as PAGE
from runtimes.generate import generate
from tests.clients.helpers import HERE, need_node

DOCS = Path(__file__).parents[2] / "docs"
TEXT = (DOCS / "onnx-clients.md").read_text(encoding="utf-8")
BROWSER = (DOCS / "browser.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", TEXT, re.DOTALL)
PYTHON = [body for language, body in BLOCKS if language == "python"]
QUESTION = "Ivy has 4 crates of 12 apples. She gives 9 away. How many are left?"


@pytest.fixture
def answer(exported: Artifact) -> str:
    """What our own runtime answers to the question of the examples."""
    tokenizer = Tokenizer.from_folder(exported.path)
    prompt = tokenizer.encode_chat([{"role": "user", "content": QUESTION}])
    with contextlib.closing(open_session(exported, SessionOptions(threads=1))) as session:
        return tokenizer.decode(generate(session, prompt, stop_ids=tokenizer.stop_ids, max_tokens=200))


@pytest.mark.parametrize("code", PYTHON, ids=["genai", "optimum"])
def test_python_examples(
    code: str, answer: str, exported: Artifact, capfd: pytest.CaptureFixture[str]
) -> None:
    assert QUESTION in code
    exec(compile(code.replace("fox-phone", str(exported.path)), "onnx-clients.md", "exec"), {})
    assert capfd.readouterr().out.strip() == answer


def test_javascript_example(answer: str, exported: Artifact) -> None:
    code = next(body for language, body in BLOCKS if language == "js")
    assert QUESTION in code
    code = code.replace("/path/to/models", str(exported.path.parent)).replace("fox-phone", exported.path.name)
    node = need_node(HERE)
    done = subprocess.run(
        [node, "--input-type=module", "-e", code], capture_output=True, text=True, timeout=120, cwd=HERE
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == answer


@pytest.mark.parametrize("text", [TEXT, BROWSER], ids=["onnx-clients", "browser"])
def test_commands_parse(text: str) -> None:
    blocks = re.findall(r"```(\w+)\n(.*?)```", text, re.DOTALL)
    lines = [line for language, body in blocks if language == "sh" for line in body.splitlines()]
    commands = [shlex.split(line, comments=True) for line in lines]
    ours = [command for command in commands if command[0] == "fox-edge"]
    assert ours
    for command in ours:
        assert callable(parse(command[1:]).run)
    for command in commands:
        if command[0] == "node":
            assert (DOCS.parent / command[1]).is_file()


def test_sizes(exported: Artifact) -> None:
    """The table's figures for nano, give or take what another recipe's graph is longer."""
    for name in (GENAI_MODEL, GENAI_CONFIG):
        row = next(line for line in TEXT.splitlines() if line.startswith(f"| `{name}`"))
        told = int(row.split("|")[3].replace(",", ""))
        assert abs((exported.path / name).stat().st_size - told) <= 0.1 * told, name


def test_pictures_exist() -> None:
    pictures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", TEXT + BROWSER)
    assert pictures == ["browser.png"]
    assert all((DOCS / name).stat().st_size < 200_000 for name in pictures)


def test_versions_in_the_browser_are_those_that_are_installed() -> None:
    packages = json.loads((PAGE / "package.json").read_text())["dependencies"]
    assert f"wllama {packages['@wllama/wllama']} |" in BROWSER
    assert f"onnxruntime-web {packages['onnxruntime-web']} |" in BROWSER
    assert packages["@wllama/wllama"] == packages["@wllama/wllama-compat"]
