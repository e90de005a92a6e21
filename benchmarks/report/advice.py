"""Which artifact to ship to each device, in one plain sentence with the figures that decided.

The rule, in this order: it fits the device's memory; it has kept the model's quality; it is the fastest of
those; where speeds cannot be told apart, the closest to the reference; where that cannot be told apart
either, the one that takes the least memory, and the sentence says so. Knows rows of a report and profiles;
measures nothing, and never lets a projection stand for a measurement.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from benchmarks.common.table import rate
from benchmarks.report.figures import interval_of, one_each

Row = Mapping[str, Any]

# An export further than this from the reference has lost too much: the limit that `fox-edge export` sets its
# own 4-bit models.
KL_LIMIT_NATS = 0.1
# A projection is no nearer to the truth than this, whatever the interval of the measurement under it: two
# that differ by less are the same to us.
PROJECTED_TIE = 0.05
_Z95 = 1.959963984540054


class Need(NamedTuple):
    """What an artifact takes on a device. `reckoned`: for the device's context, else measured here.

    `parts` is the sum in words, `misfit` the sentence of whoever found that it does not fit; '' unknown.
    """

    bytes: int | None
    reckoned: bool
    parts: str
    misfit: str


@dataclass(frozen=True)
class _Candidate:
    """One export on one device: the memory it needs there, and how fast it is or would be."""

    row: Row
    need: Need
    speed: float | None
    between: tuple[float, float] | None
    projected: bool

    @property
    def name(self) -> str:
        return str(self.row["name"])


def advise(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One advice per profile of the report: {profile, artifact, name, sentence}; artifact None: none."""
    return [advise_profile(report["rows"], p, report["settings"]) for p in report.get("profiles") or ()]


def advise_profile(rows: Sequence[Row], profile: Row, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Which of the exports among these rows to ship to one profile, and why.

    `profile`: {name, memory_bytes, context, ...}; `settings`: the bench's (its `context` says at how many
    tokens memory was measured).
    """
    # What ran on a graphics card says nothing of a phone's or laptop's processor.
    shown = [r for r in rows if r.get("device") != "cuda"]
    exports = [r for r in one_each(shown) if r.get("format") != "torch"]
    candidates = [c for r in exports if (c := _candidate(r, profile, settings)) is not None]
    fitting = [c for c in candidates if _fits(c, profile)]
    if fitting:
        chosen, sentence = _choose(fitting, len(exports), profile)
        return _advice(profile, chosen.row, sentence)
    return _advice(profile, None, _none_fits(exports, candidates, profile))


def _advice(profile: Row, row: Row | None, sentence: str) -> dict[str, Any]:
    return {
        "profile": profile["name"],
        "artifact": None if row is None else row["artifact"],
        "name": None if row is None else row["name"],
        "sentence": sentence,
    }


def _candidate(row: Row, profile: Row, settings: Mapping[str, Any]) -> _Candidate | None:
    """None for a row that failed: under another profile's cap it may have failed for that cap alone."""
    if row.get("error"):
        return None
    needed = need(row, profile, settings)
    name = profile["name"]
    projection = next((p for p in row.get("projections") or () if p.get("profile") == name), None)
    if projection is not None and projection.get("decode_tokens_per_s"):
        speed, measured = projection["decode_tokens_per_s"], row.get("decode_tokens_per_s")
        between = interval_of(row, "decode_tokens_per_s")
        if between and measured:  # what is not told apart here is not told apart there
            between = (between[0] * speed / measured, between[1] * speed / measured)
        return _Candidate(row, needed, speed, between, True)
    if not _measured_on(row, profile):
        return _Candidate(row, needed, None, None, True)
    speed = row.get("decode_tokens_per_s")
    return _Candidate(row, needed, speed, interval_of(row, "decode_tokens_per_s"), False)


def _measured_on(row: Row, profile: Row) -> bool:
    """Whether this machine's speed is this profile's: the machine itself, or what it was run as."""
    return bool(profile["name"] == (row.get("profile") or "this"))


def need(row: Row, profile: Row, settings: Mapping[str, Any]) -> Need:
    """Bytes that the artifact needs at the profile's context, and their sum in words.

    The larger of what was reckoned for that context and what was measured at no longer one.
    """
    name = profile["name"]
    reckoned: Row = next((m for m in row.get("memory") or () if m.get("profile") == name), {})
    projected: Row = next((p for p in row.get("projections") or () if p.get("profile") == name), {})
    total = reckoned.get("total_bytes") or projected.get("needed_bytes")
    peak, context, measured_at = row.get("peak_rss_bytes"), profile.get("context"), settings.get("context")
    comparable = not context or not measured_at or measured_at <= context
    if total is not None and (peak is None or not comparable or total >= peak):
        said = "" if projected.get("fits") is not False else str(projected.get("source") or "")
        return Need(total, True, _sum(reckoned), said)
    return Need(peak, False, "", "")


_PARTS = {
    "weights_bytes": "weights",
    "kv_bytes": "KV cache",
    "buffers_bytes": "buffers",
    "tokenizer_bytes": "tokenizer",
    "process_bytes": "process and libraries",
}


def _sum(reckoned: Row) -> str:
    parts = [f"{word} {_mb(reckoned[key])}" for key, word in _PARTS.items() if reckoned.get(key) is not None]
    return " + ".join(parts)


def _fits(candidate: _Candidate, profile: Row) -> bool:
    cap = profile.get("memory_bytes")
    return cap is None or (candidate.need.bytes is not None and candidate.need.bytes <= cap)


def _choose(fitting: Sequence[_Candidate], exports: int, profile: Row) -> tuple[_Candidate, str]:
    """The one to ship of those that fit, and the sentence."""
    kept = [c for c in fitting if not _lost(c.row)]
    pool = kept or [min(fitting, key=_distance)]
    fastest = max(pool, key=lambda c: c.speed or 0.0)
    quick = [c for c in pool if c is fastest or not _slower(c, fastest)]
    closest = min(quick, key=_distance)
    level = [c for c in quick if c is closest or not _further(c, closest)]
    chosen = min(level, key=lambda c: (c.need.bytes or 0, c.row.get("bytes") or 0))
    alone = len(fitting) == 1 and exports > 1
    fit, speed = _room(chosen, profile, alone), _speed(chosen, quick, level, len(pool))
    if not kept:
        return chosen, f"Ship {chosen.name} only if you must: {fit} and {speed}, but it {_lost(chosen.row)}."
    refused = _refused(chosen, fitting)
    return chosen, f"Ship {chosen.name}: {fit}, {speed}, and {_quality(chosen.row)}{refused}."


def _lost(row: Row) -> str:
    """Why an artifact has lost too much of the model; '' when nothing says so."""
    for asked in row.get("tasks") or ():
        if (asked.get("paired") or {}).get("verdict") == "worse":
            return f"gives fewer right answers to {asked.get('task')} than {asked['paired'].get('with')}"
    between = interval_of(row, "mean_kl_nats")
    mean = row.get("mean_kl_nats")
    if mean is not None and (between[0] if between else mean) > KL_LIMIT_NATS:
        return f"is too far from the reference (mean KL {mean:.2g} nats, over {KL_LIMIT_NATS:g})"
    return ""


def _distance(candidate: _Candidate) -> float:
    mean = candidate.row.get("mean_kl_nats")
    return float("inf") if mean is None else float(mean)


def _slower(candidate: _Candidate, fastest: _Candidate) -> bool:
    """Whether it is known to be slower; a speed that nobody knows is not known to be."""
    if candidate.speed is None or fastest.speed is None:
        return fastest.speed is not None
    if 1 in (candidate.row.get("runs"), fastest.row.get("runs")):
        return False  # one round tells nothing
    if candidate.row["artifact"] in (fastest.row.get("rank_shared_with") or ()):
        return False
    if not candidate.projected and fastest.row.get("rank") is not None:
        return True
    if candidate.between and fastest.between and candidate.between[1] >= fastest.between[0]:
        return False
    known = not candidate.projected and candidate.between and fastest.between
    return bool(known) or candidate.speed < (1 - PROJECTED_TIE) * fastest.speed


def _further(candidate: _Candidate, closest: _Candidate) -> bool:
    """Whether it is known to be further from the reference; without intervals, by the figures alone."""
    mine, best = candidate.row.get("mean_kl_nats"), closest.row.get("mean_kl_nats")
    if mine is None or best is None:
        return best is not None
    own, least = (interval_of(c.row, "mean_kl_nats") for c in (candidate, closest))
    return own[0] > least[1] if own and least else mine > best


def _room(chosen: _Candidate, profile: Row, alone: bool) -> str:
    """How it fits; that no other does, where that is so."""
    cap = profile.get("memory_bytes")
    if chosen.need.bytes is None:
        return "it needs memory that was not measured"
    of = f" of {_mb(cap)}" if cap is not None else ""
    at = (
        f" at {profile['context']:,} tokens of context"
        if chosen.need.reckoned and profile.get("context")
        else ""
    )
    return f"it {'alone fits, with' if alone else 'needs'} {_mb(chosen.need.bytes)}{of} MB{at}"


def _speed(chosen: _Candidate, quick: Sequence[_Candidate], level: Sequence[_Candidate], pool: int) -> str:
    """How fast it is, measured or projected, and whom it cannot be told from."""
    if chosen.speed is None:
        return "has a speed there that nobody knows"
    about, kind = ("about ", "projected") if chosen.projected else ("", "measured")
    figure = f"{about}{rate(chosen.speed)} tok/s ({kind})"
    same = [c.name for c in level if c is not chosen]
    near = [c.name for c in quick if c is not chosen and c not in level]
    if same:
        return f"runs at {figure}, not told apart from {_and(same)} in speed or fidelity but the smallest"
    if near:
        return f"runs at {figure}, not told apart from {_and(near)} in speed but closer to the reference"
    return f"is the fastest of the {pool} to choose from at {figure}" if pool > 1 else f"runs at {figure}"


def _quality(row: Row) -> str:
    said = []
    if row.get("mean_kl_nats") is not None:
        error = f" ± {_Z95 * row['mean_kl_se_nats']:.1g}" if row.get("mean_kl_se_nats") else ""
        said.append(f"mean KL {row['mean_kl_nats']:.2g}{error} nats")
    for asked in row.get("tasks") or ():
        if asked.get("n") and asked.get("correct") is not None:
            said.append(f"{asked.get('task')} {asked['correct']:,} of {asked['n']:,} right{_told(asked)}")
    if not said:
        return "nothing is known of its fidelity (--checkpoint measures it)"
    return f"keeps the model's quality ({'; '.join(said)})"


def _told(asked: Row) -> str:
    paired = asked.get("paired") or {}
    if paired.get("verdict") in ("not told apart", "better"):
        than = "than" if paired["verdict"] == "better" else "from"
        return f", {paired['verdict']} {than} {paired.get('with')}"
    low, high = asked.get("ci95_percent") or (None, None)
    return f", {low:.0f} to {high:.0f} %" if low is not None and high is not None else ""


def _refused(chosen: _Candidate, fitting: Sequence[_Candidate]) -> str:
    """A faster one that was passed over, and why."""
    faster = [c for c in fitting if _lost(c.row) and (c.speed or 0.0) > (chosen.speed or 0.0)]
    return f"; {faster[0].name} is faster but {_lost(faster[0].row)}" if faster else ""


def _none_fits(exports: Sequence[Row], candidates: Sequence[_Candidate], profile: Row) -> str:
    """Why there is nothing to ship, with the sum of the one that is nearest."""
    if not exports:
        return "No export was measured, so there is none to ship."
    known = [c for c in candidates if c.need.bytes is not None]
    if not known:
        failed = next((r for r in exports if r.get("error")), None)
        why = f"{failed['name']}: {failed['error']}" if failed else "their memory was not measured"
        return f"None of {len(exports)} exports can be shipped on what is known: {why.rstrip('.')}."
    least = min(known, key=lambda c: c.need.bytes or 0)
    if least.need.misfit and not least.need.parts:
        return f"None fits: the smallest, {least.name}, {least.need.misfit.rstrip('.')}."
    cap, needed = profile["memory_bytes"], least.need.bytes or 0
    total = f"{least.need.parts} = {_mb(needed)} MB" if least.need.parts else f"{_mb(needed)} MB"
    at = "as measured here"
    if least.need.reckoned and profile.get("context"):
        at = f"at {profile['context']:,} tokens of context"
    return (
        f"None fits: the smallest, {least.name}, needs {total} {at}, {_mb(needed - cap)} MB more than the "
        f"{_mb(cap)} MB that can be had there."
    )


def _and(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _mb(size: float) -> str:
    return f"{size / 1e6:,.0f}"
