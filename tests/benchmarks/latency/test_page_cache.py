"""Pages that are gone, pages that are there, and what is said when the system does not do as it is told."""

import os
import sys

import numpy as np
import pytest

from benchmarks.common.subject import open_subject
from benchmarks.latency import page_cache
from benchmarks.latency.measure import run_job
from benchmarks.latency.workloads import find_workload, waves

linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux drops pages when asked")
MB = 1 << 20


@pytest.fixture
def weights(tmp_path):
    """A file of 8 MB on the disk that tests are written to."""
    path = tmp_path / "model" / "weights"
    path.parent.mkdir()
    path.write_bytes(np.random.default_rng(0).bytes(8 * MB))
    return path


def test_files_are_the_folder_s_own_and_its_folders_own(weights):
    kept = weights.parent / ".cache" / "packed"
    kept.parent.mkdir()
    kept.write_bytes(b"x")
    deeper = kept.parent / "not" / "ours"
    deeper.parent.mkdir()
    deeper.write_bytes(b"x")
    outside = weights.parents[1] / "blob"
    outside.write_bytes(b"x")
    (weights.parent / "link").symlink_to(outside)
    assert set(page_cache.model_files(weights.parent)) == {weights, kept, outside}


@linux
def test_pages_go_and_come(weights):
    weights.read_bytes()
    assert page_cache.resident_share([weights]) == 1
    assert page_cache.prepare("cold", [weights]) == []
    assert page_cache.resident_share([weights]) < 0.01
    assert page_cache.prepare("warm", [weights]) == []
    assert page_cache.resident_share([weights]) == 1


@linux
def test_residence_is_counted_in_pages(weights):
    page_cache.drop([weights])
    descriptor = os.open(weights, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)  # no reading ahead
    for page in (0, 700, 1400):
        os.pread(descriptor, 1, page * 4096)
    os.close(descriptor)
    share = page_cache.resident_share([weights])
    assert 3 / 2048 <= share < 0.2


@linux
def test_pages_that_somebody_holds_stay_and_that_is_said(weights):
    mapped = np.memmap(weights, np.uint8, "r")
    assert mapped[::4096].sum() >= 0
    (note,) = page_cache.prepare("cold", [weights])
    assert note.startswith("not quite cold: the system kept ")
    assert page_cache.resident_share([weights]) > 0.5


def test_a_system_that_does_not_tell_or_cannot_is_told_of(weights, monkeypatch):
    monkeypatch.setattr(page_cache, "resident_share", lambda files: None)
    assert page_cache.prepare("warm", [weights]) == []
    if sys.platform == "linux":
        (note,) = page_cache.prepare("cold", [weights])
        assert "does not tell" in note
    monkeypatch.delattr(os, "posix_fadvise", raising=False)
    assert page_cache.prepare("cold", [weights]) == [
        "not cold: this system has no way to drop a file's pages"
    ]


def test_files_that_are_empty_or_gone_are_no_trouble(tmp_path):
    (tmp_path / "empty").touch()
    assert page_cache.resident_share([tmp_path / "empty"]) is None
    assert page_cache.resident_share([tmp_path / "gone"]) is None
    assert page_cache.prepare("warm", [tmp_path / "gone"]) == []


@linux
def test_a_cold_start_is_without_pages_of_nano_s_export_when_it_opens(nano_gguf, monkeypatch):
    subject = open_subject(str(nano_gguf.path))
    job = {
        "subject": subject.spec,
        "context": 256,
        "threads": 1,
        "waves": waves(find_workload("custom", 20, 2), subject.tokenizer()),
        "decode_tokens": 2,
    }
    files = page_cache.model_files(subject.folder)
    model = [path for path in files if path.suffix == ".gguf"]
    seen = []
    opened = type(subject).open_session

    def watch(self, options):
        seen.append(page_cache.resident_share(model))
        return opened(self, options)

    monkeypatch.setattr(type(subject), "open_session", watch)
    cold = run_job({**job, "page_cache": "cold"}, lambda *_: None)
    warm = run_job({**job, "page_cache": "warm"}, lambda *_: None)
    assert seen[0] < 0.01 and seen[1] == 1
    assert cold["notes"] == warm["notes"] == []
    assert cold["decode_tokens_per_s"] > 0
