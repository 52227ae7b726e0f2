"""The application: who gets in, the steps of a robot, what a failure looks like, and one line of log for each request.

A step is a straight line: address -> gate -> robot -> wire -> policy -> wire.
"""

import logging
import os
import shlex
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial, wraps
from time import perf_counter
from typing import Any

from flask import Flask, Response, g, request
from werkzeug.exceptions import HTTPException, MethodNotAllowed

from vlm_local.answers import Answer, Question
from vlm_local.assembly import Policies
from vlm_local.errors import EngineError, RequestError
from vlm_local.fields import Reserve
from vlm_local.plain import hide_token
from vlm_local.relay import HEADER
from vlm_local.server.access import (
    ADDRESS,
    CONNECTION,
    DEFAULT_ROBOT,
    FULL_PATH,
    RateLimit,
    check_origin,
    longest_body,
    read_token,
    take_place,
)
from vlm_local.server.records import Refusal, StepRecord, build_record
from vlm_local.server.routes import add_answer_route, add_hold_routes, add_status_routes
from vlm_local.server.service import ServerSettings, Service, read_body, send_json
from vlm_local.server.state import RobotStates
from vlm_local.wire import MAX_BODY, Message, decode_act, decode_reset, encode_action, is_submission_test

logger = logging.getLogger(__name__)

MAX_TESTS = 4  # submission tests at once

_TEST_S = 7.0  # while the model loads; AutoEval's form waits 8 s for its test
_OF_PROXIES = ("Via", "Forwarded", "X-Forwarded-For")
_ROUTES = (
    "POST /act, POST /reset, POST /hold, POST /release, POST /answer, GET /health, GET /metadata, each also below "
    "/s/ROBOT, and the live page at /"
)


def create_app(
    policies: Policies,
    settings: ServerSettings = ServerSettings(),
    states: RobotStates | None = None,
    tell_answer: Callable[[Question, Answer], None] = lambda *asked: None,
) -> Flask:
    """The WSGI application behind connections.py; its Service is `app.extensions["vlm_local"]`.

    states: holds and grippers of the robots; None to forget them with the application. tell_answer: is given what
    /answer was asked and answered.
    """
    service = Service(policies, settings, states)
    app = Flask(__name__, static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = MAX_BODY
    app.extensions["vlm_local"] = service
    _guard(app, service)
    _add_robot_routes(app, service)
    add_hold_routes(app, service)
    add_status_routes(app, service)
    if policies.answerer is not None:
        add_answer_route(app, service, policies.answerer, tell_answer)
    return app


def _guard(app: Flask, service: Service) -> None:
    """Who gets in, what a failure looks like, and one line of log a request."""
    gate = service.settings.gate
    limit = None if service.settings.rate_limit is None else RateLimit(service.settings.rate_limit)

    @app.before_request
    def admit():
        g.start, g.id, g.reason = perf_counter(), os.urandom(6).hex(), ""
        address = request.environ[ADDRESS]
        g.robot = address.check_robot()
        remote, token = request.remote_addr or "", read_token(address.token, request.headers.get("Authorization", ""))
        check_origin(request.method, address.route, request.headers.get, gate.knows(token), service.settings.names)
        try:
            gate.check(remote, token)
            g.is_known = True
        except RequestError:
            if address.route != "/health":  # open to all, but says little to strangers
                raise
            g.is_known = False
        if limit is not None and address.route == "/act":
            limit.check(remote)
        if request.headers.get("Upgrade", "").lower() == "websocket":
            raise RequestError("this port speaks HTTP; websocket clients have the port of serve --websocket-port")
        most = longest_body(address.route)
        if request.routing_exception is None and (request.content_length or 0) > most:
            raise RequestError(f"the body is larger than the {most} bytes allowed", 413)

    @app.errorhandler(Exception)
    def explain(error: Exception):
        status, reason = _judge(error)
        if status == 500:
            logger.exception("request %s failed", g.id)
        g.reason = reason
        response = send_json({"error": reason, "request_id": g.id}, status)
        if status == 503 and service.state in ("loading", "stopping", "closed"):
            response.headers["Retry-After"] = "1"  # relay.py holds such a request until the next start
        if isinstance(error, MethodNotAllowed) and error.valid_methods:
            response.headers["Allow"] = ", ".join(error.valid_methods)
        return response

    @app.after_request
    def finish(response: Response):
        response.headers["X-Request-Id"] = g.id
        robot, route = g.get("robot", DEFAULT_ROBOT), hide_token(request.environ[ADDRESS].route)
        if response.status_code >= 400 and route in ("/act", "/reset") and "robot" in g:
            service.publish(Refusal(time.time(), g.id, robot, route, response.status_code, g.reason))
        total_ms = 1e3 * (perf_counter() - g.start)
        line = {"id": g.id, "method": request.method, "route": route, "robot": robot, "status": response.status_code}
        line |= {"ms": f"{total_ms:.1f}", **g.get("about", {})} | ({"error": g.reason} if g.reason else {})
        calm = logging.INFO if route in ("/act", "/reset") else logging.DEBUG  # a page asks for frames all the time
        is_poll = route == "/health" and response.status_code == 503  # asked every second while a model loads
        level = logging.WARNING if response.status_code >= 400 and not is_poll else calm
        logger.log(level, "request %s", " ".join(f"{key}={shlex.quote(str(value))}" for key, value in line.items()))
        return response


def _judge(error: Exception) -> tuple[int, str]:
    """HTTP status and sentence of what was raised. The client's fault is 4xx, ours 5xx."""
    if isinstance(error, RequestError):
        return error.status, str(error)
    if isinstance(error, EngineError):
        return 503, str(error)
    if isinstance(error, HTTPException) and error.code is not None:
        if error.code == 404:
            return 404, f"there is no {request.method} {hide_token(request.path)}; there is {_ROUTES}"
        if isinstance(error, MethodNotAllowed):
            methods = " or ".join(sorted(set(error.valid_methods or ()) - {"HEAD", "OPTIONS"}))
            return 405, f"{hide_token(request.path)} takes {methods}, not {request.method}"
        if error.code == 413:
            return 413, f"the body is larger than the {MAX_BODY} bytes allowed"
        return error.code, error.description or error.name
    return 500, f"the server failed ({type(error).__name__}); its log says more"


def _add_robot_routes(app: Flask, service: Service) -> None:
    """POST /act and POST /reset of the robot that the address names."""
    tests = threading.BoundedSemaphore(MAX_TESTS)

    def read_message(reserve: Reserve) -> Message:
        with service.reading(request.content_length):
            return decode_act(read_body(), reserve)

    def wait_for_model(reserve: Reserve) -> Message | None:
        """Hold a request open while the model loads. Returns its message where that had to be read to know how long:
        who sent a submission test waits 8 s only.
        """
        if service.state != "loading":
            return None
        message, wait_s = read_message(reserve), service.settings.loading_s
        service.wait_loaded(min(_TEST_S, wait_s) if is_submission_test(message) else wait_s)
        return message

    @app.post("/act")
    @partial(_once, service)
    def act():
        with ExitStack() as stack:
            reserve = stack.enter_context(service.unpacking())
            early = wait_for_model(reserve)
            stack.enter_context(service.enter())
            robot = stack.enter_context(service.robots.admit(g.robot)) if _is_named() else None
            message = read_message(reserve) if early is None else early
            decoded = perf_counter()
            if robot is None and is_submission_test(message):
                return _answer_test(service, message, tests)
            if robot is None:
                g.robot = service.callers.find(_find_connection(), message.instruction)
                robot = stack.enter_context(service.robots.admit(g.robot))
            with robot.turn:
                if _is_gone():  # its step would move the episode of the next client
                    raise RequestError("the client went away while it waited", 499)
                entered = perf_counter()
                step = robot.act(message, _is_gone_for_good)
                waits = {"decode": 1e3 * (decoded - g.start), "wait": 1e3 * (entered - decoded)}
                record = build_record(step, robot.name, g.id, g.start, waits)
                service.publish(record)  # here, so that a robot's steps stay in order
            g.about = record.about
            return _answer(record, message.form)

    @app.post("/reset")
    @partial(_once, service)
    def reset():
        seed = decode_reset(read_body())
        if not _is_named():
            g.robot = service.callers.reset(_find_connection())
        service.wait_loaded(service.settings.loading_s)
        with service.enter(), service.robots.admit(g.robot) as robot, robot.turn:
            episode, seed = robot.reset(seed)
        g.about = {"episode": episode, "seed": seed}
        return send_json({"status": "reset", "robot": robot.name, "episode": episode, "seed": seed})


def _once(service: Service, route: Callable[[], Response]) -> Callable[[], Response]:
    """A route that carries out a relayed request once, however often it is sent."""

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


def _is_gone() -> bool:
    is_gone = request.environ.get("waitress.client_disconnected")
    return is_gone is not None and is_gone()


def _is_gone_for_good() -> bool:
    """A relay whose tunnel dropped comes again and gets the answer that was made meanwhile."""
    return "relayed" not in g and _is_gone()


def _answer(record: StepRecord, form: str) -> Response:
    if request.args.get("details", "").lower() not in ("", "0", "false"):
        response = send_json(record.details)
    else:
        response = Response(encode_action(record.decision.action, form), mimetype="application/json")
    stages = record.details["timings_ms"].items()
    response.headers["Server-Timing"] = ", ".join(f"{stage};dur={ms}" for stage, ms in stages)
    return response
