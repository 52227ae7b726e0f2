"""The pages over folders, without a model or a robot: `view`; and one episode as one file: `share`."""

import base64
import re
import socket
from collections.abc import Sequence
from pathlib import Path

import jinja2
from flask import Flask, request
from waitress.server import create_server

from vlm_local.data.images import encode_file
from vlm_local.data.runs import RecordedEpisode
from vlm_local.errors import RequestError
from vlm_local.files import encode_json, open_replacing
from vlm_local.server.access import check_origin
from vlm_local.server.asked import LoggedAnswers, add_asked_routes
from vlm_local.server.pages import STATIC, add_episode_routes, add_page_routes

_THREADS = 4
_MAX_BODY = 2**12  # a correction
_JPEG_QUALITY = 90
_SCRIPTS = ("page.js", "tape.js", "card.js", "player.js", "share.js")  # each after those that it imports


def serve_episodes(runs: Sequence[Path], logs: Sequence[Path], listener: socket.socket) -> None:
    """Show these folders in a browser, on a bound socket, until Ctrl-C. runs, logs: as `create_viewer` takes them."""
    create_server(create_viewer(runs, logs), sockets=[listener], threads=_THREADS, ident=None).run()


def create_viewer(runs: Sequence[Path], logs: Sequence[Path]) -> Flask:
    """The WSGI application. runs: with episodes. logs: of AutoEval's --save_classifier_data. Raises DataError."""
    app = Flask(__name__, static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = _MAX_BODY

    @app.before_request
    def admit():
        check_origin(request.method, request.path, request.headers.get, has_token=False)

    @app.errorhandler(RequestError)
    @app.errorhandler(OSError)
    @app.errorhandler(ValueError)
    def explain(error: Exception):
        return {"error": str(error)}, getattr(error, "status", 500)

    add_page_routes(app, "view.html")
    add_episode_routes(app, runs)
    add_asked_routes(app, LoggedAnswers(logs))
    return app


def write_episode(path: Path, episode: RecordedEpisode, name: str) -> int:
    """Write the episode with its pictures as one HTML file that needs no network; returns how many pictures it has.

    Of a model's folder only the name is in it. name: of the episode. Raises ConfigError where nothing can be written,
    DataError for a picture that cannot be read.
    """
    has_frames = any(Path(episode.source, "frames").glob("*.png"))
    frames = [_encode_frame(episode.load_image(step)) for step in range(len(episode.lines) if has_frames else 0)]
    lines = [line | {"model": Path(line["model"]).name} if line.get("model") else line for line in episode.lines]
    told = {"name": name, "steps": lines, "frames": frames}
    pages = jinja2.Environment(loader=jinja2.PackageLoader("vlm_local.server"), autoescape=True)
    model = next((line["model"] for line in lines if line.get("model")), None)
    text = pages.get_template("share.html").render(
        title=name,
        about=", ".join(str(word) for word in (model, episode.meta.get("outcome")) if word),
        episode=encode_json(told).replace("<", r"\u003c"),  # nothing in it ends the script element
        style=(STATIC / "live.css").read_text(encoding="utf-8"),
        script="\n".join(map(_wrap_script, _SCRIPTS)),
    )
    with open_replacing(path) as file:
        file.write(text)
    return len(frames)


def _encode_frame(image) -> str:
    """uint8 (H, W, 3) -> the address of a JPEG in the page itself."""
    return f"data:image/jpeg;base64,{base64.b64encode(encode_file(image, 'JPEG', quality=_JPEG_QUALITY)).decode()}"


def _wrap_script(name: str) -> str:
    """A module as a function, whose exports are put into a constant of the module's name: a file has no addresses."""
    text = (STATIC / name).read_text(encoding="utf-8")
    text = re.sub(r'^import (\{[^}]*\}) from "\./(\w+)\.js";$', r"const \1 = \2;", text, flags=re.MULTILINE)
    exported = re.findall(r"^export (?:const|class|(?:async )?function) (\w+)", text, flags=re.MULTILINE)
    body = re.sub(r"^export ", "", text, flags=re.MULTILINE)
    return f"const {name.removesuffix('.js')} = (() => {{\n{body}\nreturn {{ {', '.join(exported)} }};\n}})();"
