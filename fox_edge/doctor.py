"""Which runtimes work on this machine, and the one line that adds each of the others."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import platform
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fox_edge.processors import available_cores


@dataclass(frozen=True)
class Finding:
    """One runtime or tool: whether it imports, its version, and what to do when it does not."""

    name: str
    works: bool
    version: str | None
    detail: str


# (what it is for, import names that must all work, the extra that brings them)
_WANTED: tuple[tuple[str, tuple[str, ...], str | None], ...] = (
    ("torch (reference)", ("torch",), None),
    ("gguf export, llama.cpp runtime", ("gguf", "llama_cpp"), "gguf"),
    ("onnx export, onnxruntime runtime", ("onnx", "onnxruntime"), "onnx"),
    ("pte export, executorch runtime", ("executorch.extension.pybindings._portable_lib",), "executorch"),
    ("server (fox-edge serve)", ("fastapi", "uvicorn", "llguidance"), "serve"),
    ("onnxruntime-genai (reads ONNX)", ("onnxruntime_genai",), "genai"),
    ("optimum (reads ONNX artifacts)", ("optimum.onnxruntime",), "optimum"),
)


_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def examine() -> dict[str, Any]:
    """Try every runtime; keys: machine, findings[].name .works .version .detail."""
    return {
        "machine": {
            "system": f"{platform.system()} {platform.machine()}",
            "python": platform.python_version(),
            "processors": available_cores(),
        },
        "findings": [asdict(_try(*wanted)) for wanted in _WANTED] + [asdict(_cuda()), asdict(_browser())],
    }


def doctor_text(result: dict[str, Any]) -> str:
    """The findings as lines for a person."""
    machine = result["machine"]
    lines = [f"{machine['system']}, Python {machine['python']}, {machine['processors']} processors"]
    for finding in result["findings"]:
        mark = "ok     " if finding["works"] else "missing"
        lines.append(
            f"{mark} {finding['name']:<34} {finding['version'] or '':<24} {finding['detail']}".rstrip()
        )
    return "\n".join(lines)


def _try(name: str, modules: tuple[str, ...], extra: str | None) -> Finding:
    versions, details = [], []
    for module in modules:
        try:
            found = importlib.import_module(module)
        except ImportError as error:
            add = f"pip install 'fox-edge[{extra}]'" if extra else "pip install torch"
            return Finding(name, False, None, f"{error}; add it with: {add}")
        except Exception as error:  # a broken native library can raise anything; that is what a doctor is for
            return Finding(name, False, None, f"{module} is installed but does not load: {error}")
        versions.append(f"{module.split('.')[0]} {getattr(found, '__version__', None) or _version(module)}")
        if module in _DEVICES:
            details.append(_DEVICES[module](found))
    return Finding(name, True, ", ".join(versions), "; ".join(filter(None, details)))


def _llama_cpp_device(module: Any) -> str:
    """What a build with CUDA can do here; nothing of one for the CPU."""
    if b"CUDA" not in module.llama_print_system_info():
        return ""
    sees = module.llama_supports_gpu_offload()
    return "built with CUDA: --device cuda" if sees else "built with CUDA, but sees no GPU"


def _onnxruntime_device(module: Any) -> str:
    """The same of onnxruntime-gpu."""
    has = "CUDAExecutionProvider" in module.get_available_providers()
    return "has a CUDA provider: --device cuda" if has else ""


# Import name -> what there is to say of devices beside the CPU.
_DEVICES: dict[str, Callable[[Any], str]] = {
    "llama_cpp": _llama_cpp_device,
    "onnxruntime": _onnxruntime_device,
}


def _cuda() -> Finding:
    name = "CUDA runtime (cuda:...)"
    try:
        from fox_edge.gpu import find_gpu
    except ImportError:
        return Finding(name, False, None, "needs torch")
    found = find_gpu()
    if isinstance(found, str):
        return Finding(name, False, None, f"{found}; everything else runs on the CPU")
    detail = f"{found.name}, {found.memory_bytes / 1e6:,.0f} MB"
    if importlib.util.find_spec("triton") is None:
        return Finding(name, False, found.cuda, f"{detail}, but triton is not installed: pip install triton")
    return Finding(name, True, f"CUDA {found.cuda}", detail)


def _browser() -> Finding:
    """What `fox-edge bench --runtime browser` needs: a browser, and the page as `make clients` builds it."""
    name = "browser (bench --runtime browser)"
    found = next(filter(None, map(shutil.which, _BROWSERS)), None)
    if found is None:
        return Finding(name, False, None, f"none of {', '.join(_BROWSERS)} is installed")
    page = importlib.util.find_spec("runtimes.browser")
    built = [Path(place) / "vendor" for place in (page and page.submodule_search_locations) or ()]
    if not any(folder.is_dir() for folder in built):
        return Finding(name, False, None, f"{found}, but its page is not built: make clients")
    return Finding(name, True, None, found)


def _version(module: str) -> str:
    try:
        return importlib.metadata.version(module.split(".")[0])
    except importlib.metadata.PackageNotFoundError:
        return ""
