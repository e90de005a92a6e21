from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fox_edge.partial import PartialFolder, partial_files, write_whole

_FILL_AND_DIE = """
import os, signal, sys
from pathlib import Path
from fox_edge.partial import PartialFolder
with PartialFolder(Path(sys.argv[1])) as partial:
    (partial.path / "weights").write_bytes(b"x" * 1000)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_nothing_is_seen_before_it_is_in_place(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "model"
    with PartialFolder(target) as partial:
        (partial.path / "weights").write_text("w")
        assert not target.exists()
        partial.put_in_place()
        assert (target / "weights").read_text() == "w"
    assert names(target.parent) == ["model"] and names(target) == ["weights"]


def test_an_old_target_is_replaced_whole(tmp_path: Path) -> None:
    target = tmp_path / "model"
    target.mkdir()
    (target / "old").touch()
    with PartialFolder(target) as partial:
        (partial.path / "new").touch()
        partial.put_in_place()
    assert names(tmp_path) == ["model"] and names(target) == ["new"]


def test_leaving_without_it_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="stop"), PartialFolder(tmp_path / "model") as partial:
        (partial.path / "weights").touch()
        raise ValueError("stop")
    assert names(tmp_path) == []


def test_an_old_target_comes_back_when_the_new_one_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, rename = tmp_path / "model", Path.rename
    target.mkdir()
    (target / "old").touch()

    def fail(self: Path, to: Path) -> Path:
        if self.name.endswith(".partial"):
            raise OSError(5, "Input/output error")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="Input/output"), PartialFolder(target) as partial:
        partial.put_in_place()
    assert names(tmp_path) == ["model"] and names(target) == ["old"]


def test_what_a_killed_process_left_is_cleared_by_the_next(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", _FILL_AND_DIE, str(tmp_path / "model")])
    assert done.returncode == -signal.SIGKILL
    [left] = names(tmp_path)
    assert left.startswith(".model.") and left.endswith(".partial")
    with PartialFolder(tmp_path / "model") as partial:
        assert names(tmp_path) == [partial.path.name] != [left]


def test_what_others_are_filling_stays(tmp_path: Path) -> None:
    # The same target, another whose name begins alike, and a file of the user's that only looks alike.
    (tmp_path / ".model.notes.partial").touch()
    with PartialFolder(tmp_path / "model") as first, PartialFolder(tmp_path / "model.v2") as longer:
        with PartialFolder(tmp_path / "model") as second:
            assert len({first.path, second.path, longer.path}) == 3
            assert first.path.is_dir() and longer.path.is_dir()
        assert first.path.is_dir() and longer.path.is_dir()
    assert names(tmp_path) == [".model.notes.partial"]


def test_an_old_artifact_that_was_left_is_cleared_once_there_is_a_new_one(tmp_path: Path) -> None:
    old, target = tmp_path / ".model.0a1b2c3d.old", tmp_path / "model"
    old.mkdir()
    with PartialFolder(target):
        assert old.is_dir()  # the only one that there is
    target.mkdir()
    with PartialFolder(target):
        assert not old.exists()


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError), PartialFolder(tmp_path / "file" / "model"):
        pass
    assert names(tmp_path) == ["file"]


# --- files -------------------------------------------------------------------------------------------------


def test_files_are_not_seen_before_all_are_written(tmp_path: Path) -> None:
    targets = tmp_path / "a.json", tmp_path / "b.md"
    with partial_files(*targets) as partial:
        for path, text in zip(partial, "ab", strict=True):
            path.write_text(text)
            assert path.name.startswith(".") and path.name.endswith(".partial")
        assert len(names(tmp_path)) == 2 and not any(target.exists() for target in targets)
    assert names(tmp_path) == ["a.json", "b.md"] and targets[1].read_text() == "b"


def test_one_that_fails_leaves_all_as_they_were(tmp_path: Path) -> None:
    write_whole(tmp_path / "a", "old")
    with pytest.raises(ValueError, match="stop"), partial_files(tmp_path / "a", tmp_path / "b") as [a, _]:
        a.write_text("new")
        raise ValueError("stop")
    with pytest.raises(FileNotFoundError), partial_files(tmp_path / "a", tmp_path / "b") as [a, _]:
        a.write_text("new")  # and the other one is forgotten
    with pytest.raises(UnicodeEncodeError):
        write_whole(tmp_path / "a", "a lone \ud800")
    assert names(tmp_path) == ["a"] and (tmp_path / "a").read_text() == "old"


def test_a_disk_that_fills_up_at_the_last_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some file systems say so only when they are asked to keep what they took."""
    write_whole(tmp_path / "a", "old")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_whole(tmp_path / "a", "new")
    assert names(tmp_path) == ["a"] and (tmp_path / "a").read_text() == "old"
