"""Fixtures that every room uses. The makers behind them are in helpers.py."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import pytest

# `make test` runs two halves of the tests side by side. Each keeps to its own processors, and with it every
# process that it starts: threads that wait by spinning would take from the other what it works with.
if (_worker := os.environ.get("PYTEST_XDIST_WORKER")) and hasattr(os, "sched_setaffinity"):
    _all, _workers = sorted(os.sched_getaffinity(0)), int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.sched_setaffinity(0, _all[int(_worker.removeprefix("gw")) :: _workers] or _all)

import torch  # counts the processors

from fox_edge.artifact import Artifact
from fox_edge.checkpoint import Checkpoint
from tests.helpers import TINY_256, make_checkpoint

# The models here are so small that a second thread costs more than it gives.
torch.set_num_threads(1)

# Before anything imports triton: where there is no card, its interpreter runs the CUDA kernels on the CPU.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


# Files that share what is dear to make: another tool's export of the embedded model, or the tables that ggml
# makes for its smallest types.
_TOGETHER = {
    **dict.fromkeys(("test_foreign.py", "test_sharing.py"), "optimum"),
    **dict.fromkeys(("test_ggml.py", "test_ggml_grids.py", "test_gguf_types.py"), "ggml"),
}


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where tests run side by side, those of a file run in one process: its fixtures are made once."""
    for item in items:
        file = item.nodeid.partition("::")[0]
        item.add_marker(pytest.mark.xdist_group(_TOGETHER.get(item.path.name, file)))


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied random checkpoint's folder, Gemma-like; not to be written to."""
    return make_checkpoint(tmp_path_factory.mktemp("checkpoints") / "tiny")


@pytest.fixture(scope="session")
def tiny(tiny_folder: Path) -> Checkpoint:
    """That checkpoint, opened."""
    return Checkpoint.open(tiny_folder)


@pytest.fixture(scope="session")
def tiny_256(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A tied random checkpoint whose rows hold whole blocks of 256 weights."""
    return Checkpoint.open(make_checkpoint(tmp_path_factory.mktemp("checkpoints") / "tiny_256", TINY_256))


@pytest.fixture(scope="session")
def tiny_untied(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """An untied random checkpoint with a Llama-like tokenizer."""
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny_untied"
    return Checkpoint.open(make_checkpoint(folder, tied=False, gemma=False))


@pytest.fixture(scope="session")
def nano() -> Checkpoint:
    """The embedded model."""
    return Checkpoint.open("nano")


@pytest.fixture(scope="session")
def nano_gguf(nano: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The embedded model as an int8 GGUF artifact; not to be written to."""
    from export.gguf import export_gguf
    from fox_edge.quant import GGUF, find_recipe

    folder = tmp_path_factory.mktemp("artifacts") / "nano-int8"
    return export_gguf(nano, folder, find_recipe(GGUF, "int8"), threads=1)


@pytest.fixture(scope="session")
def optimum_folder(nano: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What Optimum's own exporter makes of the embedded model; not to be written to."""
    from optimum.exporters.onnx import main_export

    folder = tmp_path_factory.mktemp("optimum") / "float32"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the tracer's, which nobody here can heed
        # As where accelerate is not installed, which Optimum does not ask for: a tied matrix comes out twice.
        main_export(
            str(nano.path),
            folder,
            task="text-generation-with-past",
            do_validation=False,
            no_post_process=True,
        )
    return folder


@pytest.fixture(scope="session")
def optimum_int8_folder(optimum_folder: Path) -> Path:
    """That folder after Optimum's own dynamic quantization."""
    from optimum.onnxruntime import ORTQuantizer
    from optimum.onnxruntime.configuration import AutoQuantizationConfig

    folder = optimum_folder.with_name("int8")
    settings = AutoQuantizationConfig.avx512_vnni(is_static=False, per_channel=False)
    ORTQuantizer.from_pretrained(optimum_folder, file_name="model.onnx").quantize(settings, folder)
    return folder


@pytest.fixture(scope="session")
def tiny_pte(tiny: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The tied random checkpoint as an ExecuTorch program with every type of matrix; not to be written to."""
    from export.pte import export_pte
    from fox_edge.quant import INT4_LIMITS, NEAREST, PTE, Recipe

    rules = (("*.v_proj.weight", "q8row"), ("*.o_proj.weight", "q8row"), ("*.up_proj.weight", "float32"))
    recipe = Recipe("mixed", PTE, "q4s32", rules, INT4_LIMITS, NEAREST)
    return export_pte(tiny, tmp_path_factory.mktemp("artifacts") / "tiny-pte", recipe)
