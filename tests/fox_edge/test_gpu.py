"""Why there is no GPU, in one sentence with the versions in it; PyTorch's own words, faked."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fox_edge import doctor
from fox_edge.gpu import Gpu, find_gpu

OLD = (
    "The NVIDIA driver on your system is too old (found version 12040). Please update your GPU driver by "
    "downloading and installing a new version from the URL: http://www.nvidia.com/Download/index.aspx "
    "Alternatively, go to: https://pytorch.org to install a PyTorch version that has been compiled with your "
    "version of the CUDA driver."
)
NONE = (
    "Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU and installed a driver "
    "from http://www.nvidia.com/Download/index.aspx"
)


def fake(
    monkeypatch: pytest.MonkeyPatch,
    error: str | None = None,
    count: int = 1,
    capability: tuple[int, int] = (9, 0),
    built: str | None = "13.0",
) -> None:
    def init() -> None:
        if error is not None:
            raise RuntimeError(error)

    card = SimpleNamespace(
        name="NVIDIA H200", major=capability[0], minor=capability[1], total_memory=150_754_820_096
    )
    answers: dict[str, Any] = {
        "init": init,
        "device_count": lambda: count,
        "current_device": lambda: 0,
        "get_device_properties": lambda _: card,
    }
    monkeypatch.setattr(torch.version, "cuda", built)
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, answer)


def test_a_gpu_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch)
    assert find_gpu() == Gpu("NVIDIA H200", (9, 0), 150_754_820_096, "13.0")


@pytest.mark.parametrize(
    ("found", "sentence"),
    [
        ({"error": OLD}, r"driver is too old: it offers CUDA 12\.4, but torch \S+ is built for CUDA 13\.0"),
        ({"error": "driver too old"}, "it offers an older CUDA"),
        ({"error": NONE}, r"^no NVIDIA driver was found, which torch \S+ for CUDA 13\.0 needs$"),
        ({"error": "CUDA unknown error\nmore"}, r"^CUDA 13\.0 does not start: CUDA unknown error$"),
        ({"error": ""}, "no reason given"),
        ({"count": 0}, "shows no GPU to this process"),
        ({"capability": (7, 5)}, r"NVIDIA H200 has compute capability 7\.5, but bfloat16 needs 8\.0"),
        ({"built": None}, r"is built without CUDA; .* pip install --force-reinstall torch==\d+\.\d+\.\d+$"),
    ],
)
def test_what_is_wrong_is_one_sentence(
    found: dict[str, Any], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake(monkeypatch, **found)
    said = find_gpu()
    assert isinstance(said, str) and "\n" not in said and "http" not in said
    pytest.raises(ValueError, _raise, said).match(sentence)


def _raise(said: str) -> None:
    raise ValueError(said)


def test_the_doctor_says_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch, error=NONE)
    finding = doctor._cuda()
    assert not finding.works and finding.detail.startswith("no NVIDIA driver was found")
    fake(monkeypatch)
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: object())
    finding = doctor._cuda()
    assert finding.works and (finding.version, finding.detail) == ("CUDA 13.0", "NVIDIA H200, 150,755 MB")
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    assert not doctor._cuda().works
