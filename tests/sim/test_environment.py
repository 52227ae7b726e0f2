"""The environment: gymnasium's contract, seeds, pictures that show what is there, bad input."""

import ctypes.util
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from vlm_local.cli import build_parser
from vlm_local.errors import ConfigError
from vlm_local.sim.environment import SimEnv
from vlm_local.sim.levels import LEVELS, find_level
from vlm_local.sim.rendering import Camera
from vlm_local.sim.scene import ARM_MATERIAL, CAMERA
from vlm_local.sim.tasks import MEMORY_TASKS, TASKS, find_task
from vlm_local.sim.world import World

STAY = np.array([0.0, 0, 0, 0, 0, 0, 1])


@pytest.mark.filterwarnings("ignore::UserWarning")  # "infinite bounds" of proprio
def test_gymnasium_accepts_it():
    env = SimEnv("reach", image_size=32)
    check_env(env, skip_render_check=True)
    env.close()


@pytest.mark.parametrize("task", ["reach", "open_drawer", "eggplant_in_basket"])
def test_a_seed_is_an_episode(task):
    env = SimEnv(task, "hard", image_size=64)
    first, _ = env.reset(seed=7)
    moved, *_ = env.step(STAY + 0.01)
    env.reset(seed=8)
    env.step(STAY)
    again, _ = env.reset(seed=7)
    moved_again, *_ = env.step(STAY + 0.01)
    env.close()
    for one, other in ((first, again), (moved, moved_again)):
        assert one["instruction"] == other["instruction"]
        assert np.array_equal(one["proprio"], other["proprio"])
        assert np.array_equal(one["image"], other["image"])


@pytest.mark.slow
def test_every_level_draws_another_episode():
    shown = []
    for level in LEVELS:
        env = SimEnv("reach", level, image_size=32)
        shown.append(env.reset(seed=3)[0])
        env.close()
    assert len({(seen["image"].tobytes(), seen["instruction"]) for seen in shown}) == len(LEVELS)
    assert all(seen["image"].std() > 10 for seen in shown)


def find_colour(image: np.ndarray, channel: int) -> tuple[float, float]:
    """Mean (row, column) of the pixels in which this channel is far above the others."""
    values = image.astype(int)
    others = np.delete(values, channel, axis=2).max(axis=2)
    rows, columns = np.nonzero(values[..., channel] > 2 * others + 20)
    assert len(rows) > 20
    return float(rows.mean()), float(columns.mean())


def test_half_of_the_arms_of_one_level_have_another_colour():
    env = SimEnv("reach", image_size=None)
    colours = []
    for name in ("varied", "hard"):
        env.level = find_level(name)
        for seed in range(20):
            env.reset(seed=seed)
            colours.append(tuple(env.world.model.material(ARM_MATERIAL).rgba[:3]))
    black = max(set(colours), key=colours.count)
    assert set(colours[20:]) == {black}  # also after an episode with another
    assert 4 <= len(set(colours[:20])) - 1 == 20 - colours[:20].count(black) <= 16


def test_forward_is_up_and_left_is_left_in_the_picture():
    env = SimEnv("reach", "easy", image_size=128)
    env.reset(seed=0)
    blocks = {colour: f"block{index}" for index, colour in enumerate(env.task.colours)}
    world = env.world
    places = {"red": (0.24, 0.0), "green": (0.38, 0.0), "blue": (0.24, 0.14)}
    for colour, place in places.items():
        world.put(blocks[colour], (*place, 0.02))
    image = env.step(STAY)[0]["image"]
    env.close()
    (red_row, red_column), (green_row, _), (_, blue_column) = (find_colour(image, channel) for channel in range(3))
    assert green_row < red_row - 10
    assert blue_column < red_column - 10


@pytest.mark.parametrize("axis", range(6))
def test_the_tips_go_where_they_are_sent(axis):
    env = SimEnv("reach", "easy", image_size=None)
    env.reset(seed=0)
    before = env.observation.proprio
    step = (0.0125, 0.0125, 0.0125, 0.125, 0.125, 0.125)[axis]
    for _ in range(3):
        env.step(np.eye(7)[axis] * -step + STAY)
    moved = env.observation.proprio - before
    assert moved[axis] == pytest.approx(-3 * step, abs=(0.15 if axis < 3 else 0.4) * step)  # the wrist lags
    others = np.delete(moved[:3], axis) if axis < 3 else moved[:3]
    assert np.abs(others).max() < 0.008


def test_the_gripper_closes_and_opens():
    env = SimEnv("reach", image_size=None)
    env.reset(seed=0)
    openings = [env.step(action)[0]["proprio"][6] for action in [STAY * 0] * 3 + [STAY] * 3]
    assert openings[2] < 0.05 and openings[-1] > 0.95


def test_what_is_out_of_reach_is_not_reached_and_nothing_breaks():
    env = SimEnv("reach", image_size=None)
    env.reset(seed=0)
    for _ in range(60):
        observation, *_ = env.step(np.array([0.05, 0.05, 0.05, 0.3, 0.3, 0.3, 1]))
    assert np.isfinite(observation["proprio"]).all()
    assert np.hypot(*observation["proprio"][:2]) < 0.5


@pytest.mark.parametrize("action", [np.zeros(6), np.full(7, np.nan), np.zeros((7, 1))])
def test_an_action_is_seven_finite_numbers(action):
    env = SimEnv("reach", image_size=None)
    env.reset(seed=0)
    with pytest.raises(ConfigError, match="7 finite numbers"):
        env.step(action)


def test_unknown_names_are_told_what_there_is():
    with pytest.raises(ConfigError, match="reach, open_drawer"):
        SimEnv("juggle")
    with pytest.raises(ConfigError, match="easy, normal, hard"):
        SimEnv("reach", "impossible")


def test_without_opengl_the_debian_package_is_named(monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "glfw")
    env = SimEnv("reach", image_size=32)
    with ThreadPoolExecutor(1) as thread, pytest.raises(ConfigError, match="libegl1"):  # it has no context yet
        thread.submit(env.reset, seed=0).result()


@pytest.mark.slow
@pytest.mark.skipif(ctypes.util.find_library("OSMesa") is None, reason="apt install libosmesa6")
@pytest.mark.parametrize("setting", [{"MUJOCO_GL": "osmesa"}, {"__EGL_VENDOR_LIBRARY_DIRS": "/none"}])  # EGL: no driver
def test_osmesa_draws_what_egl_draws_and_takes_its_place(tmp_path, setting):
    draw = (
        "import sys, numpy; from vlm_local.sim.environment import SimEnv; env = SimEnv('reach', image_size=64); "
        "numpy.save(sys.argv[1], env.reset(seed=3)[0]['image']); import os; print(os.environ['MUJOCO_GL'])"
    )
    environment = {name: text for name, text in os.environ.items() if name not in ("MUJOCO_GL", "PYOPENGL_PLATFORM")}
    command = [sys.executable, "-c", draw, str(tmp_path / "picture.npy")]
    done = subprocess.run(command, env=environment | setting, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "osmesa\n", "")  # no traceback at the exit either
    env = SimEnv("reach", image_size=64)
    picture = env.reset(seed=3)[0]["image"].astype(float)
    env.close()
    assert np.abs(np.load(tmp_path / "picture.npy") - picture).mean() < 1  # 0 where both are Mesa's


def test_cameras_one_after_another_and_at_once_draw_the_same():
    def draw(env):
        return env.reset(seed=3)[0]["image"]

    first, other = SimEnv("push", image_size=64), SimEnv("eggplant_in_sink", image_size=48)
    pictures = [draw(first), draw(other), draw(first), draw(other)]
    first.close()
    other.close()
    again = SimEnv("push", image_size=64)  # in a context that was used before
    np.testing.assert_array_equal([pictures[2], draw(again)], [pictures[0]] * 2)
    np.testing.assert_array_equal(pictures[1], pictures[3])
    again.close()


def test_a_camera_that_is_closed_twice_gives_its_context_once():
    world = World("blocks")
    camera = Camera(world.model, CAMERA, 32)
    camera.close()
    camera.close()
    first, other = SimEnv("push", image_size=64), SimEnv("eggplant_in_sink", image_size=48)
    expected = first.reset(seed=3)[0]["image"]
    other.reset(seed=3)
    np.testing.assert_array_equal(first.reset(seed=3)[0]["image"], expected)
    first.close()
    other.close()


@pytest.mark.parametrize("task", [*TASKS, *MEMORY_TASKS])
def test_unseen_words_are_unseen(task):
    kind = find_task(task)
    assert not set(kind.words) & set(kind.unseen)
    instructions = set()
    for level in ("normal", "words"):
        env = SimEnv(task, level, image_size=None)
        for seed in range(3):
            env.reset(seed=seed)
            assert env.task.instruction != env.task.wrong_instruction
            instructions.add((level, env.task.instruction))
    seen, unseen = ({text for name, text in instructions if name == level} for level in ("normal", "words"))
    assert not seen & unseen


def test_help_names_every_task_and_level():
    parser = build_parser()
    options = next(action for action in parser._actions if action.choices).choices["sim"].format_help()
    assert all(name in options for name in (*TASKS, *MEMORY_TASKS, *LEVELS))
