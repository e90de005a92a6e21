"""What inspect says of checkpoints and artifacts is what is in them."""

from pathlib import Path

from export.gguf import export_gguf
from fox_edge.checkpoint import Checkpoint
from fox_edge.config import FoxConfig
from fox_edge.doctor import doctor_text, examine
from fox_edge.inspection import inspect, inspect_text, megabytes
from fox_edge.quant import find_recipe
from tests.helpers import TINY_256, make_checkpoint


def test_checkpoint(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "fox", TINY_256)
    result = inspect(str(folder))
    assert result["parameters"] == TINY_256.num_parameters()
    assert result["bytes"] == 2 * TINY_256.num_parameters()
    assert result["tied"] is True
    text = inspect_text(result)
    assert "one matrix (tied)" in text
    assert "2 x model.layers.*.mlp.down_proj.weight" in text


def test_artifact(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path / "fox", TINY_256))
    artifact = export_gguf(checkpoint, tmp_path / "out", find_recipe("gguf", "int4"), rounding="nearest")
    result = inspect(str(artifact.path))
    types = {t["name"]: t["type"] for t in result["tensors"]}
    assert types["model.embed_tokens.weight"] == "q6_k"
    assert types["model.layers.0.mlp.up_proj.weight"] == "q4_0"
    assert sum(t["bytes"] for t in result["tensors"]) == artifact.manifest.weight_bytes
    assert result["bytes"] == sum(p.stat().st_size for p in artifact.path.iterdir())
    assert "NOT verified" in inspect_text(result)


def test_the_published_shape() -> None:
    config = FoxConfig.fox_1()
    assert config.num_parameters() == 1_665_271_808  # 3,330,543,616 bytes of BF16, as published
    assert config.kv_bytes_per_token == 64 * 1024
    assert FoxConfig.nano().num_parameters() == 6_557_952


def test_megabytes() -> None:
    assert megabytes(13_115_904) == "13.1 MB"
    assert megabytes(3_330_543_616) == "3,331 MB"


def test_doctor_finds_what_is_installed_and_names_the_extra_of_what_is_not() -> None:
    result = examine()
    findings = {f["name"]: f for f in result["findings"]}
    assert findings["torch (reference)"]["works"]
    assert findings["gguf export, llama.cpp runtime"]["works"]
    optimum = findings["optimum (reads ONNX artifacts)"]
    assert optimum["works"] or "fox-edge[optimum]" in optimum["detail"]
    assert "CUDA" in doctor_text(result)
