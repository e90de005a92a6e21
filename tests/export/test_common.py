"""What exporters share: side files, size estimates, the card, the finish."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from export import common
from fox_edge.artifact import Artifact, ArtifactWriter, Manifest, TensorRecord
from fox_edge.checkpoint import Checkpoint
from fox_edge.quant import EMBEDDING, GGUF, find_recipe
from fox_edge.tokenizer import Tokenizer
from tests.helpers import make_checkpoint


def manifest(checkpoint: Checkpoint) -> Manifest:
    return common.make_manifest(
        checkpoint,
        find_recipe(GGUF, "int4"),
        model_file="m.gguf",
        tensors=[TensorRecord(EMBEDDING, "e", (512, 64), "q8_0", 34816)],
        checkpoint_sha256="0" * 64,
        versions={"fox-edge": "9.9"},
        notes=["a note of the exporter"],
    )


def test_versions_of_what_is_not_installed() -> None:
    found = common.versions("numpy", "no-such-package")
    assert found["numpy"][0].isdigit()
    assert found["no-such-package"] == "?"
    assert "fox-edge" in found


def test_needed_bytes_counts_blocks_and_is_enough(tiny_256: Checkpoint) -> None:
    assignments = find_recipe(GGUF, "int8").resolve(tiny_256.shapes())
    matrices = sum(s[0] * s[1] for s in tiny_256.shapes().values() if len(s) == 2)
    vectors = sum(s[0] for s in tiny_256.shapes().values() if len(s) == 1)
    weights = matrices // 32 * 34 + vectors * 4
    side = sum(path.stat().st_size for path in tiny_256.tokenizer_files())
    assert weights + 2 * side < common.needed_bytes(tiny_256, assignments) < weights + 2 * side + (2 << 20)


def test_the_manifest_carries_recipe_and_notes(tiny: Checkpoint) -> None:
    made = manifest(tiny)
    assert made.recipe["limits"] == {"mean_kl_nats": 0.1, "greedy_tokens": 0}
    assert made.recipe["default"] == "q4_0"
    assert made.notes == (*tiny.notes, "a note of the exporter")
    assert any("bos_token_id" in note for note in made.notes)
    assert made.context == tiny.config.max_positions
    assert json.loads(json.dumps(made.to_json()))["recipe"] == json.loads(json.dumps(made.recipe))


def test_an_artifact_reads_as_a_tokenizer_folder_with_the_same_template(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "checkpoint")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    checkpoint = Checkpoint.open(folder)
    with ArtifactWriter(tmp_path / "out") as writer:
        common.copy_side_files(writer, checkpoint)
        copied = Tokenizer.from_folder(writer.folder)
        # The fallback is a file now: whoever opens the folder with another library has it too.
        assert copied.chat_template == checkpoint.tokenizer().chat_template
        assert (writer.folder / "chat_template.jinja").read_text() == copied.chat_template
        assert copied.encode("Hello 12") == checkpoint.tokenizer().encode("Hello 12")
        generation = json.loads((writer.folder / "generation_config.json").read_text())
        assert generation["bos_token_id"] == 2
        assert set(generation["eos_token_id"]) == set(copied.stop_ids) == set(checkpoint.tokenizer().stop_ids)


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlicense: apache-2.0\n---\n", "apache-2.0"),
        ("---\r\ntags: [a]\r\nlicense: 'mit'\r\n---\r\ntext", "mit"),
        ("---\ntags: [a]\n---\nlicense: no front matter\n", None),
        ("license: apache-2.0\n", None),
        (None, None),
    ],
)
def test_the_licence_is_the_cards(tmp_path: Path, card: str | None, licence: str | None) -> None:
    folder = make_checkpoint(tmp_path / "checkpoint")
    if card is not None:
        (folder / "README.md").write_text(card)
    assert common.license_of(Checkpoint.open(folder)) == licence


def test_the_card(tiny: Checkpoint) -> None:
    text = common.model_card(tiny, manifest(tiny))
    assert text.startswith("---\nlibrary_name: gguf\n")
    assert "# tiny, GGUF int4" in text
    assert "| stored as q8_0 | 1 tensors, 34,816 bytes |" in text
    assert "one tied matrix" in text
    assert "- a note of the exporter" in text
    assert "base_model" not in text
    assert "base_model: owner/name" in common.model_card(Checkpoint(tiny.path, "owner/name"), manifest(tiny))


def test_finish_commits_what_was_verified(tiny: Checkpoint, tmp_path: Path) -> None:
    def verify(artifact: Artifact) -> dict[str, bool]:
        assert artifact.model_path.read_text() == "weights"
        return {"passed": True}

    with ArtifactWriter(tmp_path / "out") as writer:
        (writer.folder / "m.gguf").write_text("weights")
        artifact = common.finish(writer, tiny, manifest(tiny), verify)
    assert Artifact.open(tmp_path / "out") == artifact
    assert artifact.manifest.verification == {"passed": True}
    assert set(artifact.manifest.files) == {"README.md", "m.gguf"}
