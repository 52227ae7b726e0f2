"""The routes that answer in JSON: act and reset of a robot, hold and release by a person, questions, health."""

import logging
import threading
from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from time import perf_counter
from typing import Any

from flask import Flask, Response, g, request

from vlm_local.answers import Answer, Answerer, Question, build_answer_details, decode_question
from vlm_local.bounds import MAX_LISTED, check_one_text
from vlm_local.errors import RequestError
from vlm_local.files import encode_json
from vlm_local.relay import HEADER
from vlm_local.server.access import ADDRESS, CONNECTION, FULL_PATH
from vlm_local.server.records import StepRecord, build_record
from vlm_local.server.service import Service, take_place
from vlm_local.wire import (
    Message,
    check_text,
    decode_act,
    decode_reset,
    encode_action,
    is_submission_test,
    load_request,
)

logger = logging.getLogger(__name__)

MAX_TESTS = 4  # submission tests at once
MAX_QUESTIONS = 2  # at once: success detection shall not keep a robot waiting

_DEFAULT_REASON = "POST /hold"
_MAX_REASON = 200  # characters
_TEST_S = 7.0  # while the model loads; the form waits 8 s for its test
_OF_PROXIES = ("Via", "Forwarded", "X-Forwarded-For")
_HEAD = 2**16  # bytes of a large body that show what it is


def add_robot_routes(app: Flask, service: Service) -> None:
    """POST /act and POST /reset of the robot that the address names."""

    tests = threading.BoundedSemaphore(MAX_TESTS)

    def read_message() -> Message:
        with service.reading(request.content_length):
            return decode_act(read_body())

    @app.post("/act")
    @_once(service)
    def act():
        early = None
        if service.state == "loading":
            early = read_message()
            is_test = is_submission_test(early)
            service.wait_loaded(min(_TEST_S, service.settings.loading_s) if is_test else service.settings.loading_s)
        with service.enter(), ExitStack() as stack:
            robot = stack.enter_context(service.robots.admit(g.robot)) if _is_named() else None
            message = read_message() if early is None else early
            decoded = perf_counter()
            if robot is None and is_submission_test(message):
                return _answer_test(service, message, tests)
            if robot is None:
                g.robot = service.callers.find(_find_connection(), message.instruction)
                robot = stack.enter_context(service.robots.admit(g.robot))
            with robot.turn:
                _check_still_there()
                entered = perf_counter()
                step = robot.act(message)
                waits = {"decode": 1e3 * (decoded - g.start), "wait": 1e3 * (entered - decoded)}
                record = build_record(step, robot.name, g.id, g.start, waits)
                service.publish(record)  # here, so that a robot's steps stay in order
            g.about = record.about
            return _answer(record, message.form)

    @app.post("/reset")
    @_once(service)
    def reset():
        seed = decode_reset(read_body())
        if not _is_named():
            g.robot = service.callers.reset(_find_connection())
        service.wait_loaded(service.settings.loading_s)
        with service.enter(), service.robots.admit(g.robot) as robot, robot.turn:
            episode, seed = robot.reset(seed)
        g.about = {"episode": episode, "seed": seed}
        return send_json({"status": "reset", "robot": robot.name, "episode": episode, "seed": seed})


def _once(service: Service) -> Callable[[Callable[[], Response]], Callable[[], Response]]:
    """A route that carries out a relayed request once, however often it is sent."""

    def decorate(route: Callable[[], Response]) -> Callable[[], Response]:
        @wraps(route)
        def answer() -> Response:
            mark = request.headers.get(HEADER)
            if mark is None:
                return route()
            g.relayed, number = service.repeats.find(mark, request.environ.get(CONNECTION))
            with service.reading(request.content_length):
                g.body = read_body()
            sent = f"{request.environ[FULL_PATH]}?{request.query_string.decode('latin-1')}\n".encode() + g.body
            response, is_repeated = service.repeats.answer(g.relayed, number, sent, _is_gone, route)
            if is_repeated:
                g.about = {"repeated": True}
            # The application adds headers to what it answers.
            return Response(response.get_data(), response.status_code, mimetype=response.mimetype)

        return answer

    return decorate


def _is_named() -> bool:
    return request.environ[ADDRESS].robot is not None


def _find_connection() -> Any:
    """The request's own connection, the station's for a relay; None where a proxy may send those of several robots."""
    if any(name in request.headers for name in _OF_PROXIES):
        return None
    return g.get("relayed", request.environ.get(CONNECTION))


def _answer_test(service: Service, message: Message, places: threading.Semaphore) -> Response:
    with take_place(places, f"{MAX_TESTS} submission tests are being answered already; try again"):
        step = service.test(message)
    g.about = {"submission_test": True, "phrase": step.decision.phrase}
    record = build_record(step, g.robot, g.id, g.start, {})
    return _answer(record, message.form)


def _check_still_there() -> None:
    """Raises RequestError (499) where the client has hung up: its step would move the episode of the next client."""
    if _is_gone():
        raise RequestError("the client went away while it waited", 499)


def _is_gone() -> bool:
    is_gone = request.environ.get("waitress.client_disconnected")
    return is_gone is not None and is_gone()


def _answer(record: StepRecord, form: str) -> Response:
    if request.args.get("details", "0") not in ("", "0"):
        response = send_json(record.details)
    else:
        response = Response(encode_action(record.decision.action, form), mimetype="application/json")
    stages = record.details["timings_ms"].items()
    response.headers["Server-Timing"] = ", ".join(f"{stage};dur={ms}" for stage, ms in stages)
    return response


def add_hold_routes(app: Flask, service: Service) -> None:
    """POST /hold and POST /release: a person stops all robots, or the one named in the path, and lets them go on.

    Neither route needs the model or a place of a robot, so both work while everything else fails.
    """

    @app.post("/hold")
    def hold():
        robot = request.environ[ADDRESS].robot
        reason = _read_reason(request.get_data(cache=False))
        logger.warning("held: %s (%s)", robot or "all robots", reason)
        return _tell(robot, "held", service.states.hold(robot, reason), reason=reason)

    @app.post("/release")
    def release():
        robot = request.environ[ADDRESS].robot
        logger.warning("released: %s", robot or "all robots")
        return _tell(robot, "released", service.states.release(robot))


def _read_reason(body: bytes) -> str:
    """The body of /hold, empty or `{"reason": str}`. A body that cannot be read holds the robot all the same."""
    try:
        fields, _ = load_request(body)
        return check_text(fields["reason"], "reason", _MAX_REASON)
    except (RequestError, KeyError):
        return _DEFAULT_REASON


def _tell(robot: str | None, status: str, is_kept: bool, **more: str) -> Response:
    """robot: null for all. survives_restart: whether it was written into the run's folder."""
    answer = {"status": status, "robot": robot, **more, "survives_restart": is_kept}
    return send_json(answer)


def add_answer_route(
    app: Flask, service: Service, answerer: Answerer, tell: Callable[[Question, Answer], None] = lambda *asked: None
) -> None:
    """POST /answer: a question about a picture, answered by the model that also drives the robots.

    tell: is given what was asked and answered.
    """
    places = threading.BoundedSemaphore(MAX_QUESTIONS)

    @app.post("/answer")
    def answer():
        refusal = f"{MAX_QUESTIONS} questions are being answered already; ask again"
        with service.enter(), take_place(places, refusal):
            with service.reading(request.content_length):
                question = decode_question(read_body())
            answered = answerer.answer(question)
        tell(question, answered)
        return send_json(build_answer_details(answered, service.metadata.get("model")))


def add_status_routes(app: Flask, service: Service) -> None:
    """GET /health and GET /metadata. /health is open to everyone; without access it says the state alone."""

    @app.get("/health")
    def health():
        state = service.state
        lines = {name: value() for name, value in service.report.items()} if g.is_known else {}
        return send_json({"status": state, **lines}, 200 if state == "healthy" else 503)

    @app.get("/metadata")
    def metadata():
        return send_json(service.metadata)


def read_body() -> bytes:
    """The whole body of the present request, whose length has been checked.

    Flask's get_data reads 64 kB at a time and joins the parts: 141 ms of processor time for 60 MB instead of 44.
    Raises RequestError for a long list, before all of it is read.
    """
    if "body" in g:
        return g.body
    stream, length = request.environ["wsgi.input"], request.content_length or 0
    if length > MAX_LISTED:
        check_one_text(stream.read(_HEAD), length)
        stream.seek(0)
    return stream.read(length)


def send_json(value: Any, status: int = 200) -> Response:
    """JSON and a newline, for people who ask with curl."""
    return Response(encode_json(value) + "\n", status, mimetype="application/json")
