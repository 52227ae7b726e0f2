"""`view` and `share`: recorded episodes in a browser, without a model; `--episode` of replay and export."""

import base64
import io
import json
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from contextlib import contextmanager

import numpy as np
import pytest
from PIL import Image

from tests.server.browser import Browser, find_missing
from vlm_local.cli import main
from vlm_local.data.runs import RunWriter

LEFT, RIGHT, UP, DOWN, ESCAPE = "\ue012", "\ue014", "\ue013", "\ue015", "\ue00c"  # as WebDriver names keys
FOREIGN = "lift </script><b>the_cup_that_stands_beside_the_sink</b>"  # to a page, and without a place to break
WORDS = f"TASK: {FOREIGN}\nPLAN: <img src=x onerror=alert(1)>"  # a model may write anything
THOUGHT = {"reasoning": WORDS, "reasoning_step": 0, "reasoning_age": 1, "reasoning_tokens": 9, "reasoning_ms": 12.5}
needs_browser = pytest.mark.skipif(find_missing() is not None, reason=f"{find_missing()} is not installed")


def _write_episode(writer, robot, instruction, outcome=None, fault=None, frames=True, start=1.7e9, probability=0.75):
    """Three steps, of which the second may be a fault."""
    writer.start_episode(robot, {"seed": 0})
    for step in range(3):
        line = {
            "robot": robot,
            "episode": 0,
            "step": step,
            "time": start + step / 5,
            "instruction": instruction,
            "proprio": None,
            "phrase": ("move up", "move down", "stop")[step],
            "probability": probability if step == 1 else 0.75,
            "marginals": {"z": [0.25, 0.0, 0.75]},
            "axes": {"z": (1, -1, 0)[step]},
            "action": [0.0] * 7,
            "fault": fault if step == 1 else None,
            "model": "/srv/models/tiny",
            "extra": {} if fault is None else THOUGHT,
        }
        writer.add_step(line, np.full((64, 64, 3), 80 * step, np.uint8) if frames else None)
    writer.end_episode(robot, {"outcome": outcome} if outcome else None)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    simulated, served = RunWriter(folder / "simulated"), RunWriter(folder / "served")
    _write_episode(simulated, "reach", "reach the red block", "success")
    _write_episode(simulated, "reach", "reach the blue block", "late", frames=False, probability=0.4)
    _write_episode(served, "arm", FOREIGN, fault="out of memory", start=1.71e9)
    served.close()
    simulated.close()
    return folder


@pytest.fixture(scope="module")
def viewer(runs):
    """URL of `view` of these runs, in a process of its own."""
    with _view(runs) as url:
        yield url


@contextmanager
def _view(folder):
    command = [sys.executable, "-m", "vlm_local", "view", str(folder), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        yield re.search(r"look at (http://127\.0\.0\.1:\d+)/; runs: 2", process.stdout.readline())[1]
    finally:
        process.terminate()  # SIGINT is ignored where a shell started the tests in the background
        process.wait(30)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


def _get(url, **headers) -> bytes:
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=60) as answer:
        return answer.read()


def test_episodes_of_all_runs_are_listed_newest_first(viewer):
    listed = json.loads(_get(f"{viewer}/live/episodes"))
    found = [(episode["id"], episode["outcome"], episode["has_frames"]) for episode in listed["episodes"]]
    assert found[0] == ("arm-0", None, True)
    assert sorted(found[1:]) == [("reach-0", "success", True), ("reach-1", "late", False)]
    run = listed["episodes"][0]["run"]
    with Image.open(io.BytesIO(_get(f"{viewer}/live/episodes/{run}/arm-0/frames/2"))) as image:
        assert image.getpixel((0, 0)) == (160, 160, 160)


def test_only_episodes_are_served_and_only_to_this_machine(viewer):
    for path in ("act", "health", "live/events", "live/episodes/7/arm-0", "live/episodes/0/..", "static/../viewer.py"):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            _get(f"{viewer}/{path}")
    with pytest.raises(urllib.error.HTTPError, match="403"):
        _get(f"{viewer}/live/episodes", Host="attacker.example")


@needs_browser
def test_a_person_filters_and_walks_by_keys(browser, viewer):
    browser.open(viewer)
    browser.wait("document.querySelectorAll('#rows tr').length === 3")
    assert browser.text("#shown") == "3 episodes"
    browser.type("#words", "block reach")
    browser.wait("document.querySelectorAll('#rows tr').length === 2")
    browser.run("const e = document.getElementById('outcome'); e.value = 'late'; e.dispatchEvent(new Event('input'))")
    assert browser.text("#shown") == "1 of 3 episodes" and browser.text("#rows a") == "reach-1"
    browser.open("about:blank")
    browser.open(viewer)
    browser.wait("document.querySelectorAll('#rows tr').length === 3")
    browser.click("#faulty")
    browser.wait("document.querySelectorAll('#rows tr').length === 1")
    browser.wait("document.querySelector('#rows img').naturalWidth === 64")
    browser.click("#faulty")
    browser.run("const e = document.getElementById('doubt'); e.value = '0.5'; e.dispatchEvent(new Event('input'))")
    assert browser.text("#shown") == "1 of 3 episodes" and browser.text("#rows a") == "reach-1"
    browser.run("const e = document.getElementById('doubt'); e.value = ''; e.dispatchEvent(new Event('input'))")
    browser.press(DOWN)
    browser.run("document.activeElement.click()")
    browser.wait("document.querySelector('#stage .phrase')?.innerText === 'move up'")
    assert browser.text("#stage .instruction") == FOREIGN and "75 %" in browser.text("#stage .axes")
    assert "gripper\nclosed" in browser.text("#stage .readings")  # also without `meant`, as in the simulator
    browser.press(RIGHT)
    assert "out of memory" in browser.text("#stage .badges")
    browser.press(RIGHT)
    browser.press(RIGHT)  # there is no fourth
    assert browser.text("#where") == "3 of 3"
    browser.press(LEFT)
    assert browser.text("#where") == "2 of 3"
    browser.press(DOWN)
    browser.wait("location.hash.includes('reach-')")
    browser.press(ESCAPE)
    browser.wait("document.activeElement.hash?.includes('reach-')")
    assert not browser.read_log()


@needs_browser
@pytest.mark.parametrize("width", [1400, 390])
def test_the_page_fits_the_screen(browser, viewer, width):
    for part in ("", "#episodes/0/arm-0", "#episodes/1/reach-1"):
        browser.open("about:blank")
        browser.open(f"{viewer}/{part}", width, 844)
        browser.wait("document.querySelector(location.hash ? '#stage .card' : '#rows tr')")
        assert browser.run("return document.documentElement.scrollWidth <= innerWidth"), part


@needs_browser
@pytest.mark.slow
def test_a_replay_stands_beside_the_recording(browser, runs, tmp_path, capsys):
    out = tmp_path / "replay"
    command = ["replay", str(runs / "simulated"), "--policy", "stop", "--episode", "reach-0", "--out", str(out)]
    assert main(command) == 0 and main(command) == 2
    assert "choose another --out" in capsys.readouterr().err
    shutil.copytree(runs / "simulated", tmp_path / "simulated")
    with _view(tmp_path) as url:
        browser.open(url)
        browser.wait("document.querySelectorAll('#rows tr').length === 3")
        rows = "[...document.querySelectorAll('#rows tr')]"
        browser.run(f"{rows}.find((row) => row.innerText.includes('75 %')).querySelector('a').click()")
        browser.wait("document.querySelectorAll('#beside option').length === 2")
        browser.run(
            "const e = document.getElementById('beside'); e.selectedIndex = 1; e.dispatchEvent(new Event('input'))"
        )
        browser.wait("document.querySelectorAll('#stage .card').length === 2")
        browser.press(RIGHT)
        said = browser.run("return [...document.querySelectorAll('#stage .phrase')].map((phrase) => phrase.innerText)")
        assert said == ["move down", "stop"]
        assert browser.run("return document.documentElement.scrollWidth <= innerWidth") and not browser.read_log()


def _share(runs, out, episode) -> str:
    assert main(["share", str(runs / episode), "--out", str(out)]) == 0
    return out.read_text()


@needs_browser
def test_a_shared_episode_opens_from_disk_and_asks_no_network(browser, runs, tmp_path):
    _share(runs, tmp_path / "episode.html", "served/episodes/arm-0")
    browser.open("about:blank")
    browser.read_log()  # of pictures that the page before was still loading
    browser.open(f"file://{tmp_path}/episode.html", 390, 844)
    browser.wait("document.querySelector('#stage .frame')?.naturalWidth === 64")
    assert browser.text("#stage .instruction") == FOREIGN and not browser.run("return document.querySelector('b')")
    assert browser.run("return document.querySelector('#stage .reasoning p').textContent") == WORDS
    title = "Reasoning about step 0, 1 step before this, 9 tokens in 13 ms"
    assert browser.text("#stage .reasoning summary") == title and not browser.run(
        "return document.querySelector('[src=x]')"
    )
    browser.press(RIGHT)
    assert browser.text("#where") == "2 of 3" and "out of memory" in browser.text("#stage .badges")
    browser.press(" ")
    browser.wait("document.getElementById('where').innerText === '3 of 3'")
    loaded = browser.run("return performance.getEntriesByType('resource').map((entry) => entry.name.slice(0, 5))")
    assert set(loaded) <= {"data:"}
    assert browser.run("return document.documentElement.scrollWidth <= innerWidth")
    assert not browser.read_log()


def test_a_shared_file_holds_every_picture_and_names_no_place(runs, tmp_path, capsys):
    text = _share(runs, tmp_path / "episode.html", "served/episodes/arm-0")
    pictures = re.findall(r"data:image/jpeg;base64,([A-Za-z0-9+/=]+)", text)
    shades = [Image.open(io.BytesIO(base64.b64decode(picture))).getpixel((0, 0))[0] for picture in pictures]
    assert shades == pytest.approx([0, 80, 160], abs=2)
    assert not re.search(r"""(?:src|href)=["'](?!data:)|https?://|@import""", text)
    assert "<img src=x" not in text and r"\u003cimg src=x" in text
    assert str(runs) not in text and "/srv" not in text and "3 pictures" in capsys.readouterr().out
    assert "data:image" not in _share(runs, tmp_path / "blind.html", "simulated/episodes/reach-1")


def test_one_episode_is_replayed_and_exported(runs, tmp_path, capsys):
    run = str(runs / "simulated")
    assert main(["replay", run, "--policy", "stop", "--episode", "reach-0"]) == 0
    out = capsys.readouterr().out
    assert "reach-0" in out and "reach-1" not in out and "1 of 3 answers are the same" in out
    assert main(["export", run, "--episode", "reach-0", "--out", str(tmp_path / "out")]) == 0
    assert [film.name for film in (tmp_path / "out" / "films").iterdir()] == ["reach-0.mp4"]


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (["replay", "simulated", "--policy", "stop", "--episode", "reach-9"], "has no episode reach-9"),
        (["export", "simulated", "--episode", "push-0", "--out", "out"], "has no episode push-0"),
        (["share", "simulated", "--out", "x.html"], "is no recorded episode"),
        (["view", "nowhere"], "no recorded run in nowhere"),
    ],
)
def test_what_is_not_there_is_refused(runs, monkeypatch, capsys, command, says):
    monkeypatch.chdir(runs)
    assert main(command) == 2
    assert says in capsys.readouterr().err
