"""What passes and what does not, on logits and answers made by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks.arm.runs import Found
from benchmarks.arm.verdicts import arm_table, cells, compared, failed, same_text, text_of
from fox_edge.errors import FoxEdgeError

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(20, 50)).astype(np.float32)


class Reference:
    """Known logits in the reference's place."""

    def passing_logits(self, _tokens: Any) -> Any:
        yield LOGITS


def artifact(limit: float) -> Any:
    recipe = {"limits": {"mean_kl_nats": limit, "greedy_tokens": 0}}
    return SimpleNamespace(path="x", manifest=SimpleNamespace(recipe=recipe))


def found(noise: float = 0.0, answers: Any = ((1, 2, 3), (4, 5)), margins: Any = None) -> Found:
    said = {
        "runtime": "onnxruntime",
        "version": "1",
        "says": None,
        "answers": [list(answer) for answer in answers],
        "margins": margins or [[1.0] * len(answer) for answer in answers],
    }
    logits = LOGITS + noise * np.linspace(-1, 1, LOGITS.size, dtype=np.float32).reshape(LOGITS.shape)[:, ::-1]
    return Found(said, logits, {"sdot": 3, "smmla": 2, "ummla": 1})


JOB = {"text": list(range(20))}


def row(arm: Found, x86: Found | None, limit: float = 0.1) -> dict[str, Any]:
    return compared(Reference(), artifact(limit), JOB, arm, x86)  # type: ignore[arg-type]


def test_the_same_logits_and_text_pass() -> None:
    same = row(found(), found())
    assert same["passed"] and same["why"] == ""
    assert same["mean_kl_nats"] == same["kl_from_x86_nats"] == 0
    assert (same["tokens"], same["same_tokens"], same["positions"]) == (5, 5, 20)
    assert same["runtime"] == "onnxruntime 1"


def test_logits_that_are_too_far_do_not_pass() -> None:
    far = row(found(noise=3.0), found(), limit=1e-3)
    assert far["mean_kl_nats"] > 1e-3
    assert not far["passed"] and far["why"] == "mean KL above 0.001 nats"
    assert row(found(noise=3.0), found(), limit=100.0)["passed"]


def test_x86_itself_is_held_to_the_limit_alone() -> None:
    own = row(found(), None)
    assert own["passed"] and "tokens" not in own and "instructions" not in own


def said(*answers: tuple[int, ...], margins: Any = None) -> dict[str, Any]:
    return dict(found(answers=answers, margins=margins).said)


def test_an_answer_that_differs_says_where() -> None:
    text = same_text(said((1, 2, 3), (4, 5, 6)), said((1, 2, 3), (4, 9, 6)))
    assert (text["same_tokens"], text["ties"]) == (4, 0)
    assert text["first_difference"] == "answer 2 differs from x86's at token 2 (1.000 nats likelier there)"
    assert not row(found(answers=((1, 9, 3), (4, 5))), found())["passed"]


def test_a_tie_is_no_difference() -> None:
    close = [[1.0, 0.019, 1.0]]
    text = same_text(said((1, 2, 3), margins=close), said((1, 9, 8)))
    assert text == {"tokens": 3, "same_tokens": 1, "ties": 1, "first_difference": ""}
    assert same_text(said((1, 2, 3), margins=[[1.0, 0.021, 1.0]]), said((1, 9, 8)))["first_difference"]


@pytest.mark.parametrize("arm", [(1, 2), (1, 2, 3, 4)])
def test_an_answer_of_another_length_is_another(arm: tuple[int, ...]) -> None:
    text = same_text(said((1, 2, 3)), said(arm))
    assert text["first_difference"].startswith(
        f"answer 1 differs from x86's at token {min(len(arm), 3) + 1} ("
    )


def test_the_table_shows_every_run_and_why_one_failed() -> None:
    head = {"artifact": "nano-onnx-int4", "processor": "cortex-a76"}
    dead = failed(FoxEdgeError("died of an instruction that this processor does not have (SIGILL)"))
    results = {
        "processors": [
            {
                "name": "cortex-a53",
                "qemu": "cortex-a53",
                "features": ["fp", "asimd"],
                "runs": {"sdot": False, "smmla": False},
                "why": "",
            },
            {"name": "newest", "qemu": "max", "why": "qemu -cpu max: no"},
        ],
        "rows": [{**head, **row(found(), found())}, {**head, "processor": "cortex-a53", **dead}],
        "passed": False,
    }
    lines = text_of(results).splitlines()
    assert lines[0] == "cortex-a53 (qemu -cpu cortex-a53): sdot is illegal, smmla is illegal; fp asimd"
    assert lines[1] == "newest: qemu -cpu max: no"
    assert lines[-4].split()[-1] == "ok" and lines[-3].split()[-1] == "FAIL"
    assert lines[-2].endswith(
        "on cortex-a53: died of an instruction that this processor does not have (SIGILL)"
    )
    assert lines[-1] == "NOT passed"


def test_instructions_are_summed_by_what_brought_them() -> None:
    shown = cells({**row(found(), found()), "artifact": "x"})
    assert (shown["dot"], shown["mmla"], shown["same"]) == (3, 3, "5 of 5")


def test_the_page_shows_each_run_beside_x86() -> None:
    own = {"artifact": "nano-onnx-int4", "processor": "x86-64", **row(found(noise=1.0), None)}
    arm = {"artifact": "nano-onnx-int4", "processor": "cortex-a76", **row(found(noise=1.0), found())}
    dead = {"artifact": "nano-onnx-int4", "processor": "cortex-a53", **failed(FoxEdgeError("no"))}
    table = arm_table({"rows": [own, arm, dead], "emulator": "qemu 1", "system": "Debian"}).splitlines()
    kl = f"{own['mean_kl_nats']:.2g}"
    assert table[2] == f"| onnx-int4 | cortex-a76 | {kl} | {kl} | 0.1 | 5 of 5 | 3 | 3 | {arm_verdict(arm)} |"
    assert table[3] == "| onnx-int4 | cortex-a53 |  |  |  |  |  |  | FAIL |"
    assert table[-1] == "qemu 1; Debian; onnxruntime 1."


def arm_verdict(row: dict[str, Any]) -> str:
    return "ok" if row["mean_kl_nats"] <= 0.1 else "FAIL"
