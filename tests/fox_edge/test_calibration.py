"""Calibration: the windows of a text, built in or the user's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fox_edge import calibration
from fox_edge.calibration import GRAM_TOKENS, WINDOW, read_calibration
from fox_edge.checkpoint import Checkpoint
from fox_edge.errors import FoxEdgeError


def test_the_built_in_text_fills_its_windows(nano: Checkpoint) -> None:
    tokenizer = nano.tokenizer()
    found = read_calibration(tokenizer, nano.config.max_positions)
    assert found.windows.shape == (GRAM_TOKENS // WINDOW, WINDOW)
    assert (found.windows[:, 0] == tokenizer.bos_id).all()
    assert found.source == "built-in" and found.tokens == GRAM_TOKENS
    ids = found.windows[:, 1:].flatten().tolist()
    text = tokenizer.decode(ids)
    assert "The ferry leaves the eastern pier" in text and "Question: " in text and "####" in text
    assert tokenizer.bos_id not in ids
    marker = tokenizer.encode("<start_of_turn>", bos=False, special=True)
    assert len(marker) == 1 and marker[0] in ids  # chats too
    again = read_calibration(tokenizer, nano.config.max_positions)
    assert torch.equal(again.windows, found.windows) and again.sha256 == found.sha256


def test_the_built_in_text_is_not_what_exports_are_verified_on(nano: Checkpoint) -> None:
    from fox_edge.nano.problems import held_out

    tokenizer = nano.tokenizer()
    text = tokenizer.decode(calibration._built_in(tokenizer))
    assert held_out()[0].question not in text and "Question: " in text
    assert not any(problem.question in text for problem in held_out())


def test_a_users_text(nano: Checkpoint, tmp_path: Path) -> None:
    file = tmp_path / "mine.txt"
    file.write_text("One fox, two dens. " * 200, encoding="utf-8")
    tokenizer = nano.tokenizer()
    found = read_calibration(tokenizer, 1024, file)
    ids = tokenizer.encode(file.read_text(), bos=False)
    assert found.source == "mine.txt"
    assert found.windows[:, 1:].flatten().tolist() == ids[: len(ids) // (WINDOW - 1) * (WINDOW - 1)]
    assert read_calibration(tokenizer, 32, file).windows.shape[1] == 32
    assert found.first(300).windows.shape[0] == found.first(1).windows.shape[0] == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"0 tokens of calibration text, but a window takes 255"),
        (b"A fox.", r"[1-9] tokens of calibration text, but a window takes 255"),
        (b"\xff\xfe\x00", r"not readable as UTF-8 text"),
        (None, r"not readable as UTF-8 text \(.*No such file"),
    ],
)
def test_a_text_that_will_not_do(
    nano: Checkpoint, tmp_path: Path, content: bytes | None, message: str
) -> None:
    file = tmp_path / "mine.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(FoxEdgeError, match=rf"mine\.txt: {message}"):
        read_calibration(nano.tokenizer(), 1024, file)


def test_a_text_too_large(nano: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "MAX_TEXT_BYTES", 100)
    file = tmp_path / "mine.txt"
    file.write_bytes(b"x" * 101)
    with pytest.raises(FoxEdgeError, match="101 bytes, but calibration text has at most 100"):
        read_calibration(nano.tokenizer(), 1024, file)
