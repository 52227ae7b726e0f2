"""What a prompt shows before the present picture: past frames, and examples that are never of the same episode."""

import re
from dataclasses import replace

import numpy as np
import pytest

from tests import recordings
from tests.tiny_models import tiny_checkpoint
from vlm_local.assembly import open_policies
from vlm_local.context import FrameSettings, PromptContext
from vlm_local.data import Selection, open_episodes
from vlm_local.embodiments import load_embodiment
from vlm_local.engines.scripted import build_constant_engine
from vlm_local.errors import ConfigError
from vlm_local.examples import load_examples, write_example_file
from vlm_local.grammar import load_phrase_grammar
from vlm_local.lab.offline.answers import PolicyAnswerer
from vlm_local.marks import MarkedPolicy, Projection
from vlm_local.policy import Settings, VLMPolicy
from vlm_local.policy_options import PolicyOptions
from vlm_local.prompts import load_template
from vlm_local.types import Observation

GRAMMAR = load_phrase_grammar()
NUM_STEPS, NUM_EPISODES = 12, 4
SEEN = Observation(np.zeros((8, 8, 3), np.uint8), "lift the cup")


@pytest.fixture(scope="module")
def data_set(tmp_path_factory):
    folder = tmp_path_factory.mktemp("examples") / "data"
    records = [
        recordings.make_rlds_record(
            recordings.make_states(NUM_STEPS, seed),
            images=list(map(recordings.encode_image, recordings.make_images(NUM_STEPS, seed))),
        )
        for seed in range(NUM_EPISODES)
    ]
    recordings.write_rlds(folder, records)
    return str(folder)


class Listener:
    """A robot's policy whose engine says "stop" and remembers what it was asked. Its features are the mean colour."""

    def __init__(self, context: PromptContext):
        self.requests, self._view = [], np.zeros((8, 8, 3), np.uint8)
        self._engine = build_constant_engine("stop")
        self.policy = VLMPolicy(self._generate, GRAMMAR, load_template("chat"), Settings(), context=context)

    def _generate(self, request):
        [generation] = self._engine.generate([request])
        if request.wants_features:
            return replace(generation, features=request.image.mean(axis=(0, 1)).astype(np.float32))
        self.requests.append(request)
        return generation

    def see(self, step: int):
        self._view[:] = step  # as a camera's driver may: every picture in the same memory
        return self.policy.act(Observation(self._view, "lift the cup", None, step))


def list_frames(request) -> list[int]:
    return [int(picture.pixels[0, 0, 0]) for picture in request.prompt.pictures]


@pytest.mark.parametrize(
    ("choice", "at_7", "at_8"), [("first", [0, 2], [0, 2]), ("last", [4, 6], [4, 6]), ("alternate", [2, 6], [2, 6])]
)
def test_past_frames_are_shown_oldest_first_and_end_with_their_episode(choice, at_7, at_8):
    robot = Listener(PromptContext(frames=FrameSettings(2, 2, choice)))
    told = [robot.see(step).extra["frames"] for step in range(10)]
    assert told[:4] == [[], [0], [0], [0, 2] if choice != "alternate" else [2]]
    assert told[7] == at_7 and told[8] == at_8 and told == [list_frames(request) for request in robot.requests]
    text = "".join(part for part in robot.requests[7].prompt.earlier if isinstance(part, str))
    assert f"step {at_7[0]}" in text and "The view now" in text
    robot.policy.reset(1)
    assert [robot.see(step).extra["frames"] for step in range(10)] == told


def test_without_examples_and_frames_a_prompt_has_one_picture_and_its_record_says_nothing():
    robot = Listener(PromptContext())
    assert not {"frames", "examples"} & set(robot.see(0).extra)
    assert robot.requests[0].prompt.earlier == ()


def test_examples_are_balanced_over_phrases_and_say_what_was_right(data_set):
    examples = load_examples(f"{data_set}:5", "fixed", GRAMMAR.sentences)
    robot = Listener(PromptContext(examples))
    told = robot.see(0).extra["examples"]
    assert len(told) == 5 and [f"{each['source']}: {each['phrase']}" for each in examples.metadata["shown"]] == told
    phrases = [each.partition(": ")[2] for each in told]
    assert len(set(phrases)) == 5
    earlier = robot.requests[0].prompt.earlier
    assert len(robot.requests[0].prompt.pictures) == 5
    assert all(f"The movement that was right: {phrase}" in "".join(map(str, earlier)) for phrase in phrases)


@pytest.fixture
def lines(tmp_path):
    """Two episodes that move forward, one that moves backward, and one whose pictures are of no one camera.

    The last three steps of each have no full window.
    """

    def make(speed, num_steps, instruction, seed, last_side=32):
        states = np.zeros((num_steps, 7), np.float32)
        states[:, 0] = 0.3 + speed * np.arange(num_steps)
        images = [*recordings.make_images(num_steps, seed)[:-1], recordings.make_images(1, seed, last_side)[0]]
        return recordings.make_rlds_record(states, instruction, list(map(recordings.encode_image, images)))

    slowly = "close the drawer slowly with your left hand"
    records = [
        make(0.02, 8, ["", *[slowly] * 7], 0),
        make(0.02, 8, "close the drawer", 1),
        make(-0.02, 6, ["open it", *[slowly] * 5], 2),
        make(0.02, 8, "close the drawer", 3, last_side=64),
    ]
    recordings.write_rlds(tmp_path / "lines", records)
    return str(tmp_path / "lines")


def list_steps(examples):
    return [tuple(map(int, re.findall(r"\d+", example.source))) for example in examples]


def test_examples_are_what_their_steps_were_and_come_from_all_episodes(lines):
    episodes = list(open_episodes(lines))
    shown = load_examples(f"{lines}:64", "fixed", GRAMMAR.sentences).choose(SEEN, None)
    steps = list_steps(shown)
    assert sorted(steps) == [(0, 1), (0, 2), (0, 3), (0, 4), *((1, step) for step in range(5)), (2, 0), (2, 1), (2, 2)]
    assert [index for index, _ in steps] == [0, 2, 1, 2, 0, 2, 1, 0, 1, 0, 1, 1]
    for (index, step), example in zip(steps, shown, strict=True):
        assert example.phrase == ("move backward" if index == 2 else "move forward")
        assert example.instruction == episodes[index].instruction_at(step)
        assert (example.proprio == episodes[index].states[step]).all()
        assert (example.picture.pixels == episodes[index].load_image(step)).all()


def test_examples_are_of_the_episodes_and_phrases_that_were_given(lines, tmp_path):
    write_example_file(tmp_path / "few.json", lines, Selection(), [1, 2])
    for phrases, steps in (
        ({"move backward", "move forward"}, [(1, 0), (2, 0)]),
        ({"move backward"}, [(2, 0), (2, 1)]),
    ):
        examples = load_examples(f"{tmp_path / 'few.json'}:2", "fixed", phrases)
        assert list_steps(examples.choose(SEEN, None)) == steps
    with pytest.raises(ConfigError, match="a label that the grammar allows"):
        load_examples(lines, "fixed", {"move up"})


def test_nearest_shows_the_episode_with_the_same_task(lines):
    robot = Listener(PromptContext(load_examples(f"{lines}:1", "nearest", GRAMMAR.sentences)))
    observation = Observation(np.full((8, 8, 3), 99, np.uint8), "CLOSE THE DRAWER", None, 0)
    assert robot.policy.act(observation).extra["examples"][0].startswith("episode 1,")


@pytest.mark.parametrize(("choice", "marks"), [("fixed", None), ("nearest", None), ("fixed", "gripper")])
def test_an_episode_that_is_scored_never_gives_an_example(data_set, choice, marks):
    """Also where another episode of the same data set begins, at steps behind the first, and in marked pictures."""
    robot = Listener(PromptContext(load_examples(f"{data_set}:6", choice, GRAMMAR.sentences)))
    if marks:
        projection = Projection.from_camera_matrix(load_embodiment("simulator").camera_matrix)
        robot.policy = MarkedPolicy(robot.policy, marks, projection)
    answerer = PolicyAnswerer(robot.policy, seed=0)
    shown_from = set()
    for episode in open_episodes(data_set):
        robot.requests.clear()
        list(answerer.answer(episode, ["stop"] * len(episode), range(3, len(episode)), {}))
        own = {episode.load_image(step).tobytes() for step in range(len(episode))}
        for request in robot.requests:
            pictures = {picture.pixels.tobytes() for picture in request.prompt.pictures}
            assert len(request.prompt.pictures) == 6 and not pictures & own
            shown_from |= pictures
    assert len(shown_from) > 6  # what is left out for one is shown to another


def test_nearest_shows_the_episodes_that_look_alike(data_set):
    first = list(open_episodes(data_set))[-1].load_image(0)
    robot = Listener(PromptContext(load_examples(f"{data_set}:1", "nearest", GRAMMAR.sentences)))
    near = first.copy()
    near[0, 0] += 1  # another picture, so that its episode is not left out
    assert robot.policy.act(Observation(near, "lift", None, 0)).extra["examples"][0].startswith("episode 3,")


def test_a_model_is_shown_examples_and_frames_and_says_so(data_set):
    options = PolicyOptions(
        model=str(tiny_checkpoint("qwen3-vl")), examples=f"{data_set}:2", example_choice="nearest", frames=1
    )
    policies = open_policies(options)
    try:
        policy = policies.build("robot")
        episode = next(open_episodes(data_set))
        for step in range(3):
            decision = policy.act(Observation(episode.load_image(step), "lift the cup", None, step))
    finally:
        policies.close()
    assert len(decision.extra["examples"]) == 2 and decision.extra["frames"] == [1]
    assert not any(each.startswith("episode 0,") for each in decision.extra["examples"])
    assert decision.extra["reused_tokens"] > 0
    about = policies.metadata
    assert about["examples"] == {"data": data_set, "num": 2, "choice": "nearest", "episodes": NUM_EPISODES}
    assert about["frames"] == {"num": 1, "every": 1, "choice": "last"}


@pytest.mark.long  # tests/engines/test_process.py has pictures cross the pipe by default
def test_an_engine_in_its_own_process_is_shown_the_same(data_set):
    options = PolicyOptions(model=str(tiny_checkpoint("qwen2-vl")), examples=f"{data_set}:2", frames=2, dtype="float32")

    def play(apart: bool) -> list[float]:
        policies = open_policies(options, apart=apart)
        try:
            policy, episode = policies.build("robot"), next(open_episodes(data_set))
            return [policy.act(Observation(episode.load_image(n), "lift", None, n)).probability for n in range(4)]
        finally:
            policies.close()

    np.testing.assert_allclose(play(True), play(False), atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "paligemma", "frames": 1}, "reads only one"),
        ({"model": "paligemma2", "examples": "data"}, "reads only one"),
        ({"model": "tiny", "frames": 2}, "reads only one"),
        ({"model": "random", "frames": 2}, "--frames would change nothing"),
        ({"model": "qwen2-vl", "frame_every": 2}, "without --frames"),
        ({"model": "qwen2-vl", "frames": -1}, "from 0 to 32"),
        ({"model": "qwen2-vl", "frames": 1, "frame_every": 0}, "at least 1"),
        ({"model": "qwen2-vl", "example_choice": "nearest"}, "without --examples"),
        ({"model": "qwen2-vl", "prompt": "answer", "frames": 1}, r"no block \[frame\]"),
        ({"model": "qwen2-vl", "examples": "data:0"}, "from 1 to 64"),
        (
            {
                "model": "any",
                "engine": "openai",
                "engine_url": "http://a",
                "examples": "data",
                "example_choice": "nearest",
            },
            "image features",
        ),
    ],
)
def test_what_cannot_be_shown_is_refused_at_start(options, message):
    model = options["model"]
    folder = model if model in ("tiny", "random", "any") else str(tiny_checkpoint(model))
    with pytest.raises(ConfigError, match=message):
        open_policies(PolicyOptions(**{**options, "model": folder}))
