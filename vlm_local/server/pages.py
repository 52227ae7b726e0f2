"""The live page's routes: the page, its stream, past episodes, the try-it box. Addresses are relative
in the page, so that it works below a prefix, a token or a tunnel's path. `view` shows the episodes alone.
"""

import threading
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from flask import Flask, Response, redirect, render_template, request

from vlm_local.data.runs import list_folders
from vlm_local.data.summary import summarise_run
from vlm_local.errors import RequestError
from vlm_local.files import read_json_lines
from vlm_local.policy import Policy, derive_seed
from vlm_local.server.access import FULL_PATH, take_place
from vlm_local.server.live import Hub
from vlm_local.server.service import read_body, send_json
from vlm_local.types import Observation
from vlm_local.wire import build_details, decode_act

STATIC = Path(__file__).with_name("static")
# Not guessed: a machine's own table may call JavaScript plain text, which browsers refuse to run.
_TYPES = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",  # the address may hold a token
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_MAX_LISTED = 500
_MAX_READERS = 2  # of the recording at a time: a long one takes seconds of the interpreter's lock


def add_live_routes(app: Flask, hub: Hub, run: Path | None) -> None:
    """run: the folder that is recorded to, None when recording is off."""
    add_page_routes(app, "index.html")
    _add_stream_routes(app, hub)
    add_episode_routes(app, [] if run is None else [run])
    _add_try_route(app)


def add_page_routes(app: Flask, template: str) -> None:
    """The page at /, made from `template`, and its static files."""

    @app.after_request
    def harden(response: Response):
        if _is_page(request.path):
            response.headers.update(_HEADERS)
        return response

    @app.get("/")
    def show_page():
        path = request.environ.get(FULL_PATH, request.path)
        if not path.endswith("/"):  # or the page's relative addresses would start one folder too high
            return redirect(path.rsplit("/", 1)[-1] + "/")
        return render_template(template)

    @app.get("/static/<name>")
    def show_static(name: str):
        path = STATIC / name
        if path.suffix not in _TYPES or path.parent != STATIC or not path.is_file():
            raise RequestError(f"there is no static/{name}", 404)
        return Response(path.read_bytes(), mimetype=_TYPES[path.suffix])


def _is_page(path: str) -> bool:
    return path == "/" or path.startswith(("/static/", "/live/"))


def _add_stream_routes(app: Flask, hub: Hub) -> None:
    @app.get("/live/events")
    def stream():
        response = Response(hub.watch(), mimetype="text/event-stream")
        response.headers["X-Accel-Buffering"] = "no"  # nginx in front must not hold events back
        return response

    @app.get("/live/frame/<robot>")
    def show_frame(robot: str):
        lossless = request.args.get("format") == "png"
        return Response(hub.encode_frame(robot, lossless), mimetype=f"image/{'png' if lossless else 'jpeg'}")


def add_episode_routes(app: Flask, runs: Sequence[Path]) -> None:
    """What is recorded in these folders; an episode's address is its run's place among them and its own name."""
    places = threading.Semaphore(_MAX_READERS)

    def find(run: int, episode: str) -> Path:
        for _, _, folder in list_folders(runs[run] / "episodes") if run < len(runs) else []:
            if folder.name == episode:
                return folder
        raise RequestError(f"there is no episode {episode!r} in this run", 404)

    @app.get("/live/episodes")
    def list_episodes():
        with take_place(places, "the recording is being read already; ask again"):
            found = [(episode, run) for run, folder in enumerate(runs) for episode in summarise_run(folder)]
        found.sort(key=lambda line: line[0].started or 0.0, reverse=True)
        episodes = [{"run": run, **asdict(episode)} for episode, run in found[:_MAX_LISTED]]
        return send_json({"folders": list(map(str, runs)), "total": len(found), "episodes": episodes})

    @app.get("/live/episodes/<int:run>/<episode>")
    def show_episode(run: int, episode: str):
        with take_place(places, "the recording is being read already; ask again"):
            return send_json({"steps": list(read_json_lines(find(run, episode) / "steps.jsonl"))})

    @app.get("/live/episodes/<int:run>/<episode>/frames/<int:step>")
    def show_recorded_frame(run: int, episode: str, step: int):
        frame = find(run, episode) / "frames" / f"{step:06d}.png"
        if not frame.is_file():
            raise RequestError(f"episode {episode!r} has no frame {step}", 404)
        return Response(frame.read_bytes(), mimetype="image/png")


def _add_try_route(app: Flask) -> None:
    service = app.extensions["vlm_local"]
    place = threading.Semaphore(1)
    policies: list[Policy] = []  # one of its own: no robot's episode is touched, and robots go first

    @app.post("/live/try")
    def try_it():
        if request.mimetype != "application/json":  # a foreign page can send no other kind unasked
            raise RequestError("send JSON, with Content-Type: application/json", 415)
        with service.enter(), take_place(place, "another picture is being tried; try again when it is answered"):
            with service.reading(request.content_length):
                message = decode_act(read_body())
            if message.instruction is None:
                raise RequestError("type an instruction: what shall the robot do?")
            if not policies:
                policies.append(service.policies.build(None, tell_all=True))
            policies[0].reset(derive_seed(0, "try-it", 0))
            proprio = service.settings.build_frame().read(message.state)
            decision = policies[0].act(Observation(message.image, message.instruction, proprio))
        where = {"model": service.metadata.get("model"), "robot": None, "episode": None, "step": None}
        return send_json({**build_details(decision, **where), "instruction": message.instruction})
