"""What fox-edge doctor says of the browser."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from fox_edge import doctor
from runtimes.browser.chromium import PROGRAMS


def test_doctor_tells_what_the_browser_lacks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert doctor._BROWSERS == PROGRAMS
    monkeypatch.setattr(doctor.shutil, "which", lambda _name: None)
    found = doctor._browser()
    assert not found.works and found.detail.startswith("none of chromium, ")
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/bin/{name}" if "google" in name else None)
    place = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda _name: place)
    assert doctor._browser().detail == "/bin/google-chrome, but its page is not built: make clients"
    (tmp_path / "vendor").mkdir()
    assert doctor._browser() == doctor.Finding(
        "browser (bench --runtime browser)", True, None, "/bin/google-chrome"
    )
