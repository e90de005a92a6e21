"""Pages of a mapped file: let go of, found again, and never lost when they were written to."""

from __future__ import annotations

import mmap
import re
from pathlib import Path

import pytest

from runtimes import mapped_pages
from runtimes.mapped_pages import drop_pages

pytestmark = pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="Linux's own account")
SIZE = 1 << 20


def resident(path: Path) -> int:
    """Bytes of this file's pages in this process."""
    rss = rf"{re.escape(str(path))}\n(?:(?!Rss).*\n)*Rss: +([0-9]+) kB"
    found = re.findall(rss, Path("/proc/self/smaps").read_text())
    return 1024 * sum(int(size) for size in found)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "a file"
    path.write_bytes(b"x" * SIZE)
    return path


def private(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)


def test_clean_pages_go_and_come_back(file: Path, tmp_path: Path) -> None:
    (tmp_path / "another").write_bytes(b"y" * SIZE)
    held, other = private(file), private(tmp_path / "another")
    assert sum(held[::4096]) == 256 * ord("x") and sum(other[::4096]) == 256 * ord("y")
    assert resident(file) == resident(tmp_path / "another") == SIZE
    drop_pages(file)
    assert (resident(file), resident(tmp_path / "another")) == (0, SIZE)
    assert held[:] == b"x" * SIZE
    drop_pages(file, tmp_path / "another")
    assert (resident(file), resident(tmp_path / "another")) == (0, 0)


def test_what_was_written_stays(file: Path) -> None:
    clean, written = private(file), private(file)
    written[SIZE // 2] = 0
    assert clean[SIZE - 1] == written[SIZE - 1]
    drop_pages(file)
    assert written[SIZE // 2] == 0 and written[SIZE - 1] == ord("x")
    assert clean[:] == b"x" * SIZE


def test_a_system_without_such_an_account(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mapped_pages, "_MAPS", tmp_path / "missing")
    drop_pages(file)
