"""Memory of several processes: what they share counts once."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest

from runtimes.browser.chromium import descendants
from runtimes.browser.tree_memory import Watch, held

SIZE = 64 << 20
# Fills so many bytes, becomes two processes that share them, and waits.
TWINS = f"""
import os
kept = bytearray(b"x" * {SIZE})
child = os.fork()
if child:
    print("ready", flush=True)
    input()
    os.kill(child, 9)
else:
    import time
    time.sleep(60)
"""


@pytest.fixture
def twins() -> Iterator[int]:
    process = subprocess.Popen(
        [sys.executable, "-c", TWINS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process.pid
        process.stdin.write("\n")


def test_shared_pages_count_once(twins: int) -> None:
    family = descendants(twins)
    assert len(family) == 2
    both, one = held(family), held(family[:1])
    assert both is not None and one is not None
    # Both have the 64 MiB; either is charged half of it. An interpreter takes some 10 MB more.
    assert SIZE < both.anonymous <= both.total < SIZE + (40 << 20)
    assert SIZE // 2 < one.anonymous < SIZE // 2 + (20 << 20)
    assert both.total == pytest.approx(both.anonymous + both.file, rel=0.02)


def test_the_most_that_was_held_is_kept(twins: int) -> None:
    looks = [[twins], descendants(twins), []]
    watch = Watch(lambda: looks.pop(0))
    alone, both, none = watch.look(), watch.look(), watch.look()
    assert none is None and alone is not None and both is not None
    assert watch.peak_bytes == both.total > alone.total


def test_processes_that_are_gone_hold_nothing() -> None:
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    assert held([done.pid]) is None
