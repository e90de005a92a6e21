"""Whether PyTorch can use an NVIDIA GPU here; and if not, why not, and what would help, in one sentence.

Knows PyTorch's words about drivers. Does not know what anyone wants to compute.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import torch

# The first compute capability that multiplies bfloat16.
LEAST_CAPABILITY = (8, 0)

# A driver's highest CUDA version, as PyTorch prints it: 12040 is 12.4.
_FOUND_VERSION = re.compile(r"found version (\d+)")


class Gpu(NamedTuple):
    """What PyTorch computes on."""

    name: str
    capability: tuple[int, int]
    memory_bytes: int
    cuda: str  # the version that PyTorch was built for


def find_gpu() -> Gpu | str:
    """The current GPU, or one sentence that says what was found instead."""
    built = torch.version.cuda
    if built is None:
        return (
            f"torch {torch.__version__} is built without CUDA; on Linux this brings the build with it: "
            f"pip install --force-reinstall torch=={torch.__version__.partition('+')[0]}"
        )
    try:
        torch.cuda.init()
        count = torch.cuda.device_count()
    except (RuntimeError, AssertionError) as error:
        return _why(str(error), built)
    if not count:
        return "the NVIDIA driver shows no GPU to this process (CUDA_VISIBLE_DEVICES may hide it)"
    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    gpu = Gpu(found.name, (found.major, found.minor), found.total_memory, built)
    if gpu.capability < LEAST_CAPABILITY:
        least = ".".join(map(str, LEAST_CAPABILITY))
        return (
            f"{gpu.name} has compute capability {found.major}.{found.minor}, but bfloat16 needs {least}: "
            "an Ampere or newer"
        )
    return gpu


def _why(words: str, built: str) -> str:
    """PyTorch's complaint, in a sentence with the versions in it."""
    if "too old" in words:
        found = _FOUND_VERSION.search(words)
        version = int(found[1]) if found else 0
        offers = f"CUDA {version // 1000}.{version % 1000 // 10}" if found else "an older CUDA"
        return (
            f"the NVIDIA driver is too old: it offers {offers}, but torch {torch.__version__} is built for "
            f"CUDA {built}; update the driver"
        )
    if "no NVIDIA driver" in words:
        return f"no NVIDIA driver was found, which torch {torch.__version__} for CUDA {built} needs"
    first = words.strip().splitlines()[0] if words.strip() else "no reason given"
    return f"CUDA {built} does not start: {first}"
