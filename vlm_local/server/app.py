"""The routes. One request, a straight line: address -> gate -> robot -> wire -> policy -> wire."""

import logging
import os
import shlex
import time
from collections.abc import Sequence
from dataclasses import replace
from time import perf_counter
from typing import Any

from flask import Flask, Response, g, request
from werkzeug.exceptions import HTTPException

from vlm_local.errors import EngineError, RequestError
from vlm_local.files import encode_json
from vlm_local.plain import hide_token
from vlm_local.server.access import ADDRESS, DEFAULT_ROBOT, RateLimit, longest_body, parse_address, read_token
from vlm_local.server.answers import add_answer_route
from vlm_local.server.bodies import read_body
from vlm_local.server.episodes import Step
from vlm_local.server.holds import add_hold_routes
from vlm_local.server.kept import Kept
from vlm_local.server.origins import check_origin
from vlm_local.server.records import Refusal, StepRecord, Subscriber
from vlm_local.server.service import Policies, ServerSettings, Service
from vlm_local.wire import MAX_BODY, build_details, decode_act, decode_reset, encode_action

logger = logging.getLogger(__name__)

FULL_PATH = "vlm_local.path"
_ROUTES = (
    "POST /act, POST /reset, POST /hold, POST /release, POST /answer, GET /health, GET /metadata, each also below "
    "/s/ROBOT, and the live page at /"
)


def create_app(
    policies: Policies,
    settings: ServerSettings = ServerSettings(),
    subscribers: Sequence[Subscriber] = (),
    kept: Kept | None = None,
) -> Flask:
    """The WSGI application; its Service is `app.extensions["vlm_local"]`.

    subscribers: called with each StepRecord and Refusal, every one in a thread of its own. kept: holds and
    grippers; None to forget them with the application.
    """
    app = Flask(__name__, static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = MAX_BODY
    service = app.extensions["vlm_local"] = Service(policies, settings, subscribers, kept)
    app.wsgi_app = _Addressed(app.wsgi_app, settings.prefix)
    _guard(app, service)
    _add_robot_routes(app, service)
    add_hold_routes(app)
    _add_status_routes(app, service)
    if policies.answerer is not None:
        add_answer_route(app, policies.answerer)
    return app


class _Addressed:
    """Takes prefix, token and robot off the path before Flask routes (and logs) what is left."""

    def __init__(self, wsgi_app, prefix: str):
        self._wsgi_app = wsgi_app
        self._prefix = prefix

    def __call__(self, environ, start_response):
        try:
            address = parse_address(environ["PATH_INFO"], self._prefix)
        except RequestError as error:
            address = error
        environ[ADDRESS] = address
        environ[FULL_PATH] = environ["PATH_INFO"]
        environ["PATH_INFO"] = getattr(address, "route", "/")
        return self._wsgi_app(environ, start_response)


def _guard(app: Flask, service: Service) -> None:
    """Who gets in, what a failure looks like, and one line of log a request."""
    gate = service.settings.gate
    limit = None if service.settings.rate_limit is None else RateLimit(service.settings.rate_limit)

    @app.before_request
    def admit():
        g.start, g.id, g.reason = perf_counter(), os.urandom(6).hex(), ""
        address = request.environ[ADDRESS]
        if isinstance(address, RequestError):
            raise address
        g.robot = address.robot or DEFAULT_ROBOT
        remote, authorization = request.remote_addr or "", request.headers.get("Authorization", "")
        has_token = gate.knows(read_token(address.token, authorization))
        check_origin(request.method, address.route, request.headers, has_token, service.settings.names)
        try:
            gate.check(remote, address.token, authorization)
            g.is_known = True
        except RequestError:
            if address.route != "/health":  # open to all, but says little to strangers
                raise
            g.is_known = False
        if limit is not None and address.route == "/act":
            limit.check(remote)
        most = longest_body(address.route)
        if request.routing_exception is None and (request.content_length or 0) > most:
            raise RequestError(f"the body is larger than the {most} bytes allowed", 413)

    @app.errorhandler(Exception)
    def explain(error: Exception):
        status, reason = _judge(error)
        if status == 500:
            logger.exception("request %s failed", g.id)
        g.reason = reason
        response = _json({"error": reason, "request_id": g.id}, status)
        if isinstance(error, HTTPException) and getattr(error, "valid_methods", None):
            response.headers["Allow"] = ", ".join(error.valid_methods)
        return response

    @app.after_request
    def finish(response: Response):
        response.headers["X-Request-Id"] = g.id
        address = request.environ[ADDRESS]
        robot = getattr(address, "robot", None) or DEFAULT_ROBOT
        route = hide_token(getattr(address, "route", "/"))
        if response.status_code >= 400 and route in ("/act", "/reset"):
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
        if error.code == 405:
            methods = " or ".join(sorted(set(error.valid_methods or ()) - {"HEAD", "OPTIONS"}))
            return 405, f"{hide_token(request.path)} takes {methods}, not {request.method}"
        if error.code == 413:
            return 413, f"the body is larger than the {MAX_BODY} bytes allowed"
        return error.code, error.description or error.name
    return 500, f"the server failed ({type(error).__name__}); its log says more"


def _add_robot_routes(app: Flask, service: Service) -> None:
    @app.post("/act")
    def act():
        with service.enter(), service.robots.admit(g.robot) as robot:
            with service.reading(request.content_length):
                message = decode_act(read_body())
            decoded = perf_counter()
            with robot.turn:
                _check_still_there()
                entered = perf_counter()
                step = robot.act(message)
                waits = {"decode": 1e3 * (decoded - g.start), "wait": 1e3 * (entered - decoded)}
                record = _build_record(step, robot.name, service.policies.metadata.get("model"), waits)
                service.publish(record)  # here, so that a robot's steps stay in order
            return _answer(record, message.form)

    @app.post("/reset")
    def reset():
        seed = decode_reset(read_body())
        with service.enter(), service.robots.admit(g.robot) as robot, robot.turn:
            episode, seed = robot.reset(seed)
        g.about = {"episode": episode, "seed": seed}
        return _json({"status": "reset", "robot": robot.name, "episode": episode, "seed": seed})


def _check_still_there() -> None:
    """A client that gave up while it waited shall not move its successor's episode."""
    is_gone = request.environ.get("waitress.client_disconnected")
    if is_gone is not None and is_gone():
        raise RequestError("the client went away while it waited", 499)


def _build_record(step: Step, robot: str, model: str | None, waits: dict[str, float]) -> StepRecord:
    timings = {**waits, **step.decision.timings_ms, "total": 1e3 * (perf_counter() - g.start)}
    decision = replace(step.decision, timings_ms=timings)
    where = {"model": model, "robot": robot, "episode": step.episode, "step": step.step}
    details = build_details(decision, **where, seed=step.seed, started_by=step.started_by)
    g.about = {"episode": step.episode, "step": step.step, "phrase": decision.phrase}
    if decision.fault:
        g.about["fault"] = decision.fault
    episode = step.episode, step.step, step.seed, step.started_by
    return StepRecord(time.time(), g.id, robot, *episode, step.observation, decision, details)


def _answer(record: StepRecord, form: str) -> Response:
    if request.args.get("details", "0") not in ("", "0"):
        response = _json(record.details)
    else:
        response = Response(encode_action(record.decision.action, form), mimetype="application/json")
    stages = record.details["timings_ms"].items()
    response.headers["Server-Timing"] = ", ".join(f"{stage};dur={ms}" for stage, ms in stages)
    return response


def _add_status_routes(app: Flask, service: Service) -> None:
    @app.get("/health")
    def health():
        state = service.state
        lines = {name: value() for name, value in service.report.items()} if g.is_known else {}
        return _json({"status": state, **lines}, 200 if state == "healthy" else 503)

    @app.get("/metadata")
    def metadata():
        return _json(service.metadata)


def _json(value: Any, status: int = 200) -> Response:
    return Response(encode_json(value) + "\n", status, mimetype="application/json")
