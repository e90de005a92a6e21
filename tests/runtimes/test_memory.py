"""Memory told before it is taken: what is left, the sum, and the longest context that fits."""

from __future__ import annotations

from pathlib import Path

import pytest

from fox_edge.errors import NotEnoughMemoryError
from runtimes import memory
from runtimes.memory import MemoryNeed, available_bytes, fitting_context

NEED = MemoryNeed(weights=1_000_000_000, buffers=100_000_000, per_position=131_072)


def has(available: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda: available)


@pytest.mark.parametrize(("asked", "opened"), [(None, 8192), (1, 1), (8192, 8192)])
@pytest.mark.parametrize("available", [None, NEED.total(8192)])
def test_what_fits_is_opened(
    asked: int | None, opened: int, available: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    has(available, monkeypatch)
    assert fitting_context(NEED, asked, 8192, "model") == opened


def test_what_does_not_fit_is_refused_with_the_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    has(NEED.total(1024) + 5, monkeypatch)
    with pytest.raises(NotEnoughMemoryError) as error:
        fitting_context(NEED, 4000, 8192, "model")
    assert str(error.value) == (
        "model: a context of 4000 tokens takes 1,000 MB of weights + 524 MB of KV cache + 100 MB of buffers "
        "= 1,624 MB, but 1,234 MB of memory are available; a context of 1024 would fit"
    )
    assert fitting_context(NEED, 1024, 8192, "model") == 1024


def test_who_asks_for_no_context_gets_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    has(NEED.total(1024) + 5, monkeypatch)
    assert fitting_context(NEED, None, 8192, "model") == 1024


@pytest.mark.parametrize("asked", [None, 1])
def test_no_context_fits(asked: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    has(NEED.total(0), monkeypatch)
    with pytest.raises(NotEnoughMemoryError, match="no context would fit"):
        fitting_context(NEED, asked, 8192, "model")


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with 8,000 kB left and no container."""
    (tmp_path / "meminfo").write_text("MemTotal:  16000 kB\nMemAvailable:    8000 kB\n")
    (tmp_path / "cgroup").write_text("0::/a/b\n")
    (tmp_path / "group" / "a" / "b").mkdir(parents=True)
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "_MEMBERSHIP", tmp_path / "cgroup")
    monkeypatch.setattr(memory, "_GROUPS", tmp_path / "group")
    return tmp_path


def limit(folder: Path, size: str, used: int, droppable: int) -> None:
    (folder / "memory.max").write_text(f"{size}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\ninactive_file {droppable}\nactive_file 7\n")


def test_without_a_container(system: Path) -> None:
    assert available_bytes() == 8000 * 1024


@pytest.mark.parametrize("place", ["", "a", "a/b"])
def test_a_container_with_less(place: str, system: Path) -> None:
    limit(system / "group" / place, "5000000", 3_000_000, 1_000_000)
    assert available_bytes() == 3_000_000


def test_the_innermost_limit_is_not_the_least(system: Path) -> None:
    limit(system / "group" / "a", "5000000", 4_000_000, 0)
    limit(system / "group" / "a" / "b", "5000000", 1_000_000, 0)
    assert available_bytes() == 1_000_000


def test_a_container_that_is_full(system: Path) -> None:
    limit(system / "group" / "a", "5000000", 6_000_000, 0)
    assert available_bytes() == 0


def test_a_container_without_a_limit(system: Path) -> None:
    limit(system / "group" / "a", "max", 3_000_000, 0)
    assert available_bytes() == 8000 * 1024


def test_the_first_version_of_control_groups(system: Path) -> None:
    (system / "cgroup").write_text("5:cpu:/\n4:memory:/x\n")
    folder = system / "group" / "memory" / "x"
    folder.mkdir(parents=True)
    (folder / "memory.limit_in_bytes").write_text("4000000\n")
    (folder / "memory.usage_in_bytes").write_text("1000000\n")
    (folder / "memory.stat").write_text("inactive_file 1\ntotal_inactive_file 500000\n")
    assert available_bytes() == 3_500_000


def test_a_system_that_does_not_tell(system: Path) -> None:
    (system / "meminfo").unlink()
    (system / "cgroup").unlink()
    assert available_bytes() is None
