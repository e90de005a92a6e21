"""Device profiles, the sum against a cap, and projections: each by hand."""

from __future__ import annotations

import json
from typing import Any

import pytest

from benchmarks.common.machine import memory_bytes
from benchmarks.common.subject import open_subject
from benchmarks.devices.fit import misfit, need_at, needs_of
from benchmarks.devices.profiles import PROFILES, Profile, bus_bytes_per_s, find_profile, threads_here
from benchmarks.devices.projection import project, projections
from fox_edge.checkpoint import Checkpoint
from fox_edge.errors import FoxEdgeError
from fox_edge.processors import available_cores

DEVICE = Profile("box", "a box", 2, 1_000_000_000, 1024, 20e9, "its label")


def need(**more: Any) -> dict[str, Any]:
    parts = {
        "weights_bytes": 700_000_000,
        "kv_bytes": 200_000_000,
        "buffers_bytes": 50_000_000,
        "tokenizer_bytes": 10_000_000,
        "process_bytes": 39_999_999,
    } | more
    return {"context": 1024, **parts, "total_bytes": sum(parts.values())}


def test_the_profiles_are_those_that_are_promised_and_say_where_they_are_from() -> None:
    assert list(PROFILES) == ["laptop", "phone-8gb", "phone-4gb", "pi5", "this"]
    for profile in PROFILES.values():
        assert profile.source and profile.device and profile.threads > 0
        assert json.loads(json.dumps(profile.to_json()))["name"] == profile.name
    built_in = {"laptop": 16, "phone-8gb": 8, "phone-4gb": 4, "pi5": 8}
    for name, gib in built_in.items():
        # No app has all of a device's memory; what is assumed is said.
        assert 0.3 * gib < PROFILES[name].memory_bytes / 2**30 < gib
        assert "assumed:" in PROFILES[name].source


def test_published_bandwidths_are_transfers_times_bus_width() -> None:
    assert bus_bytes_per_s(4267e6, 32) == pytest.approx(17.1e9, rel=0.002)  # Raspberry Pi 5
    assert PROFILES["pi5"].bandwidth_bytes_per_s == pytest.approx(17.07e9, rel=0.001)
    assert PROFILES["laptop"].bandwidth_bytes_per_s == pytest.approx(89.6e9)
    assert PROFILES["phone-8gb"].bandwidth_bytes_per_s == pytest.approx(76.8e9)


def test_this_machine_is_its_own_cores_and_memory() -> None:
    this = find_profile("this")
    assert (this.threads, this.memory_bytes) == (available_cores(), memory_bytes())
    assert this.bandwidth_bytes_per_s is None and this.context is None
    assert threads_here(find_profile("laptop")) == min(8, available_cores())


def test_an_unknown_profile_lists_those_that_there_are() -> None:
    with pytest.raises(
        FoxEdgeError, match="called 'fridge'; there are laptop, phone-8gb, phone-4gb, pi5, this"
    ):
        find_profile("fridge")


# --- the sum ---------------------------------------------------------------------------------------------


def test_what_fits_to_the_byte_fits_and_one_more_does_not() -> None:
    assert misfit(need(process_bytes=40_000_000), DEVICE) is None  # 1,000,000,000 exactly
    assert misfit(need(process_bytes=40_000_001), DEVICE) is not None


def test_what_does_not_fit_is_told_with_the_sum() -> None:
    told = misfit(need(kv_bytes=900_000_000), DEVICE)
    assert told == (
        "does not fit box: at 1,024 tokens 700 MB of weights + 900 MB of KV cache + 50.0 MB of buffers + "
        "10.0 MB of tokenizer + 40.0 MB of process = 1,700 MB, but 1,000 MB can be had there"
    )


def test_a_model_is_reckoned_at_every_context_in_a_process_of_its_own(checkpoint: Checkpoint) -> None:
    subject = open_subject(f"torch:{checkpoint.path}")
    needs = needs_of(subject, [64, 256, 4096], {"kv": None})
    assert list(needs) == [64, 256, 512]  # the model has 512
    kv = 2 * 3 * 2 * 16 * 2  # keys and values, layers, heads, size, bytes
    for context, found in needs.items():
        assert found["context"] == context and found["kv_bytes"] == kv * context
        assert found["weights_bytes"] == 2 * checkpoint.config.num_parameters()
        parts = ("weights", "kv", "buffers", "tokenizer", "process")
        assert found["total_bytes"] == sum(found[f"{part}_bytes"] for part in parts)
    assert needs[512]["total_bytes"] - needs[64]["total_bytes"] == kv * (512 - 64)
    assert need_at(needs, 256) is needs[256]
    assert need_at(needs, 4096) is needs[512] and need_at({}, 4096) is None


def test_who_cannot_be_reckoned_is_not_refused(checkpoint: Checkpoint) -> None:
    """A choice that the runtime does not have: the run itself will say so."""
    assert needs_of(open_subject(f"torch:{checkpoint.path}"), [64], {"kv": "q8_0"}) == {}


# --- projections ------------------------------------------------------------------------------------------


def test_a_projection_is_bandwidth_over_bytes_times_the_share() -> None:
    row = {"bytes_per_token": 500_000_000, "roofline_percent": 60.0}
    found = project(row, DEVICE, need())
    assert found is not None
    # 20e9 / 5e8 = 40 tokens/s at most, 60 % of that
    assert found["ceiling_tokens_per_s"] == 40
    assert found["decode_tokens_per_s"] == pytest.approx(24)
    assert found["computed"] is True and found["source"].startswith("computed: 20.0 GB/s published for a box")
    assert (found["fits"], found["needed_bytes"], found["memory_cap_bytes"]) == (True, 999_999_999, 10**9)


def test_a_projection_never_passes_the_device_s_ceiling() -> None:
    row = {"bytes_per_token": 500_000_000, "roofline_percent": 130.0}
    assert (project(row, DEVICE) or {})["decode_tokens_per_s"] == 40


def test_what_does_not_fit_has_no_speed_but_the_sum() -> None:
    row = {"bytes_per_token": 500_000_000, "roofline_percent": 60.0}
    found = project(row, DEVICE, need(kv_bytes=10**9)) or {}
    assert found["decode_tokens_per_s"] is None and found["fits"] is False
    assert "does not fit box" in found["source"]


def test_what_was_not_measured_has_a_ceiling_only() -> None:
    found = project({"bytes_per_token": 500_000_000, "error": "it died"}, DEVICE, need()) or {}
    assert found["decode_tokens_per_s"] is None and found["ceiling_tokens_per_s"] == 40
    assert "nothing was measured here" in found["source"]


def test_every_device_with_a_published_bandwidth_is_projected_and_this_machine_is_not() -> None:
    row = {"bytes_per_token": 10**9, "roofline_percent": 50.0}
    found = projections(row, PROFILES.values(), {2048: need(), 8192: need(kv_bytes=10**10)})
    assert [p["profile"] for p in found] == ["laptop", "phone-8gb", "phone-4gb", "pi5"]
    by_name = {p["profile"]: p for p in found}
    assert by_name["phone-4gb"]["fits"] is True and by_name["laptop"]["fits"] is False
    # 17.066 GB/s over 1 GB per token, half of it
    assert by_name["pi5"]["decode_tokens_per_s"] == pytest.approx(8.534)
