"""Memory readings against allocations whose size is known; bandwidth against a plain copy."""

import json
import os
import subprocess
import sys

import numpy as np

from benchmarks.common import machine
from benchmarks.devices.roofline import buffer_bytes, read_bandwidth

MB = 1 << 20


def test_the_machine_is_described_in_plain_json():
    found = json.loads(json.dumps(machine.machine()))
    assert found["cpu"]
    assert 1 <= found["cores"] <= os.cpu_count()
    assert 256 * MB < machine.available_memory_bytes() <= found["memory_bytes"]
    assert found["versions"]["numpy"] == np.__version__


def test_an_allocation_shows_in_peak_and_leaves_the_present():
    before = machine.memory()
    block = np.ones(64 * MB, np.uint8)
    during = machine.memory()
    assert during.peak_rss >= before.peak_rss
    assert machine.peak_rss_bytes() >= 64 * MB
    if during.anonymous is not None:
        assert 60 * MB < during.anonymous - before.anonymous < 80 * MB
        del block
        assert machine.memory().anonymous < during.anonymous - 60 * MB
        assert machine.memory().peak_rss >= during.rss - MB  # the system counts in batches


def test_a_mapped_file_counts_as_file_and_not_as_anonymous(tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(b"x" * (32 * MB))
    before = machine.memory()
    mapped = np.memmap(path, np.uint8, "r")
    assert int(mapped.max()) == ord("x")
    after = machine.memory()
    if after.file is not None:
        assert 30 * MB < after.file - before.file < 40 * MB
        assert abs(after.anonymous - before.anonymous) < 4 * MB


def test_a_child_does_not_inherit_its_parent_s_peak():
    block = np.ones(300 * MB, np.uint8)
    assert machine.peak_rss_bytes() > block.nbytes
    code = "from benchmarks.common.machine import peak_rss_bytes; print(peak_rss_bytes())"
    if sys.platform == "linux":
        child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert 4 * MB < int(child.stdout) < 100 * MB


def test_bandwidth_is_the_best_way():
    found = read_bandwidth(buffer_bytes(48 * MB), threads=1, seconds=0.4)
    assert (found.buffer_bytes, found.threads) == (32 * MB, 1)
    assert found.bytes_per_s == max(found.methods.values()) == found.methods[found.method]


def test_every_way_reads_the_whole_buffer():
    found = read_bandwidth(1 * MB, threads=2, seconds=0.1)
    # A way that stopped early would look faster than any processor's cache is.
    assert all(0 < value < 5e12 for value in found.methods.values())
    assert len(found.methods) == 4


def test_a_working_set_is_stood_for_by_a_power_of_two():
    assert buffer_bytes(1) == MB
    assert buffer_bytes(64 * MB) == 64 * MB
    assert buffer_bytes(127 * MB) == 64 * MB
    assert buffer_bytes(1 << 40) <= 1 << 30
