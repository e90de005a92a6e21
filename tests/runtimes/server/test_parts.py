"""The small parts: text and log-probabilities of an answer, histograms, the page's policy."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
from pathlib import Path

import pytest

from fox_edge.checkpoint import Checkpoint
from fox_edge.tokenizer import Tokenizer
from runtimes.generate import Logprobs
from runtimes.server import page
from runtimes.server.answer import Answer, Delta
from runtimes.server.engine import Outcome
from runtimes.server.metrics import Histogram
from runtimes.server.page import Page


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(Checkpoint.open("nano").path)


def written(tokenizer: Tokenizer, text: str, stops: list[str]) -> tuple[list[Delta], int]:
    """The deltas of an answer of this text, each with its tokens' log-probabilities; and the tokens taken."""

    async def run() -> tuple[list[Delta], int]:
        answer, taken = Answer(tokenizer, stops), 0
        for token in tokenizer.encode(text):
            taken += 1
            if not answer.token(token, Logprobs(token, -0.5, ((token, -0.5),))):
                break
        answer.ended(Outcome("read" if answer.stopped else "stop", 1, 0, taken))
        deltas = [delta async for batch in answer.deltas() for delta in batch]
        return deltas, taken

    return asyncio.run(run())


@pytest.mark.parametrize("text", ["Tom has 12 apples.", "fox 🦊, 狐狸\n\nline", "ünïcödé"])
def test_deltas_are_the_text_and_every_token_once(tokenizer: Tokenizer, text: str) -> None:
    deltas, taken = written(tokenizer, text, ["never"])
    assert "".join(delta.text for delta in deltas) == text
    entries = [entry for delta in deltas for entry in delta.logprobs]
    assert len(entries) == taken and b"".join(entry.data for entry in entries) == text.encode()
    assert [delta.outcome is not None for delta in deltas] == [False] * (len(deltas) - 1) + [True]
    assert "\ufffd" not in "".join(delta.text for delta in deltas)
    offsets = [entry.offset for entry in entries]
    assert offsets == sorted(offsets) and offsets[0] == 0


def test_what_a_stop_string_takes_away_takes_its_tokens_along(tokenizer: Tokenizer) -> None:
    deltas, taken = written(tokenizer, "Tom has 12 apples and more", ["12"])
    assert "".join(delta.text for delta in deltas) == "Tom has "
    entries = b"".join(entry.data for delta in deltas for entry in delta.logprobs)
    assert entries.startswith(b"Tom has ") or entries == b"Tom has"
    assert b"2" not in entries and taken < len(tokenizer.encode("Tom has 12 apples and more"))


def test_a_histogram_counts_into_the_right_buckets() -> None:
    histogram = Histogram((1, 2.5))
    for value in (0.5, 1, 1.5, 2.5, 9):
        histogram.observe(value)
    assert histogram.lines("x") == [
        'x_bucket{le="1"} 2',
        'x_bucket{le="2.5"} 4',
        'x_bucket{le="+Inf"} 5',
        "x_sum 14.500000",
        "x_count 5",
    ]


def test_the_policy_names_the_very_script_and_style() -> None:
    made = Page()
    for tag, directive in (("script", "script-src"), ("style", "style-src")):
        (inline,) = re.findall(rf"<{tag}>(.*?)</{tag}>", made.html, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()
        assert f"{directive} 'sha256-{digest}'" in made.policy
    # A style or handler in the markup would be forbidden by that policy.
    assert not re.search(r"\s(style|on\w+)=", made.html)


def test_the_page_names_no_other_place() -> None:
    for path in [*page.HERE.glob("page.*"), Path(page.HERE.parent / "browser" / "style.css")]:
        if path.suffix != ".py":
            assert not re.search(r"https?://|innerHTML|eval\(", path.read_text()), path
