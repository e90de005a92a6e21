"""What a model takes of a GPU's memory: told before anything is loaded, and refused with the sum.

There is no GPU: what it would say of its memory is faked, up to where weights would be loaded.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable

import pytest
import torch

from fox_edge import cli
from fox_edge.checkpoint import Checkpoint
from fox_edge.config import FoxConfig
from fox_edge.errors import FoxEdgeError, NotEnoughMemoryError
from fox_edge.gpu import Gpu
from runtimes.base import SessionOptions
from runtimes.cuda import need, session
from runtimes.cuda.form import FLOATS, Form
from runtimes.cuda.model import Model
from runtimes.cuda.session import CudaInt4Session, CudaInt8Session, CudaSession
from runtimes.cuda.sources import open_source

GB, MB = 10**9, 10**6
Fake = Callable[..., None]


class Fox1:
    """Fox-1's shape, of which nothing is ever read."""

    config, name, context = FoxConfig.fox_1(), "Fox-1", 8192

    def form(self, tensor: str) -> Form:
        return FLOATS


def test_fox_1_in_bf16_for_one_user_of_1024_positions_takes_3600_mb() -> None:
    found = need.memory_need(Fox1(), SessionOptions(context=1024), torch.bfloat16, "cuda")  # type: ignore[arg-type]
    assert found.weights - 3_330_543_616 < MB  # norms are float32
    assert found.cache(1024) == 1024 * 65_536
    assert 3_500 * MB < found.total(1024) <= 3_600 * MB


def test_32_users_take_32_slots_and_one_to_fill_up() -> None:
    options = SessionOptions(context=746, conversations=32)
    found = need.memory_need(Fox1(), options, torch.bfloat16, "cuda")  # type: ignore[arg-type]
    assert found.cache(746) == 33 * 746 * 65_536
    assert found.buffers > 63 * 4 * 256_000


def test_rounded_models_take_less(nano: Checkpoint) -> None:
    options = SessionOptions(device="cpu")
    weights = [kind.need(nano, options).weights for kind in (CudaSession, CudaInt8Session, CudaInt4Session)]
    parameters = nano.config.num_parameters()
    assert [round(8 * size / parameters, 1) for size in weights] == [16.0, 8.3, 4.5]


def test_what_is_told_is_what_is_loaded(nano: Checkpoint) -> None:
    options = SessionOptions(device="cpu", context=100, conversations=3)
    told = CudaSession.need(nano, options)
    model = Model(open_source(nano), 3, 100, torch.bfloat16, torch.device("cpu"))
    held = model.weights.norm.untyped_storage().nbytes()
    assert told.weights == held
    assert told.cache(100) == model.slots.keys.nbytes + model.slots.values.nbytes


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Fake:
    """A GPU with so many bytes free and held; nothing can be loaded to it."""

    def have(free: int, total: int = 150 * GB, reserved: int = 0) -> None:
        monkeypatch.setattr(session, "find_gpu", lambda: Gpu("H200", (9, 0), total, "13.0"))
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, total))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: reserved)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: reserved // 2)
        monkeypatch.setattr(session, "Model", lambda *arguments: pytest.fail("something was loaded"))

    return have


def refusal(checkpoint: Checkpoint, options: SessionOptions) -> str:
    with pytest.raises(NotEnoughMemoryError) as error:
        CudaSession(checkpoint, options)
    text = str(error.value)
    assert "\n" not in text
    return text


def test_too_little_memory_is_refused_with_the_sum(gpu: Fake, nano: Checkpoint) -> None:
    found = CudaSession.need(nano, SessionOptions(context=1024, conversations=4))
    available = found.total(500) + 5000  # of which 10 MB are this process's own, but idle
    gpu(free=available - 10 * MB, total=1 * GB, reserved=20 * MB)
    said = refusal(nano, SessionOptions(context=1024, conversations=4))
    numbers = [f"{n / 1e6:,.0f} MB" for n in (found.weights, found.cache(1024), found.total(1024))]
    assert said.startswith("the checkpoint nano: a context of 1024 tokens takes")
    assert all(number in said for number in numbers)
    assert f"but {available / 1e6:,.0f} MB of the GPU's 1,000 MB are free; a context of 500 would fit" in said


def test_who_holds_the_rest_is_said(gpu: Fake, nano: Checkpoint) -> None:
    gpu(free=50 * MB, reserved=100 * MB)
    said = refusal(nano, SessionOptions())
    held = (150 * GB - 50 * MB - 100 * MB - (600 << 20)) / 1e6
    assert f"100 MB of the GPU's 150,000 MB are free (another process holds some {held:,.0f} MB" in said
    assert "no context would fit" in said


def test_as_much_context_as_fits_is_opened(
    gpu: Fake, nano: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = CudaSession.need(nano, SessionOptions(conversations=4))
    gpu(free=found.total(300) + 100)
    opened: list[int] = []

    def model(source: object, conversations: int, context: int, *rest: object) -> None:
        opened.append(context)
        raise torch.OutOfMemoryError("taken in the meantime")

    monkeypatch.setattr(session, "Model", model)
    with pytest.raises(NotEnoughMemoryError, match="was taken by others while the model was loaded"):
        CudaSession(nano, SessionOptions(conversations=4))
    assert opened == [300]


def test_inspect_tells_what_a_gpu_would_hold(
    gpu: Fake, nano: Checkpoint, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = CudaInt4Session.need(nano, SessionOptions(context=100))
    gpu(free=found.total(100) + 50, total=1 * GB)
    assert cli.main(["inspect", "cuda-int4:nano", "--context", "100", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["format"] == "checkpoint"
    memory = told["memory"]
    assert (memory["weights_bytes"], memory["total_bytes"]) == (found.weights, found.total(100))
    assert memory["on_device"] and memory["largest_context"] == 100 and memory["kv"] == "bfloat16"
    assert cli.main(["inspect", "cuda-int4:nano", "--context", "100"]) == 0
    sum_line, beside, fits = capsys.readouterr().out.splitlines()[-3:]
    assert sum_line.startswith("memory of the GPU at 100 tokens in cuda: weights")
    assert beside.startswith("beside it, of this machine's: tokenizer") and " + process " in beside
    assert fits.endswith("of the GPU's 1,000 MB are free: a context of up to 100 tokens fits")
    monkeypatch.setattr(session, "find_gpu", lambda: "no NVIDIA driver was found")
    assert cli.main(["inspect", "cuda:nano"]) == 0
    assert capsys.readouterr().out.endswith("it cannot be opened here: no NVIDIA driver was found\n")
    assert cli.main(["inspect", "cuda:nano", "--device", "cpu", "--json"]) == 0
    memory = json.loads(capsys.readouterr().out)["memory"]
    parts = ("weights_bytes", "kv_bytes", "buffers_bytes", "tokenizer_bytes", "process_bytes")
    assert memory["total_bytes"] == sum(memory[part] for part in parts) and not memory["on_device"]


def test_without_a_gpu_one_sentence_says_what_was_found(
    nano: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "find_gpu", lambda: "no NVIDIA driver was found")
    with pytest.raises(FoxEdgeError, match=r"^the checkpoint nano cannot be opened on a GPU: no NVIDIA"):
        CudaSession(nano)
    with pytest.raises(FoxEdgeError, match="cannot be opened on a GPU"):
        CudaSession(nano, dataclasses.replace(SessionOptions(), device="cuda"))
