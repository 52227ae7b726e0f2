"""A model behind one or several OpenAI-compatible servers (vLLM, SGLang, llama.cpp, hosted APIs).

The servers constrain the answer, each in its own dialect; every answer is checked here again.
"""

import asyncio
import threading
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from time import perf_counter
from typing import Any

from vlm_local.engines import ControlTokenFilter, Outcome, as_engine_error
from vlm_local.engines.chat_api import Completion, build_messages, encode_image
from vlm_local.engines.gaps import StepGaps, write_thought
from vlm_local.engines.masses import (
    Mass,
    Spelling,
    build_spelling,
    find_likeliest,
    list_probabilities,
    locate,
    split,
    weigh,
)
from vlm_local.engines.pool import ServerPool
from vlm_local.engines.remote import Reply, Server
from vlm_local.errors import ConfigError, EngineError, RequestError
from vlm_local.types import Generation, GenerationRequest, Prompt, Thought, ThoughtRequest

_DEADLINE_S = 10.0  # a robot that waits longer than this for a step has a fault, not an answer
_COMPILE_S = 60.0  # a server compiles a list of sentences when it first meets it
_MAX_GRAMMARS = 8
_MAX_QUESTIONS = 32

_PROBABILITY = (
    "product of the server's token probabilities after its constraint; other spellings of a phrase in tokens "
    "count for it only where they can become nothing else, so these are lower bounds"
)
_DECIDE = (
    "greedy by the server; map and sample (inverse CDF at the episode's seed) over the server's distribution after "
    "its constraint, narrowed by further questions until the phrase is settled"
)


class OpenAIEngine:
    """Asks a model at other machines; every request is sent alone, and none waits for another.

    Its event loop runs in a thread of its own; any thread may call `submit`.
    Failures are RemoteErrors, counted by kind in `counters`; see ServerPool for several servers.
    """

    def __init__(
        self,
        urls: Sequence[str],
        model: str,
        deadline_ms: float | None = None,
        max_batch: int = 16,
        dialect: str | None = None,
    ):
        """urls: base URLs, at least one. model: its name at the servers. deadline_ms: of one step, 10 s at most.

        max_batch: how many requests `generate` takes. dialect: the only one to try (see chat_api.py).
        Raises ConfigError where a server cannot be used, RemoteError where none can be reached.
        """
        self.max_batch = max_batch
        self._model = model
        self._dialect = dialect
        self._deadline_s = _DEADLINE_S if deadline_ms is None else min(deadline_ms / 1e3, _DEADLINE_S)
        self._grammars: dict[tuple[str, ...], asyncio.Task] = {}  # robots' lists, and their introduction
        self._filter_tokens = ControlTokenFilter(None)
        self._gaps = StepGaps()
        self._pool = ServerPool([Server(url, model) for url in urls], self._connect)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="openai-engine", daemon=True)
        self._thread.start()
        try:
            self._call(self._pool.open())
        except BaseException:
            self.close()
            raise

    @property
    def metadata(self) -> Mapping[str, Any]:
        """counters: requests, retries, revived, and failures by kind (see RemoteError)."""
        pool = self._pool
        gives_probabilities = all(server.constrained for server in pool.up)
        lacks = next((server.lacks_for_draws for server in pool.up if server.lacks_for_draws), None)
        return {
            "model": self._model,
            "engine": "openai",
            "trained": None,
            "servers": [
                {"url": server.url, "up": server not in pool.down, "dialect": server.dialect} for server in pool.servers
            ],
            "about_probability": _PROBABILITY if gives_probabilities else "not given by the server",
            "about_decide": f"greedy only: a server {lacks}" if lacks else _DECIDE,
            "counters": dict(pool.counters),
            "versions": {"openai": version("openai")},
        }

    @property
    def is_down(self) -> bool:
        """Whether none of the servers can be connected. Any thread may ask."""
        return self._pool.is_down

    def check(self, decide: str, posterior: str) -> None:
        """Raises ConfigError for settings that these servers cannot honour."""
        if posterior == "exact":
            raise ConfigError("--posterior exact needs every phrase's probability; servers give bounds, so use fast")
        for server in self._pool.up:
            if decide != "greedy" and server.lacks_for_draws:
                raise ConfigError(
                    f"--decide {decide} cannot be had here: {server.url} {server.lacks_for_draws}; use --decide greedy"
                )

    def generate(self, requests: Sequence[GenerationRequest]) -> list[Outcome]:
        """Answers in order; where one failed, its error stands in its place and spoils no other's."""
        return self._call(self._generate_all(requests))

    def submit(self, request: GenerationRequest) -> "Future[Outcome]":
        """Any thread may call it: a slow server or question delays no other request."""
        return asyncio.run_coroutine_threadsafe(self._generate_one(request), self._loop)

    def submit_thought(self, request: ThoughtRequest) -> "Future[Thought]":
        """Field by field, while no robot's request is under way; one that comes ends the question, not the thought."""
        return asyncio.run_coroutine_threadsafe(self._write(request), self._loop)

    def forget(self, episode: str) -> None:
        """Nothing is kept here; the servers' caches look after themselves."""

    def close(self) -> None:
        if self._loop.is_closed():
            return
        self._call(self._close_all())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _call(self, coroutine: Coroutine) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    # Everything below runs in the event loop's thread.

    async def _close_all(self) -> None:
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        closing = [server.close() for server in self._pool.servers]
        await asyncio.gather(*tasks, *closing, return_exceptions=True)

    async def _connect(self, server: Server) -> None:
        """A server that comes back may be another version: probe again, and have it compile again."""
        await server.connect(self._dialect)
        for sentences in list(self._grammars)[-2:]:
            await server.warm_up(sentences, _COMPILE_S)

    async def _introduce(self, sentences: tuple[str, ...]) -> None:
        """Have all servers compile a robots' list before a step's deadline begins.

        The first has time, for it comes before any robot. A later one goes on compiling when the
        robot's wait is over. Questions have no introduction: their own deadline pays for it.
        """
        limit_s = self._deadline_s if self._grammars else _COMPILE_S
        if sentences not in self._grammars:
            if len(self._grammars) == _MAX_GRAMMARS:
                self._grammars.pop(next(iter(self._grammars))).cancel()
            self._grammars[sentences] = asyncio.create_task(self._warm_up_all(sentences))
        await asyncio.wait({self._grammars[sentences]}, timeout=limit_s)

    async def _warm_up_all(self, sentences: tuple[str, ...]) -> None:
        warming = [server.warm_up(sentences, _COMPILE_S) for server in self._pool.up]
        await asyncio.gather(*warming, return_exceptions=True)  # what fails here fails again in the step

    async def _generate_all(self, requests: Sequence[GenerationRequest]) -> list[Outcome]:
        return await asyncio.gather(*map(self._generate_one, requests))

    def _make_plain(self, request: GenerationRequest) -> GenerationRequest:
        """Raises RequestError for words that would steer the model."""
        self._filter_tokens.check_sentences(request.sentences)
        return replace(request, prompt=self._make_prompt_plain(request.prompt))

    def _make_prompt_plain(self, prompt: Prompt) -> Prompt:
        earlier = [self._filter_tokens(part) if isinstance(part, str) else part for part in prompt.earlier]
        before, after = self._filter_tokens(prompt.before), self._filter_tokens(prompt.after)
        return replace(prompt, before=before, after=after, earlier=tuple(earlier))

    async def _generate_one(self, request: GenerationRequest) -> Outcome:
        robot = None if request.episode is None else request.episode.rpartition("/")[0]
        try:
            with as_engine_error("asking the server failed"):
                job = partial(self._answer, request=self._make_plain(request))
                plainer = partial(job, plain=True) if request.decide == "greedy" else None
                if robot is None:
                    return await self._pool.run(robot, job, self._deadline_s, plainer)
                with self._gaps.closed():
                    await self._introduce(request.sentences)
                    return await self._pool.run(robot, job, self._deadline_s, plainer)
        except (EngineError, RequestError) as error:
            return error

    async def _write(self, request: ThoughtRequest) -> Thought:
        prompt, image_url = self._make_prompt_plain(request.prompt), encode_image(request.image)

        async def ask(words: str, max_tokens: int) -> Completion:
            """What follows `words`, in a gap between steps unless someone waits for it."""
            messages = build_messages(replace(prompt, after=f"{prompt.after}\n{words}"), image_url)

            async def job(server: Server) -> Completion:
                return await server.write(messages, max_tokens, self._deadline_s)

            return await self._gaps.run(partial(self._pool.run, None, job, self._deadline_s), request.is_awaited)

        return await write_thought(request, ask, self._filter_tokens)

    async def _answer(self, server: Server, request: GenerationRequest, plain: bool = False) -> Generation:
        start = perf_counter()
        messages = build_messages(request.prompt, encode_image(request.image))
        encoded = perf_counter()
        reply = await server.ask(messages, request.sentences, self._deadline_s, plain)
        sentence, num_questions = reply.sentence, 1
        if request.decide != "greedy":
            sentence, num_questions = await self._settle(server, messages, request, reply)
        timings = {"encode": 1e3 * (encoded - start), "remote": 1e3 * (perf_counter() - encoded)}
        probabilities = missing = None
        masses = _weigh(server, request.sentences, reply)
        if masses:
            probabilities = list_probabilities(_spell(server, request.sentences), masses)
            missing = max(0.0, 1.0 - float(probabilities.sum()))
        return Generation(sentence, probabilities, missing, timings, {"questions": num_questions})

    async def _settle(
        self, server: Server, messages: list, request: GenerationRequest, reply: Reply
    ) -> tuple[str, int]:
        """Ask again about ever narrower sets of sentences until the draw, or the likeliest, is settled."""
        sentences = request.sentences
        temperature = request.temperature if request.decide == "sample" else 1.0
        spelling = _spell(server, sentences)
        masses = _weigh(server, sentences, reply, temperature)
        for num_questions in range(1, _MAX_QUESTIONS):
            if not masses:
                raise EngineError(f"{server.url} gave no usable log-probabilities; only --decide greedy does without")
            if request.decide == "sample":
                assert request.uniform is not None  # every request that samples brings its draw
                found = locate(spelling, masses, request.uniform)
            else:
                found = find_likeliest(spelling, masses)
            if isinstance(found, int):
                return sentences[found], num_questions
            narrower = [sentences[index] for index in sorted(spelling.order[found.first : found.last])]
            reply = await server.ask(messages, narrower, self._deadline_s)
            parts = _weigh(server, narrower, reply, temperature)
            masses = split(masses, found, parts)
        raise EngineError(f"{_MAX_QUESTIONS} questions to {server.url} did not settle the answer")


def _spell(server: Server, sentences: Sequence[str]) -> Spelling:
    return build_spelling(tuple(map(server.spell, sentences)))


def _weigh(server: Server, sentences: Sequence[str], reply: Reply, temperature: float = 1.0) -> list[Mass]:
    return weigh(_spell(server, sentences), server.spell(reply.sentence).encode(), reply.positions, temperature)
