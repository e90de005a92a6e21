"""What the tables of the README and the docs show of each results file: one function per table.

Knows the results of every study, and Markdown. Does not know where a table stands.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from benchmarks.gguf_rounding import preset_of
from benchmarks.gpu import goals


def demo_table(report: Mapping[str, Any]) -> str:
    """What the demo printed, and the published row marked as not ours."""
    rows = []
    for row in report["rows"]:
        rows.append(
            [
                row["name"],
                _mb(row["bytes"]),
                f"{row['load_s']:.2f}",
                f"{1e3 * row['time_to_first_token_s']:,.0f}",
                f"{row['prompt_tokens_per_s']:,.0f}",
                f"{row['decode_tokens_per_s']:,.0f}",
                _mb(row["peak_rss_bytes"]),
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
            f"*{_mb(base['peak_rss_bytes'])}*",
            *("", "", ""),
        ]
    )
    head = (
        *("nano as", "MB", "load, s", "first token, ms", "prompt tok/s", "decode tok/s"),
        *("peak RSS, MB", "mean KL, nats", "top-1, %", "word problems right"),
    )
    return _measured(head, rows, report)


def report_table(report: Mapping[str, Any]) -> str:
    """The page's table in short, with the speeds' intervals, and the published row marked as not ours."""
    rows = []
    for row in report["rows"]:
        low, high = row["interval"]["decode_tokens_per_s"]
        rows.append(
            [
                row["name"],
                _mb(row["bytes"]),
                f"{row['load_s']:.1f}",
                f"{row['prompt_tokens_per_s']:,.0f}",
                f"{row['decode_tokens_per_s']:,.1f} ({low:,.1f} to {high:,.1f})",
                f"{row['roofline_percent']:.0f}",
                f"{row['baseline_ratio']['decode_tokens_per_s']:.2f}",
                _mb(row["peak_rss_bytes"]),
                f"{row['mean_kl_nats']:.2g}",
            ]
        )
    base = report["baseline"]
    rows.append(
        [
            *("*not ours: BF16 on an H100 (paper)*", "", "", ""),
            f"*over {base['decode_tokens_per_s']}*",
            f"*{base['roofline_percent']:.0f}*",
            *("*1.00*", f"*{_mb(base['peak_rss_bytes'])}*", ""),
        ]
    )
    head = (
        *("artifact", "MB", "load, s", "prompt tok/s", "decode tok/s", "% of its ceiling", "× H100"),
        *("peak RSS, MB", "mean KL, nats"),
    )
    return _measured(head, rows, report)


def full_shape_table(results: Mapping[str, Any]) -> str:
    """Exports and runs at Fox-1's shape, ours beside the peers of the same run."""
    exports = [
        [
            _who(row),
            _mb(row["bytes"]),
            f"{row['seconds']:.1f}",
            _mb(row["peak_anonymous_bytes"]),
            _mb(row["peak_rss_bytes"]),
        ]
        for row in results["exports"]
    ]
    if whole := results.get("compensated"):
        exports.append(
            [
                f"{_who(whole)}, killed at half and gone on with, verified",
                _mb(whole["bytes"]),
                f"{whole['wall_s']:.0f}",
                _mb(whole["peak_anonymous_bytes"]),
                _mb(whole["peak_rss_bytes"]),
            ]
        )
    runs = [
        [
            _who(row),
            f"{row['prompt_tokens_per_s']:.0f}",
            f"{row['decode_tokens_per_s']:.1f}",
            _mb(row["peak_rss_bytes"]),
        ]
        for row in results["runs"]
    ]
    export_head = ("export", "MB", "wall, s", "peak anonymous, MB", "peak RSS, MB")
    run_head = (
        f"run ({results['prompt_tokens']}-token prompt)",
        "prompt tok/s",
        "decode tok/s",
        "peak RSS, MB",
    )
    ratios = [[row["what"], f"{row['ratio']:.2f}"] for row in results["ratios"]]
    tables = [(export_head, exports), (run_head, runs), (("ours over the peer's, same run", "ratio"), ratios)]
    return "\n\n".join([*(_markdown(head, rows) for head, rows in tables), _machine(results["machine"])])


def accuracy_table(results: Mapping[str, Any]) -> str:
    """What `fox-edge eval --json` found, without the answers."""
    rows = [
        [
            row["artifact"].removeprefix("out/"),
            f"{row['correct']} of {row['n']}",
            "{:.0f} to {:.0f} %".format(*row["ci95_percent"]),
            "–" if row["paired_p"] is None else f"{row['paired_p']:.2g}",
        ]
        for row in results["results"]
    ]
    return _markdown(("model", "right", "95 % interval", "p, paired with the first"), rows)


def rounding_table(results: Mapping[str, Any]) -> str:
    """The embedded model by every way of rounding: bytes and what is left of it."""
    rows = []
    for row in results["rows"]:
        exact = row.get("float32_activations")
        rows.append(
            [
                _peer(row["artifact"]),
                row.get("rounding") or "",
                f"{row['weight_bytes'] / 1e6:.2f}",
                f"{row['mean_kl_nats']:.4f}",
                f"{row['top1_agreement_percent']:.1f}",
                f"{exact['mean_kl_nats']:.4f}" if exact else "",
                f"{row['flipped_percent']:.1f}" if exact else "",
            ]
        )
    head = (
        *("nano as", "rounding", "weights, MB", "mean KL, nats", "top-1, %"),
        *("mean KL with float32 activations", "tokens that int8 activations change, %"),
    )
    pairs = [
        [row["ours"], _peer(row["peer"]), f"{row['bytes']:.2f}", f"{row['mean_kl']:.2f}"]
        for row in results["ratios"]
    ]
    pair_head = ("ours", "over", "bytes", "mean KL")
    machine = results["machine"] | {"versions": results["machine"]["versions"] | results["peers"]}
    return "\n\n".join([_markdown(head, rows), _markdown(pair_head, pairs), _machine(machine)])


def _peer(name: str) -> str:
    """A peer's row says who it is."""
    return name.replace("genai-", "onnxruntime-genai ")


def onnx_shape_table(results: Mapping[str, Any]) -> str:
    """Every goal at Fox-1's shape: ours, the peer's, and what was to be reached."""
    rows = []
    for goal in results["goals"]:
        bounds = {
            "at_most": f"at most {goal['at_most']} x",
            "at_least": f"at least {goal['at_least']} x",
            "limit": f"at most {_figure(goal['figure'], goal['limit'] or 0)}",
        }
        asked = [text for key, text in bounds.items() if goal[key] is not None]
        verdict = ("reached" if goal["reached"] else "**missed**") if asked else ""
        ours, peer = (_figure(goal["figure"], goal[key]) for key in ("ours", "peer"))
        rows.append([goal["what"], ours, peer, f"{goal['ratio']:.2f}", ", ".join(asked), verdict])
    machine = results["machine"] | {"versions": results["machine"]["versions"] | results["peers"]}
    head = ("int4, Fox-1's shape", "ours", "onnxruntime-genai", "ratio", "to reach", "")
    return f"{_markdown(head, rows)}\n\n{_machine(machine)}"


def _figure(name: str, value: float) -> str:
    """A figure in the unit that its name ends in."""
    if name.endswith("_bytes"):
        return f"{_mb(value)} MB"
    if name == "seconds":
        return f"{value:.1f} s"
    return f"{value:.1f}" if name.endswith("_per_s") else f"{value:.2f} s"


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
                _mb(row["predicted"]["total_bytes"]),
                _mb(row["measured"]["peak_rss_bytes"]),
                f"{row['ratio']:.3f}",
            ]
        )
    head = ("runtime", "KV cache", "context", "predicted, MB", "peak RSS, MB", "ratio")
    return _measured(head, rows, results)


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
    return _measured(head, rows, results)


def perplexity_peer_table(results: Mapping[str, Any]) -> str:
    """Each figure three times: ours, ours behind llama-perplexity's 16 bits, llama-perplexity's."""
    keys = (
        "mean_kl_nats",
        "p99_kl_nats",
        "top1_agreement_percent",
        "reference_perplexity",
        "perplexity_ratio",
    )
    names = {"ours": "ours", "rounded": "ours, in 16 bits", "theirs": "llama-perplexity"}
    rows = []
    for row in results["results"]:
        sides = {"ours": row["ours"], "rounded": row["ours"]["rounded"], "theirs": row["theirs"]}
        for side, figures in sides.items():
            artifact = row["artifact"] if side == "ours" else ""
            rows.append([artifact, names[side], *(f"{figures[key]:.6g}" for key in keys)])
    head = ("export", "", "mean KL, nats", "p99", "top-1, %", "reference's perplexity", "over it")
    return _measured(head, rows, results)


def fidelity_cost_table(results: Mapping[str, Any]) -> str:
    """A comparison's time beside the two models' own, and its memory above the artifact's."""
    rows = [
        [
            row["artifact"],
            f"{row['reference_forward_s']:.1f}",
            f"{row['artifact_forward_s']:.1f}",
            f"{row['fidelity_s']:.1f}",
            f"{row['ratio']:.2f}",
            _mb(row["above_models_bytes"]),
        ]
        for row in results["results"]
    ]
    head = (
        *("artifact", "reference alone, s", "artifact alone, s", "fidelity, s", "over both"),
        "above the models, MB",
    )
    return _measured(head, rows, results)


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
    return _measured(head, rows, results)


def repeats_table(results: Mapping[str, Any]) -> str:
    """How often two runs agree within their intervals, figure by figure."""
    rows = [
        [
            f"`{row['figure']}`",
            f"{row['width_percent']:.1f}",
            f"{row['agreeing']} of {row['pairs']}",
            f"{row['agreeing_percent']:.1f}",
            f"{row['not_told_apart_percent']:.1f}",
        ]
        for row in results["results"]
    ]
    head = (
        *("figure", "interval's typical width, %", "pairs of runs that agree", "%"),
        "not told apart by compare, %",
    )
    return _measured(head, rows, results)


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
    return _measured(head, rows, results)


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
            f"{_mb(row['rss_first_quarter_bytes'])} to {_mb(row['rss_last_quarter_bytes'])}",
        ]
        for row in results["results"]
    ]
    head = (
        *("server", "answers", "failed", "not a lone client's", "tok/s, all", "tok/s, alone"),
        *("first token, known over new prompt", "RSS, first to last quarter, MB"),
    )
    return _measured(head, rows, results)


def _recipe_name(recipe: str) -> str:
    """A recipe in few words, behind the preset's name if it is one."""
    preset = preset_of(recipe)
    return f"**{preset}**: {recipe}" if preset else recipe


def gguf_rounding_table(results: Mapping[str, Any]) -> str:
    """Recipes for GGUF: bytes, what is left of the embedded model, speed; then ratios to the peer's."""
    speeds = {row["recipe"]: row for row in results.get("speed", {}).get("rows", ())}
    found = results["fidelity"]
    ours = [(row, _recipe_name(row["recipe"])) for row in found["ours"]]
    peers = [(row, f"*{row['artifact'].removeprefix('peer-')}, llama-quantize*") for row in found["peers"]]
    rows = []
    for row, name in sorted(ours + peers, key=lambda pair: -pair[0]["weight_bytes"]):
        speed = speeds.get(row.get("recipe"))
        rows.append(
            [
                name,
                f"{row['bits_per_weight']:.2f}",
                f"{row['mean_kl_nats']:.5f}",
                f"{row['top1_agreement_percent']:.1f}",
                *(
                    (
                        _mb(speed["bytes"]),
                        f"{speed['prompt_tokens_per_s']:.0f}",
                        f"{speed['decode_tokens_per_s']:.1f}",
                    )
                    if speed
                    else ("", "", "")
                ),
            ]
        )
    head = (
        *("recipe", "nano: bits per weight", "mean KL, nats", "top-1, %"),
        *("Fox-1's shape: MB", "prompt tok/s", "decode tok/s"),
    )
    pairs = [
        [
            _recipe_name(row["ours"]),
            row["peer"],
            f"{row['bytes']:.3f}",
            f"{row['mean_kl']:.2f}",
        ]
        for row in found["ratios"]
    ]
    pair_head = ("ours", "over llama-quantize's", "bytes", "mean KL")
    return "\n\n".join([_markdown(head, rows), _markdown(pair_head, pairs), _machine(found["machine"])])


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
            _mb(row["peak_device_bytes"]),
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
    tables = [_markdown(head, rows), _markdown(rate_head, rates)]
    return "\n\n".join([*tables, f"{card['name']}, {with_what}; {_machine(results['machine'])}"])


TABLES: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "demo": demo_table,
    "report": report_table,
    "accuracy": accuracy_table,
    "full-shape": full_shape_table,
    "rounding": rounding_table,
    "gguf-rounding": gguf_rounding_table,
    "onnx-shape": onnx_shape_table,
    "memory": memory_table,
    "speculation": speculation_table,
    "perplexity-peer": perplexity_peer_table,
    "fidelity-cost": fidelity_cost_table,
    "overhead": overhead_table,
    "repeats": repeats_table,
    "prefix-gain": prefix_gain_table,
    "serve": serve_table,
    "gpu": gpu_table,
}


def _who(row: Mapping[str, Any]) -> str:
    who = "**fox-edge**" if row["who"] == "fox-edge" else row["who"]
    return f"{who} {row['artifact'].removeprefix('peer-')}"


def _mb(size: int | float) -> str:
    return f"{size / 1e6:,.1f}" if size < 1e8 else f"{size / 1e6:,.0f}"


def _markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _measured(head: Sequence[str], rows: Iterable[Sequence[str]], results: Mapping[str, Any]) -> str:
    """A table, and the machine that it was measured on."""
    return f"{_markdown(head, rows)}\n\n{_machine(results['machine'])}"


def _machine(machine: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    memory = machine["memory_bytes"] / 2**30
    hardware = f"{machine['cpu']}, {machine['cores']} cores, {memory:.0f} GiB"
    return f"{hardware}; Python {machine['python']}, {versions}."
