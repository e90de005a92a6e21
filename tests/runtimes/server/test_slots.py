"""Which slot a prompt gets, and what of it is in the cache then."""

from __future__ import annotations

import pytest

from runtimes.prefix import PrefixCache
from runtimes.server.slots import CHUNK, Slot, Slots
from tests.runtimes.server.fakes import FakeSession, Family, answer_alone

SYSTEM = [7] * (2 * CHUNK + 10)


@pytest.fixture
def family() -> Family:
    return Family()


@pytest.fixture
def slots(family: Family) -> Slots:
    return Slots(FakeSession(family=family), 3)


def run(slots: Slots, prompt: list[int], free: list[Slot] | None = None, count: int = 4) -> Slot:
    """Answer a prompt to its end; gives the slot that it was answered in."""
    slot = slots.take(prompt, slots.all if free is None else free)
    made = list(slot.cache.generate(prompt, max_tokens=count))
    assert made == answer_alone(prompt, count)
    return slot


def copies(family: Family) -> list[tuple[int, str, int]]:
    return [call for call in family.calls if call[1].startswith("copy")]


def test_a_conversation_goes_on_where_it_was(slots: Slots, family: Family) -> None:
    question = [1, 2, 3]
    first = run(slots, question)
    run(slots, [50, 51])
    family.calls.clear()
    more = [*question, *answer_alone(question, 4), 9, 9]
    assert run(slots, more) is first
    # All but the last token of the answer, which nobody had to run, was in the cache: to the very token.
    assert first.cache.reused_tokens == len(question) + 3
    assert family.calls[0] == (first.number, "prefill", 3)


def test_others_get_the_slot_that_was_used_least_recently(slots: Slots) -> None:
    used = [run(slots, [start] * 5).number for start in (1, 2, 3, 4, 5)]
    assert used == [0, 1, 2, 0, 1]


def test_a_system_prompt_is_copied_into_the_slot_of_another_conversation(
    slots: Slots, family: Family
) -> None:
    one = run(slots, [*SYSTEM, 1, 1], count=300)
    family.calls.clear()
    two = run(slots, [*SYSTEM, 2, 2])
    assert two is not one
    assert copies(family) == [(two.number, f"copy from {one.number}", 2 * CHUNK)]
    assert two.cache.reused_tokens == 2 * CHUNK
    # What the first conversation holds is all still there.
    assert len(one.cache.held()) == len(SYSTEM) + 2 + 299


def test_a_busy_slot_lends_its_prefix_too(slots: Slots, family: Family) -> None:
    busy = slots.take([*SYSTEM, 1], slots.all)
    generation = busy.cache.generate([*SYSTEM, 1], max_tokens=50)
    made = [next(generation) for _ in range(5)]
    other = run(slots, [*SYSTEM, 2], [slot for slot in slots.all if slot is not busy])
    assert other.cache.reused_tokens == 2 * CHUNK
    assert made + list(generation) == answer_alone([*SYSTEM, 1], 50)


def test_a_prompt_that_is_repeated_is_cut_at_the_same_places(slots: Slots, family: Family) -> None:
    prompt = [*SYSTEM, 3]
    slot = run(slots, prompt)
    family.calls.clear()
    assert run(slots, prompt) is slot
    assert slot.cache.reused_tokens == 2 * CHUNK
    assert family.calls[0] == (slot.number, "prefill", len(prompt) - 2 * CHUNK)


def test_a_slot_is_not_taken_from_a_long_conversation_for_a_short_prefix(slots: Slots) -> None:
    long = run(slots, [*SYSTEM, 1], count=400)
    other = run(slots, [*SYSTEM, 2])
    assert other is not long
    assert run(slots, [*SYSTEM, 2]) is other


def test_a_copied_conversation_goes_on_to_the_token(family: Family) -> None:
    one, two = PrefixCache(FakeSession(family=family), 64), PrefixCache(FakeSession(family=family), 64)
    question = [1, 2, 3]
    answer = list(one.generate(question, max_tokens=10))
    more = [*question, *answer, 5]
    two.adopt(one, one.shared(more))
    assert two.shared(more) == one.shared(more) == len(question) + 9
    assert list(two.generate(more, max_tokens=3)) == answer_alone(more, 3)


def test_every_conversation_is_closed(slots: Slots, family: Family) -> None:
    assert family.open == 3
    slots.close()
    assert family.open == 0


def test_where_not_all_slots_can_be_opened_none_is_left_open() -> None:
    class Scarce(FakeSession):
        def another(self):
            if self.family.open == 3:
                raise MemoryError
            return super().another()

    session = Scarce()
    with pytest.raises(MemoryError):
        Slots(session, 5)
    assert session.family.open == 1  # the given one, which is its owner's
