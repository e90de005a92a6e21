"""Two results side by side: what got worse, what got better, what cannot be told apart.

Takes what `bench --json`, `eval --json` or a report.json hold. Speeds and memory of different machines or
settings are shown and not judged; how a figure is judged is verdicts.py's. Measures nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from benchmarks.common import records
from benchmarks.common.table import Column, render
from benchmarks.report.document import read_report
from benchmarks.report.verdicts import BETTER, SAME, UNJUDGED, WORSE, judge_row
from fox_edge.errors import FoxEdgeError

Row = Mapping[str, Any]

TOLERANCE_PERCENT = 3.0

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
    results = []
    pairs, left, joined = _matched(first["rows"], second["rows"])
    for old, new in pairs:
        figures = list(judge_row(old, new, comparable, tolerance_percent / 100))
        results.append({"artifact": new["artifact"], "before_artifact": old["artifact"], "figures": figures})
    verdicts = [f["verdict"] for r in results for f in r["figures"]]
    return {
        "tolerance_percent": tolerance_percent,
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
    cards = [(x.get("conditions") or {}).get("card") or {} for x in (first, second)]
    if _differ(cards, "name"):
        other.append(f"graphics card {_plain(cards[0]['name'])} and {_plain(cards[1]['name'])}")
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
            f"the machine was noisy, the same work varied {' and '.join(noisy)}: the intervals of speeds "
            "and times are wider by that"
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
