"""What the agent said about the keys of each waiting request. Sans-IO: no vLLM, no client, no clock.

vLLM asks for every key of a waiting request on every scheduler step. The agent is asked once per request and run of
keys; every later question is answered from here. Rules:

1. An answer holds until the request is scheduled, preempted or finished; then a new question is sent.
2. A question that is not answered within the deadline counts as a miss for the request, also if the answer comes later.
3. A key whose load failed for a request stays a miss for that request to its end, or it would be tried for ever.
4. A request is promised no more blocks than the primary tier has slots, and each one once: what was loaded and is
   looked up again has been evicted meanwhile, and would push the next one out.
5. Everything is bounded: requests, and questions in flight (the oldest is forgotten, its keys time out).
"""

from __future__ import annotations

import enum
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple


class Answer(enum.Enum):
    """What is known of one key for one request."""

    UNKNOWN = "unknown"  # not asked yet
    PENDING = "pending"
    LOCAL = "local"  # the node's own agent has it
    PEER = "peer"  # a live peer has it
    MISS = "miss"

    @property
    def is_hit(self) -> bool:
        return self in (Answer.LOCAL, Answer.PEER)


class _Question(NamedTuple):
    request_id: str
    keys: tuple[bytes, ...]
    asked_at: float


class _Request:
    __slots__ = ("answers", "asked_below", "deadlines", "failed", "loaded", "promised")

    def __init__(self) -> None:
        self.answers: dict[bytes, Answer] = {}
        self.deadlines: dict[bytes, float] = {}  # keys whose answer is awaited -> until when
        self.failed: set[bytes] = set()
        self.promised: set[bytes] = set()
        self.loaded: set[bytes] = set()
        self.asked_below: set[int] = set()  # groups whose earlier positions were asked for too


class LookupTable:
    """Answers per (request, key). For one thread: the scheduler's.

    Args:
        deadline_s: how long a question may stay open.
        promised_max: blocks that one request may be promised: the slots of the primary tier.
        requests_max: requests that may have answers at once; beyond it, the oldest request's answers are forgotten.
        questions_max: questions that may be in flight at once.
    """

    def __init__(
        self, *, deadline_s: float, promised_max: int, requests_max: int = 8192, questions_max: int = 4096
    ) -> None:
        self._deadline_s = deadline_s
        self._promised_max = promised_max
        self._requests_max = requests_max
        self._questions_max = questions_max
        self._requests: OrderedDict[str, _Request] = OrderedDict()
        self._questions: OrderedDict[int, _Question] = OrderedDict()
        self.timeouts = 0  # keys that became a miss by rule 2; the caller takes and clears it

    def check(self, request_id: str, key: bytes, now: float) -> Answer:
        """What is known of ``key``; a question past its deadline turns into a miss here."""
        request = self._requests.get(request_id)
        if request is None:
            return Answer.UNKNOWN
        if key in request.failed:
            return Answer.MISS
        answer = request.answers.get(key)
        if answer is not None:
            return answer
        deadline = request.deadlines.get(key)
        if deadline is None:
            return Answer.UNKNOWN
        if now < deadline:
            return Answer.PENDING
        late = [other for other, until in request.deadlines.items() if until <= now]
        self.timeouts += self._resolve(request, late, Answer.MISS)
        return Answer.MISS

    def to_ask(self, request_id: str, key: bytes, positions: Mapping[bytes, int], group: int) -> list[bytes]:
        """The keys to put into one question when ``key`` is unknown: it and what will be looked up after it.

        A group with full attention is scanned forward from the first block that the engine lacks, so only later
        positions are of interest. A windowed group is scanned backward: the second unknown key of a group shows it, and
        then all its keys are asked for.

        Args:
            positions: end token of each key of the request and group, as far as the engine tells; may lack ``key``.
            group: the KV-cache group that ``key`` and ``positions`` belong to.
        """
        request = self._request(request_id)
        start = positions.get(key)
        if start is None:
            return [key]
        everything = group in request.asked_below
        request.asked_below.add(group)
        skip = request.answers.keys() | request.deadlines.keys() | request.failed
        return [k for k, position in positions.items() if (everything or position >= start) and k not in skip]

    def asked(self, request_id: str, keys: Iterable[bytes], question: int, now: float) -> None:
        """A question for ``keys`` is on its way as number ``question``."""
        keys = tuple(keys)
        self._questions[question] = _Question(request_id, keys, now)
        if len(self._questions) > self._questions_max:
            self._questions.popitem(last=False)
        deadlines = self._request(request_id).deadlines
        for key in keys:
            deadlines[key] = now + self._deadline_s

    def refused(self, request_id: str, keys: Iterable[bytes]) -> None:
        """The question could not be sent: misses, until the request is scheduled or ends."""
        self._resolve(self._request(request_id), keys, Answer.MISS)

    def answered(self, question: int, sources: Sequence[str | None], now: float) -> float | None:
        """The agent answered: per key of the question ``"local"``, ``"peer"`` or None for nobody.

        Returns:
            How long the answer took, in seconds; None if nobody waits for it any more.
        """
        asked = self._questions.pop(question, None)
        request = self._requests.get(asked.request_id) if asked is not None else None
        if asked is None or request is None:
            return None
        awaited = False
        for key, source in zip(asked.keys, sources, strict=True):
            # A key that is not awaited any more was settled by its deadline (rule 2).
            if request.deadlines.pop(key, None) is not None:
                request.answers[key] = Answer(source) if source is not None else Answer.MISS
                awaited = True
        return now - asked.asked_at if awaited else None

    def lost(self, question: int) -> int:
        """The agent went away with the question: its keys are misses. Returns how many."""
        asked = self._questions.pop(question, None)
        request = self._requests.get(asked.request_id) if asked is not None else None
        if asked is None or request is None:
            return 0
        return self._resolve(request, [key for key in asked.keys if key in request.deadlines], Answer.MISS)

    def promise(self, request_id: str, key: bytes) -> bool:
        """Whether a hit on ``key`` may be told to the engine, which then allocates a slot and loads it: rule 4."""
        request = self._request(request_id)
        if key in request.promised:
            return key not in request.loaded
        if len(request.promised) >= self._promised_max:
            return False
        request.promised.add(key)
        return True

    def loaded(self, request_id: str, keys: Iterable[bytes]) -> None:
        """``keys`` are in the primary tier now, for this request."""
        request = self._requests.get(request_id)
        if request is not None:
            request.loaded.update(keys)

    def load_failed(self, request_id: str, keys: Iterable[bytes]) -> None:
        """Loading ``keys`` for this request failed: rule 3."""
        request = self._requests.get(request_id)
        if request is not None:
            request.failed.update(keys)

    def loading(self, request_id: str) -> None:
        """A load for this request begins; makes sure that its failure will be remembered."""
        self._request(request_id)

    def scheduled(self, request_id: str) -> None:
        """The request left or re-entered the waiting queue: rule 1. Failed loads stay known."""
        request = self._requests.get(request_id)
        if request is None:
            return
        if request.failed:
            for table in (request.answers, request.deadlines, request.asked_below, request.promised, request.loaded):
                table.clear()
        else:
            del self._requests[request_id]

    def finished(self, request_id: str) -> None:
        """The request ended; nothing of it is kept. An answer still on its way will be dropped."""
        self._requests.pop(request_id, None)

    def __len__(self) -> int:
        return len(self._requests)

    def _request(self, request_id: str) -> _Request:
        request = self._requests.get(request_id)
        if request is None:
            request = self._requests[request_id] = _Request()
            if len(self._requests) > self._requests_max:
                self._requests.popitem(last=False)
        return request

    @staticmethod
    def _resolve(request: _Request, keys: Iterable[bytes], answer: Answer) -> int:
        keys = tuple(keys)
        for key in keys:
            request.deadlines.pop(key, None)
            request.answers[key] = answer
        return len(keys)
