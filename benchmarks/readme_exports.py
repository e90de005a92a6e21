"""What the tables of the README and the docs show of exports: bytes, memory, and what is left of the model.

One function per results file. Knows those results; not how Markdown is written, nor where a table stands.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.common.markdown import machine_line, markdown, mb, measured
from benchmarks.gguf_rounding import preset_of


def full_shape_table(results: Mapping[str, Any]) -> str:
    """Exports and runs at Fox-1's shape, ours beside the peers of the same run."""
    exports = [
        [
            _who(row),
            mb(row["bytes"]),
            f"{row['seconds']:.1f}",
            mb(row["peak_anonymous_bytes"]),
            mb(row["peak_rss_bytes"]),
        ]
        for row in results["exports"]
    ]
    if whole := results.get("compensated"):
        exports.append(
            [
                f"{_who(whole)}, killed at half and gone on with, verified",
                mb(whole["bytes"]),
                f"{whole['wall_s']:.0f}",
                mb(whole["peak_anonymous_bytes"]),
                mb(whole["peak_rss_bytes"]),
            ]
        )
    runs = [
        [
            _who(row),
            f"{row['prompt_tokens_per_s']:.0f}",
            f"{row['decode_tokens_per_s']:.1f}",
            mb(row["peak_rss_bytes"]),
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
    return "\n\n".join([*(markdown(head, rows) for head, rows in tables), machine_line(results["machine"])])


def _who(row: Mapping[str, Any]) -> str:
    who = "**fox-edge**" if row["who"] == "fox-edge" else row["who"]
    return f"{who} {row['artifact'].removeprefix('peer-')}"


def onnx_shape_table(results: Mapping[str, Any]) -> str:
    """The goals of ONNX at Fox-1's shape."""
    return _goals_table(results, "int4, Fox-1's shape", "onnxruntime-genai")


def pte_shape_table(results: Mapping[str, Any]) -> str:
    """The goals of ExecuTorch: at Fox-1's shape, and what rounding leaves of the embedded model."""
    return _goals_table(results, "int4, Fox-1's shape", "llama.cpp q4_k, its better setting")


def _goals_table(results: Mapping[str, Any], what: str, peer: str) -> str:
    """Every goal: ours, the peer's, and what was to be reached."""
    rows = []
    for goal in results["goals"]:
        bounds = {
            "at_most": f"at most {goal['at_most']} x",
            "at_least": f"at least {goal['at_least']} x",
            "limit": f"at most {_figure(goal['figure'], goal['limit'] or 0)}",
        }
        asked = [text for key, text in bounds.items() if goal[key] is not None]
        verdict = ("reached" if goal["reached"] else "**missed**") if asked else ""
        figures = (_figure(goal["figure"], goal[key]) for key in ("ours", "peer"))
        rows.append([goal["what"], *figures, f"{goal['ratio']:.2f}", ", ".join(asked), verdict])
    machine = results["machine"] | {"versions": results["machine"]["versions"] | results["peers"]}
    head = (what, "ours", peer, "ratio", "to reach", "")
    return f"{markdown(head, rows)}\n\n{machine_line(machine)}"


def _figure(name: str, value: float) -> str:
    """A figure in the unit that its name ends in."""
    if name.endswith("_bytes"):
        return f"{mb(value)} MB"
    if name == "seconds":
        return f"{value:.1f} s"
    if name.endswith("_nats"):
        return f"{value:.4f}"
    return f"{value:.1f}" if name.endswith("_per_s") else f"{value:.2f} s"


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
    return "\n\n".join([markdown(head, rows), markdown(pair_head, pairs), machine_line(machine)])


def _peer(name: str) -> str:
    """A peer's row says who it is."""
    return name.replace("genai-", "onnxruntime-genai ")


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
                        mb(speed["bytes"]),
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
    return "\n\n".join([markdown(head, rows), markdown(pair_head, pairs), machine_line(found["machine"])])


def _recipe_name(recipe: str) -> str:
    """A recipe in few words, behind the preset's name if it is one."""
    preset = preset_of(recipe)
    return f"**{preset}**: {recipe}" if preset else recipe


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
    return measured(head, rows, results)


def fidelity_cost_table(results: Mapping[str, Any]) -> str:
    """A comparison's time beside the two models' own, and its memory above the artifact's."""
    rows = [
        [
            row["artifact"],
            f"{row['reference_forward_s']:.1f}",
            f"{row['artifact_forward_s']:.1f}",
            f"{row['fidelity_s']:.1f}",
            f"{row['ratio']:.2f}",
            mb(row["above_models_bytes"]),
        ]
        for row in results["results"]
    ]
    head = (
        *("artifact", "reference alone, s", "artifact alone, s", "fidelity, s", "over both"),
        "above the models, MB",
    )
    return measured(head, rows, results)


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
    return markdown(("model", "right", "95 % interval", "p, paired with the first"), rows)
