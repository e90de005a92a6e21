"""Slots: conversations side by side on the same weights, and which of them a new prompt gets.

Knows what tokens every slot's cache holds. Does not know queues, time limits, text or HTTP.
"""

from __future__ import annotations

from collections.abc import Sequence

from runtimes.base import BatchingSession, SharingSession
from runtimes.generate import Generation
from runtimes.prefix import PrefixCache

# Tokens of a prompt that run at once, while other slots wait for their next token, where the session does not
# say how many. Also the step at which a prefix of another conversation is reused: every prompt is cut at the
# same places, whatever is cached.
CHUNK = 64
# A slot is taken over when the new prompt goes on from at least this share of what it holds.
_WORTH_TAKING = 0.5


class Slot:
    """One conversation: a session's cache, and the generation that runs in it, if one does.

    `part` tokens of a prompt are run at once.
    """

    def __init__(self, number: int, session: SharingSession) -> None:
        self.number = number
        self.part = session.prefill_chunk if isinstance(session, BatchingSession) else CHUNK
        self.cache = PrefixCache(session, self.part)
        self.generation: Generation | None = None
        self.last_used = 0  # a count that grows, not a time
        self.last_part = 0  # in which round a part of its prompt was run
        self.last_token_s = 0.0


class Slots:
    """All slots. The first works in the given session, the others in further ones on its weights."""

    def __init__(self, session: SharingSession, count: int) -> None:
        sessions = [session]
        try:
            while len(sessions) < count:
                sessions.append(session.another())
        except BaseException:
            for extra in sessions[1:]:
                extra.close()
            raise
        self.all = [Slot(number, session) for number, session in enumerate(sessions)]
        self._uses = 0

    def take(self, prompt: Sequence[int], free: Sequence[Slot]) -> Slot:
        """The free slot for a prompt, with as much of it in the cache as any slot holds.

        That is the free slot whose conversation the prompt goes on from; else the one that was used least
        recently, into which the longest prefix that any slot holds is copied, a busy one's too.
        """
        self._uses += 1
        shared = {slot: slot.cache.shared(prompt) for slot in self.all}
        held = {slot: len(slot.cache.held()) for slot in free}
        slot = max(free, key=lambda slot: (shared[slot], -held[slot]))
        if shared[slot] < _WORTH_TAKING * held[slot]:
            slot = min(free, key=lambda slot: slot.last_used)
        # Some runtimes copy more of a source than is wanted: of equal ones the shortest.
        source = max(self.all, key=lambda other: (shared[other], -other.cache.session.length))
        if shared[source] > shared[slot]:
            slot.cache.adopt(source.cache, shared[source])
        slot.last_used = self._uses
        return slot

    def close(self) -> None:
        """Free every conversation, and with the last one the weights."""
        for slot in self.all:
            slot.cache.session.close()
