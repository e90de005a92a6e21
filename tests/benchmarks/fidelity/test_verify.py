"""Verification finds what is wrong, and says so; what is right passes."""

import json
import shutil
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.fidelity.divergence import reference_text
from benchmarks.fidelity.verify import Verifier, limits_of, verify, verify_text
from export.gguf import export_gguf
from export.onnx import export_onnx
from fox_edge.artifact import MANIFEST, Artifact, export_summary, export_text
from fox_edge.checkpoint import Checkpoint
from fox_edge.errors import ArtifactError, VerificationError
from fox_edge.quant import Limits, find_recipe
from runtimes.base import SessionOptions, open_session
from tests.helpers import TINY_256, make_checkpoint

EXPORTERS = {"gguf": export_gguf, "onnx": export_onnx}
LOOSE = Limits(mean_kl_nats=0.05, greedy_tokens=0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(make_checkpoint(tmp_path_factory.mktemp("verify") / "fox", TINY_256))


def exported(checkpoint: Checkpoint, folder: Path, format: str, quant: str = "int8") -> Artifact:
    """An export of a test's own, to be spoiled: a copy of the one beside its checkpoint, made once."""
    whole = checkpoint.path.with_name(f"{format}-{quant}")
    if not whole.exists():
        EXPORTERS[format](checkpoint, whole, find_recipe(format, quant))
    return Artifact.open(shutil.copytree(whole, folder / "copy" / format))


def failed(report: dict) -> dict[str, str]:
    return {check["name"]: check["detail"] for check in report["checks"] if not check["passed"]}


def test_verification_keeps_nothing_beside_the_artifact(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtimes.onnx.prepacked.MIN_BYTES", 0)
    artifact = exported(checkpoint, tmp_path, "onnx")
    before = sorted(artifact.path.iterdir())
    assert verify(artifact, checkpoint, limits_of(artifact))["passed"]
    assert sorted(artifact.path.iterdir()) == before
    with closing(open_session(artifact)):
        assert len(list(artifact.path.iterdir())) == len(before) + 1


@pytest.mark.parametrize("format", ["gguf", "onnx"])
def test_a_good_export_passes_every_check(checkpoint: Checkpoint, tmp_path: Path, format: str) -> None:
    artifact = exported(checkpoint, tmp_path, format)
    report = verify(artifact, checkpoint, limits_of(artifact))
    assert failed(report) == {} and report["passed"]
    assert [c["name"] for c in report["checks"]] == [
        "files",
        "source",
        "manifest",
        "tokenizer",
        "special tokens",
        "chat template",
        "tie",
        "tensors",
        "logits",
        "greedy text",
        *(["activations"] if format == "onnx" else []),
    ]
    assert 0 <= report["mean_kl_nats"] <= 0.005
    assert "verified" in verify_text(report)


def test_tokens_that_int8_activations_change_are_counted(
    nano: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = export_onnx(nano, tmp_path / "out", find_recipe("onnx", "q4s128"), rounding="nearest")
    report = verify(artifact, nano, Limits(mean_kl_nats=1, greedy_tokens=0))
    best: dict[int, list[int]] = {}
    tokens = nano.tokenizer().encode(reference_text(), bos=True)[:512]
    for level in (1, 4):
        with closing(open_session(artifact, SessionOptions(accuracy_level=level, cache=False))) as session:
            best[level] = [int(row.argmax()) for rows in session.score(tokens) for row in rows]
    flips = sum(a != b for a, b in zip(best[1], best[4], strict=True))
    assert flips > 0 and report["flipped_percent"] == pytest.approx(100 * flips / 512)
    (row,) = [check for check in report["checks"] if check["name"] == "activations"]
    assert row["passed"] and row["finding"] and f"at {flips} of 512 positions" in row["detail"]
    plain = export_onnx(nano, tmp_path / "plain", find_recipe("onnx", "float32"))
    assert "flipped_percent" not in verify(plain, nano, LOOSE)


@pytest.mark.parametrize(("percent", "told"), [(1.0, False), (1.2, True), (None, False)])
def test_many_changed_tokens_are_told_at_export(
    checkpoint: Checkpoint, tmp_path: Path, percent: float | None, told: bool
) -> None:
    report = {"seconds": 1.0, "mean_kl_nats": 0.01, "top1_agreement_percent": 99.0}
    report |= {"flipped_percent": percent} if percent is not None else {}
    recipe = find_recipe("onnx", "int8")
    artifact = export_onnx(checkpoint, tmp_path / "out", recipe, verify=lambda _: report)
    text = export_text(export_summary(artifact, 1.0, 1, 1))
    assert ("note: activations rounded to int8 change 1.2 % of the likeliest tokens" in text) == told


@pytest.mark.parametrize("format", ["gguf", "onnx"])
def test_a_flipped_byte_is_found_twice(checkpoint: Checkpoint, tmp_path: Path, format: str) -> None:
    artifact = exported(checkpoint, tmp_path, format)
    biggest = max(artifact.path.iterdir(), key=lambda p: p.stat().st_size)
    data = np.memmap(biggest, np.uint8, "r+")
    # A stretch in the middle of the weights: big enough that the tensor check sees it too.
    middle = len(data) // 2
    data[middle : middle + 20000] ^= 0x55
    data.flush()
    found = failed(verify(artifact, checkpoint, LOOSE))
    assert biggest.name in found["files"]
    assert "relative error" in found["tensors"]


def test_another_checkpoint_is_told_apart(checkpoint: Checkpoint, tmp_path: Path) -> None:
    artifact = exported(checkpoint, tmp_path, "onnx")
    other = Checkpoint.open(make_checkpoint(tmp_path / "other", TINY_256, seed=1))
    found = failed(verify(artifact, other, LOOSE))
    assert {"source", "tensors", "logits"} <= set(found)


def test_a_changed_chat_template_is_found(checkpoint: Checkpoint, tmp_path: Path) -> None:
    artifact = exported(checkpoint, tmp_path, "onnx")
    (artifact.path / "chat_template.jinja").write_text("{{ messages[0].content }}")
    settings = json.loads((artifact.path / "tokenizer_config.json").read_text())
    settings["chat_template"] = "{{ messages[0].content }}"
    (artifact.path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert "chat template" in failed(verify(artifact, checkpoint, LOOSE))


def test_limits_that_cannot_be_met_fail_the_logits(checkpoint: Checkpoint, tmp_path: Path) -> None:
    artifact = exported(checkpoint, tmp_path, "gguf", "int4")
    report = verify(artifact, checkpoint, Limits(mean_kl_nats=1e-12, greedy_tokens=0))
    assert list(failed(report)) == ["logits"]
    assert not report["passed"] and "the limit is 1e-12" in failed(report)["logits"]


def test_greedy_text_of_a_crude_export_differs(tmp_path: Path) -> None:
    # Not tied: a tied random model repeats its last token, however crudely it is rounded.
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path / "fox", TINY_256, tied=False))
    artifact = exported(checkpoint, tmp_path, "gguf", "q2_k")
    found = failed(verify(artifact, checkpoint, Limits(mean_kl_nats=10.0, greedy_tokens=64)))
    assert "the reference's" in found["greedy text"]


@pytest.mark.parametrize("format", ["gguf", "onnx"])
def test_a_failed_export_leaves_only_its_report(checkpoint: Checkpoint, tmp_path: Path, format: str) -> None:
    target = tmp_path / "out" / "model"
    recipe = replace(find_recipe(format, "int4"), limits=Limits(mean_kl_nats=1e-12, greedy_tokens=0))
    with pytest.raises(VerificationError, match="failed verification and was not kept: logits"):
        EXPORTERS[format](checkpoint, target, recipe, verify=Verifier(checkpoint, recipe.limits, target))
    assert [p.name for p in target.parent.iterdir()] == ["model.verification.json"]
    assert json.loads((target.parent / "model.verification.json").read_text())["passed"] is False


def test_text_of_the_user(checkpoint: Checkpoint, tmp_path: Path) -> None:
    artifact = exported(checkpoint, tmp_path, "onnx")
    report = verify(artifact, checkpoint, LOOSE, text="one fox and two foxes, " * 40)
    assert report["passed"]
    assert "at least 64 are needed" in failed(verify(artifact, checkpoint, LOOSE, text="short"))["logits"]


def test_a_manifest_without_limits(checkpoint: Checkpoint, tmp_path: Path) -> None:
    artifact = exported(checkpoint, tmp_path, "onnx")
    fields = json.loads((artifact.path / MANIFEST).read_text())
    del fields["recipe"]["limits"]
    (artifact.path / MANIFEST).write_text(json.dumps(fields))
    with pytest.raises(ArtifactError, match="no limits"):
        limits_of(Artifact.open(artifact.path))


def lying(artifact: Artifact, change: dict) -> Artifact:
    """The artifact with top-level fields of its manifest replaced."""
    fields = json.loads((artifact.path / MANIFEST).read_text())
    (artifact.path / MANIFEST).write_text(json.dumps(fields | change))
    return Artifact.open(artifact.path)


def test_a_manifest_cannot_talk_the_tie_away(checkpoint: Checkpoint, tmp_path: Path) -> None:
    artifact = lying(exported(checkpoint, tmp_path, "onnx"), {"tied": False})
    tie = next(c for c in verify(artifact, checkpoint, LOOSE)["checks"] if c["name"] == "tie")
    assert tie["passed"] and "hold them once" in tie["detail"]


def test_a_type_that_does_not_exist(checkpoint: Checkpoint, tmp_path: Path) -> None:
    artifact = exported(checkpoint, tmp_path, "gguf")
    tensors = json.loads((artifact.path / MANIFEST).read_text())["tensors"]
    tensors[0]["type"] = "q9_z"
    found = failed(verify(lying(artifact, {"tensors": tensors}), checkpoint, LOOSE))
    assert found == {"tensors": "model.embed_tokens.weight: the manifest says q9_z, but the file has q8_0"}


Q = "model.layers.1.self_attn.q_proj.weight"
WIDEST = {"gguf": "q2_k", "onnx": "q2s256"}  # the types with the loosest bounds


@pytest.mark.parametrize("format", ["gguf", "onnx"])
@pytest.mark.parametrize(
    ("lie", "words"),
    [
        ({"tied": False}, "the manifest lies: tied is False, the checkpoint's True"),
        ({"parameters": 12}, "the manifest lies: parameters is 12, the checkpoint's "),
        ({"context": 100}, "the manifest lies: context is 100, the checkpoint's 256"),
    ],
)
def test_a_manifest_that_lies_about_the_model(
    lie: dict, words: str, format: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    found = failed(verify(lying(exported(checkpoint, tmp_path, format), lie), checkpoint, LOOSE))
    assert list(found) == ["manifest"] and words in found["manifest"]


@pytest.mark.parametrize("format", ["gguf", "onnx"])
def test_a_manifest_that_lies_about_a_tensor(format: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    """A loose type would loosen the bound of the tensor's error: the file's own type counts."""
    artifact = exported(checkpoint, tmp_path, format)
    told = json.loads((artifact.path / MANIFEST).read_text())["tensors"]
    truth = next(t for t in told if t["name"] == Q)

    def lies(**fields: object) -> dict[str, str]:
        tensors = [{**t, **fields} if t["name"] == Q else t for t in told]
        return failed(verify(lying(artifact, {"tensors": tensors}), checkpoint, LOOSE))

    assert lies() == {}
    assert lies(type=WIDEST[format]) == {
        "tensors": f"{Q}: the manifest says {WIDEST[format]}, but the file has {truth['type']}"
    }
    assert lies(bytes=truth["bytes"] + 1) == {
        "tensors": f"{Q}: the manifest says {truth['bytes'] + 1} bytes, but the file has {truth['bytes']}"
    }
    shape = (truth["shape"][0] + 1, truth["shape"][1])
    found = lies(shape=shape)
    assert f"the shape of {Q} is {shape}, the checkpoint's" in found.pop("manifest")
    # A GGUF's header is held against its manifest before llama.cpp sees it.
    assert list(found) == (["opens"] if format == "gguf" else [])


@pytest.mark.parametrize("format", ["gguf", "onnx"])
def test_a_manifest_that_lists_other_tensors(format: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    artifact = exported(checkpoint, tmp_path, format)
    told = json.loads((artifact.path / MANIFEST).read_text())["tensors"]
    truth = next(t for t in told if t["name"] == Q)
    without = [t for t in told if t["name"] != Q]
    found = failed(verify(lying(artifact, {"tensors": without}), checkpoint, LOOSE))
    assert f"the shape of {Q} is None" in found["manifest"] and set(found) & {"tensors", "opens"}
    found = failed(
        verify(lying(artifact, {"tensors": [*told, {**truth, "name": "more"}]}), checkpoint, LOOSE)
    )
    assert "the checkpoint has no more" in found["manifest"]
    found = failed(verify(lying(artifact, {"tensors": [*told, truth]}), checkpoint, LOOSE))
    assert f"{len(told) + 1} tensors are listed, the checkpoint has {len(told)}" in found["manifest"]


@pytest.mark.parametrize("format", ["gguf", "onnx"])
def test_a_config_that_lies(format: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    artifact = exported(checkpoint, tmp_path, format)
    fields = json.loads((artifact.path / "config.json").read_text())
    (artifact.path / "config.json").write_text(json.dumps(fields | {"rope_theta": 500_000}))
    found = failed(verify(artifact, checkpoint, LOOSE))
    assert "config.json" in found["files"]
    assert "config.json's rope_theta is 500000.0, the checkpoint's 10000.0" in found["manifest"]


def append(data: bytes) -> bytes:
    return data + b"\0"


def insert(data: bytes) -> bytes:
    return b"\0" + data


def lose(data: bytes) -> bytes:
    return data[1:]


def flip(data: bytes) -> bytes:
    return data[:-5] + bytes([data[-5] ^ 1]) + data[-4:]


@pytest.mark.parametrize("format", ["gguf", "onnx"])
@pytest.mark.parametrize("damage", [append, insert, lose, flip])
def test_one_byte_too_many_too_few_or_wrong(
    damage: Callable[[bytes], bytes], format: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    artifact = exported(checkpoint, tmp_path, format)
    biggest = max(artifact.path.iterdir(), key=lambda p: p.stat().st_size)
    biggest.write_bytes(damage(biggest.read_bytes()))
    report = verify(artifact, checkpoint, LOOSE)
    assert failed(report)["files"] == f"sha256 is not the manifest's: {biggest.name}"
    # A wrong byte leaves the rest in its place; but where all weights are off theirs, more is said.
    if damage in (insert, lose):
        assert "opens" in failed(report)


@pytest.mark.parametrize("format", ["gguf", "onnx"])
def test_a_row_that_the_blocks_do_not_divide(format: str, tmp_path: Path) -> None:
    """It gets smaller blocks, or plain floats; the manifest says why, and the file is held to that."""
    config = replace(TINY_256, intermediate_size=272)  # 17 blocks of 16 and no whole number of larger ones
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path / "fox", config))
    artifact = exported(checkpoint, tmp_path, format)
    down = next(t for t in artifact.manifest.tensors if t.name.endswith("down_proj.weight"))
    assert down.type == {"gguf": "f16", "onnx": "q8s16"}[format]
    asked = {"gguf": "q8_0 blocks of 32", "onnx": "q8s128 blocks of 128"}[format]
    assert down.reason == f"272 columns are no whole number of {asked}"
    assert failed(verify(artifact, checkpoint, limits_of(artifact))) == {}


def test_a_manifest_without_hashes_does_not_open(checkpoint: Checkpoint, tmp_path: Path) -> None:
    artifact = exported(checkpoint, tmp_path, "onnx")
    with pytest.raises(ArtifactError, match=r"has no sha256 for the model file 'model\.onnx'"):
        lying(artifact, {"files": {}})
