"""Robots that give no name are told apart by connection and instruction."""

import http.client
import json
import threading
from contextlib import closing

import numpy as np
import pytest

from tests.server.observing import observe
from tests.serving import build_body, serve, until
from vlm_local.data.runs import read_run
from vlm_local.server.callers import Callers
from vlm_local.server.service import ServerSettings

DRAWER, SINK = "open the drawer", "put the eggplant in the blue sink"
TEST = {"image": np.zeros((256, 256, 3), np.uint8), "instruction": "test connection", "proprio": [0.0] * 8}


class Station:
    """A client with one connection for its whole job, as AutoEval's."""

    def __init__(self, server, instruction):
        self._connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        self._instruction = instruction

    def _post(self, path, body, headers=None):
        self._connection.request("POST", path, body, headers or {})
        response = self._connection.getresponse()
        answer = response.read()
        assert response.status == 200, answer
        return json.loads(answer)

    def reset(self):
        return self._post("/reset", b"")

    def act(self, instruction=None, headers=None, **fields):
        body = build_body(instruction=instruction or self._instruction, **fields)
        answer = self._post("/act?details=1", body, headers)
        return answer["robot"], answer["episode"], answer["step"]

    def close(self):
        self._connection.close()


@pytest.fixture
def server():
    with serve() as server:
        yield server


def test_two_stations_at_once_keep_their_episodes(server):
    with closing(Station(server, DRAWER)) as drawer, closing(Station(server, SINK)) as sink:
        drawer.reset()
        steps = [drawer.act(), drawer.act()]
        sink.reset()  # concerns its own connection
        for _ in range(3):
            steps += [sink.act(), drawer.act()]
    assert steps == [
        *(("robot", 0, 0), ("robot", 0, 1)),
        *(("robot.2", 0, 0), ("robot", 0, 2), ("robot.2", 0, 1), ("robot", 0, 3), ("robot.2", 0, 2), ("robot", 0, 4)),
    ]


def test_two_stations_with_the_same_task_are_two_robots(server):
    with closing(Station(server, DRAWER)) as first, closing(Station(server, DRAWER)) as second:
        assert [first.act(), second.act(), first.act(), second.act()] == [
            ("robot", 0, 0),
            ("robot.2", 0, 0),
            ("robot", 0, 1),
            ("robot.2", 0, 1),
        ]


def test_twenty_steps_over_twenty_connections_are_one_episode(server):
    steps = []
    for _ in range(20):
        with closing(Station(server, DRAWER)) as station:
            steps.append(station.act())
    assert steps == [("robot", 0, step) for step in range(20)]


def test_two_clients_that_open_a_connection_for_each_request_are_told_apart_by_instruction(server):
    steps = []
    for _ in range(6):
        for instruction in (DRAWER, SINK):
            with closing(Station(server, instruction)) as station:
                steps.append(station.act())
    settled = steps[4:]  # the first steps cannot be told from one robot with two tasks
    assert settled[0::2] == [(settled[0][0], settled[0][1], settled[0][2] + step) for step in range(4)]
    assert settled[1::2] == [(settled[1][0], settled[1][1], settled[1][2] + step) for step in range(4)]
    assert settled[0][0] != settled[1][0]


def test_through_a_proxy_the_instruction_alone_decides(server):
    """A pool of two connections, over which the requests of two stations come in any order."""
    via = {"Via": "1.1 balancer"}
    with closing(Station(server, "")) as first, closing(Station(server, "")) as second:
        steps = [
            connection.act(instruction, via)
            for connection, instruction in ((first, DRAWER), (second, SINK), (second, DRAWER), (first, SINK))
        ]
    assert steps == [("robot", 0, 0), ("robot.2", 0, 0), ("robot", 0, 1), ("robot.2", 0, 1)]


def test_one_client_may_change_its_task(server):
    with closing(Station(server, DRAWER)) as station:
        assert [station.act(), station.act(SINK), station.act(SINK)] == [
            ("robot", 0, 0),
            ("robot", 1, 0),
            ("robot", 1, 1),
        ]


def test_a_gripper_stays_closed_whichever_robot_it_is_taken_for(server):
    server.engine.phrase = "close gripper"
    answers = []
    for instruction in (DRAWER, SINK, DRAWER, SINK):
        answers.append(server.act(instruction=instruction, proprio=None))
        server.engine.phrase = "stop"
    assert [answer["action"][6] for answer in answers] == [0] * 4
    assert {answer["robot"] for answer in answers} == {"robot", "robot.2"}


def test_submission_tests_in_the_middle_of_a_job_touch_nobody_and_are_not_recorded(tmp_path):
    settings = ServerSettings(max_robots=2)
    with observe(tmp_path / "run", settings) as server, closing(Station(server, DRAWER)) as station:
        assert station.act() == ("robot", 0, 0)
        stations = []
        for _ in range(20):
            stations.append(Station(server, "test connection"))
            stations[-1].act(**{name: value for name, value in TEST.items() if name != "instruction"})
        assert station.act() == ("robot", 0, 1)
        with closing(Station(server, SINK)) as other:
            assert other.act() == ("robot.2", 0, 0)
        for each in stations:
            each.close()
        until(lambda: server.observed.report_recording()["written"] == 3)
    recorded = {(episode.robot, len(episode.lines)) for episode in read_run(tmp_path / "run", pytest.fail)}
    assert recorded == {("robot", 2), ("robot.2", 1)}


def test_a_submission_test_turns_the_gripper_of_no_robot_called_test():
    with serve() as server:
        server.engine.phrase = "close gripper"
        assert server.post("/act", build_body(**TEST))[0] == 200
        server.engine.phrase = "move up"
        assert server.act("/s/test/act?details=1", proprio=None)["action"][6] == 1


def test_two_stations_a_test_and_a_third_request_in_flight_are_all_answered(server):
    server.engine.gate.clear()
    answers = []

    def post(**fields):
        answers.append(server.post("/act", build_body(**fields))[0])

    requests = [{"instruction": DRAWER}, {"instruction": SINK}, {"instruction": DRAWER}, TEST]
    threads = [threading.Thread(target=post, kwargs=fields) for fields in requests]
    for thread in threads:
        thread.start()
    until(lambda: server.service._num_inside == 4)
    server.engine.gate.set()
    for thread in threads:
        thread.join(60)
    assert answers == [200] * 4


def test_a_closed_connection_frees_its_place():
    with serve(settings=ServerSettings(max_robots=2)) as server:
        stations = [Station(server, f"lift cup {number}") for number in range(3)]
        assert [station.act()[0] for station in stations] == ["robot", "robot.2", "robot.3"]
        assert server.post("/s/left/act", build_body())[0] == 403
        for station in stations:
            station.close()
        assert server.act("/s/left/act?details=1")["robot"] == "left"
        assert server.act("/s/right/act?details=1")["robot"] == "right"


def _lose_two_stations(server, instructions, opening=None):
    """Two stations, of which the first has closed its gripper, and whose connections end."""
    with closing(Station(server, instructions[0])) as first, closing(Station(server, instructions[1])) as second:
        server.engine.phrase = "close gripper"
        first.act(proprio=_measure(opening))
        server.engine.phrase = "stop"
        for station in (second, first, second, first):
            assert station.act(proprio=_measure(1.0 if station is second else opening))[1] == 0


def _measure(opening):
    return None if opening is None else [0.3, 0.0, 0.15, 0.0, 0.1, 0.0, opening]


def _come_back(server, instruction, opening):
    station = Station(server, instruction)
    _, _, step = station.act(proprio=_measure(opening))
    return station, step, server.newest_record().decision.action[6]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("is_measured", [True, False])
def test_two_stations_with_one_task_that_both_come_back_begin_anew_and_drop_nothing(server, order, is_measured):
    """Nobody knows which is which. A gripper that is not measured stays closed where one of the two was."""
    openings = [0.4, 1.0] if is_measured else [None, None]
    _lose_two_stations(server, [DRAWER, DRAWER], openings[0])
    stations = []
    for which in order:
        station, step, command = _come_back(server, DRAWER, openings[which])
        stations.append(station)
        assert (step, command) == (0, which if is_measured else 0)
    assert sorted(station.act()[2] for station in stations) == [1, 1]
    for station in stations:
        station.close()


def test_two_stations_with_two_tasks_that_both_come_back_go_on(server):
    _lose_two_stations(server, [DRAWER, SINK])
    sink, step, command = _come_back(server, SINK, 1.0)
    assert (step, command) == (2, 1)
    drawer, step, command = _come_back(server, DRAWER, None)
    assert (step, command) == (3, 0)
    sink.close()
    drawer.close()


def test_a_station_that_resets_when_it_comes_back_resets_no_other(server):
    _lose_two_stations(server, [DRAWER, SINK])
    with closing(Station(server, SINK)) as sink:
        sink.reset()
        drawer, step, command = _come_back(server, DRAWER, None)
        assert (step, command) == (3, 0)
        assert sink.act()[2] == 0
        drawer.close()


def test_a_station_that_comes_back_with_another_task_takes_no_others_gripper_nor_episode(server):
    _lose_two_stations(server, [DRAWER, SINK])
    station, step, command = _come_back(server, "lift the cup", 1.0)
    assert (step, command) == (0, 1)
    drawer, step, command = _come_back(server, DRAWER, None)
    assert (step, command) == (3, 0)
    station.close()
    drawer.close()


def test_who_may_be_the_one_that_a_person_stopped_stands_still(server):
    _lose_two_stations(server, [DRAWER, DRAWER], 0.4)
    assert server.post("/s/robot/hold", b"")[0] == 200
    server.engine.phrase = "move up"
    for opening in (1.0, 0.4):
        station, *_ = _come_back(server, DRAWER, opening)
        assert "held by a person" in server.newest_record().decision.fault
        station.close()


def test_a_reset_on_a_new_connection_does_not_release_who_may_have_been_stopped(server):
    _lose_two_stations(server, [DRAWER, SINK])
    assert server.post("/s/robot/hold", b"")[0] == 200
    with closing(Station(server, DRAWER)) as station:
        station.reset()
        station.act()
        assert "held by a person" in server.newest_record().decision.fault


@pytest.mark.parametrize("headers", [None, {"Via": "1.1 balancer"}])
def test_who_was_stopped_does_not_move_for_another_task_though_others_asked_meanwhile(server, headers):
    """Two clients that open a connection for each request, or share those of a proxy."""

    def ask(instruction):
        with closing(Station(server, instruction)) as station:
            return station.act(headers=headers)[0]

    names = {instruction: ask(instruction) for _ in range(3) for instruction in (DRAWER, SINK)}
    assert server.post(f"/s/{names[DRAWER]}/hold", b"")[0] == 200
    assert ask(SINK) == names[SINK] and server.newest_record().decision.fault is None
    ask("lift the cup")  # it may be the one that was stopped
    assert "held by a person" in server.newest_record().decision.fault


def test_two_that_were_taken_for_one_are_both_stopped(server):
    with closing(Station(server, DRAWER)) as station:
        station.act()
        assert server.post("/s/robot/hold", b"")[0] == 200
        robots = {station.act(instruction)[0] for instruction in (SINK, DRAWER)}
    assert robots == {"robot", "robot.2"}
    assert set(server.service.states.describe()["robots"]) == robots


def test_after_a_restart_who_comes_first_gets_no_others_gripper(tmp_path):
    with observe(tmp_path / "first") as server:
        _lose_two_stations(server, [DRAWER, SINK])
    with observe(tmp_path / "second", previous=tmp_path / "first") as server:
        server.service.subscribe(server.records.append)
        server.engine.phrase = "stop"
        with closing(Station(server, SINK)) as sink, closing(Station(server, DRAWER)) as drawer:
            for station, opening, command in ((sink, 1.0, 1), (drawer, None, 0)):
                station.act(proprio=_measure(opening))
                until(lambda: server.records)
                assert server.records.pop().decision.action[6] == command


class Line:
    """A connection as the server sees it."""

    def __init__(self):
        self.is_open = True

    def close(self):
        self.is_open = False


class Told(Callers):
    """Callers with a clock that stands still, and what they tell."""

    def __init__(self, max_robots=8):
        self.now, self.split, self.mixed = 0.0, [], []
        super().__init__(
            max_robots, 60, lambda: self.now, lambda old, new: self.split.append((old, new)), self.mixed.append
        )

    def ask(self, instruction, connection="own", num_times=1):
        """The robot's name, of requests on a connection that then closes, where none is given."""
        line = Line() if connection == "own" else connection
        names = {self.find(line, instruction) for _ in range(num_times)}
        if connection == "own":
            line.close()
        self.now += 0.1
        (name,) = names
        return name


def test_a_task_that_comes_back_soon_is_another_robots_and_any_other_task_is_not():
    for tasks, seconds, name in (
        ([DRAWER, SINK, DRAWER], 9, "robot.2"),
        ([DRAWER, SINK, SINK, DRAWER], 9, "robot.2"),
        ([DRAWER, SINK, DRAWER], 11, "robot"),
        ([DRAWER, SINK, "lift the cup"], 9, "robot"),
    ):
        callers, line = Told(), Line()
        for task in tasks[:-1]:
            assert callers.ask(task, line) == "robot"
        callers.now += seconds
        assert callers.ask(tasks[-1], line) == name


def test_two_tasks_that_alternate_on_one_connection_keep_their_episodes():
    callers, line = Told(), Line()
    names = [callers.ask(task, line) for task in (*(DRAWER, SINK) * 4, None)]
    assert names[-5:] == [*["robot.2", "robot"] * 2, "robot"] and callers.mixed == []


def test_a_new_robot_may_be_any_of_those_that_were_here_at_the_same_time():
    callers, lines = Told(), [Line(), Line()]
    for task, line in zip("ab", lines, strict=True):
        callers.ask(task, line, 2)
    lines[0].close(), lines[1].close()
    callers.now += 2
    assert callers.ask("c") == "robot.3" and callers.split == [(["robot.2", "robot"], "robot.3")]
    callers = Told()
    callers.ask("a", None)
    callers.now += 61
    callers.ask("b", None), callers.ask("c", None)
    assert callers.split == [(["robot"], "robot.2"), (["robot.2"], "robot.3")]


def test_a_request_without_an_instruction_does_not_forget_the_episodes():
    callers = Told()
    names = [callers.ask(task, None) for task in (DRAWER, None, SINK, DRAWER, None)]
    assert names == ["robot", "robot", "robot.2", "robot", "robot"] and callers.mixed == []


def test_a_reset_on_an_open_connection_is_its_own_robots_whoever_else_is_lost():
    callers, lines = Told(), [Line() for _ in range(3)]
    names = [callers.ask(task, line, 2) for task, line in zip("abc", lines, strict=True)]
    lines[0].close(), lines[1].close()
    assert callers.reset(lines[2]) == names[2] == "robot.3"


def test_an_open_connection_gives_its_place_up_after_a_reset_or_a_long_rest():
    callers, station = Told(), Line()
    assert callers.reset(Line()) == "robot"  # some clients keep one connection for resets and one for steps
    callers.now += 2
    assert callers.ask(DRAWER, station) == "robot"
    callers.now += 59
    assert callers.ask(DRAWER) == "robot.2"
    callers.now += 2
    assert callers.ask(SINK, Line()) == "robot.2"
    assert callers.ask(DRAWER, Line()) == "robot"


def test_a_new_connection_is_the_last_ones_only_if_that_one_opens_them_all_the_time():
    for seconds, mixed in ((0.5, []), (2, [["robot.2", "robot"]])):
        callers, station = Told(), Line()
        callers.ask(DRAWER, station, 3)
        assert callers.ask(DRAWER) == "robot.2"
        station.close()
        callers.now += seconds
        assert callers.ask(DRAWER) == "robot.2" and callers.mixed == mixed
    callers = Told()
    callers.ask(DRAWER), callers.ask(SINK), callers.ask(DRAWER), callers.ask(SINK)
    callers.now += 2
    assert callers.ask("lift the cup") == "robot"  # none of them keeps its connection: the last one, with a new task
    assert callers.mixed == []
    callers, first, second = Told(), Line(), Line()
    callers.ask(DRAWER, first, 2), callers.ask(DRAWER, second, 2)
    first.close()
    callers.now += 61
    callers.ask(DRAWER, second), second.close()
    callers.now += 2
    assert callers.ask(DRAWER) == "robot.2" and callers.mixed == []  # the other one left long before


def test_where_there_are_too_many_the_one_that_is_free_longest_makes_room():
    callers = Told(max_robots=2)
    names = []
    for task in "abcda":
        names.append(callers.ask(task, None))  # through a proxy
        callers.now += 1
    assert names == ["robot", "robot.2", "robot.3", "robot", "robot.2"]
    assert callers.mixed == [["robot"], ["robot.2"]]
    assert callers.split[1] == (["robot.2", "robot"], "robot.3")


def test_a_connection_that_is_about_to_close_is_waited_for():
    """A relay closes it a moment after the client, which has opened the next one by then."""
    callers = Callers(max_robots=8, idle_s=60)
    other = Line()
    assert callers.find(other, DRAWER) == "robot"
    other.close()
    for number, line in enumerate([Line() for _ in range(4)]):
        assert (callers.reset(line) if number == 2 else callers.find(line, DRAWER)) == "robot"
        threading.Timer(0.03, line.close).start()


def test_nobody_waits_for_a_connection_that_is_not_about_to_close(monkeypatch):
    callers = Callers(max_robots=8, idle_s=60)
    station = Line()
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("it waits"))
    assert [callers.find(station, DRAWER) for _ in range(2)] == ["robot", "robot"]
    assert [callers.find(Line(), instruction) for instruction in (DRAWER, SINK)] == ["robot.2", "robot.3"]
    callers = Told()
    assert [callers.ask(DRAWER), callers.ask(DRAWER)] == ["robot", "robot"]  # nor for one that has closed it
    assert callers.ask(DRAWER, Line()) == "robot"
    callers.now += 2  # nor for one that was not here just now
    assert callers.ask(DRAWER, Line()) == "robot.2"
