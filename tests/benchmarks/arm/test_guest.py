"""The program that runs on both sides, on this one: greedy answers, margins, what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.arm import guest, torch_lib
from benchmarks.arm.wheels import WHEELS
from runtimes.base import RUNTIMES


class Scripted:
    """A session that says known rows in turn."""

    context, length = 10, 0

    def __init__(self, *rows: tuple[float, ...]) -> None:
        self.rows, self.fed = [np.array(row, np.float32) for row in rows], []

    def reset(self) -> None:
        self.length, self.fed = 0, []

    def prefill(self, tokens):
        self.length += len(tokens)
        self.fed += list(tokens)
        return self.rows[len(self.fed) - 2]

    def step(self, token):
        return self.prefill([token])


ROWS = (0, 3, 1), (5, 0, 4.5), (1, 2, 9), (7, 0, 0)


def test_an_answer_is_the_likeliest_token_each_time() -> None:
    session = Scripted(*ROWS)
    tokens, margins = guest.answer(session, [8, 9], {2}, 10)  # type: ignore[arg-type]
    assert (tokens, margins) == ([1, 0, 2], [2.0, 0.5, 7.0])
    assert session.fed == [8, 9, 1, 0]


def test_an_answer_ends_at_its_length_or_with_the_context() -> None:
    assert guest.answer(Scripted(*ROWS), [8, 9], {2}, 2)[0] == [1, 0]  # type: ignore[arg-type]
    short = Scripted(*ROWS)
    short.context = 3
    assert guest.answer(short, [8, 9], {2}, 9)[0] == [1, 0]  # type: ignore[arg-type]


def test_what_is_no_artifact_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = tmp_path / "job.json"
    job.write_text(json.dumps({"artifact": str(tmp_path / "nowhere"), "context": 8, "threads": 1}))
    assert guest.main(str(job), str(tmp_path)) == 2
    assert "nowhere: no such folder" in capsys.readouterr().err
    assert not (tmp_path / guest.SAID).exists()


def test_every_format_that_a_runtime_opens_can_be_run() -> None:
    assert set(WHEELS) == set(guest._PACKAGES) == set(RUNTIMES)


def test_a_stand_in_has_every_name_once() -> None:
    text = torch_lib.assembly({"_ZTI3Foo", "cudaMalloc", "_ZN1a1bE"}, {"_ZN1a1bE"})
    assert text.count(".globl ") == 3
    assert ".set cudaMalloc, stand_in\n" in text and ".set _ZN1a1bE, room\n" in text
    assert '_ZTI3Foo: .quad room, 1f\n1: .asciz "3Foo"\n' in text


def test_pytorch_is_told_that_it_is_alone(tmp_path: Path) -> None:
    package, asks = tmp_path / "__init__.py", tmp_path / "distributed" / "rpc" / "__init__.py"
    asks.parent.mkdir(parents=True)
    asks.write_text('def is_available():\n    return hasattr(torch._C, "_rpc_init")\n')
    package.write_text('if hasattr(torch._C, "_c10d_init"):\n    import torch.distributed\n')
    torch_lib.without_processes(tmp_path)
    assert asks.read_text() == "def is_available():\n    return False\n"
    assert package.read_text() == "if False:\n    import torch.distributed\n"
