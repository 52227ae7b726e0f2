"""The routes beside a robot's own that answer in JSON: hold and release by a person, questions, health."""

import logging
import threading
from collections.abc import Callable

from flask import Flask, Response, g, request

from vlm_local.answers import Answer, Answerer, Question, build_answer_details, decode_question
from vlm_local.errors import RequestError
from vlm_local.fields import check_text
from vlm_local.server.access import ADDRESS, take_place
from vlm_local.server.service import Service, read_body, send_json
from vlm_local.wire import load_request

logger = logging.getLogger(__name__)

MAX_QUESTIONS = 2  # at once: success detection shall not keep a robot waiting

_DEFAULT_REASON = "POST /hold"
_MAX_REASON = 200  # characters


def add_hold_routes(app: Flask, service: Service) -> None:
    """POST /hold and POST /release: a person stops all robots, or the one named in the path, and lets them go on.

    Neither route needs the model or a place of a robot, so both work while everything else fails.
    """

    @app.post("/hold")
    def hold():
        robot = request.environ[ADDRESS].robot
        reason = _read_reason(request.get_data(cache=False))
        logger.warning("held: %s (%s)", robot or "all robots", reason)
        return _tell(service, robot, "held", service.states.hold(robot, reason), reason=reason)

    @app.post("/release")
    def release():
        robot = request.environ[ADDRESS].robot
        logger.warning("released: %s", robot or "all robots")
        return _tell(service, robot, "released", service.states.release(robot))


def _read_reason(body: bytes) -> str:
    """The body of /hold, empty or `{"reason": str}`. A body that cannot be read holds the robot all the same."""
    try:
        fields, _ = load_request(body)
        return check_text(fields["reason"], "reason", _MAX_REASON)
    except (RequestError, KeyError):
        return _DEFAULT_REASON


def _tell(service: Service, robot: str | None, status: str, is_kept: bool, **more: str) -> Response:
    """robot: null for all. survives_restart: whether it was written into the run's folder. note: for a name that stops
    nobody now, as it may be misspelt.
    """
    answer = {"status": status, "robot": robot, **more, "survives_restart": is_kept}
    known = service.robots.names
    if robot is not None and robot not in known:
        answer["note"] = f"no robot of this name is here now; here: {', '.join(known) or 'none'}"
        logger.warning("%s: %s", robot, answer["note"])
    return send_json(answer)


def add_answer_route(
    app: Flask, service: Service, answerer: Answerer, tell: Callable[[Question, Answer], None]
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
