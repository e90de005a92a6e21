"""Stop strings against a plain search in the whole text, however the text is cut into pieces."""

import random

import pytest

from fox_edge.errors import FoxEdgeError
from runtimes.stop_strings import StopStrings


def stream(text: str, stops: list[str], cuts: list[int]) -> tuple[str, str | None, list[str]]:
    """The text that comes out, the stop string found, and what was out after each piece."""
    watch, out, steps = StopStrings(stops), "", []
    for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        out += watch.push(text[start:end])
        steps.append(out)
    return out + watch.flush(), watch.found, steps


def test_no_stop_strings_pass_everything_at_once():
    assert stream("abc", [], [1, 2]) == ("abc", None, ["a", "ab", "abc"])


def test_the_beginning_of_a_stop_string_is_held_back_until_it_is_decided():
    assert stream("a\n\nb", ["\n\nUser"], [2, 3]) == ("a\n\nb", None, ["a", "a", "a\n\nb"])


def test_a_stop_string_over_several_pieces_ends_the_text():
    assert stream("one END two", ["END"], [5, 6, 8]) == ("one ", "END", ["one ", "one ", "one ", "one "])


def test_what_was_held_comes_out_at_the_end():
    assert stream("so EN", ["END"], []) == ("so EN", None, ["so "])


def test_a_beginning_within_a_false_beginning():
    assert stream("aab", ["ab"], [1, 2])[:2] == ("a", "ab")


def test_nothing_comes_after_a_stop():
    watch = StopStrings(["."])
    assert (watch.push("a. b"), watch.push("c"), watch.flush()) == ("a", "", "")


def test_an_empty_stop_string_is_refused():
    with pytest.raises(FoxEdgeError, match="empty"):
        StopStrings(["a", ""])


def test_however_a_text_is_cut_the_result_is_that_of_a_plain_search():
    rng = random.Random(3)
    for _ in range(500):
        text = "".join(rng.choices("ab", k=12))
        stops = ["".join(rng.choices("ab", k=rng.randint(1, 5))) for _ in range(rng.randint(1, 3))]
        expected: tuple[str, str | None] = (text, None)
        for end in range(1, len(text) + 1):
            if done := [stop for stop in stops if text[:end].endswith(stop)]:
                longest = max(done, key=len)
                expected = (text[: end - len(longest)], longest)
                break
        cuts = sorted(rng.sample(range(1, 12), rng.randint(0, 11)))
        assert stream(text, stops, cuts)[:2] == expected, (text, stops, cuts)
