"""Two results side by side: what got worse, what got better, what cannot be told apart.

Takes what `bench --json`, `eval --json` or a report.json hold. A change is a regression or an improvement
only when its 95 % interval leaves no change out, and when it is larger than a tolerance: for speeds and times
on a noisy machine, than what the same work varied by there, since rounds of a few seconds do not see how such
a machine drifts. Speeds and memory of different machines or settings are shown and not judged. Knows figures
and intervals; measures nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from benchmarks.accuracy.proportions import compare as paired
from benchmarks.common import records
from benchmarks.common.table import Column, render
from benchmarks.report.document import read_report
from benchmarks.report.figures import interval_of
from fox_edge.errors import FoxEdgeError

Row = Mapping[str, Any]

TOLERANCE_PERCENT = 3.0
WORSE, BETTER, SAME, UNJUDGED = "regression", "improvement", "not told apart", "not comparable"


@dataclass(frozen=True)
class _Figure:
    """One figure: whether more of it is better, what it depends on, and whether it is the same every time."""

    key: str
    more_is_better: bool
    of: str  # 'machine', 'text' or 'artifact': what must be equal for a comparison to mean something
    exact: bool = False
    timed: bool = False  # by a clock: other work on the machine shows in it


_FIGURES = (
    _Figure("bytes", False, "artifact", exact=True),
    _Figure("load_s", False, "machine", timed=True),
    _Figure("time_to_first_token_s", False, "machine", timed=True),
    _Figure("prompt_tokens_per_s", True, "machine", timed=True),
    _Figure("decode_tokens_per_s", True, "machine", timed=True),
    _Figure("total_tokens_per_s", True, "machine", timed=True),
    _Figure("token_p95_s", False, "machine", timed=True),
    _Figure("token_p99_s", False, "machine", timed=True),
    _Figure("peak_rss_bytes", False, "machine"),
    _Figure("anonymous_rss_bytes", False, "machine"),
    _Figure("energy_joules_per_token", False, "machine", timed=True),
    _Figure("mean_kl_nats", False, "text"),
    _Figure("top1_agreement_percent", True, "text"),
)
# Settings that change what is measured; a different number of repeats only changes how sure one is.
_SETTINGS = (
    *("workload", "prompt_tokens", "decode_tokens", "users", "context", "threads", "page_cache"),
    *("profile", "session"),
)
_MACHINE = ("cpu", "cores", "memory_bytes")


def compare(before: Path, after: Path, *, tolerance_percent: float = TOLERANCE_PERCENT) -> dict[str, Any]:
    """Compare two files: {before, after, warnings, results [{artifact, figures [...]}], regressions, ...}.

    Each figure: {figure, before, after, ratio, interval (of the ratio, or null), change_percent, verdict}.
    Raises FoxEdgeError for a file that is no result, and when the two have no artifact in common.
    """
    first, second = read_result(before), read_result(after)
    if not _matched(first["rows"], second["rows"])[0]:
        names = [", ".join(str(r["artifact"]) for r in x["rows"]) or "nothing" for x in (first, second)]
        raise FoxEdgeError(f"no artifact is in both: {before} has {names[0]}; {after} has {names[1]}")
    return {
        "schema": records.SCHEMA,
        "before": str(before),
        "after": str(after),
        **compare_results(first, second, tolerance_percent=tolerance_percent),
    }


def compare_results(
    first: Row, second: Row, *, tolerance_percent: float = TOLERANCE_PERCENT
) -> dict[str, Any]:
    """The same of two records with `rows`, without the files' names; rows without a counterpart are named."""
    warnings, comparable = _differences(first, second)
    noise = max(_noise(first), _noise(second))
    results = []
    pairs, left, joined = _matched(first["rows"], second["rows"])
    for old, new in pairs:
        figures = list(_figures(old, new, comparable, tolerance_percent / 100, noise))
        results.append({"artifact": new["artifact"], "before_artifact": old["artifact"], "figures": figures})
    verdicts = [f["verdict"] for r in results for f in r["figures"]]
    return {
        "tolerance_percent": tolerance_percent,
        "noise_percent": 100 * noise,
        "warnings": warnings + joined,
        "only_before": [r["artifact"] for r in left[0]],
        "only_after": [r["artifact"] for r in left[1]],
        "results": results,
        "regressions": verdicts.count(WORSE),
        "improvements": verdicts.count(BETTER),
        "not_told_apart": verdicts.count(SAME),
        "not_comparable": verdicts.count(UNJUDGED),
    }


def read_result(path: Path) -> dict[str, Any]:
    """A result of any kind as a report's record: with `rows`, whose grades are in `tasks`.

    Raises FoxEdgeError with one sentence for a file that holds none.
    """
    record = records.read_json(path)
    if "rows" in record:
        return read_report(path)
    if "results" not in record:
        raise FoxEdgeError(
            f"{path}: no result of bench, eval or a report (it has neither 'rows' nor 'results')"
        )
    task = record.get("task")
    if task is None or task == "fidelity":
        records.check(record, records.FIDELITY if task else records.BENCH, path)
        return {**record, "rows": record["results"]}
    if not isinstance(task, str):
        raise FoxEdgeError(f"{path}: task is no text")
    records.check(record, records.EVALUATION, path)
    rows = []
    for row in record["results"]:
        named = {k: row.get(k) for k in ("artifact", "format", "runtime", "error")}
        rows.append({**named, "tasks": [{**row, "task": task}]})
    return {**record, "rows": rows, "tasks": [{"task": task, "n": record.get("n")}]}


# --- what must be equal ----------------------------------------------------------------------------------


def _differences(first: Row, second: Row) -> tuple[list[str], dict[str, bool]]:
    """What is not the same around the figures, in sentences, and which kinds of figures are comparable."""
    said = []
    machines = [x.get("machine") or {} for x in (first, second)]
    other = [
        f"{k} {_plain(machines[0][k])} and {_plain(machines[1][k])}" for k in _MACHINE if _differ(machines, k)
    ]
    if other:
        said.append(f"two different machines: {', '.join(other)}")
    settings = [x.get("settings") or {} for x in (first, second)]
    changed = [
        f"{k} {_plain(settings[0].get(k))} and {_plain(settings[1].get(k))}"
        for k in _SETTINGS
        if _differ(settings, k)
    ]
    if changed:
        said.append(f"different settings: {', '.join(changed)}")
    texts = [x.get("text") or {} for x in (first, second)]
    text = [k for k in ("source", "tokens", "windows") if _differ(texts, k)]
    if text:
        said.append(
            "fidelity on different texts: "
            + " and ".join(f"{_plain(t.get('source'))} ({_plain(t.get('tokens'))} tokens)" for t in texts)
        )
    comparable = {"machine": not other and not changed, "text": not text, "artifact": True}
    return [*said, *_remarks(first, second)], comparable


def _remarks(first: Row, second: Row) -> list[str]:
    """What explains a change without forbidding to judge it: versions, and noise."""
    said = []
    versions = [(x.get("machine") or {}).get("versions") or {} for x in (first, second)]
    moved = [
        f"{k} {versions[0][k]} to {versions[1][k]}"
        for k in sorted(versions[0].keys() & versions[1].keys())
        if versions[0][k] != versions[1][k]
    ]
    if moved:
        said.append(f"other versions: {', '.join(moved)}")
    noises = [(word, _noise(x)) for word, x in (("before", first), ("after", second))]
    if noisy := [f"{word} by {100 * noise:.0f} %" for word, noise in noises if noise]:
        said.append(
            f"the machine was noisy, the same work varied {' and '.join(noisy)}: speeds and times that "
            "differ by less are not told apart"
        )
    return said


def _noise(result: Row) -> float:
    """By what share slow passes through the same work fell behind fast ones; 0 on a quiet machine."""
    conditions = result.get("conditions") or {}
    return (conditions.get("noise_percent") or 0.0) / 100 if conditions.get("noisy") else 0.0


def _differ(pair: Sequence[Row], key: str) -> bool:
    """Whether both tell, and tell different things; null is a choice like another, where it is told."""
    first, second = pair
    if key not in first or key not in second or first[key] == second[key]:
        return False
    if key == "memory_bytes" and first[key] and second[key]:
        # What a kernel keeps for itself moves a little from one start to the next.
        return bool(abs(first[key] - second[key]) > 0.01 * first[key])
    return True


def _plain(value: Any) -> str:
    return "default" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def _matched(
    before: Sequence[Row], after: Sequence[Row]
) -> tuple[list[tuple[Row, Row]], tuple[list[Row], list[Row]], list[str]]:
    """Pairs of rows of the same artifact, what is left over on either side, and how pairs were found.

    By the whole name; for the rest by the last part of the path, where that is only one on each side; at
    last, one artifact on each side is taken for the same.
    """
    old, new, pairs, said = list(before), list(after), [], []
    for key in (_whole_name, _last_name):
        for row in list(new):
            same = [r for r in old if key(r) == key(row)]
            rivals = [r for r in new if key(r) == key(row)]
            if len(same) == 1 and len(rivals) == 1:
                pairs.append((same[0], row))
                old.remove(same[0])
                new.remove(row)
    if not pairs and len(old) == len(new) == 1:
        said.append(f"different artifacts: {old[0]['artifact']} and {new[0]['artifact']}")
        pairs, old, new = [(old[0], new[0])], [], []
    return pairs, (old, new), said


def _whole_name(row: Row) -> tuple[str, Any]:
    return row["artifact"], row.get("users") or 1


def _last_name(row: Row) -> tuple[str, Any]:
    return PurePath(row["artifact"]).name, row.get("users") or 1


# --- figure by figure ------------------------------------------------------------------------------------


def _figures(
    old: Row, new: Row, comparable: Mapping[str, bool], tolerance: float, noise: float
) -> Iterator[dict[str, Any]]:
    broken = [bool(r.get("error")) for r in (old, new)]
    if any(broken):
        verdict = SAME if all(broken) else WORSE if broken[1] else BETTER
        yield _result("runs", None if broken[0] else 1, None if broken[1] else 1, None, verdict) | {
            "error": new.get("error") or old.get("error")
        }
        return
    if any(old.get(k) != new.get(k) for k in ("positions", "fidelity_from")):
        comparable = {**comparable, "text": False}
    for figure in _FIGURES:
        if old.get(figure.key) is not None and new.get(figure.key) is not None:
            loud = noise if figure.timed else 0.0
            yield _judged(figure, old, new, comparable[figure.of], tolerance, loud)
    for asked in old.get("tasks") or ():
        other = next((t for t in new.get("tasks") or () if t.get("task") == asked.get("task")), None)
        if other and asked.get("n") and other.get("n"):
            yield _accuracy(asked, other)


def _judged(
    figure: _Figure, old: Row, new: Row, comparable: bool, tolerance: float, noise: float
) -> dict[str, Any]:
    """The ratio of one figure and what its interval says."""
    a, b = float(old[figure.key]), float(new[figure.key])
    between = (
        None if figure.exact else ratio_interval(a, _bounds(old, figure.key), b, _bounds(new, figure.key))
    )
    result = _result(figure.key, old[figure.key], new[figure.key], between, SAME)
    if not comparable:
        return result | {"verdict": UNJUDGED}
    apart = (a != b) if figure.exact else between is not None and not between[0] <= 1 <= between[1]
    if apart and abs(b - a) > tolerance * abs(a) and min(a, b) < (1 - noise) * max(a, b):
        result["verdict"] = BETTER if (b > a) == figure.more_is_better else WORSE
    return result


def _bounds(row: Row, key: str) -> tuple[float, float] | None:
    """The interval of a figure; one run's extremes are none."""
    found = interval_of(row, key)
    return None if found is None or (found[0] == found[1] and row.get("runs") == 1) else found


def ratio_interval(
    a: float, around_a: tuple[float, float] | None, b: float, around_b: tuple[float, float] | None
) -> tuple[float, float] | None:
    """95 % interval of b / a from the intervals of both; None where one is unknown or not above zero.

    The variances of the logarithms are recovered from the limits (MOVER; Zou and Donner, Statistics in
    Medicine 27, 2008): the distance to each limit of the ratio is the root of the sum of squares of the
    distances that push it there.
    """
    if around_a is None or around_b is None or min(a, b, around_a[0], around_b[0]) <= 0:
        return None
    la, lb = math.log(a), math.log(b)
    down_a, up_a = la - math.log(around_a[0]), math.log(around_a[1]) - la
    down_b, up_b = lb - math.log(around_b[0]), math.log(around_b[1]) - lb
    low, high = math.hypot(down_b, up_a), math.hypot(up_b, down_a)
    return math.exp(lb - la - low), math.exp(lb - la + high)


def _accuracy(old: Row, new: Row) -> dict[str, Any]:
    """Right answers: paired when both carry answers to the same questions, else by their two intervals."""
    key = f"{old['task']}: accuracy_percent"
    result = _result(key, old.get("accuracy_percent"), new.get("accuracy_percent"), None, SAME)
    ours, theirs = (t.get("answers") or () for t in (new, old))
    if ours and _asked(ours) == _asked(theirs):
        told = paired([_score(a) for a in theirs], [_score(a) for a in ours])
        verdicts = {"worse": WORSE, "better": BETTER}
        return result | {
            "paired_p": told.p,
            "difference_percent": told.difference_percent,
            "difference_interval_percent": list(told.interval_percent),
            "verdict": verdicts.get(told.verdict, SAME),
        }
    if old.get("n") != new.get("n"):
        result["n"] = [old.get("n"), new.get("n")]
    limits = _difference_interval(old, new)
    if limits and not limits[0] <= 0 <= limits[1]:
        result["verdict"] = BETTER if limits[0] > 0 else WORSE
    return result | {"paired_p": None, "difference_interval_percent": limits}


def _asked(answers: Sequence[Row]) -> list[tuple[Any, Any]]:
    """Which questions were asked, as far as answers tell."""
    return [(a.get("question"), a.get("expected")) for a in answers]


def _score(answer: Row) -> float:
    score = answer.get("score")
    return float(bool(answer.get("right")) if score is None else score)


def _difference_interval(old: Row, new: Row) -> tuple[float, float] | None:
    """95 % interval of the difference of two shares from their own (Newcombe, 1998, method 10)."""
    p, q, around_p, around_q = (t.get(k) for k in ("accuracy_percent", "ci95_percent") for t in (old, new))
    if p is None or q is None or not around_p or not around_q:
        return None
    low = math.hypot(q - around_q[0], around_p[1] - p)
    high = math.hypot(around_q[1] - q, p - around_p[0])
    return q - p - low, q - p + high


def _result(
    figure: str, before: Any, after: Any, between: tuple[float, float] | None, verdict: str
) -> dict[str, Any]:
    ratio = after / before if before and after is not None else None
    return {
        "figure": figure,
        "before": before,
        "after": after,
        "ratio": ratio,
        "interval": None if between is None else list(between),
        "change_percent": None if ratio is None else 100 * (ratio - 1),
        "verdict": verdict,
    }


# --- for a person ----------------------------------------------------------------------------------------

COLUMNS = (
    Column("figure", "figure"),
    Column("before", "before_said", "{:s}"),
    Column("after", "after_said", "{:s}"),
    Column("ratio", "ratio", "{:.3f}"),
    Column("95 % interval", "interval_said", "{:s}"),
    Column("verdict", "verdict"),
)


def compare_text(result: Mapping[str, Any]) -> str:
    """What differs around the figures first and loudly, then a table per artifact, then the sum."""
    lines = [f"NOT THE SAME: {warning}" for warning in result["warnings"]]
    for found in result["results"]:
        lines += ["", found["artifact"]]
        lines.append(
            render(COLUMNS, [_said(f) for f in found["figures"]]) if found["figures"] else "no figure in both"
        )
        lines += [f"{f['error']}" for f in found["figures"] if f.get("error")]
    for key, word in (("only_before", "before"), ("only_after", "after")):
        if result[key]:
            lines += ["", f"only {word}: {', '.join(result[key])}"]
    counts = [(result["regressions"], WORSE), (result["improvements"], BETTER)]
    total = ", ".join(f"{n} {word}{'' if n == 1 else 's'}" for n, word in counts)
    rest = f"{result['not_told_apart']} not told apart"
    if result["not_comparable"]:
        rest += f", {result['not_comparable']} not comparable and so not judged"
    lines += ["", f"{total}, {rest} (changes under {result['tolerance_percent']:g} % do not count)"]
    return "\n".join(lines).lstrip("\n")


def _said(figure: Mapping[str, Any]) -> dict[str, Any]:
    key, between = figure["figure"], figure["interval"]
    verdict = figure["verdict"].upper() if figure["verdict"] == WORSE else figure["verdict"]
    if figure.get("paired_p") is not None:
        verdict += f" (paired, p {figure['paired_p']:.2g})"
    elif (
        between is None
        and figure["verdict"] == SAME
        and key not in ("runs", "bytes")
        and "accuracy" not in key
    ):
        verdict += " (no interval)"
    return {
        **figure,
        "before_said": _value(key, figure["before"]),
        "after_said": _value(key, figure["after"]),
        "interval_said": None if between is None else f"{between[0]:.3f} to {between[1]:.3f}",
        "verdict": verdict,
    }


def _value(key: str, value: Any) -> str:
    if key == "runs":
        return "no" if value is None else "yes"
    if value is None:
        return "–"
    if key.endswith("_bytes") or key == "bytes":
        return f"{value / 1e6:,.1f} MB"
    if key.endswith("_percent"):
        return f"{value:.1f} %"
    return f"{value:,.4g}"
