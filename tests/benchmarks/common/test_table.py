from __future__ import annotations

import pytest

from benchmarks.common.table import Column, rate, render


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.0212, "0.0212"),
        (1, "1.00"),
        (4.266, "4.27"),
        (12.84, "12.8"),
        (128.4, "128"),
        (1284.4, "1,284"),
        (31_234_567.0, "31,234,567"),
    ],
)
def test_rates_have_three_digits_and_no_exponent(value: float, text: str) -> None:
    assert rate(value) == text


def test_a_table_too_wide_is_cut_where_paths_differ_least() -> None:
    rows = [{"path": "a/very/long/way/to/int4", "n": 1.0}, {"path": "short", "n": None}]
    table = render((Column("artifact", "path"), Column("tok/s", "n", "{:.1f}")), rows, width=22)
    assert table.splitlines() == [
        "artifact         tok/s",
        "---------------  -----",
        "…ng/way/to/int4    1.0",
        "short                –",
    ]
