"""A GPU that a library's build has is used when it is asked for, and only then; else a sentence says why.

No such build is at hand: what the libraries would answer is faked, up to where they would open a model.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import llama_cpp.llama_cpp as lib
import numpy as np
import pytest

from export.gguf import export_gguf
from export.onnx import export_onnx
from fox_edge import doctor
from fox_edge.artifact import Artifact
from fox_edge.checkpoint import Checkpoint
from fox_edge.cli import main
from fox_edge.errors import FoxEdgeError
from fox_edge.quant import GGUF, ONNX, find_recipe
from runtimes.base import SessionOptions, check_choices
from runtimes.llama_cpp import choices as llama_cpp_choices
from runtimes.llama_cpp import device as llama_cpp_device
from runtimes.llama_cpp.choices import choose_for_model
from runtimes.llama_cpp.session import LlamaCppSession
from runtimes.onnx import engine as onnx_engine
from runtimes.onnx.session import OnnxSession

CUDA = SessionOptions(device="cuda")
CPU, GPU = "CPUExecutionProvider", "CUDAExecutionProvider"
IDS = list(range(8, 40))


@pytest.fixture(scope="module")
def gguf(tiny_256: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return export_gguf(tiny_256, tmp_path_factory.mktemp("devices") / "gguf", find_recipe(GGUF, "f16"))


@pytest.fixture(scope="module")
def onnx(tiny: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return export_onnx(tiny, tmp_path_factory.mktemp("devices") / "onnx", find_recipe(ONNX, "float32"))


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """ggml's registry as a CUDA build with two GPUs would answer; the real one is asked again afterwards."""

    def function(answer: Any) -> Any:
        def call(*_: object) -> Any:
            return answer

        return call

    made = SimpleNamespace(
        ggml_backend_reg_by_name=function(0xF0), ggml_backend_reg_dev_count=function(2), function=function
    )
    llama_cpp_device.cuda_devices.cache_clear()
    monkeypatch.setattr(lib, "_lib", made)
    yield made
    llama_cpp_device.cuda_devices.cache_clear()


def sentence(options: SessionOptions = CUDA) -> str:
    with pytest.raises(FoxEdgeError) as error:
        llama_cpp_choices.check_options(options)
    text = str(error.value)
    assert "\n" not in text
    return text


# --- llama.cpp -----------------------------------------------------------------------------------------


def test_this_build_of_llama_cpp_has_no_cuda_and_says_how_to_get_it(gguf: Artifact) -> None:
    assert llama_cpp_device.cuda_devices() is None
    assert "built here without CUDA; build it with CMAKE_ARGS=-DGGML_CUDA=on" in sentence()
    with pytest.raises(FoxEdgeError, match="without CUDA"):
        LlamaCppSession(gguf, CUDA)


def test_without_devices_llama_cpp_gives_the_same(gguf: Artifact) -> None:
    """The empty list that keeps a CUDA build on the CPU is one that llama.cpp takes."""
    found = []
    for device in (None, "cpu"):
        with LlamaCppSession(gguf, SessionOptions(threads=1, context=64, device=device)) as session:
            found.append(session.prefill(IDS))
    np.testing.assert_array_equal(*found)


def test_a_cuda_build_takes_every_layer_when_asked(
    library: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lib, "llama_supports_gpu_offload", lambda: True)
    llama_cpp_choices.check_options(CUDA)
    params = lib.llama_model_default_params()
    params.n_gpu_layers = 7
    choose_for_model(params, CUDA)
    assert params.n_gpu_layers == -1 and params.devices is None


@pytest.mark.parametrize("options", [SessionOptions(), SessionOptions(device="cpu")])
def test_and_else_computes_on_the_cpu_alone(library: SimpleNamespace, options: SessionOptions) -> None:
    params = lib.llama_model_default_params()
    choose_for_model(params, options)
    assert params.n_gpu_layers == 0
    assert ctypes.c_void_p.from_address(params.devices).value is None  # a list that ends at once


def test_a_build_for_the_cpu_is_left_as_it_was() -> None:
    params, plain = lib.llama_model_default_params(), lib.llama_model_default_params()
    choose_for_model(params, SessionOptions())
    assert (params.n_gpu_layers, params.devices) == (plain.n_gpu_layers, plain.devices)


def test_a_cuda_build_on_a_machine_without_a_gpu(library: SimpleNamespace) -> None:
    library.ggml_backend_reg_dev_count = library.function(0)
    assert sentence() == "--device cuda: llama.cpp was built with CUDA, but sees no NVIDIA GPU here"
    params = lib.llama_model_default_params()
    choose_for_model(params, SessionOptions())
    assert params.devices is None


# --- onnxruntime -----------------------------------------------------------------------------------------


def test_this_build_of_onnxruntime_has_no_cuda_provider(onnx: Artifact) -> None:
    with pytest.raises(FoxEdgeError, match="has no CUDAExecutionProvider here; the package onnxruntime-gpu"):
        OnnxSession(onnx, CUDA)
    OnnxSession(onnx, SessionOptions(device="cpu", context=16, threads=1)).close()


class Engine:
    """What onnxruntime-gpu makes of a session: its own on the CPU, that says what it was asked for."""

    real = onnx_engine.ort.InferenceSession

    def __init__(self, starts: bool) -> None:
        self.starts, self.asked = starts, []

    def __call__(self, model: Any, options: Any, providers: list[str]) -> Any:
        self.asked.append(providers)
        session = Engine.real(model, options, providers=[CPU])
        told = providers if self.starts else [CPU]
        session.get_providers = lambda: told
        return session


@pytest.mark.parametrize("starts", [True, False])
def test_a_cuda_provider_is_asked_for_and_must_have_started(
    starts: bool, onnx: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(starts)
    monkeypatch.setattr(onnx_engine.ort, "get_available_providers", lambda: [GPU, CPU])
    monkeypatch.setattr(onnx_engine.ort, "InferenceSession", engine)
    options = SessionOptions(device="cuda", context=64, threads=1)
    if starts:
        session = OnnxSession(onnx, options)
        plain = OnnxSession(onnx, SessionOptions(context=64, threads=1))
        np.testing.assert_allclose(session.prefill(IDS), plain.prefill(IDS), atol=1e-5)
        assert engine.asked == [[GPU, CPU], [CPU]]
        assert not (onnx.path / ".fox-edge").exists()
    else:
        with pytest.raises(FoxEdgeError, match=r"onnxruntime's CUDAExecutionProvider does not start here"):
            OnnxSession(onnx, options)


# --- all of them -----------------------------------------------------------------------------------------


def test_a_runtime_without_the_choice_refuses_it() -> None:
    with pytest.raises(FoxEdgeError, match=r"^--device cuda: PyTorch's reference computes on cpu$"):
        check_choices(CUDA, "PyTorch's reference", ("bfloat16",))


def test_the_word_reaches_the_runtime(gguf: Artifact, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", str(gguf.path), "hello", "--device", "cuda"]) == 2
    said = capsys.readouterr().err
    assert said.splitlines()[-1].startswith("fox-edge chat: --device cuda: llama-cpp-python was built here")


def test_doctor_tells_what_a_build_can_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    builds = {
        "llama_cpp": SimpleNamespace(
            __version__="1",
            llama_print_system_info=lambda: b"CUDA : ARCHS = 900 | CPU : SSE3 = 1 | ",
            llama_supports_gpu_offload=lambda: True,
        ),
        "onnxruntime": SimpleNamespace(__version__="2", get_available_providers=lambda: [GPU, CPU]),
        "gguf": SimpleNamespace(__version__="3"),
        "onnx": SimpleNamespace(__version__="4"),
    }
    monkeypatch.setattr(doctor.importlib, "import_module", lambda name: builds[name])
    assert doctor._try("a", ("gguf", "llama_cpp"), "gguf") == doctor.Finding(
        "a", True, "gguf 3, llama_cpp 1", "built with CUDA: --device cuda"
    )
    builds["llama_cpp"].llama_supports_gpu_offload = lambda: False
    assert doctor._try("a", ("llama_cpp",), None).detail == "built with CUDA, but sees no GPU"
    assert doctor._try("b", ("onnx", "onnxruntime"), None).detail == "has a CUDA provider: --device cuda"
    builds["onnxruntime"].get_available_providers = lambda: [CPU]
    builds["llama_cpp"].llama_print_system_info = lambda: b"CPU : SSE3 = 1 | "
    assert all(doctor._try("c", (module,), None).detail == "" for module in ("llama_cpp", "onnxruntime"))
