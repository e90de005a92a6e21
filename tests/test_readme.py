"""The README is true: its commands parse, its tables come from the results files, its tree is the tree."""

import re
import shlex

import pytest

from benchmarks.readme import PAGES, README, ROOT, with_tables
from fox_edge import cli

TEXT = README.read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", TEXT, re.DOTALL)
SHELL_LINES = [
    line.split("#")[0].strip() for language, body in BLOCKS if language == "sh" for line in body.splitlines()
]
COMMANDS = [line for line in SHELL_LINES if line.startswith("fox-edge ")]
INLINE = re.findall(r"`(fox-edge [^`]+)`", TEXT)


@pytest.mark.parametrize("command", [*COMMANDS, *INLINE])
def test_commands_parse(command: str) -> None:
    args = cli.parse(shlex.split(command)[1:])
    assert callable(args.run)


def test_every_verb_is_shown() -> None:
    shown = {shlex.split(command)[1] for command in [*COMMANDS, *INLINE]}
    assert shown >= set(cli.VERBS)


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = {line.split()[1] for line in SHELL_LINES if line.startswith("make ")}
    assert {"demo", "test"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_ci_runs_the_readmes_own_test_command() -> None:
    assert "make test" in (ROOT / ".ci" / "run").read_text().splitlines()


def test_tables_come_from_the_results_files() -> None:
    assert "<!-- demo table: " in TEXT and "<!-- full-shape table: " in TEXT
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert with_tables(text) == text, page


HOUSE = ROOT / "docs" / "house.md"


def tree_paths(text: str) -> set[str]:
    """Paths of a page's file tree; two spaces of indent are one folder deeper."""
    blocks = re.findall(r"```(\w*)\n(.*?)```", text, re.DOTALL)
    body = next(body for language, body in blocks if not language and body.startswith("fox_edge/"))
    folders: list[str] = []
    paths = []
    for line in body.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        folders[depth:] = [line.split()[0]]
        paths.append("".join(folders).rstrip("/"))
    return set(paths)


def test_the_readmes_tree_has_every_room() -> None:
    told = tree_paths(TEXT)
    assert [path for path in told if not (ROOT / path).exists()] == []
    assert told >= {"fox_edge", "export", "runtimes", "benchmarks", "tests", "docs"}


def test_the_tree_of_the_house_is_the_tree() -> None:
    told = tree_paths(HOUSE.read_text(encoding="utf-8"))
    assert [path for path in told if not (ROOT / path).exists()] == []
    rooms = [ROOT / room for room in ("fox_edge", "export", "runtimes", "benchmarks")]
    rooms += [path.parent for room in rooms[2:] for path in room.glob("*/__init__.py")]
    modules = {
        str(path.relative_to(ROOT))
        for room in rooms
        for path in room.glob("*.py")
        if path.name != "__init__.py"
    }
    assert modules - told == set()


def test_linked_files_exist() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", TEXT):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target


def test_nothing_in_the_text_names_a_private_path() -> None:
    assert not re.search(r"(?<![\w./])/(work|root|home|tmp)/", TEXT)
