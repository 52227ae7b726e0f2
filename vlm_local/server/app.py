"""The application: who gets in, what a failure looks like, and one line of log for each request.

One request, a straight line: address -> gate -> robot -> wire -> policy -> wire; routes.py goes on where this ends.
"""

import logging
import os
import shlex
import time
from collections.abc import Callable
from time import perf_counter

from flask import Flask, Response, g, request
from werkzeug.exceptions import HTTPException, MethodNotAllowed

from vlm_local.answers import Answer, Question
from vlm_local.errors import EngineError, RequestError
from vlm_local.plain import hide_token
from vlm_local.server.access import (
    ADDRESS,
    DEFAULT_ROBOT,
    FULL_PATH,
    RateLimit,
    check_origin,
    longest_body,
    parse_address,
    read_token,
)
from vlm_local.server.records import Refusal
from vlm_local.server.routes import (
    add_answer_route,
    add_hold_routes,
    add_robot_routes,
    add_status_routes,
    send_json,
)
from vlm_local.server.service import Policies, ServerSettings, Service
from vlm_local.server.state import RobotStates
from vlm_local.wire import MAX_BODY

logger = logging.getLogger(__name__)

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
    """The WSGI application; its Service is `app.extensions["vlm_local"]`.

    states: holds and grippers of the robots; None to forget them with the application. tell_answer: is given what
    /answer was asked and answered.
    """
    service = Service(policies, settings, states)
    app = _App(settings.prefix)
    app.extensions["vlm_local"] = service
    _guard(app, service)
    add_robot_routes(app, service)
    add_hold_routes(app, service)
    add_status_routes(app, service)
    if policies.answerer is not None:
        add_answer_route(app, service, policies.answerer, tell_answer)
    return app


class _App(Flask):
    """Takes prefix, token and robot off the path before Flask routes (and logs) what is left."""

    def __init__(self, prefix: str):
        super().__init__(__name__, static_folder=None)
        self.config["MAX_CONTENT_LENGTH"] = MAX_BODY
        self._prefix = prefix

    def wsgi_app(self, environ, start_response):
        path = environ["PATH_INFO"]
        address = environ.get(ADDRESS) or parse_address(path, self._prefix)  # connections.py has looked at it
        environ |= {ADDRESS: address, FULL_PATH: path, "PATH_INFO": address.route}
        return super().wsgi_app(environ, start_response)


def _guard(app: Flask, service: Service) -> None:
    """Who gets in, what a failure looks like, and one line of log a request."""
    gate = service.settings.gate
    limit = None if service.settings.rate_limit is None else RateLimit(service.settings.rate_limit)

    @app.before_request
    def admit():
        g.start, g.id, g.reason = perf_counter(), os.urandom(6).hex(), ""
        address = request.environ[ADDRESS]
        g.robot = address.check_robot()
        remote, authorization = request.remote_addr or "", request.headers.get("Authorization", "")
        has_token = gate.knows(read_token(address.token, authorization))
        check_origin(request.method, address.route, request.headers.get, has_token, service.settings.names)
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
        response = send_json({"error": reason, "request_id": g.id}, status)
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
