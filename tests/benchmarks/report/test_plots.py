"""Drawings by hand: where a point lies, what a bar's length is, which rows are on the front."""

import math
from xml.etree import ElementTree

import pytest

from benchmarks.report.document import make_report
from benchmarks.report.plots import (
    accuracy_plot,
    caps,
    ceiling_plot,
    curve_plot,
    front_plot,
    latency_plot,
    memory_plot,
    pareto,
    projection_plot,
)
from benchmarks.report.style import CSS
from benchmarks.report.svg import WIDTH, nice_ticks, shortened
from tests.benchmarks.sample_report import (
    NAMES,
    PROFILES,
    bench_result,
    evaluation,
    fidelity,
    full_evaluation,
    full_fidelity,
    full_result,
)


@pytest.fixture(scope="module")
def rows():
    """Nano's rows."""
    found = make_report(
        bench_result(), checkpoint="nano", names=NAMES, fidelity=fidelity(), evaluations=[evaluation()]
    )
    return found["rows"]


@pytest.fixture(scope="module")
def full():
    """Rows of Fox-1's shape."""
    return make_report(
        full_result(), checkpoint="fox", fidelity=full_fidelity(), evaluations=[full_evaluation()]
    )["rows"]


def svg(text: str):
    return ElementTree.fromstring(text)


def rects(text: str, kind: str):
    return [r for r in svg(text).iter("rect") if kind in r.get("class", "").split()]


def point(bytes: float, kl: float, name: str = "x") -> dict:
    return {"artifact": name, "name": name, "bytes": bytes, "mean_kl_nats": kl, "format": "gguf"}


def test_the_front_by_hand():
    a, b, c, d = point(4, 0.5, "a"), point(5, 0.4, "b"), point(5, 0.3, "c"), point(9, 0.01, "d")
    beaten = [point(6, 0.3, "e"), point(9, 0.02, "f"), point(10, 0.01, "g")]
    assert [r["name"] for r in pareto([*beaten, d, c, b, a])] == ["a", "c", "d"]
    assert pareto([point(0, 1), {"name": "n"}]) == []
    assert [r["name"] for r in pareto([a])] == ["a"]


def test_the_front_plot_places_points_by_size_and_log_kl(rows):
    root = svg(front_plot(rows))
    circles = [(float(c.get("cx")), float(c.get("cy"))) for c in root.iter("circle")]
    assert len(circles) == 2  # the two GGUF files
    (x8, y8), (x4, y4) = circles
    assert x8 > x4 and y8 > y4  # int8 is larger, and closer to the reference, which is down
    grid = [float(line.get("y1")) for line in root.iter("line") if line.get("class") == "grid"]
    assert (y8 - y4) / (grid[0] - grid[1]) == pytest.approx(1.655, abs=0.01)  # log10(1.4e-3 / 3.1e-5)


def test_the_line_goes_down_at_each_point_of_the_front_and_level_to_the_next():
    rows = [point(4e6, 0.1, "a"), point(8e6, 0.01, "b"), point(9e6, 0.05, "beaten")]
    root = svg(front_plot(rows))
    (path,) = [p for p in root.iter("polyline") if p.get("class") == "front"]
    corners = [tuple(map(float, p.split(","))) for p in path.get("points").split()]
    (a, b, _) = [(float(c.get("cx")), float(c.get("cy"))) for c in root.iter("circle")]
    assert corners[1:4] == [a, (b[0], a[1]), b]
    assert corners[0][0] == a[0] and corners[-1][1] == b[1]


def test_whiskers_are_the_95_percent_interval(full):
    root = svg(front_plot(full))
    grid = [float(line.get("y1")) for line in root.iter("line") if line.get("class") == "grid"]
    whisker = next(line for line in root.iter("line") if line.get("class") == "whisker")
    span = (float(whisker.get("y1")) - float(whisker.get("y2"))) / (grid[0] - grid[1])
    half = 1.96 * 0.04
    assert abs(span) == pytest.approx(math.log10((1 + half) / (1 - half)), abs=0.01)


def test_the_ceiling_plot_hatches_what_is_not_ours(rows):
    published = {"name": "H100", "ours": False, "roofline_percent": 19.9, "decode_tokens_per_s": 200}
    text = ceiling_plot([*rows, published])
    mine, theirs = rects(text, "is-gguf"), rects(text, "published")
    assert len(mine) == 2 and len(theirs) == 1
    assert float(theirs[0].get("width")) / float(mine[0].get("width")) == pytest.approx(19.9 / 7.2, rel=0.02)
    assert 'id="hatch"' in text
    assert 'id="hatch"' not in ceiling_plot(rows)
    assert len(rects(text, "track")) == 6


def test_the_memory_plot_stacks_own_and_file_pages(rows):
    bars = list(svg(memory_plot(rows)).iter("rect"))
    assert len(bars) == 10
    assert float(bars[1].get("x")) == pytest.approx(
        float(bars[0].get("x")) + float(bars[0].get("width")), abs=0.2
    )
    (alone,) = svg(memory_plot([{"name": "x", "format": "gguf", "peak_rss_bytes": 5e6}])).iter("rect")
    assert alone.get("class") == "is-gguf"


def test_every_format_has_a_shape_and_a_colour_of_its_own():
    shapes = {"gguf": "circle", "onnx": "rect", "pte": "polygon"}
    text = front_plot([point(n + 1, 0.1 / (n + 1), f) | {"format": f} for n, f in enumerate(shapes)])
    for format, shape in shapes.items():
        (mark,) = [m for m in svg(text).iter(shape) if m.get("class", "").split()[:1] == [f"is-{format}"]]
        assert f".is-{format}{{fill:var(--{format})}}" in CSS
    assert len(mark.get("points").split()) == 3


def test_caps_are_drawn_at_their_megabytes_where_they_are_in_sight(full):
    near, far = caps(full, PROFILES)
    assert [p["name"] for p in near] == ["phone-8gb", "phone-4gb", "pi5"]
    assert [p["name"] for p in far] == ["this"]
    text = memory_plot(full, PROFILES)
    lines = [float(e.get("x1")) for e in svg(text).iter("line") if e.get("class") == "cap"]
    ticks = [e for e in svg(text).iter("text") if e.get("class") == "tick" and e.text == "1,000 MB"]
    assert lines[0] == float(ticks[0].get("x"))  # pi5's 1,000 MB
    assert (lines[1] - 2) / (lines[0] - 2) == pytest.approx(1.5, abs=0.01)


def test_the_accuracy_plot_says_what_the_paired_test_says(full):
    text = accuracy_plot(full, "gsm8k")
    words = [e.text for e in svg(text).iter("text")]
    assert "36 %" in words and "11 % · worse" in words and "35 % · not told apart" in words
    assert 'class="reference"' in text
    assert accuracy_plot(full, "mmlu") == ""


def test_the_latency_plot_runs_from_the_median_to_the_99th_percentile(full):
    text = latency_plot(full[:1])
    (mark,) = rects(text, "is-torch")
    first, last = (e for e in svg(text).iter("line") if "range" in e.get("class"))
    assert float(first.get("x1")) == pytest.approx(float(mark.get("x")) + 5, abs=0.1)
    reach = (float(last.get("x2")) - 8) / (float(first.get("x1")) - 8)
    assert reach == pytest.approx(1.3, abs=0.01)


def test_the_projection_plot_is_all_hatched(full):
    text = projection_plot(full, "pi5")
    assert len(rects(text, "projected")) == 7 and 'id="hatch"' in text
    assert "is-" not in text
    assert projection_plot(full, "this") == ""


def test_the_curve_has_a_line_per_row_and_falls_with_it(full):
    lines = [p.get("points").split() for p in svg(curve_plot(full)).iter("polyline")]
    assert len(lines) == 7 and {len(line) for line in lines} == {8}
    heights = [float(p.split(",")[1]) for p in lines[0]]
    assert heights == sorted(heights)  # KL falls, so the line goes down the page


@pytest.mark.parametrize("plot", [front_plot, ceiling_plot, memory_plot, latency_plot, curve_plot])
def test_a_plot_without_figures_is_left_out(plot):
    assert plot([{"artifact": "x", "name": "x", "format": "gguf"}]) == ""
    assert plot([]) == ""


def test_labels_do_not_lie_on_each_other(rows):
    same = [{**r, "bytes": 5e6, "mean_kl_nats": 1e-3} for r in rows[:4]]
    labels = [t for t in svg(front_plot(same)).iter("text") if t.get("class") == "label"]
    places = [(float(t.get("x")), float(t.get("y"))) for t in labels]
    assert len(set(places)) == 4


def test_a_long_name_keeps_both_its_ends_and_stays_inside():
    assert shortened("a-very-long-name-of-an-artifact-int4", 100) == "a-very…t-int4"
    assert shortened("short", 100) == "short"
    text = front_plot([point(5e6, 0.1, "n" * 300)])
    (label,) = [t for t in svg(text).iter("text") if t.get("class") == "label"]
    assert len(label.text) < WIDTH / 5


@pytest.mark.parametrize(
    ("top", "ticks"),
    [(100, [0, 20, 40, 60, 80, 100]), (13.6, [0, 5, 10, 15]), (0.7, [0, 0.2, 0.4, 0.6, 0.8]), (0, [0, 1])],
)
def test_ticks_are_round_and_reach_the_top(top, ticks):
    assert nice_ticks(top) == ticks
