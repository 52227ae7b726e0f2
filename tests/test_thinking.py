"""Reasons first, as a policy has them: which reasoning a step's prompt shows, what its record says, what is refused."""

import json
import threading
from concurrent.futures import Future

import numpy as np
import pytest

from tests.tiny_models import tiny_checkpoint
from vlm_local.assembly import open_policies
from vlm_local.cli import main
from vlm_local.engines.scripted import build_constant_engine
from vlm_local.errors import ConfigError, EngineError
from vlm_local.grammar import load_phrase_grammar
from vlm_local.policy import Settings, VLMPolicy
from vlm_local.policy_options import PolicyOptions
from vlm_local.prompts import load_template
from vlm_local.prompts.thoughts import load_thought_plan
from vlm_local.thinking import Thinker, ThinkSettings
from vlm_local.types import Observation, Thought

GRAMMAR, CHAT = load_phrase_grammar(), load_template("chat")


class Robot:
    """A robot's policy whose engine says "stop"; its thoughts are written when the test says so.

    written: what is written a moment after each thought begins, for a robot that does not pause.
    """

    def __init__(self, every: int = 3, written: Thought | None = None):
        self.asked, self.thoughts, self._written = [], [], written
        self._engine = build_constant_engine("stop")
        settings = ThinkSettings(load_thought_plan("ecot"), every, between_steps=written is None)
        thinker = Thinker(settings, self._think, CHAT, GRAMMAR.sentences)
        self.policy = VLMPolicy(self._generate, GRAMMAR, CHAT, Settings(), thinker=thinker)

    def _generate(self, request):
        self.asked.append(request)
        return self._engine.generate([request])[0]

    def _think(self, request, build_next):
        self.thoughts.append((request, build_next, Future()))
        if self._written is not None:
            threading.Timer(0.02, self.thoughts[-1][2].set_result, (self._written,)).start()
        return self.thoughts[-1][2]

    def step(self, number: int):
        return self.policy.act(Observation(np.full((8, 8, 3), number, np.uint8), "lift the cup", None, number))

    def shown(self, place: int = -1) -> str:
        """Text before the picture of a step that was asked."""
        return "\n".join(self.asked[place].prompt.earlier)


def test_a_step_shows_the_newest_reasoning_that_is_written_and_its_record_says_how_old_it_is():
    robot = Robot(every=3)
    assert robot.step(0).extra["reasoning"] is None and robot.shown() == ""
    request, build_next, future = robot.thoughts[0]
    assert (
        "TASK" in request.prompt.after
        and request.fields == load_thought_plan("ecot").fields
        and request.max_tokens == 200
    )
    robot.step(1)
    first = Thought("TASK: lift <b>it</b>", 7, 12.5)
    assert build_next(first).prompt.before == robot.asked[0].prompt.before
    assert build_next(first).episode == request.episode == robot.asked[0].episode
    future.set_result(first)
    told = robot.step(2).extra
    assert "step 0 of this episode" in robot.shown() and first.text in robot.shown()
    assert build_next(first).prompt.earlier == robot.asked[-1].prompt.earlier  # what was read ahead is what is asked
    names = ("reasoning", "reasoning_step", "reasoning_age", "reasoning_tokens", "reasoning_ms")
    assert [told[name] for name in names] == [first.text, 0, 2, 7, 12.5]
    assert len(robot.thoughts) == 1
    robot.step(3)
    robot.step(4)
    assert len(robot.thoughts) == 2 and robot.thoughts[1][0].image[0, 0, 0] == 3
    assert robot.step(5).extra["reasoning_step"] == 0  # until the second is written
    robot.thoughts[1][2].set_result(Thought("TASK: go", 2))
    told = robot.step(6).extra
    assert (told["reasoning_step"], told["reasoning_age"]) == (3, 3) and "TASK: go" in robot.shown()


def test_reasoning_belongs_to_its_episode():
    robot = Robot()
    robot.step(0)
    robot.thoughts[0][2].set_result(Thought("TASK: lift", 2))
    robot.step(1)
    robot.step(3)
    robot.policy.reset(1)
    assert robot.thoughts[1][2].cancelled()
    assert robot.step(0).extra["reasoning"] is None and robot.shown() == ""
    assert robot.thoughts[2][0].episode == "robot/2" != robot.thoughts[1][0].episode


def test_a_thought_that_failed_or_is_never_written_costs_no_step_anything():
    robot = Robot(every=2)
    robot.step(0)
    robot.thoughts[0][2].set_exception(EngineError("out of memory"))
    assert robot.step(1).extra["reasoning"] is None
    for number in range(2, 23):
        robot.step(number)
    assert not robot.thoughts[1][2].cancelled()
    robot.step(23)
    assert robot.thoughts[1][2].cancelled() and len(robot.thoughts) == 3  # its picture had become too old
    robot.thoughts[2][2].set_result(Thought("", 0))
    assert robot.step(25).extra["reasoning"] is None
    robot.thoughts[3][2].cancel()  # as by an engine that ends
    assert robot.step(27).extra["reasoning"] is None and len(robot.thoughts) == 5


def test_a_robot_that_does_not_pause_waits_for_its_thoughts():
    robot = Robot(every=2, written=Thought("TASK: lift", 2))
    assert [robot.step(number).extra.get("reasoning_age") for number in range(4)] == [None, 1, 2, 1]
    assert [request.is_awaited for request, *_ in robot.thoughts] == [True, True]
    robot.policy.reset(1)
    assert robot.step(0).extra["reasoning"] is None and len(robot.thoughts) == 2  # nothing of this episode was seen


@pytest.mark.slow
def test_a_model_thinks_before_the_next_step_where_no_robot_waits():
    model = str(tiny_checkpoint("smolvlm2"))
    policies = open_policies(PolicyOptions(model=model, think="ecot", think_every=2, think_tokens=6, frames=1))
    try:
        policy = policies.build("robot")
        image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        told = [policy.act(Observation(image + step, "lift", np.zeros(7), step)).extra for step in range(4)]
    finally:
        policies.close()
    assert [each.get("reasoning_age") for each in told] == [None, 1, 2, 1]
    assert told[1]["reasoning"].startswith("TASK: ") and 0 < told[1]["reasoning_tokens"] <= 6
    about = policies.metadata["think"]
    assert about["name"] == "ecot" and about["every"] == 2 and about["when"] == "before the next step"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "paligemma2", "think": "ecot"}, "only gives short answers"),
        ({"model": "tiny", "think": "ecot"}, "only gives short answers"),
        ({"model": "random", "think": "ecot"}, "--think would change nothing: no model is loaded"),
        ({"model": "stop", "think": "ecot", "think_every": 2}, "--think, --think-every would change nothing"),
        ({"model": "smolvlm2", "think_tokens": 9}, "without --think"),
        ({"model": "smolvlm2", "think": "ecto"}, "did you mean ecot"),
        ({"model": "smolvlm2", "think": "ecot", "decoder": "outlines"}, "leave --decoder out"),
        ({"model": "smolvlm2", "think": "ecot", "prompt": "answer"}, r"no block \[reasoning\]"),
        ({"model": "smolvlm2", "think": "ecot", "think_every": 0}, "at least 1"),
        ({"model": "smolvlm2", "think": "ecot", "think_tokens": 900}, "from 1 to 512"),
        ({"model": "smolvlm2", "think": "ecot", "think_tokens": 0}, "from 1 to 512"),
        ({"model": "http://127.0.0.1:1", "think": "ecot"}, "takes no --think: it decides for itself"),
    ],
)
def test_what_cannot_think_is_refused_in_a_sentence(options, message):
    model = options["model"]
    folder = str(tiny_checkpoint(model)) if model in ("paligemma2", "smolvlm2") else model
    with pytest.raises(ConfigError, match=message):
        open_policies(PolicyOptions(**{**options, "model": folder}))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("TASK: 20", "cannot read"),
        ({"ask": "why?"}, "expected a JSON object"),
        ({"ask": " ", "fields": {"TASK": 9}}, "`ask` is empty"),
        ({"ask": "why, $nobody?", "fields": {"TASK": 9}}, "unknown nobody"),
        ({"ask": "why?", "fields": {}}, "1 to 16 fields"),
        ({"ask": "why?", "fields": {"task:": 9}}, "a field's name"),
        ({"ask": "why?", "fields": {"TASK": 0}}, "1 to 512 tokens"),
        ({"ask": "why?", "fields": {"TASK": True}}, "1 to 512 tokens"),
    ],
)
def test_a_file_that_names_no_fields_is_refused(content, message, tmp_path):
    path = tmp_path / "own.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ConfigError, match=message):
        load_thought_plan(path)


@pytest.mark.slow
def test_the_recording_of_an_episode_holds_its_reasoning(tmp_path):
    command = ["sim", "--policy", str(tiny_checkpoint("smolvlm2")), "--think", "ecot", "--think-every", "2"]
    plan = ["--think-tokens", "6", "--episodes", "1", "--max-steps", "4", "--films", "1", "--out", str(tmp_path)]
    assert main([*command, *plan]) == 0
    [steps] = tmp_path.glob("episodes/*/steps.jsonl")
    lines = [json.loads(line)["extra"] for line in steps.read_text().splitlines()]
    assert lines[0]["reasoning"] is None and lines[1]["reasoning"].startswith("TASK: ")
    assert [line.get("reasoning_step") for line in lines] == [None, 0, 0, 2]


@pytest.mark.long
def test_a_robot_that_keeps_its_rhythm_is_thought_for_between_its_steps(capsys):
    flags = ["--model", str(tiny_checkpoint("smolvlm2")), "--hz", "1.5", "--rounds", "1", "--episode-steps", "12"]
    assert main(["bench", "think", *flags, "--think-tokens", "6", "--think-every", "2"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["thoughts"] > 0 and result["think"]["when"] == "between steps"
    assert result["ms"]["with"]["n"] == result["ms"]["without"]["n"] == 12
