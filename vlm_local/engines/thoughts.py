"""Thoughts that wait for moments in which no robot does.

A piece of a thought is begun only where it ends before the next step of any robot is expected. What is expected of a
robot: its next request comes after the shortest of its last pauses. What is expected of a piece: what such pieces took.
"""

import logging
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from statistics import median_low
from time import monotonic, perf_counter

from vlm_local.engines import ThinkingEngine, settle
from vlm_local.errors import EngineError, VLMLocalError
from vlm_local.types import GenerationRequest, Thought, ThoughtRequest

logger = logging.getLogger(__name__)

_NUM_PAUSES = 16  # of a robot, of which the shortest counts
_NUM_TIMES = 9  # of a kind of piece, of which the median counts: a single slow one shall not end all thinking
_SPARE = 1.5  # a piece is expected to take so many times what it took
_AWAY_S = 1.0  # a robot that is so much later than its longest pause has gone, and may find a piece running
_MAX_ROBOTS = 64
_LOOK_AGAIN_S = 0.1  # whether a robot has gone
_WARM_UPS = 2  # the first one finds everything cold


@dataclass(eq=False)
class ThoughtJob:
    """One thought, and where its caller looks for it.

    begins: what the next piece hands to the engine, None where it goes on. thought: once it is written, while what the
    next step reads is read ahead. piece: name of the next one. spent_ms: so far.
    """

    request: ThoughtRequest
    build_next: Callable[[Thought], GenerationRequest]
    future: "Future[Thought]" = field(default_factory=Future)
    begins: ThoughtRequest | GenerationRequest | None = None
    thought: Thought | None = None
    piece: str = "begin"
    spent_ms: float = 0.0

    def __post_init__(self):
        self.begins = self.request


@dataclass(eq=False)
class _Pauses:
    """A robot's times between an answer and its next request. since: of its last answer, None while it is asked."""

    since: float | None = None
    last: deque[float] = field(default_factory=lambda: deque(maxlen=_NUM_PAUSES))

    def measure_left_s(self, now: float) -> float:
        """Until its next request is expected: 0 where it may come at any moment, infinity where the robot has gone."""
        if self.since is None:
            return 0.0
        passed = now - self.since
        if passed > max(self.last, default=0.0) + _AWAY_S:
            return float("inf")
        return max(min(self.last, default=0.0) - passed, 0.0)


class ThoughtQueue:
    """Thoughts in the order in which they were begun. The owner's lock guards it, but not `work` and `warm_up`."""

    def __init__(self, engine: ThinkingEngine):
        self._engine = engine
        self._jobs: list[ThoughtJob] = []
        self._robots: OrderedDict[str, _Pauses] = OrderedDict()
        self._times_s: dict[str, deque[float]] = {}  # of pieces, by name

    @property
    def look_again_s(self) -> float | None:
        """How long to wait before the next look at `pick`, None where nothing is to be written."""
        return _LOOK_AGAIN_S if self._jobs else None

    def note_asked(self, request: GenerationRequest) -> None:
        """A request was submitted."""
        pauses = self._find_pauses(request)
        if pauses is not None and pauses.since is not None:
            pauses.last.append(monotonic() - pauses.since)
            pauses.since = None

    def note_answered(self, request: GenerationRequest) -> None:
        """A request's caller has its answer."""
        pauses = self._find_pauses(request)
        if pauses is not None:
            pauses.since = monotonic()

    def _find_pauses(self, request: GenerationRequest) -> _Pauses | None:
        """Of the robot that asks; None where it is no step."""
        if request.episode is None or request.wants_features:
            return None
        robot = request.episode.rpartition("/")[0]
        pauses = self._robots.setdefault(robot, _Pauses())
        self._robots.move_to_end(robot)
        if len(self._robots) > _MAX_ROBOTS:
            self._robots.popitem(last=False)
        return pauses

    def add(self, job: ThoughtJob) -> None:
        self._jobs.append(job)

    def forget(self, episode: str) -> None:
        for job in self._jobs:
            if job.request.episode == episode:
                job.future.cancel()

    def clear(self) -> None:
        for job in self._jobs:
            job.future.cancel()

    def pick(self, now: float) -> ThoughtJob | None:
        """The thought whose next piece may be done now, None where one must wait. now: monotonic seconds."""
        self._jobs = [job for job in self._jobs if not job.future.done()]
        if not self._jobs:
            return None
        awaited = next((job for job in self._jobs if job.request.is_awaited), None)
        if awaited is not None:
            return awaited
        left_s = min((each.measure_left_s(now) for each in self._robots.values()), default=float("inf"))
        return self._jobs[0] if self._expect_s(self._jobs[0].piece) < left_s else None

    def _expect_s(self, piece: str) -> float:
        times = self._times_s.get(piece)
        return _SPARE * median_low(times) if times else 0.0

    def work(self, job: ThoughtJob) -> None:
        """Do one piece. Called by the engine's thread, without the lock."""
        start, piece = perf_counter(), job.piece
        begins, job.begins = job.begins, None
        try:
            outcome = self._engine.think(job.request.episode, begins)
            if isinstance(outcome, Thought) and outcome.text:
                job.thought, job.piece = outcome, "begin"
                job.begins = job.build_next(outcome)
        except Exception as error:
            self._fail(job, error)
            return
        taken_s = perf_counter() - start
        job.spent_ms += 1e3 * taken_s
        self._times_s.setdefault(piece, deque(maxlen=_NUM_TIMES)).append(taken_s)
        if isinstance(outcome, str):
            job.piece = outcome
        elif job.begins is None:
            thought = outcome or job.thought or Thought("", 0)
            settle(job.future, replace(thought, ms=round(job.spent_ms, 1)))

    def _fail(self, job: ThoughtJob, error: Exception) -> None:
        if not isinstance(error, VLMLocalError):
            logger.exception("a thought failed")
            error = EngineError(f"the thought failed: {type(error).__name__}: {error}")
        settle(job.future, error)

    def warm_up(self, request: ThoughtRequest, reads: GenerationRequest) -> None:
        """Write a thought and read `reads` ahead, so that it is known how long each kind of piece takes.

        Raises what failed.
        """
        for _ in range(_WARM_UPS):
            for begins in (request, reads):
                self._engine.forget(request.episode)
                job = ThoughtJob(request, lambda thought: reads)
                job.begins, job.thought = begins, Thought("", 0)
                while not job.future.done():
                    self.work(job)
                job.future.result()
