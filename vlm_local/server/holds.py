"""POST /hold and POST /release: a person stops all robots, or the one named in the path, and lets them go on."""

import logging

from flask import Flask, Response, request

from vlm_local.errors import RequestError
from vlm_local.files import encode_json
from vlm_local.server.access import ADDRESS
from vlm_local.server.service import Service
from vlm_local.wire import check_text, load_request

logger = logging.getLogger(__name__)

_DEFAULT_REASON = "POST /hold"
_MAX_REASON = 200


def add_hold_routes(app: Flask) -> None:
    """Neither route needs the model or a place of a robot: both work while everything else fails."""
    service: Service = app.extensions["vlm_local"]

    @app.post("/hold")
    def hold():
        robot = request.environ[ADDRESS].robot
        reason = _read_reason(request.get_data(cache=False))
        logger.warning("held: %s (%s)", robot or "all robots", reason)
        return _tell(robot, "held", service.kept.hold(robot, reason), reason=reason)

    @app.post("/release")
    def release():
        robot = request.environ[ADDRESS].robot
        logger.warning("released: %s", robot or "all robots")
        return _tell(robot, "released", service.kept.release(robot))


def _read_reason(body: bytes) -> str:
    """The body of /hold, empty or `{"reason": str}`. What cannot be read is no reason not to stop."""
    try:
        fields, _ = load_request(body)
        return check_text(fields["reason"], "reason", _MAX_REASON)
    except (RequestError, KeyError):
        return _DEFAULT_REASON


def _tell(robot: str | None, status: str, is_kept: bool, **more: str) -> Response:
    """robot: null for all. survives_restart: whether it was written into the run's folder."""
    answer = {"status": status, "robot": robot, **more, "survives_restart": is_kept}
    return Response(encode_json(answer) + "\n", mimetype="application/json")
