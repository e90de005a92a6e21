"""The families of word problems: data for the template language that `problems.py` describes.

Numbers stay small on purpose: sums mostly under 200, products of small factors, exact divisions. A model
of 6.6M weights learns those, and a model that answers most of them shows what quantization takes away.
"""

from __future__ import annotations

from fox_edge.nano.families_money import MONEY
from fox_edge.nano.families_things import THINGS
from fox_edge.nano.families_time import TIME
from fox_edge.nano.family import NAMES, WORDS, Family

__all__ = ["DRILLS", "FAMILIES", "NAMES", "WORDS", "Family"]

FAMILIES: tuple[Family, ...] = THINGS + MONEY + TIME

# Bare sums: they teach the arithmetic that the stories need. For training only, never among the held out.
DRILLS: tuple[Family, ...] = tuple(
    Family(
        name, draw, (f"What is {shown}?", f"Calculate {shown}.", f"How much is {shown}?"), (f"[r={rule}]",)
    )
    for name, draw, shown, rule in (
        ("drill_add", "a=1..99; b=1..99", "{a}+{b}", "a+b"),
        ("drill_subtract", "b=1..99; c=1..99; a=b+c", "{a}-{b}", "a-b"),
        ("drill_multiply", "a=2..20; b=2..12", "{a}*{b}", "a*b"),
        ("drill_divide", "b=2..12; c=2..20; a=b*c", "{a}/{b}", "a/b"),
    )
)
