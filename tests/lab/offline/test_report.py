import base64
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from tests import recordings
from tests.server.browser import Browser, find_missing
from vlm_local.data import open_episodes
from vlm_local.lab.offline.report import build_map, choose_frames, format_report
from vlm_local.lab.offline.rows import build_rows
from vlm_local.lab.offline.run import EvaluationPlan, evaluate
from vlm_local.lab.pages import draw_reliability
from vlm_local.types import Decision

MARGINALS = {axis: (0.2, 0.5, 0.3) for axis in ("x", "y", "z", "tilt", "yaw", "gripper")}


class _Source:
    """Answers drawn from a seed, with probabilities."""

    def __init__(self):
        self.metadata = {"model": "<made up>", "trained": False}
        self.max_workers = 1

    def build(self, robot):
        return self

    def close(self):
        self.closed = True

    def reset(self, seed):
        self._random = np.random.default_rng(seed)

    def act(self, observation):
        phrase = ("tilt up", "tilt down", "open gripper", "close gripper", "stop")[self._random.integers(5)]
        return Decision(np.zeros(7), phrase, probability=0.4, marginals=MARGINALS)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A report folder and the report, of three episodes of which one frame is broken."""
    folder = tmp_path_factory.mktemp("report")
    states = recordings.make_states(12)
    images = [recordings.encode_image(image) for image in recordings.make_images(12)]
    images[4] = b"broken"
    records = [
        recordings.make_rlds_record(states, "</script><b>bold</b>", images),
        recordings.make_rlds_record(recordings.make_states(12, 1), "lift the cup"),
        recordings.make_rlds_record(states, ""),
    ]
    recordings.write_rlds(folder / "data", records)
    source = _Source()
    report = evaluate(
        EvaluationPlan("tiny", "my data"),
        folder / "out",
        lambda report: open_episodes(folder / "data", report=report),
        lambda: source,
    )
    assert source.closed
    return folder / "out", report


def test_report_json_says_what_it_was_made_with(made):
    folder, report = made
    saved = json.loads((folder / "report.json").read_text())
    assert saved == json.loads(json.dumps(report))
    assert 0 <= saved["exact"] <= 1 and saved["steps"] == 23
    assert set(saved["axes"]) == set(MARGINALS)
    assert all("exact" in saved["baselines"][name] for name in ("majority", "repeat_last", "random"))
    assert saved["policy"] == {"name": "tiny", "model": "<made up>", "trained": False}
    assert saved["versions"]["vlm_local"] and len(saved["labels_sha256"]) == 64 and saved["seed"] == 0
    assert saved["answer_ms"]["n"] == 23
    assert len(saved["left_out"]) == 2
    assert any("step 4" in line for line in saved["left_out"])
    assert any("no instruction" in line for line in saved["left_out"])


def test_the_table_tells_models_of_one_folder_apart(made):
    _, report = made
    named = [{**report, "policy": {**report["policy"], "name": f"/data/models/of/our/lab/{name}"}} for name in "ab"]
    first, second = [format_report(each).splitlines()[2] for each in named]
    assert "our/lab/a " in first and "our/lab/b " in second and len(first) == len(second)


def test_report_html_needs_nothing_from_elsewhere(made):
    html = (made[0] / "report.html").read_text()
    links = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"')\s>]+)""", html)
    assert all(link.startswith(("data:", "#")) or "base64" in link or '"data' in link for link in links), links
    assert "<b>bold</b>" not in html and "</script><b>" not in html
    assert "untrained" in html


def test_calibration_and_f1_have_three_decimals_as_their_intervals(made):
    html = (made[0] / "report.html").read_text()
    (score, low, high) = re.search(r"<td>(0\.\d+) <small>(0\.\d+) to (\d\.\d+)</small></td><td>", html).groups()
    assert {len(number) for number in (score, low, high)} == {5}
    assert "e-0" not in re.sub(r"<script.*?</script>|<svg.*?</svg>|data:[^\"]*", "", html, flags=re.S)


def test_frames_are_shown_worst_first_with_their_pictures(made):
    html = (made[0] / "report.html").read_text()
    frames = json.loads(re.search(r'id="frames">(.*?)</script>', html, re.S)[1])
    assert len(frames) == 23
    opposite = [sum(a * b < 0 for a, b in zip(*frame["signs"], strict=True)) for frame in frames]
    assert opposite == sorted(opposite, reverse=True) and opposite[0] > 0
    picture = Image.open(io.BytesIO(base64.b64decode(frames[0]["image"])))
    assert picture.size == (32, 32)
    expected = recordings.make_images(12)[frames[0]["step"]]
    assert np.abs(np.asarray(picture).astype(int) - expected).mean() < 12
    assert frames[0]["marginals"][0] == [0.2, 0.5, 0.3]


@pytest.mark.slow
@pytest.mark.skipif(find_missing() is not None, reason=f"{find_missing()} is not installed")
def test_the_page_works_in_a_browser(made, tmp_path):
    browser = Browser(tmp_path)
    try:
        browser.open((made[0] / "report.html").as_uri(), width=390, height=800)
        browser.wait("document.querySelectorAll('#strip button').length === 23")
        assert "episode" in browser.text("#detail")
        first = browser.text("#detail")
        browser.click("#next")
        assert browser.text("#detail") != first
        browser.run("show.value = 'opposite'; show.dispatchEvent(new Event('change'))")
        shown = browser.run("return [...document.querySelectorAll('#strip button')].map(b => b.className)")
        assert shown and set(shown) == {"opposite"}
        assert browser.run("return document.documentElement.scrollWidth") <= 390, "the page is wider than the phone"
        assert not browser.read_log()
    finally:
        browser.close()


def test_order_of_frames():
    pairs = [
        ("stop", "stop", 0.9),
        ("move up", "stop", 0.5),
        ("move up", "move down", 0.1),
        ("move up", "stop", 0.8),
        ("stop", "stop", 0.2),
        ("move up", "move left", 0.3),
    ]
    rows = [
        {"episode": 0, "step": step, "instruction": "go", "label": label, "phrase": phrase, "probability": p}
        | {"full_window": True}
        for step, (label, phrase, p) in enumerate(pairs)
    ]
    assert choose_frames(build_rows(rows)) == [2, 5, 3, 1, 4, 0]


def test_a_map_has_counts_and_shares_and_marks_opposites():
    made = build_map("y", [[40, 3, 2], [1, 50, 0], [0, 0, 4]])
    assert made["words"] == ("right", "none", "left")
    assert [cell["text"] for cell in made["rows"][0]] == ["40\n89 %", "3\n7 %", "2\n4 %"]
    assert [cell["text"] for cell in made["rows"][2]] == ["0", "0", "4"], "a label of four steps has no percentage"
    assert [cell["opposite"] for cell in made["rows"][0]] == [False, False, True]
    assert build_map("gripper", [[0, 0, 0]] * 3)["words"] == ("close", "none", "open")


def test_no_figure_of_calibration_without_probabilities():
    assert draw_reliability([[0, 0, 0]] * 10) is None
    assert "<svg" in draw_reliability([[0, 0, 0]] * 9 + [[5, 4.8, 3]])
