"""Without the optional packages, each ONNX module says in one sentence which extra brings them."""

from __future__ import annotations

import importlib
import sys

import pytest

from fox_edge.errors import MissingPackageError


@pytest.mark.parametrize(
    ("module", "package"),
    [
        ("runtimes.onnx.engine", "onnxruntime"),
        ("runtimes.onnx.foreign_session", "onnxruntime"),
        ("runtimes.onnx.external", "onnx"),
        ("export.onnx_graph", "onnx"),
    ],
)
def test_a_missing_package_names_its_extra(
    module: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    for loaded in (module, "runtimes.onnx.engine"):  # through which others have the package
        monkeypatch.delitem(sys.modules, loaded, raising=False)
    with pytest.raises(MissingPackageError, match=rf"^{package} is not installed; .*fox-edge\[onnx\]"):
        importlib.import_module(module)
