"""Windows of token ids: laid as llama-perplexity lays them, and texts that give none."""

import pytest

from benchmarks.fidelity.texts import WINDOW, built_in_text, read_windows, word_problems
from fox_edge.errors import ContextOverflowError, FoxEdgeError


@pytest.fixture
def letters(tmp_path):
    path = tmp_path / "letters.txt"
    path.write_text("a fox has dens. " * 40)
    return path


def test_windows_by_hand(nano, letters):
    tokenizer = nano.tokenizer()
    ids = tokenizer.encode(letters.read_text(), bos=True)
    found = read_windows(tokenizer, 1024, file=letters, tokens=35, window=10)
    # Three whole windows of 35 tokens; each begins with <bos>, which only the first had.
    assert found.windows == [
        ids[:10],
        [tokenizer.bos_id, *ids[11:20]],
        [tokenizer.bos_id, *ids[21:30]],
    ]
    # The second half, less the last position, after which nothing comes: 5 to 8 predict 6 to 9.
    assert (found.first, found.length, found.scored) == (5, 10, 4)
    assert found.inputs == [window[:9] for window in found.windows]
    assert found.targets() == [*ids[6:10], *ids[16:20], *ids[26:30]]
    assert found.to_json() == {
        "source": "letters.txt",
        "tokens": 30,
        "windows": 3,
        "window": 10,
        "scored_from": 5,
        "scored_per_window": 4,
    }


def test_every_position_can_be_asked_for(nano, letters):
    found = read_windows(nano.tokenizer(), 1024, file=letters, tokens=20, window=10, score_from=0)
    assert found.scored == 9
    assert found.targets() == found.windows[0][1:] + found.windows[1][1:]


def test_a_tokenizer_that_puts_no_bos_gets_none(nano, letters, monkeypatch):
    tokenizer = nano.tokenizer()
    monkeypatch.setattr(tokenizer, "add_bos", False)
    found = read_windows(tokenizer, 1024, file=letters, tokens=20, window=10)
    first, second = found.windows
    assert first + second == tokenizer.encode(letters.read_text())[:20]


def test_the_built_in_text_is_as_long_as_asked_for(nano):
    tokenizer = nano.tokenizer()
    found = read_windows(tokenizer, 1024, tokens=20_000)
    assert (found.length, found.source) == (WINDOW, "built-in")
    assert len(found.windows) == 20_000 // WINDOW
    assert len(tokenizer.encode(built_in_text(tokenizer, 20_000))) >= 20_000
    # A longer text goes on where a shorter one ends.
    assert word_problems(480).startswith(word_problems(60))


def test_a_short_context_has_shorter_windows(nano):
    assert read_windows(nano.tokenizer(), 64).length == 64


def test_texts_that_give_no_window_are_told_with_numbers(nano, tmp_path, letters):
    def read(file=None, context=1024, **numbers):
        with pytest.raises(FoxEdgeError) as told:
            read_windows(nano.tokenizer(), context, file=file, **numbers)
        return str(told.value)

    short, latin = tmp_path / "short.txt", tmp_path / "latin.txt"
    short.write_text("A fox.")
    latin.write_bytes(b"caf\xe9 " * 9)
    count = len(nano.tokenizer().encode("A fox.", bos=True))
    assert read(short) == f"{short}: {count} tokens of text, but one window takes 512"
    assert "latin.txt: not readable as UTF-8 text" in read(latin)
    assert "none.txt: not readable" in read(tmp_path / "none.txt")
    assert "not readable" in read(tmp_path)
    assert "100 tokens were asked for, but one window takes 512" in read(letters, tokens=100)
    assert "10000000 tokens were asked for" in read(letters, tokens=10**7)
    assert "positions 0 to 8, none from 9 on" in read(letters, window=10, score_from=9)
    assert "a window of 1 tokens" in read(letters, window=1)
    with pytest.raises(ContextOverflowError, match="window of 2000 tokens does not fit the model's 1024"):
        read_windows(nano.tokenizer(), 1024, window=2000)


def test_a_text_that_is_too_large_is_not_read(nano, tmp_path, monkeypatch):
    large = tmp_path / "large.txt"
    large.write_text("x" * 1001)
    monkeypatch.setattr("benchmarks.fidelity.texts.MAX_TEXT_BYTES", 1000)
    with pytest.raises(FoxEdgeError, match=r"large\.txt: 1001 bytes, but a text has at most 1000"):
        read_windows(nano.tokenizer(), 1024, file=large)
