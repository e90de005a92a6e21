"""Arithmetic word problems in GSM8K's answer form, made from a seed: what nano learns and is asked.

A family (see `families.py`) is a story in a small template language:

- `draw`: "a=2..60; q=2..9; c=a*q" draws integers and derives others, left to right;
- `(buys|gets)` picks one of the words; `{N}` and `{M}` are two people, `{he}` `{his}` `{him}` the pronouns
  of `N` (`{He}` and `{His}` begin a sentence), `{things}` and the other names of `WORDS` draw a noun;
- in the working, `[t=a+b]` writes `3+4=<<3+4=7>>7` and binds `t`; `[$t=a*b]` writes dollars.

The last value bound is the result, so an answer cannot disagree with its own annotations.
Knows nothing of tokens, chat templates or files.
"""

from __future__ import annotations

import ast
import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cache

from fox_edge.nano.families import DRILLS, FAMILIES, NAMES, WORDS, Family

# Held-out problems come from this seed; `generate` leaves their questions out whatever its own seed is.
HELD_OUT_SEED = 1_000_003
HELD_OUT_COUNT = 200


@dataclass(frozen=True)
class Problem:
    """One question and its worked answer, which ends in a line `#### n`."""

    question: str
    answer: str
    result: int
    family: str


def calculate(expression: str, values: Mapping[str, int] | None = None) -> Fraction:
    """The exact value of an expression of + - * / over integers and the names in `values`.

    Raises ValueError for anything else in it.
    """
    return _value(ast.parse(expression, mode="eval").body, values or {})


def _value(node: ast.expr, values: Mapping[str, int]) -> Fraction:
    match node:
        case ast.Constant(value=int(number)):
            return Fraction(number)
        case ast.Name(id=name) if name in values:
            return Fraction(values[name])
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _value(left, values) + _value(right, values)
        case ast.BinOp(left=left, op=ast.Sub(), right=right):
            return _value(left, values) - _value(right, values)
        case ast.BinOp(left=left, op=ast.Mult(), right=right):
            return _value(left, values) * _value(right, values)
        case ast.BinOp(left=left, op=ast.Div(), right=right):
            return _value(left, values) / _value(right, values)
    raise ValueError(f"not plain arithmetic: {ast.unparse(node)}")


def _whole(expression: str, values: Mapping[str, int]) -> int:
    value = calculate(expression, values)
    if value.denominator != 1:
        raise ValueError(f"{expression} with {dict(values)} is {value}, not a whole number")
    return int(value)


class _Telling:
    """One telling of a family: the numbers and words drawn so far."""

    def __init__(self, family: Family, rng: random.Random) -> None:
        self.rng = rng
        self.numbers: dict[str, int] = {}
        (name, he, him, his), (other, *_) = rng.sample(NAMES, 2)
        self.words = {"N": name, "M": other, "he": he, "him": him, "his": his}
        self.words |= {"He": he.capitalize(), "His": his.capitalize()}
        for part in family.draw.split(";"):
            variable, _, rule = part.strip().partition("=")
            low, dots, high = rule.partition("..")
            value = _whole(low, self.numbers)
            self.numbers[variable] = rng.randint(value, _whole(high, self.numbers)) if dots else value

    def fill(self, template: str) -> str:
        """Choose alternatives, then put in words and numbers, then do the sums."""
        text = re.sub(r"\(([^()]*\|[^()]*)\)", lambda m: self.rng.choice(m[1].split("|")), template)
        text = re.sub(r"\{(\w+)\}", lambda m: self._slot(m[1]), text)
        return re.sub(r"\[(\$?)(\w+)=([^\]]+)\]", lambda m: self._sum(m[1], m[2], m[3]), text)

    def _slot(self, name: str) -> str:
        if name in self.numbers:
            return str(self.numbers[name])
        if name not in self.words:
            # Slots such as box and boxes are two forms of one noun, drawn together.
            forms = next(forms for forms in WORDS if name in forms)
            choice = self.rng.randrange(len(WORDS[forms]))
            self.words |= dict(zip(forms, WORDS[forms][choice], strict=True))
        return self.words[name]

    def _sum(self, unit: str, name: str, rule: str) -> str:
        if name in self.numbers:
            raise ValueError(f"{name} is bound twice")
        shown = re.sub(r"[a-z]\w*", lambda m: str(self.numbers[m[0]]), rule)
        self.numbers[name] = result = _whole(rule, self.numbers)
        return f"{shown}={unit}<<{shown}={result}>>{result}"


def tell(family: Family, rng: random.Random) -> Problem:
    """Draw one problem of a family."""
    telling = _Telling(family, rng)
    question = telling.fill(rng.choice(family.questions))
    lines = [telling.fill(line) for line in family.working]
    result = next(reversed(telling.numbers.values()))
    question = question[0].upper() + question[1:]
    return Problem(question, "\n".join([*lines, f"#### {result}"]), result, family.name)


def _draw(seed: int, count: int, families: tuple[Family, ...], excluded: frozenset[str]) -> list[Problem]:
    rng = random.Random(f"nano problems {seed}")
    seen = set(excluded)
    problems: list[Problem] = []
    misses = 0
    while len(problems) < count:
        # Taking turns keeps the families even; the order within a round is drawn.
        for family in rng.sample(families, len(families)):
            problem = tell(family, rng)
            if problem.question in seen:
                misses += 1
                continue
            seen.add(problem.question)
            problems.append(problem)
        if misses > 20 * count + 1000:
            raise ValueError(f"these families hold fewer than {count} different questions")
    return problems[:count]


def generate(seed: int, count: int, drills: bool = False) -> list[Problem]:
    """`count` different problems, the same for the same seed, none of them held out.

    With `drills`, bare sums ("What is 17+25?") are drawn among the stories, each kind as often as a family.
    """
    families = FAMILIES + DRILLS if drills else FAMILIES
    return _draw(seed, count, families, _held_out_questions())


def held_out(count: int = HELD_OUT_COUNT) -> list[Problem]:
    """Up to 200 story problems (no drills) that `generate` never returns, families evenly mixed."""
    if not 0 <= count <= HELD_OUT_COUNT:
        raise ValueError(f"{count} held-out problems were asked for; there are {HELD_OUT_COUNT}")
    return list(_held_out()[:count])


@cache
def _held_out() -> tuple[Problem, ...]:
    return tuple(_draw(HELD_OUT_SEED, HELD_OUT_COUNT, FAMILIES, frozenset()))


@cache
def _held_out_questions() -> frozenset[str]:
    return frozenset(problem.question for problem in _held_out())


def practice_sheets(seed: int) -> Iterator[tuple[str, str]]:
    """Without end, (question, answer) pairs of six bare sums, for more arithmetic per token."""
    rng = random.Random(f"nano sheets {seed}")
    while True:
        sums = [_bare_sum(rng) for _ in range(6)]
        yield (
            f"Work out {', '.join(sums)}.",
            "\n".join(f"{expression}={calculate(expression)}" for expression in sums),
        )


def _bare_sum(rng: random.Random) -> str:
    a, b = rng.randint(2, 120), rng.randint(2, 80)
    p, q = rng.randint(2, 30), rng.randint(2, 12)
    return rng.choice((f"{a}+{b}", f"{a + b}-{a}", f"{a + b}-{b}", f"{p}*{q}", f"{q}*{p}", f"{p * q}/{q}"))


def final_answer(text: str) -> str | None:
    """The number after `####`, as GSM8K's own scoring reads it (commas dropped), or None."""
    found = re.search(r"#### (-?[0-9.,]+)", text)
    return found[1].replace(",", "").rstrip(".") if found else None
