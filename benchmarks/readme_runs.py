"""What the tables of the README and the docs show of runs: speed, memory, answers under load.

One function per results file. Knows those results; not how Markdown is written, nor where a table stands.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.common.markdown import machine_line, markdown, mb, measured
from benchmarks.gpu import goals


def demo_table(report: Mapping[str, Any]) -> str:
    """What the demo printed, and the published row marked as not ours."""
    rows = []
    for row in report["rows"]:
        rows.append(
            [
                row["name"],
                mb(row["bytes"]),
                f"{row['load_s']:.2f}",
                f"{1e3 * row['time_to_first_token_s']:,.0f}",
                f"{row['prompt_tokens_per_s']:,.0f}",
                f"{row['decode_tokens_per_s']:,.0f}",
                mb(row["peak_rss_bytes"]),
                f"{row['mean_kl_nats']:.2g}",
                f"{row['top1_agreement_percent']:.1f}",
                f"{row['correct']} of {row['n']}",
            ]
        )
    base = report["baseline"]
    rows.append(
        [
            "*not ours: Fox-1 BF16 on an H100 (paper)*",
            *("", "", "", ""),
            f"*over {base['decode_tokens_per_s']}*",
            f"*{mb(base['peak_rss_bytes'])}*",
            *("", "", ""),
        ]
    )
    head = (
        *("nano as", "MB", "load, s", "first token, ms", "prompt tok/s", "decode tok/s"),
        *("peak RSS, MB", "mean KL, nats", "top-1, %", "word problems right"),
    )
    return measured(head, rows, report)


def report_table(report: Mapping[str, Any]) -> str:
    """The page's table in short, with the speeds' intervals, and the published row marked as not ours."""
    rows = []
    for row in report["rows"]:
        low, high = row["interval"]["decode_tokens_per_s"]
        rows.append(
            [
                row["name"],
                mb(row["bytes"]),
                f"{row['load_s']:.1f}",
                f"{row['prompt_tokens_per_s']:,.0f}",
                f"{row['decode_tokens_per_s']:,.1f} ({low:,.1f} to {high:,.1f})",
                f"{row['roofline_percent']:.0f}",
                f"{row['baseline_ratio']['decode_tokens_per_s']:.2f}",
                mb(row["peak_rss_bytes"]),
                f"{row['mean_kl_nats']:.2g}",
            ]
        )
    base = report["baseline"]
    rows.append(
        [
            *("*not ours: BF16 on an H100 (paper)*", "", "", ""),
            f"*over {base['decode_tokens_per_s']}*",
            f"*{base['roofline_percent']:.0f}*",
            *("*1.00*", f"*{mb(base['peak_rss_bytes'])}*", ""),
        ]
    )
    head = (
        *("artifact", "MB", "load, s", "prompt tok/s", "decode tok/s", "% of its ceiling", "× H100"),
        *("peak RSS, MB", "mean KL, nats"),
    )
    return measured(head, rows, report)


def memory_table(results: Mapping[str, Any]) -> str:
    """What was predicted beside what was measured, by runtime, KV cache and context."""
    rows = []
    for row in results["rows"]:
        others = [f"{k} {('off', 'on')[v]}" for k, v in row["session"].items() if isinstance(v, bool)]
        rows.append(
            [
                ", ".join([row["runtime"], *others]),
                row["kv"],
                f"{row['context']:,}",
                mb(row["predicted"]["total_bytes"]),
                mb(row["measured"]["peak_rss_bytes"]),
                f"{row['ratio']:.3f}",
            ]
        )
    head = ("runtime", "KV cache", "context", "predicted, MB", "peak RSS, MB", "ratio")
    return measured(head, rows, results)


def speculation_table(results: Mapping[str, Any]) -> str:
    """Decoding with and without guesses, and how many answers are the same."""
    rows = []
    for row in results["results"]:
        right = row["right_percent"]
        rows.append(
            [
                row["artifact"],
                row["prompts"],
                row["way"],
                f"{row['decode_tokens_per_s']:,.1f}",
                f"{row['speedup']:.2f}",
                f"{row['guessed']:,}" if "guessed" in row else "",
                "" if right is None else f"{right:.0f}",
                f"{row['identical']} of {row['answers']}",
            ]
        )
    head = (
        *("model", "prompts", "guesses", "decode tok/s", "times plain", "tokens guessed", "right, %"),
        "answers the same",
    )
    return measured(head, rows, results)


def overhead_table(results: Mapping[str, Any]) -> str:
    """What the harness costs: beside a bare loop, and by itself as a share of a token."""
    rows = [
        [
            row["artifact"],
            f"{1e3 * row['token_s']:.2f}",
            f"{row['overhead_percent']:+.2f}",
            "{:+.1f} to {:+.1f}".format(*row["interval_percent"]),
            f"{1e6 * row['clockwork_s']:.2f}",
            f"{row['clockwork_percent']:.2f}",
        ]
        for row in results["results"]
    ]
    head = (
        *("model", "ms per token", "over the bare loop, %", "95 % interval"),
        *("clockwork, µs per token", "of a token, %"),
    )
    return measured(head, rows, results)


def repeats_table(results: Mapping[str, Any]) -> str:
    """How often two runs agree within their intervals, figure by figure."""
    rows = [
        [
            f"`{row['figure']}`",
            f"{row['width_percent']:.1f}",
            f"{row['agreeing']} of {row['pairs']}",
            f"{row['agreeing_percent']:.1f}",
            f"{row['by_rounds_alone_percent']:.1f}",
            f"{row['not_told_apart_percent']:.1f}",
        ]
        for row in results["results"]
    ]
    head = (
        *("figure", "interval's typical width, %", "pairs of runs that agree", "%"),
        "by rounds alone, %",
        "not told apart by compare, %",
    )
    return measured(head, rows, results)


def prefix_gain_table(results: Mapping[str, Any]) -> str:
    """Questions with their worked examples run once, beside every prompt run whole."""
    rows = []
    for row in results["results"]:
        reused, whole = row["reused"], row["whole"]
        rows.append(
            [
                row["artifact"],
                f"{whole['prompt_tokens_run']:,} / {reused['prompt_tokens_run']:,}",
                f"{whole['prompt_s']:.1f} / {reused['prompt_s']:.1f}",
                f"{row['prompt_times_faster']:.1f}",
                f"{whole['seconds']:.1f} / {reused['seconds']:.1f}",
                f"{row['times_faster']:.1f}",
                f"{row['together_times_faster']:.1f}" if "together" in row else "",
            ]
        )
    head = (
        *("model", "prompt tokens run, whole / reused", "prompts, s", "times faster"),
        *("with the answers, s", "times faster"),
        f"and {results.get('batch') or 'several'} questions at once",
    )
    return measured(head, rows, results)


def serve_table(results: Mapping[str, Any]) -> str:
    """A server under load, and the peer's beside it."""
    rows = [
        [
            row["who"],
            f"{row['answers']:,}",
            f"{row['failed']}",
            f"{row['different']}",
            f"{row['tokens_per_s']:,.0f}",
            f"{row['alone_tokens_per_s']:,.0f}",
            f"{row['known_prompt']['ratio']:.2f}",
            f"{mb(row['rss_first_quarter_bytes'])} to {mb(row['rss_last_quarter_bytes'])}",
        ]
        for row in results["results"]
    ]
    head = (
        *("server", "answers", "failed", "not a lone client's", "tok/s, all", "tok/s, alone"),
        *("first token, known over new prompt", "RSS, first to last quarter, MB"),
    )
    return measured(head, rows, results)


def gpu_table(results: Mapping[str, Any]) -> str:
    """The figures to reach on one card with their verdicts, then every rate beside its floor."""
    rows = [
        [
            goal["what"],
            goal["paper"],
            goals.to_reach(goal),
            goals.found(goal),
            goal["verdict"] if goal["verdict"] == "reached" else f"**{goal['verdict']}**",
        ]
        for goal in results["goals"]
    ]
    head = (f"Fox-1's shape on one {results['card']['name']}", "paper, H100", "to reach", "ours", "")
    rates = [
        [
            f"{part}: {name}",
            f"{row['decode_tokens_per_s']:,.0f}",
            f"{row['total_tokens_per_s']:,.0f}",
            f"{goals.share_of_bandwidth(results, part, name):.0f} %",
            f"{row['prompt_tokens_per_s']:,.0f}",
            f"{goals.share_of_operations(results, part, name):.0f} %",
            mb(row["peak_device_bytes"]),
        ]
        for part in ("decode", "prompt", "users")
        for name, row in results["parts"].get(part, {}).items()
        if "error" not in row
    ]
    rate_head = (
        *("measured", "tok/s, each", "tok/s, all", "of the bandwidth", "prompt tok/s", "of the BF16 rate"),
        "MB reserved",
    )
    card, about = results["card"], results["parts"]["floors"]["card"]["torch"]
    with_what = f"driver {card['driver']}, CUDA {about['cuda']}, triton {about['triton']}"
    tables = [markdown(head, rows), markdown(rate_head, rates)]
    return "\n\n".join([*tables, f"{card['name']}, {with_what}; {machine_line(results['machine'])}"])


def browser_table(report: Mapping[str, Any]) -> str:
    """Every artifact in its own runtime and in the browser, whose own memory stands beside the sum."""
    rows = [
        [
            f"{row['artifact'].removeprefix('browser:')} in {row['runtime']}",
            mb(row["bytes"]),
            f"{row['load_s']:.2f}",
            f"{1e3 * row['time_to_first_token_s']:,.0f}",
            f"{row['prompt_tokens_per_s']:,.0f}",
            f"{row['decode_tokens_per_s']:,.0f}",
            mb(row["peak_rss_bytes"]),
            mb(row["empty_rss_bytes"]),
        ]
        for row in report["results"]
    ]
    head = (
        *("", "MB", "load, s", "first token, ms", "prompt tok/s", "decode tok/s"),
        *("peak memory, MB", "of it before a model, MB"),
    )
    return measured(head, rows, report)
