"""The report as a reader gets it: well formed, self-contained, escaped, complete, narrow on a terminal."""

import json
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from benchmarks.plots import memory_plot, nice_ticks, quality_plot, share_plot
from benchmarks.report import findings, make_report, report_html, report_text, write_report
from benchmarks.table import WIDTH, Column, render
from fox_edge.errors import FoxEdgeError

from .sample_report import NAMES, answers, bench_result, evaluation, fidelity

VOID = {"meta", "link", "br"}


class Page(HTMLParser):
    """Checks that tags close in order; collects text, attributes and table rows."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.rows: list[list[str]] = []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data


@pytest.fixture
def report():
    return make_report(
        bench_result(),
        checkpoint="nano",
        names=NAMES,
        fidelity=fidelity(),
        evaluation=evaluation(),
        answers=answers(),
        question="How many apples are left?",
        commands=["fox-edge demo --out out"],
    )


def test_rows_are_joined_by_artifact(report):
    row = json.loads(json.dumps(report))["rows"][2]
    assert (row["name"], row["artifact"]) == ("GGUF int4", "out/gguf-int4")
    assert row["mean_kl_nats"] == 1.4e-3
    assert (row["correct"], row["n"], row["accuracy_percent"]) == (31, 50, 62.0)
    assert row["answer"].endswith("#### 19")
    assert report["schema"] == 1


def test_the_page_is_well_formed_and_complete(report):
    page = Page(report_html(report))
    text = "".join(page.texts)
    heading, *rows, published = page.rows
    assert len(heading) == 11
    assert [row[0] for row in rows] == list(NAMES.values())
    assert rows[2][1:] == ["5.2", "6.34", "0.31", "42", "9,900", "1,100", "80", "0.0014", "98.7", "62"]
    assert published[0] == "Fox-1 1.6B BF16, H100not ours"
    assert published[6:8] == ["over 200", "3,703"]
    assert published[1] == "–"
    for said in (
        "How many apples are left?",
        "fox-edge demo --out out",
        "140 GB/s from 4 MiB",
        "torch 2.13.0",
    ):
        assert said in text


def test_the_page_asks_nothing_from_outside_and_runs_nothing(report):
    html = report_html(report)
    page = Page(html)
    assert not re.search(r"https?:|//[a-z]|@import|url\((?!#hatch)", html)
    assert not {"script", "img", "iframe"} & {tag for tag, _, _ in page.attributes}
    for _, name, value in page.attributes:
        assert not name.startswith("on")
        if name in ("src", "href"):
            assert value == "data:,"
    assert "default-src 'none'" in html


def test_whatever_a_model_or_machine_says_is_escaped(report):
    bad = "<script>alert('x')</script>\"&"
    for row in report["rows"]:
        row["name"] = row["answer"] = bad
    report["rows"][0]["error"] = bad
    report["machine"]["cpu"] = report["question"] = report["checkpoint"] = bad
    report["machine"]["versions"] = {bad: bad}
    report["commands"] = [bad]
    html = report_html(report)
    assert "<script" not in html
    Page(html)
    assert html.count("&lt;script&gt;") > 10


def test_missing_figures_are_dashes_and_failed_rows_say_why(report):
    first, second = report["rows"][:2]
    report["rows"] = [
        {"name": first["name"], "format": "torch", "error": "killed by SIGKILL"},
        {"name": second["name"], "format": "gguf", "bytes": None, "mean_kl_nats": None},
    ]
    page = Page(report_html(report))
    assert page.rows[1] == ["PyTorch BF16", "killed by SIGKILL"]
    assert page.rows[2] == ["GGUF int8", *["–"] * 10]
    assert "killed by SIGKILL" in report_text(report)


def test_the_terminal_table_fits_and_marks_the_published_row(report):
    lines = report_text(report).splitlines()
    table = lines[:8]
    assert max(map(len, table)) <= WIDTH
    assert table[-1].startswith("not ours: H100")
    assert len({line.rindex("  ") for line in table[:1]}) == 1
    assert [line.split("  ")[0] for line in table[2:7]] == list(NAMES.values())


def test_a_table_too_wide_cuts_the_first_column_from_its_left():
    columns = [Column("path", "path"), Column("n", "n", "{:d}")]
    text = render(columns, [{"path": "/a/very/long/path/to/int4", "n": 5}], width=16)
    assert text.splitlines()[2].split() == ["…path/to/int4", "5"]
    assert max(map(len, text.splitlines())) == 16


def test_findings_compare_with_the_reference(report):
    said = findings(report["rows"])
    assert said[0] == "Smallest: GGUF int4, 38 % of the BF16 checkpoint's bytes."
    assert said[1] == "Fastest at decoding: GGUF int4, 5.2 times the BF16 PyTorch model."
    assert "GGUF int8, mean KL 3.1e-05" in said[2]
    assert findings(report["rows"][1:]) == []


def svg(text: str):
    return ElementTree.fromstring(text)


def test_quality_plot_places_points_by_size_and_log_kl(report):
    root = svg(quality_plot(report["rows"]))
    circles = [(float(c.get("cx")), float(c.get("cy"))) for c in root.iter("circle")]
    assert len(circles) == 2  # the two GGUF files
    (x8, y8), (x4, y4) = circles
    assert x8 > x4 and y8 > y4  # int8 is larger, and closer to the reference, which is down
    grid = [float(line.get("y1")) for line in root.iter("line")]
    decades = (y8 - y4) / (grid[0] - grid[1])
    assert decades == pytest.approx(1.655, abs=0.01)  # log10(1.4e-3 / 3.1e-5)


def test_share_plot_hatches_what_is_not_ours(report):
    text = share_plot([*report["rows"], report["baseline"]])
    bars = [r for r in svg(text).iter("rect") if r.get("class", "").startswith(("is-", "published"))]
    assert [b.get("class") for b in bars][-1] == "published"
    widths = [float(b.get("width")) for b in bars]
    assert widths[-1] / widths[1] == pytest.approx(19.9 / 7.2, rel=0.02)
    assert 'id="hatch"' in text
    assert 'id="hatch"' not in share_plot(report["rows"])


def test_memory_plot_stacks_own_and_file_pages(report):
    bars = [r for r in svg(memory_plot(report["rows"])).iter("rect")]
    assert len(bars) == 10
    assert float(bars[1].get("x")) == pytest.approx(
        float(bars[0].get("x")) + float(bars[0].get("width")), abs=0.2
    )


@pytest.mark.parametrize("plot", [quality_plot, share_plot, memory_plot])
def test_a_plot_without_figures_is_left_out(plot):
    assert plot([{"name": "x", "format": "gguf"}]) == ""


def test_labels_do_not_lie_on_each_other(report):
    rows = [{**r, "bytes": 5e6, "mean_kl_nats": 1e-3} for r in report["rows"][:4]]
    labels = [t for t in svg(quality_plot(rows)).iter("text") if t.get("class") == "label"]
    places = [(float(t.get("x")), float(t.get("y"))) for t in labels]
    assert len(set(places)) == 4


@pytest.mark.parametrize(
    ("top", "ticks"),
    [(100, [0, 20, 40, 60, 80, 100]), (13.6, [0, 5, 10, 15]), (0.7, [0, 0.2, 0.4, 0.6, 0.8]), (0, [0, 1])],
)
def test_ticks_are_round_and_reach_the_top(top, ticks):
    assert nice_ticks(top) == ticks


def test_files_are_written_and_a_bad_folder_is_named(report, tmp_path):
    data, page = write_report(report, tmp_path / "out")
    assert json.loads(data.read_text(encoding="utf-8")) == report
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    (tmp_path / "file").write_text("x")
    with pytest.raises(FoxEdgeError, match="file: the report cannot be written"):
        write_report(report, tmp_path / "file")
