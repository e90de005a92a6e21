"""The published row, a measured one instead, and files that cannot be one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.devices.baseline import H100, baseline, baseline_text, ratio
from fox_edge.errors import FoxEdgeError

ROW = {
    "artifact": "out/int8",
    "runtime": "llama.cpp",
    "format": "gguf",
    "quant": "int8",
    "decode_tokens_per_s": 25.0,
    "peak_rss_bytes": 1_900_000_000,
    "roofline_percent": 71.5,
}
BENCH = {
    "schema": 2,
    "created": "2026-11-21T12:00:00+00:00",
    "machine": {"cpu": "A Processor"},
    "settings": {"prompt_tokens": 234, "decode_tokens": 512},
    "results": [ROW],
}


def write(tmp_path: Path, fields: Any) -> Path:
    path = tmp_path / "bench.json"
    path.write_text(fields if isinstance(fields, str) else json.dumps(fields))
    return path


def test_the_published_row_is_the_paper_s_and_a_copy() -> None:
    row = baseline()
    assert (row["decode_tokens_per_s"], row["peak_rss_bytes"], row["ours"]) == (200, 3_703_000_000, False)
    row["decode_tokens_per_s"] = 1
    assert baseline() == H100
    text = baseline_text(H100)
    assert text.startswith("not ours: Fox-1 1.6B BF16, H100: over 200 tok/s per user, 3,703 MB of GPU memory")
    assert "technical report" in text


def test_ratios_by_hand() -> None:
    assert ratio({"decode_tokens_per_s": 50, "peak_rss_bytes": 1_851_500_000}, H100) == {
        "decode_tokens_per_s": 0.25,
        "peak_rss_bytes": 0.5,
    }
    assert ratio({"error": "it died"}, H100) == {"decode_tokens_per_s": None, "peak_rss_bytes": None}
    assert ratio(ROW, {"decode_tokens_per_s": 50, "peak_rss_bytes": None})["peak_rss_bytes"] is None


def test_a_measured_row_takes_the_published_one_s_place(tmp_path: Path) -> None:
    row = baseline(write(tmp_path, BENCH))
    assert set(H100) - set(row) == {"gsm8k_5_shot_percent"}
    assert row["ours"] is True and row["decode_is_at_least"] is False
    assert (row["name"], row["hardware"], row["runtime"]) == ("out/int8", "A Processor", "llama.cpp")
    assert (row["prompt_tokens"], row["output_tokens"], row["decode_tokens_per_s"]) == (234, 512, 25)
    assert row["source"] == "bench.json, 2026-11-21T12:00:00+00:00"
    assert baseline_text(row) == (
        "measured before: out/int8: 25 tok/s per user, 1,900 MB of resident memory "
        "(bench.json, 2026-11-21T12:00:00+00:00)"
    )


def test_a_report_and_a_result_without_a_schema_are_read_too(tmp_path: Path) -> None:
    report = {"schema": 2, "checkpoint": "nano", "rows": [{**ROW, "name": "int8 GGUF"}]}
    row = baseline(write(tmp_path, report))
    assert (row["name"], row["model"]) == ("int8 GGUF", "nano")
    assert row["hardware"] == "a machine that is not told" and row["prompt_tokens"] is None
    assert baseline(write(tmp_path, {"results": [ROW]}))["decode_tokens_per_s"] == 25
    least = baseline(write(tmp_path, {"results": [{"decode_tokens_per_s": 3}]}))
    assert (least["name"], least["peak_rss_bytes"]) == ("without a name", None)
    assert baseline_text(least) == "measured before: without a name: 3 tok/s per user (bench.json)"


def test_one_of_several_rows_is_named(tmp_path: Path) -> None:
    other = {**ROW, "artifact": "out/int4", "name": "the int4", "decode_tokens_per_s": 40.0}
    broken = {"artifact": "out/broken", "error": "it died"}
    path = write(tmp_path, {**BENCH, "results": [ROW, other, broken]})
    assert baseline(f"{path}#out/int4")["decode_tokens_per_s"] == 40
    assert baseline(f"{path}#the int4")["decode_tokens_per_s"] == 40
    with pytest.raises(
        FoxEdgeError, match=r"has 2 results; say which one with .*json#NAME: out/int8, the int4$"
    ):
        baseline(path)
    with pytest.raises(
        FoxEdgeError, match=r"no result of the name 'out/broken'; there are out/int8, the int4"
    ):
        baseline(f"{path}#out/broken")
    users = write(tmp_path, {**BENCH, "results": [ROW, ROW]})
    with pytest.raises(FoxEdgeError, match="2 results of the name 'out/int8'"):
        baseline(f"{users}#out/int8")


def test_a_file_with_the_sign_in_its_name_is_a_file(tmp_path: Path) -> None:
    path = tmp_path / "run#3.json"
    path.write_text(json.dumps(BENCH))
    assert baseline(path)["decode_tokens_per_s"] == 25
    assert baseline(f"{path}#out/int8")["decode_tokens_per_s"] == 25


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ("{", "not JSON (line 1, column 2"),
        ("[1]", "holds no result of fox-edge (a JSON list, not an object)"),
        ("[" * 100_000, "nested too deep for a result"),
        ("\x00\xff", "not JSON (line 1, column 1"),
        ({"schema": 3, "results": [ROW]}, "written in schema 3 by a later fox-edge; this one reads up to 2"),
        ({"schema": "2", "results": [ROW]}, 'schema is "2", not a whole number from 1'),
        ({"schema": True, "results": [ROW]}, "schema is true"),
        ({"machine": {}}, "has no list of results"),
        ({"results": {"a": 1}}, "has no list of results"),
        ({"results": [1, 2]}, "has no list of results"),
        ({"results": []}, "none of its 0 results was measured"),
        ({"results": [{"error": "it died"}]}, "none of its 1 results was measured"),
        ({"results": [{"artifact": "x"}]}, "the row x has no decode_tokens_per_s"),
        ({"results": [{**ROW, "decode_tokens_per_s": "fast"}]}, "decode_tokens_per_s of out/int8 is 'fast'"),
        ({"results": [{**ROW, "decode_tokens_per_s": 0}]}, "decode_tokens_per_s of out/int8 is 0"),
        ({"results": [{**ROW, "decode_tokens_per_s": True}]}, "decode_tokens_per_s of out/int8 is True"),
        ({"results": [{**ROW, "peak_rss_bytes": -1}]}, "peak_rss_bytes of out/int8 is -1"),
        ({"results": [{**ROW, "peak_rss_bytes": 10**400}]}, "peak_rss_bytes of out/int8 is 1000"),
        ('{"results": [{"decode_tokens_per_s": NaN}]}', "not JSON (NaN is no number of JSON)"),
        ('{"results": [{"decode_tokens_per_s": Infinity}]}', "not JSON (Infinity is no number of JSON)"),
    ],
)
def test_what_cannot_be_a_baseline_is_told_in_one_sentence(fields: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(FoxEdgeError) as found:
        baseline(write(tmp_path, fields))
    told = str(found.value)
    assert message in told and "bench.json" in told and "\n" not in told and len(told) < 400


def test_a_file_that_is_not_there_or_too_large(tmp_path: Path) -> None:
    with pytest.raises(FoxEdgeError, match=r"nowhere\.json: cannot be read \(No such file"):
        baseline(tmp_path / "nowhere.json")
    with pytest.raises(FoxEdgeError, match="cannot be read \\(Is a directory"):
        baseline(tmp_path)
    path = tmp_path / "large.json"
    with path.open("wb") as file:
        file.truncate(65 << 20)
    with pytest.raises(FoxEdgeError, match="larger than the 64 MiB that a result may have"):
        baseline(path)


def test_a_stranger_s_names_are_cut_and_cannot_steer_a_terminal(tmp_path: Path) -> None:
    row = {**ROW, "artifact": "\x1b[31m" + "x" * 1000, "runtime": ["a", "list"]}
    found = baseline(write(tmp_path, {**BENCH, "results": [row], "machine": [], "settings": "none"}))
    assert found["name"].startswith("\ufffd[31mxxx") and len(found["name"]) == 200
    assert found["runtime"] == "['a', 'list']" and found["prompt_tokens"] is None
    many = [{**ROW, "artifact": f"a{n}"} for n in range(1000)]
    with pytest.raises(FoxEdgeError, match=r"a11 and 988 more$"):
        baseline(write(tmp_path, {"results": many}))
