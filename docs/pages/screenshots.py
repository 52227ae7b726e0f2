"""Draws the pictures here: python docs/pages/screenshots.py, from the repository. Needs chromium and chromedriver."""

import io
import os
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from PIL import Image

from tests.server.browser import Browser
from vlm_local.cli import main
from vlm_local.errors import EngineError
from vlm_local.lab.closed_loop.demo import open_server, play
from vlm_local.server.serve import bind
from vlm_local.server.viewer import serve_episodes

HERE = Path(__file__).parent
SIZES = {"": (1400, 900, False), "-phone": (390, 844, True)}  # width, height, dark
COLOURS = 160  # of a PNG's palette: a fifth of the bytes


def shoot(browser: Browser, name: str, url: str, ready: str) -> None:
    """NAME.png, wide and light, and NAME-phone.png, narrow and dark. ready: JavaScript, true once it is drawn."""
    for suffix, (width, height, dark) in SIZES.items():
        browser.open("about:blank")
        browser.open(url, width, height, dark)
        browser.wait(ready)
        time.sleep(1.0)  # pictures
        shot = Path(tempfile.mkdtemp()) / "shot.png"
        browser.screenshot(shot)
        buffer = io.BytesIO()
        Image.open(shot).convert("RGB").quantize(COLOURS).save(buffer, "PNG", optimize=True)
        (HERE / f"{name}{suffix}.png").write_bytes(buffer.getvalue())


def drive(url: str) -> None:
    with suppress(EngineError):  # the server stops when the picture is taken
        for _ in play(url, None):
            pass


def shoot_live(browser: Browser) -> None:
    with open_server(0) as url:
        threading.Thread(target=drive, args=(url,), daemon=True).start()
        shoot(
            browser,
            "live",
            url,
            "document.querySelector('.frame')?.naturalWidth && Number(document.querySelector('dd').innerText)",
        )


def shoot_results(browser: Browser, folder: Path) -> None:
    """The episodes of a short run in the simulator, one of them, and the report."""
    main(
        [
            "sim",
            "-q",
            "--policy",
            "tiny",
            "--task",
            "reach,push",
            "--episodes",
            "3",
            "--workers",
            "1",
            "--out",
            str(folder),
        ]
    )
    listener = bind("127.0.0.1", 0)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}/"
    threading.Thread(target=serve_episodes, args=([folder], [], listener), daemon=True).start()
    shoot(browser, "episodes", url, "document.querySelectorAll('#rows tr').length === 6")
    shoot(browser, "episode", f"{url}#episodes/0/push-1", "document.querySelector('#stage .frame')?.naturalWidth")
    shoot(browser, "report", f"{(folder / 'report.html').resolve().as_uri()}", "document.querySelector('.tiles')")


if __name__ == "__main__":
    place = Path(tempfile.mkdtemp())
    browser = Browser(place / "profile")
    try:
        shoot_live(browser)
        os.chdir(place)  # the pages show the folder as it was named
        shoot_results(browser, Path("results"))
    finally:
        browser.close()
