"""What comes of a user's choices about a policy: files are read, and what contradicts itself is refused."""

from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from functools import cached_property, partial
from typing import Any

import numpy as np

from vlm_local.actions import build_step_table, load_step_table
from vlm_local.answers import Answerer
from vlm_local.checkpoint import Checkpoint
from vlm_local.context import FrameSettings, PromptContext, describe_context
from vlm_local.embodiments import AUTO, BRIDGE, load_embodiment
from vlm_local.engines import Engine
from vlm_local.engines.process import EngineProcess
from vlm_local.engines.scripted import build_constant_engine, build_uniform_engine
from vlm_local.engines.worker import EngineWorker
from vlm_local.errors import ConfigError
from vlm_local.examples import ExampleSet, load_examples
from vlm_local.grammar import Grammar, load_phrase_grammar
from vlm_local.marks import MARKS, MarkedPolicy, Projection
from vlm_local.models import find_checkpoint
from vlm_local.policy import HoldPhrase, Policy, Settings, VLMPolicy
from vlm_local.policy_options import DEFAULTS, PolicyOptions, refuse
from vlm_local.primitives import is_slight, list_phrases, list_slight_phrases
from vlm_local.prompts import Example, Frame, Template, build_prompt, check_history, load_template
from vlm_local.prompts.thoughts import load_thought_plan
from vlm_local.registry import DEFAULT
from vlm_local.thinking import Thinker, ThinkSettings, build_warm_thought
from vlm_local.types import GenerationRequest, Observation, Picture, ThoughtRequest

RANDOM = "random"
# Flag -> another one, without which it changes nothing.
_NEEDS = {
    "example_choice": "examples",
    "frame_every": "frames",
    "frame_choice": "frames",
    "think_every": "think",
    "think_tokens": "think",
}
_OF_PROMPTS = ("prompt", "history", "contrast", "marks", "examples", "frames", "think", *_NEEDS)
_LOADING = ("quantize", "device", "dtype", "decoder")  # flags about a model that is loaded here
_HUNG_S = 60.0  # past the deadline of a request: only then is a slow forward taken for one that never ends


def open_engine(options: PolicyOptions) -> Engine:
    """The engine alone, loaded in the caller's thread, which then owns it. Raises ConfigError and EngineError."""
    return ResolvedOptions(options).load()


class ResolvedOptions:
    """Options resolved against the checkpoint's vlm_local.json and DEFAULTS, with every file read but the weights.

    checkpoint: None for a baseline or a model behind an API.
    """

    def __init__(self, options: PolicyOptions, between_steps: bool = False):
        """between_steps: robots wait for the answers, so thoughts are written while they pause."""
        self._options = options
        self._model = options.model or DEFAULT
        self.checkpoint = self._find_checkpoint()
        self.grammar: Grammar = load_phrase_grammar(self.choose("grammar"))
        embodiment = self.choose("embodiment")
        self._embodiment = load_embodiment(BRIDGE if embodiment == AUTO else embodiment)
        small = next(filter(is_slight, self.grammar.sentences), None)
        prompt = self.choose("prompt") or ("paligemma" if self._is_paligemma else "chat")
        self.template: Template = load_template(prompt, self._embodiment.camera, small is not None)
        self.settings = Settings(**{field.name: self.choose(field.name) for field in fields(Settings)})
        table = load_step_table(options.steps) if options.steps else build_step_table(self._embodiment.steps or {})
        self._table = table if small is None else replace(table, slightly=table.choose(small))
        self._projection = self._find_projection()
        self._examples: ExampleSet | None = None
        self._frames = FrameSettings(*(self.choose(name) for name in ("frames", "frame_every", "frame_choice")))
        self._thinking = self._find_thinking(between_steps)
        self._hold = self.choose("steps_per_phrase")
        if self._hold < 1:
            raise ConfigError(f"--steps-per-phrase must be at least 1, but is {self._hold}")
        if self.choose("max_batch") < 1:
            raise ConfigError(f"--max-batch must be at least 1, but is {self.choose('max_batch')}")
        if self._is_constant and self._model not in self.grammar.sentences:
            raise ConfigError(f"the grammar {self.grammar.name} does not hold {self._model!r}")

    @property
    def metadata(self) -> dict[str, Any]:
        return {
            "model": self._model,
            "grammar": {
                "name": self.grammar.name,
                "sha256": self.grammar.sha256,
                "sentences": len(self.grammar.sentences),
            },
            "prompt": {"name": self.template.name, "sha256": self.template.sha256},
            "embodiment": self.choose("embodiment"),
            "steps": asdict(self._table),
            **asdict(self.settings),
            "marks": self.choose("marks"),
            "steps_per_phrase": self._hold,
            **describe_context(self._examples, self._frames),
            **({} if self._thinking is None else {"think": self._thinking.metadata}),
        }

    def refuse_unused(self) -> None:
        """A flag that would be ignored is an error."""
        if self._is_baseline:
            unused = ("engine", "engine_url", "max_batch", *_OF_PROMPTS, *_LOADING)
            why = f"no model is loaded for {self._model!r}"
        elif self._options.engine == "openai":
            if not self._urls:
                raise ConfigError("--engine openai needs --engine-url URL[,URL...], for example http://127.0.0.1:8001")
            if self.settings.contrast:
                raise ConfigError(
                    "--contrast needs the probabilities of every phrase at a blank picture, of which a server behind "
                    "--engine openai tells only a part; leave it out, or load the model here"
                )
            unused, why = _LOADING, "the server behind --engine openai has loaded the model as it likes"
        else:
            unused, why = ("engine_url",), "the model is loaded here; --engine openai asks a server"
        refuse(self._options, unused, "", f" would change nothing: {why}")
        for flag, other in _NEEDS.items():
            if not self.choose(other):
                refuse(self._options, [flag], "", f" would change nothing without --{other}")
        check_history(self._options.history, self.template)

    def load_examples(self) -> None:
        """Read the data set of --examples. Raises ConfigError where the model cannot be shown several pictures."""
        given = self._options.examples
        if given is not None or self._frames.num:
            self._refuse_one_picture()
        if given is None:
            return
        choice = self.choose("example_choice")
        if choice == "nearest" and self._options.engine == "openai":
            raise ConfigError("--example-choice nearest needs the model's image features, which no server gives")
        self._examples = load_examples(given, choice, self.grammar.sentences, self.choose("embodiment"))

    def _refuse_one_picture(self) -> None:
        own = self._own_template
        if self._is_paligemma or (own is not None and own.example is own.frame is None):
            raise ConfigError(f"--examples and --frames show several pictures, but {self._model} reads only one")
        for flag, block, wanted in (
            ("examples", "example", self._options.examples),
            ("frames", "frame", self._frames.num),
        ):
            if wanted and getattr(self.template, block) is None:
                raise ConfigError(f"--{flag}: the prompt {self.template.name} has no block [{block}] to show them in")

    def load(self) -> Engine:
        if self._model == RANDOM:
            return build_uniform_engine()
        if self._is_constant:
            return build_constant_engine(self._model)
        if self._options.engine == "openai":
            return self._connect()
        from vlm_local.engines.hf import open_hf_engine

        assert self.checkpoint is not None  # found for every model that is neither a baseline nor behind an API
        chosen = {name: self.choose(name) for name in ("quantize", "device", "dtype", "decoder", "max_batch")}
        return open_hf_engine(self.checkpoint, **chosen)

    def load_apart(self) -> Engine:
        """As `load`, but a model is loaded in another process, which resolves the same options again."""
        if self.checkpoint is None:
            return self.load()
        deadline_ms = self._options.deadline_ms
        load = partial(open_engine, self._options)
        if deadline_ms is None:
            return EngineProcess(load)
        return EngineProcess(load, deadline_ms / 1e3 + _HUNG_S, stopped_after_s=deadline_ms / 1e3)

    def build_policy(
        self, robot: str | None, worker: EngineWorker, metadata: Mapping[str, Any], tell_all: bool
    ) -> Policy:
        best = "fast" if self._options.engine == "openai" else "exact"  # servers give bounds only
        thinker = None
        if self._thinking is not None:
            thinker = Thinker(self._thinking, worker.think, self.template, self.grammar.sentences)
        policy = VLMPolicy(
            worker.generate,
            self.grammar,
            self.template,
            replace(self.settings, posterior=best) if tell_all else self.settings,
            self._table,
            robot,
            worker.forget,
            metadata,
            PromptContext(self._examples, self._frames),
            thinker,
        )
        if self._projection is not None:
            policy = MarkedPolicy(policy, self.choose("marks"), self._projection)
        return policy if self._hold == 1 else HoldPhrase(policy, self._hold)

    def build_answerer(self, worker: EngineWorker) -> Answerer | None:
        if self._is_baseline:
            return None
        return Answerer(worker.generate, load_template("paligemma_answer" if self._is_paligemma else "answer"))

    def build_warm_up(self) -> list[GenerationRequest]:
        """A request as the robot will send it, twice: the second finds what the first has kept."""
        image = np.zeros((256, 256, 3), np.uint8)
        observation = Observation(image, "warm up", np.zeros(7))
        num_examples = self._examples.num if self._examples else 0
        examples = [Example(Picture(image), "warm up", np.zeros(7), "move forward left")] * num_examples
        frames = [Frame(0, Picture(image))] * self._frames.num
        request = GenerationRequest(
            image,
            build_prompt(self.template, observation, (), examples, frames),
            self.grammar.sentences,
            episode="warm-up",
            decide=self.settings.decide,
            temperature=self.settings.temperature,
            uniform=0.5 if self.settings.decide == "sample" else None,
            posterior=self.settings.posterior,
            contrast=self.settings.contrast,
            blank=build_prompt(self.template, replace(observation, proprio=None)),
        )
        return [request, request]

    def build_warm_thought(self) -> tuple[ThoughtRequest, GenerationRequest] | None:
        """A short thought, and what reads it; None where the model shall not think."""
        if self._thinking is None:
            return None
        return build_warm_thought(self._thinking, self.template, self.build_warm_up()[0])

    def _find_thinking(self, between_steps: bool) -> ThinkSettings | None:
        """Raises ConfigError where the model cannot write, or its prompt does not show what was written."""
        name = self.choose("think")
        if name is None:
            return None
        settings = ThinkSettings(
            load_thought_plan(name), self.choose("think_every"), self.choose("think_tokens"), between_steps
        )
        own = self._own_template
        if self._is_paligemma or (own is not None and own.reasoning is None):
            raise ConfigError(f"--think has the model write free text, but {self._model} only gives short answers")
        if self.checkpoint is not None and self.choose("decoder") == "outlines":
            raise ConfigError("--think needs what --decoder trie keeps between steps; leave --decoder out")
        if self.template.reasoning is None:
            raise ConfigError(f"--think: the prompt {self.template.name} has no block [reasoning] to show it in")
        return settings

    def _find_projection(self) -> Projection | None:
        """What marks are drawn with, None without them."""
        kind, name = self.choose("marks"), self._embodiment.name
        if kind is None:
            return None
        if kind not in MARKS:
            raise ConfigError(f"--marks must be one of {', '.join(MARKS)}, not {kind!r}")
        if self._embodiment.camera_matrix is None:
            raise ConfigError(
                f"--marks needs to know where the camera stands, and the embodiment {name} has no camera_matrix; name "
                f"one that has with --embodiment, or add it to a file of your own (docs/zeroshot.md, Marks)"
            )
        return Projection.from_camera_matrix(self._embodiment.camera_matrix)

    @property
    def _is_constant(self) -> bool:
        return self._model in list_phrases() + list_slight_phrases()

    @property
    def _is_baseline(self) -> bool:
        """No model answers."""
        return self._model == RANDOM or self._is_constant

    @cached_property
    def _own_template(self) -> Template | None:
        """The prompt that the checkpoint's vlm_local.json names, as it was trained with; None where it names none."""
        name = self.checkpoint.sidecar.get("prompt") if self.checkpoint else None
        return load_template(name) if name else None

    @property
    def _is_paligemma(self) -> bool:
        return self.checkpoint is not None and self.checkpoint.family.startswith("paligemma")

    def _find_checkpoint(self) -> Checkpoint | None:
        if self._options.engine not in ("local", "openai"):
            raise ConfigError(f"--engine must be local or openai, not {self._options.engine!r}")
        if self._options.engine == "openai" or self._is_baseline:
            return None
        return find_checkpoint(self._model, self._options.offline)

    def choose(self, name: str) -> Any:
        """Flag, else the checkpoint's vlm_local.json, else the default."""
        if name == "decide" and self._model == RANDOM:
            return "sample"
        given = getattr(self._options, name)
        if given is not None:
            return given
        told = self.checkpoint.sidecar.get(name) if self.checkpoint else None
        return DEFAULTS.get(name) if told is None else told

    @property
    def _urls(self) -> list[str]:
        return [url.strip() for url in (self._options.engine_url or "").split(",") if url.strip()]

    def _connect(self) -> Engine:
        from vlm_local.engines.openai import OpenAIEngine

        options = self._options
        # Earlier than the worker's, or a server that is late would pass for a model that is stuck.
        deadline_ms = None if options.deadline_ms is None else 0.9 * options.deadline_ms
        engine = OpenAIEngine(self._urls, self._model, deadline_ms, self.choose("max_batch"))
        engine.check(self.settings.decide, self.settings.posterior)
        return engine
