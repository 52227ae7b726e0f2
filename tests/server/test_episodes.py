import tracemalloc

import numpy as np
import pytest

from vlm_local.errors import EngineError, RequestError
from vlm_local.policy import derive_seed
from vlm_local.server.episodes import FORGET_S, EpisodeSettings, Robot, Robots
from vlm_local.types import Decision
from vlm_local.wire import Message

IMAGE = np.zeros((16, 16, 3), np.uint8)


class SpyPolicy:
    def __init__(self):
        self.seeds, self.observations, self.metadata, self.error = [], [], {}, None
        self.action = np.zeros(7)

    def reset(self, seed):
        self.seeds.append(seed)

    def act(self, observation):
        self.observations.append(observation)
        if self.error:
            raise self.error
        return Decision(self.action)


@pytest.fixture
def clock():
    class Clock:
        now = 100.0

        def __call__(self):
            return self.now

    return Clock()


@pytest.fixture
def policy():
    return SpyPolicy()


@pytest.fixture
def robot(policy, clock):
    return Robot("left", policy, EpisodeSettings(seed=9), clock)


def _message(instruction="lift the cup", x=None):
    proprio = None if x is None else np.array([x, 0, 0.1, 0, 0, 0, 1])
    return Message(IMAGE, instruction, proprio, "list")


def _watch(robot, policy, shown):
    """`same_picture` of the steps. shown: (picture's grey, whether the answer moves the arm) of each."""
    told = []
    for grey, moves in shown:
        policy.action = np.array([0.0125 * moves, 0, 0, 0, 0, 0, 1])
        step = robot.act(Message(np.full_like(IMAGE, grey), "lift the cup", None, "list"))
        told.append(step.decision.extra.get("same_picture"))
    return told


def test_a_picture_that_stays_the_same_while_the_arm_moves_is_told(robot, policy, caplog):
    frozen = [(1, True)] * 8
    assert _watch(robot, policy, frozen) == [None] * 5 + [5, 6, 7]
    assert [record.message.split(":")[0] for record in caplog.records] == [
        "robot left has sent the same picture for 5 steps that should have moved it"
    ]
    assert _watch(robot, policy, [(2, True), *frozen[:5]]) == [None] * 6  # it is back, and gone again
    assert _watch(robot, policy, [(3, False)] * 8) == [None] * 8  # nothing was to be seen
    assert _watch(robot, policy, [(4, True), (4, False)] * 5) == [None] * 9 + [5]


def _count_short(robot, *messages):
    return [robot.act(message).decision.extra.get("short_episodes") for message in messages]


@pytest.mark.parametrize("others", [{"instruction": "open the drawer"}, {"x": 0.4}])
def test_two_arms_that_use_one_name_are_told(others, robot, caplog):
    """Also where only a pose tells them apart. One arm that is given a few tasks after each other is none of them."""
    mine, other = _message(x=0.1), _message(**{"x": 0.1, **others})
    assert _count_short(robot, *[mine, other] * 4) == [None] * 5 + [5, 6, 7]
    assert [record.message.split(",")[0] for record in caplog.records] == [
        "robot left: 5 requests in a row each began an episode"
    ]
    assert _count_short(robot, other, mine, other, other, *[mine, other] * 2) == [None] * 8


def _play(robot, *messages):
    """(episode, step, why it began) of each message."""
    steps = [robot.act(message) for message in messages]
    return [(step.episode, step.step, step.started_by) for step in steps]


def test_episodes_are_counted_from_the_first_request(robot):
    assert _play(robot, _message(), _message()) == [(0, 0, "first request"), (0, 1, "first request")]
    robot.reset()
    assert _play(robot, _message(), _message()) == [(1, 0, "reset"), (1, 1, "reset")]


def test_a_reset_before_the_first_step_uses_no_number(robot):
    for _ in range(3):
        assert robot.reset()[0] == 0
    assert _play(robot, _message()) == [(0, 0, "reset")]


def test_another_instruction_begins_an_episode_and_null_does_not(robot, policy):
    played = _play(robot, _message("a"), _message(None), _message("b"), _message(None))
    assert played == [(0, 0, "first request"), (0, 1, "first request"), (1, 0, "instruction"), (1, 1, "instruction")]
    assert [o.instruction for o in policy.observations] == ["a", "a", "b", "b"]


def test_null_without_an_instruction_is_refused_and_begins_nothing(robot):
    with pytest.raises(RequestError, match="none yet"):
        robot.act(_message(None))
    robot.act(_message())
    robot.reset()
    with pytest.raises(RequestError, match="none yet"):
        robot.act(_message(None))
    assert _play(robot, _message()) == [(1, 0, "reset")]


def test_a_jump_of_the_arm_begins_an_episode_that_keeps_the_instruction(robot, policy):
    played = _play(
        robot, _message("a", 0.30), _message(None, 0.39), _message(None, 0.50), _message(None), _message("a", 0.9)
    )
    assert [step[2] for step in played] == ["first request"] * 2 + ["jump"] * 3
    assert policy.observations[2].instruction == "a"


def test_an_arm_that_was_held_up_and_slips_off_to_where_it_was_sent_goes_on(robot, policy):
    policy.action = np.array([0.0125, 0, 0, 0, 0, 0, 0])
    for _ in range(20):
        robot.act(_message("a", 0.30))
    assert _play(robot, _message("a", 0.30 + 20 * 0.0125 - 0.03)) == [(0, 20, "first request")]
    assert _play(robot, _message("a", 0.1)) == [(1, 0, "jump")]


def test_an_arm_that_carried_out_several_steps_for_one_answer_did_not_jump(robot, policy):
    policy.action = np.array([0.0125, 0, 0, 0, 0, 0, 0])
    x = 0.30
    for request in range(4):
        step = robot.act(_message("a", x))
        steps = [step, *robot.repeat(step, 9)]
        assert [(each.episode, each.step) for each in steps] == [(0, 10 * request + age) for age in range(10)]
        x += sum(each.sent.action[0] for each in steps)  # 0.125 m: a jump, where no action led there


def test_two_idle_minutes_begin_an_episode(robot, clock):
    robot.act(_message())
    clock.now += 119
    assert _play(robot, _message()) == [(0, 1, "first request")]
    clock.now += 121
    assert _play(robot, _message(None)) == [(1, 0, "idle")]
    seed = robot.reset(77)[1]
    clock.now += 1000  # a person resets the scene; the seed given must not be lost
    assert (robot.act(_message()).seed, seed) == (77, 77)


def test_seeds_come_from_the_client_or_from_server_robot_and_number(robot, policy):
    assert robot.act(_message()).seed == derive_seed(9, "left", 0)
    assert robot.reset(5) == (1, 5)
    robot.act(_message())
    assert robot.reset() == (2, derive_seed(9, "left", 2))
    assert policy.seeds == [derive_seed(9, "left", 0), 5, derive_seed(9, "left", 2)]


def test_a_fault_uses_its_step_up_and_a_refusal_does_not(robot, policy):
    policy.error = EngineError("dead")
    with pytest.raises(EngineError):
        robot.act(_message())
    policy.error = RequestError("no proprio")
    with pytest.raises(RequestError):
        robot.act(_message())
    policy.error = None
    assert _play(robot, _message()) == [(0, 1, "first request")]


def test_an_episode_that_the_policy_could_not_begin_is_begun_by_the_next_request(clock):
    policy = SpyPolicy()
    robot = Robot("arm", policy, EpisodeSettings(), clock)
    robot.act(_message())
    begin, policy.reset = policy.reset, _fail
    for refused in (lambda: robot.act(_message("another")), robot.reset):
        with pytest.raises(EngineError):
            refused()
    policy.reset = begin
    step = robot.act(_message("another"))
    assert (step.episode, step.step, step.started_by) == (1, 0, "instruction")
    assert policy.seeds[1:] == [step.seed]


def _fail(seed):
    raise EngineError("the server is gone")


def test_robots_are_made_once_by_name_and_forgotten_where_nothing_came_of_it(clock):
    robots = Robots(lambda name: Robot(name, SpyPolicy(), EpisodeSettings(), clock), max_robots=1)
    with robots.admit("a") as first, robots.admit("a") as second:
        assert first is second
        with pytest.raises(RequestError, match="one waiting") as caught, robots.admit("a"):
            pass
        assert caught.value.status == 503
        with pytest.raises(RequestError, match="serves 1 robots") as caught, robots.admit("b"):
            pass
        assert caught.value.status == 403
    with robots.admit("b") as robot:
        robot.reset()
    with robots.admit("b") as again:
        assert again is robot


def test_who_never_acted_or_is_long_gone_makes_room_and_numbers_are_not_given_twice(clock):
    robots = Robots(lambda name: Robot(name, SpyPolicy(), EpisodeSettings(), clock), max_robots=2, clock=clock)
    for name in ("made-up", "another", "left", "right"):
        with robots.admit(name) as robot:
            robot.reset()
        clock.now += 1
    with robots.admit("robot") as unnamed:  # always has its place, though it is the longest idle from now on
        unnamed.act(_message())
    clock.now += 1
    for name in ("left", "right"):
        with robots.admit(name) as robot:
            assert robot.act(_message()).started_by == "reset"
        clock.now += 1
    with pytest.raises(RequestError, match=f"idle for {FORGET_S:g} s"), robots.admit("third"):
        pass
    clock.now += FORGET_S
    with robots.admit("right"), robots.admit("third") as third:
        assert third.act(_message()).episode == 0
    clock.now += FORGET_S
    with robots.admit("left") as left:
        step = left.act(_message())
        assert (step.episode, step.step, step.started_by) == (1, 0, "first request")


def test_names_that_never_acted_leave_nothing_behind(clock):
    """Of what was allocated here and in episodes.py: other tests' threads allocate, too."""
    robots = Robots(lambda name: Robot(name, SpyPolicy(), EpisodeSettings(), clock), max_robots=2, clock=clock)
    here = {each.__code__.co_filename for each in (Robots.admit.__wrapped__, _message)}

    def measure() -> int:
        held = tracemalloc.take_snapshot().statistics("filename")
        return sum(each.size for each in held if each.traceback[0].filename in here)

    tracemalloc.start()
    try:
        for count in range(500):
            if count == 200:
                before = measure()
            with robots.admit(f"made-up-{count}") as robot:
                robot.reset()
        assert measure() - before < 10_000
    finally:
        tracemalloc.stop()
