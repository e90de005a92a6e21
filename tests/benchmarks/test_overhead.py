"""What measuring costs and whether runs agree: the arithmetic on clocks and intervals that are made up."""

import itertools
import json

import pytest

from benchmarks import overhead, repeats
from benchmarks.latency import bench
from benchmarks.latency.conditions import Noise
from benchmarks.latency.rows import FIGURES
from fox_edge.errors import FoxEdgeError
from tests.benchmarks.fake_session import Clock, FakeSession


def test_the_bare_loop_and_the_harness_ask_the_same_of_a_model():
    clock = Clock()
    session = FakeSession(clock, token_s=1.0, steps_s=(0.1,))
    assert overhead.bare_s(session, [1] * 5, 8, clock) == pytest.approx(0.8)
    bare, session.log[:] = list(session.log), []
    assert overhead.harness_s(session, [1] * 5, 8, clock) == pytest.approx(0.8)
    assert session.log == bare
    assert [what for _, what, _ in bare] == ["prefill"] + ["step"] * 8


def test_a_harness_that_takes_longer_shows():
    class Slow(Clock):
        """Reading it takes 2 ms: what a heavy harness would do at every token."""

        def __call__(self):
            self.now += 0.002
            return self.now

    clock = Slow()
    bare, measured = overhead.compare(FakeSession(clock), [1] * 5, 50, 4, clock)
    assert len(bare) == len(measured) == 4
    # 50 readings of the clock more, of 2 ms each, beside the two or three that both have.
    assert measured[0] - bare[0] == pytest.approx(50 * 0.002, abs=0.008)


def test_pairs_alternate_who_is_first(monkeypatch):
    seen = []
    monkeypatch.setattr(overhead, "bare_s", lambda *_: seen.append("b") or 1.0)
    monkeypatch.setattr(overhead, "harness_s", lambda *_: seen.append("h") or 1.0)
    overhead.compare(None, [1], 2, 3)
    assert "".join(seen) == "bhhbbhhb"


def test_overhead_of_a_real_model_is_a_whole_row(checkpoint, tmp_path, monkeypatch, capsys):
    out = tmp_path / "overhead.json"
    words = [f"torch:{checkpoint.path}", "--results", str(out), "--pairs", "3", "--decode-tokens", "8"]
    monkeypatch.setattr("sys.argv", ["overhead", *words, "--threads", "1"])
    overhead.main()
    found = json.loads(out.read_text())
    (row,) = found["results"]
    low, high = row["interval_percent"]
    assert low <= high
    assert row["clockwork_s"] < 1e-3
    assert row["clockwork_percent"] == pytest.approx(100 * row["clockwork_s"] / row["token_s"])
    assert len(row["samples"]["bare_s"]) == 3
    assert "harness over bare" in capsys.readouterr().out


def test_intervals_agree_when_they_touch():
    assert repeats.agreement([[1, 2], [2, 3], [4, 5]]) == (1, 3)
    assert repeats.agreement([[1, 9], [2, 3], [4, 5]]) == (2, 3)


def test_a_summary_by_hand():
    def run(middle, half):
        samples = [middle - half / 2, middle, middle + half / 2]
        figure = {"median": middle, "interval": [middle - half, middle + half], "samples": samples}
        return {"conditions": {}, **dict.fromkeys(repeats.FIGURES, figure)}

    line = repeats.summarize([run(100, 2), run(103, 2), run(110, 1)])[0]
    assert line["figure"] == "decode_tokens_per_s"
    assert (line["lowest"], line["highest"]) == (100, 110)
    assert (line["agreeing"], line["pairs"]) == (1, 3)
    assert line["agreeing_percent"] == pytest.approx(100 / 3)
    assert line["width_percent"] == pytest.approx(100 * 4 / 103)
    assert line["by_rounds_alone_percent"] == 0  # 99 to 101, 102 to 104, 109.5 to 110.5
    assert line["not_told_apart"] == 1  # 3 % is no change
    assert repeats.summarize([run(100, 7), run(108, 6)])[0]["not_told_apart"] == 1
    assert (
        repeats.summarize([run(100, 5), run(108, 4)])[0]["not_told_apart"] == 0
    )  # seldom both wrong at once


def test_two_runs_are_compared(checkpoint, known_machine, monkeypatch):
    spec = f"torch:{checkpoint.path}"
    rates = itertools.count(100)
    run = dict.fromkeys(FIGURES, 1.0)
    monkeypatch.setattr(bench, "run_worker", lambda job, **_: run | {"decode_tokens_per_s": next(rates)})
    monkeypatch.setattr(Noise, "probe", lambda self: None)  # nothing of this machine is in the intervals
    found = repeats.repeats(spec, 2, repeats=2, prompt_tokens=8, decode_tokens=2, threads=1)
    decode = found["results"][0]
    assert (decode["lowest"], decode["highest"]) == (100.5, 102.5)  # 100 and 101, then 102 and 103
    assert decode["agreeing"] == 0
    assert [line["agreeing"] for line in found["results"][1:]] == [1] * 5
    assert {line["figure"] for line in found["results"]} == set(repeats.FIGURES)
    assert all(line["pairs"] == 1 for line in found["results"])
    assert len(found["runs"]) == 2
    assert "of 1" in repeats.repeats_text(found["results"])
    with pytest.raises(FoxEdgeError, match="at least two runs"):
        repeats.repeats(spec, 1)
