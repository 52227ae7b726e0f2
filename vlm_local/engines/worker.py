"""The thread that owns an engine. All other threads submit a request and wait for its answer.

One thread, because engines are not thread-safe and a GPU runs one forward at a time anyway. Lock: `_changed` guards
the queues and is never held while the engine works.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import replace
from functools import partial
from time import monotonic, perf_counter
from typing import Any

from vlm_local.engines import (
    ConcurrentEngine,
    Engine,
    Job,
    Outcome,
    RemoteThinkingEngine,
    ThinkingEngine,
    add_timings,
    as_engine_error,
    choose_next,
    deliver,
    fail,
    forget,
    scale_down,
    settle,
)
from vlm_local.engines.thoughts import ThoughtJob, ThoughtQueue
from vlm_local.errors import ConfigError, EngineClosed, EngineError, VLMLocalError
from vlm_local.types import Generation, GenerationRequest, Thought, ThoughtRequest


class EngineWorker:
    """Loads an engine and gives it requests, in a thread of its own. Any thread may call the public methods.

    Requests that wait while a forward runs share the next one, up to the engine's max_batch; one that
    comes alone starts at once. Requests of an episode are a robot's: they go before others and share no
    forward with them. Large pictures are scaled down in their callers' threads. A forward cannot be
    interrupted: past the deadline its callers get an EngineError, its late result is thrown away, and
    until it returns every new request fails at once.
    A ConcurrentEngine is given each request as it comes. Thoughts are written in pieces, where nothing waits and no
    robot is expected (see ThoughtQueue).
    """

    def __init__(
        self,
        load: Callable[[], Engine],
        deadline_ms: float | None = None,
        warm_up: Sequence[GenerationRequest] = (),
        warm_thought: tuple[ThoughtRequest, GenerationRequest] | None = None,
    ):
        """load: makes the engine, in the worker's thread. deadline_ms: from submission to answer.

        warm_up: answered one by one before the state becomes "healthy". warm_thought: written then, with what reads it.
        """
        if deadline_ms is not None and not deadline_ms > 0:
            raise ConfigError(f"--deadline-ms must be more than 0, but is {deadline_ms:g}")
        self._load = load
        self._deadline_s = None if deadline_ms is None else deadline_ms / 1e3
        self._warm_up, self._warm_thought = warm_up, warm_thought
        self._engine: Engine | None = None
        self._is_concurrent = False
        self._failure: Exception | None = None
        self._closed = False
        self._loaded = threading.Event()  # or failed, or closed
        self._changed = threading.Condition()
        self._waiting: list[Job] = []
        self._running: list[Job] = []
        self._running_since: float | None = None
        self._submitted: set[Job] = set()
        self._forgotten: list[str] = []
        self._thoughts: ThoughtQueue | None = None  # once one is asked for; guarded by _changed, but not its `work`
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def state(self) -> str:
        """ "loading", "healthy", "stuck", "failed" or "closed".

        stuck: past the deadline, or the engine itself says that it is down (its process, its servers).
        """
        if self._closed:
            return "closed"
        if self._failure is not None:
            return "failed"
        if not self._loaded.is_set():
            return "loading"
        return "stuck" if self._is_stuck() or getattr(self._engine, "is_down", False) else "healthy"

    @property
    def num_waiting(self) -> int:
        """Requests that no forward has taken yet."""
        return len(self._waiting)

    @property
    def metadata(self) -> Mapping[str, Any]:
        """The engine's, empty until it is loaded."""
        return {} if self._engine is None else self._engine.metadata

    def wait_loaded(self, timeout_s: float | None = None) -> bool:
        """True once the engine can answer, False after the time-out. Raises what the load raised."""
        if not self._loaded.wait(timeout_s):
            return False
        if self._failure is not None:
            raise self._failure
        if self._closed:
            raise EngineClosed("the engine is closed")
        return True

    def generate(self, request: GenerationRequest) -> Generation:
        """Block until the engine has answered.

        Raises EngineError where the engine failed or took longer than the deadline, EngineClosed where it is closed,
        RequestError for a request that it cannot answer. `timings_ms` gets "queue" (waiting) and "engine" (the rest).
        """
        self.wait_loaded()
        if not self._is_concurrent:  # others wait for those beside them
            request = replace(request, image=scale_down(request.image))
        submitted = perf_counter()
        job = Job(request)
        with self._changed:
            if self._closed:
                raise EngineClosed("the engine is closed")
            if self._is_stuck():
                raise EngineError(f"the model is stuck or being loaded again: no answer for {self._deadline_s:g} s")
            self._waiting.append(job)
            if self._thoughts is not None:
                self._thoughts.note_asked(request)
            self._changed.notify()
        try:
            generation = job.future.result(self._deadline_s)
        except (FutureTimeoutError, CancelledError):
            job.future.cancel()
            raise self._explain_late() from None
        finally:
            if self._thoughts is not None:
                with self._changed:
                    self._thoughts.note_answered(request)
                    self._changed.notify()
            del job  # its future holds the failure, which holds this function's variables: the picture for long
        waited_ms = 1e3 * (perf_counter() - submitted)
        if self._deadline_s is not None and waited_ms > 1e3 * self._deadline_s:  # the machine was paused
            raise self._explain_late()
        return add_timings(generation, {"queue": max(waited_ms - generation.timings_ms["engine"], 0.0)})

    def _explain_late(self) -> EngineError:
        return EngineError(f"no answer within the deadline of {self._deadline_s:g} s (--deadline-ms)")

    def think(self, request: ThoughtRequest, build_next: Callable[[Thought], GenerationRequest]) -> "Future[Thought]":
        """Have a thought written; returns at once. Cancelling the future, or forgetting the episode, ends it.

        build_next: what reads the thought in the episode's next step. The part before its picture is read before the
        future is done, so that the step finds it kept. Called in the engine's thread. Raises EngineError for an engine
        that writes no free text.
        """
        self.wait_loaded()
        engine = self._engine
        if isinstance(engine, RemoteThinkingEngine):
            return engine.submit_thought(request)
        if not isinstance(engine, ThinkingEngine):
            raise EngineError("this engine answers with given sentences only, it writes no free text")
        job = ThoughtJob(replace(request, image=scale_down(request.image)), build_next)
        with self._changed:
            if self._closed:
                raise EngineClosed("the engine is closed")
            self._thoughts = self._thoughts or ThoughtQueue(engine)
            self._thoughts.add(job)
            self._changed.notify()
        return job.future

    def forget(self, episode: str) -> None:
        """Have the engine drop what it keeps of an episode, before its next forward."""
        with self._changed:
            if self._thoughts is not None:
                self._thoughts.forget(episode)
            self._forgotten.append(episode)
            self._changed.notify()

    def close(self, timeout_s: float = 1.0) -> bool:
        """Fail whatever waits. True when the thread ended in time; a forward in this process cannot be ended."""
        with self._changed:
            self._closed = True
            abandoned = [*self._waiting, *self._running, *self._submitted]
            self._waiting.clear()
            if self._thoughts is not None:
                self._thoughts.clear()
            self._changed.notify()
        self._loaded.set()
        for job in abandoned:
            settle(job.future, EngineClosed("the server is stopping"))
        getattr(self._engine, "end", lambda: None)()  # nobody waits for what an EngineProcess does
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _is_stuck(self) -> bool:
        since = self._running_since
        return since is not None and self._deadline_s is not None and monotonic() - since > self._deadline_s

    def _run(self) -> None:
        try:
            with as_engine_error("loading the model failed"):
                engine = self._engine = self._open()
                is_concurrent = self._is_concurrent = isinstance(engine, ConcurrentEngine)
        except VLMLocalError as error:
            self._failure = error
            return
        finally:
            self._loaded.set()
        while (work := self._take(engine.max_batch)) is not None:
            forgotten, batch, thought = work
            for episode in forgotten:
                forget(engine, episode)
            if thought is not None and self._thoughts is not None:
                self._thoughts.work(thought)
            elif is_concurrent:
                self._submit(engine, batch)
            elif batch:
                self._answer(engine, batch)
            self._running_since = None
            self._running = []
        engine.close()

    def _open(self) -> Engine:
        """The engine, warm."""
        engine = self._load()
        for request in self._warm_up:
            for outcome in engine.generate([request]):
                if isinstance(outcome, VLMLocalError):
                    raise outcome
        if self._warm_thought is not None and isinstance(engine, ThinkingEngine):
            self._thoughts = ThoughtQueue(engine)
            self._thoughts.warm_up(*self._warm_thought)
        elif self._warm_thought is not None and isinstance(engine, RemoteThinkingEngine):
            engine.submit_thought(replace(self._warm_thought[0], is_awaited=True)).result()
        elif self._warm_thought is not None:
            raise ConfigError("--think: this engine answers with given sentences only, it writes no free text")
        for episode in {request.episode for request in self._warm_up if request.episode is not None}:
            engine.forget(episode)
        return engine

    def _take(self, max_batch: int) -> tuple[list[str], list[Job], ThoughtJob | None] | None:
        """Wait for work: episodes to forget, requests to answer, or else a thought to go on with; None once closed."""
        with self._changed:
            thought = None
            while not (self._closed or self._waiting or self._forgotten):
                if self._thoughts and (thought := self._thoughts.pick(monotonic())) is not None:
                    break
                self._changed.wait(self._thoughts and self._thoughts.look_again_s)
            if self._closed:
                return None
            forgotten, self._forgotten = self._forgotten, []
            batch = []
            for job in choose_next(self._waiting, max_batch):
                self._waiting.remove(job)
                if job.future.set_running_or_notify_cancel():
                    batch.append(job)
            self._running, self._running_since = batch, monotonic()  # forgetting takes its time, too
            return forgotten, batch, thought

    def _submit(self, engine: ConcurrentEngine, jobs: list[Job]) -> None:
        start = perf_counter()
        for job in jobs:
            with self._changed:
                self._submitted.add(job)
            try:
                engine.submit(job.request).add_done_callback(partial(self._finish, job, start))
            except Exception as error:
                with self._changed:
                    self._submitted.discard(job)
                fail(job, error)

    def _finish(self, job: Job, start: float, outcome: "Future[Outcome]") -> None:
        """Called in the engine's own thread."""
        with self._changed:
            self._submitted.discard(job)
        try:
            deliver(job, outcome.result(), 1e3 * (perf_counter() - start))
        except CancelledError:
            settle(job.future, EngineClosed("the engine is closed"))
        except Exception as error:
            fail(job, error)

    def _answer(self, engine: Engine, batch: list[Job]) -> None:
        """One forward for all; where it fails, one for each, so that only the guilty request fails."""
        start = perf_counter()
        try:
            generations = engine.generate([job.request for job in batch])
            if len(generations) != len(batch):
                raise EngineError(f"the engine gave {len(generations)} answers to {len(batch)} requests")
        except Exception as error:
            if len(batch) > 1:
                for job in batch:
                    if not self._is_stuck():  # past the deadline, when nobody waits any more
                        self._answer(engine, [job])
                return
            fail(batch[0], error)
            return
        engine_ms = 1e3 * (perf_counter() - start)
        for job, generation in zip(batch, generations, strict=True):
            deliver(job, generation, engine_ms)
