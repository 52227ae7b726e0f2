"""The live page in a real browser."""

import numpy as np
import pytest
from PIL import Image

from tests.server.browser import Browser, find_missing
from tests.server.observing import observe
from tests.server.test_answers import BRIGHT, DRAWER, build_question
from tests.serving import IMAGE, PHRASE, SteeredEngine, ask
from vlm_local.data.questions import open_labelled
from vlm_local.errors import EngineError
from vlm_local.server.access import Gate
from vlm_local.server.service import ServerSettings
from vlm_local.server.watch import FROZEN_AFTER
from vlm_local.types import Generation

pytestmark = pytest.mark.skipif(find_missing() is not None, reason=f"{find_missing()} is not installed")

WIDTHS = {"laptop": (1280, 800), "phone": (390, 844)}


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture
def server(tmp_path):
    with observe(tmp_path / "run") as server:
        yield server


def test_robots_stand_side_by_side_and_follow_their_steps(browser, server):
    browser.open(server.url)
    browser.wait("!document.getElementById('waiting').hidden")
    assert browser.text("#address") == f"{server.url}/act"
    for name in ("left", "right"):
        server.act(f"/s/{name}/act?details=1")
    browser.wait("document.querySelectorAll('.card').length === 2")
    browser.wait(f"document.querySelector('.phrase').innerText === '{PHRASE}'")
    tops = browser.run("return [...document.querySelectorAll('.card')].map((card) => card.getBoundingClientRect().top)")
    assert tops[0] == tops[1]
    assert browser.text(".robot") == "left" and "100 % sure" in browser.text(".sure")
    assert [" ".join(browser.text(f".axis:nth-child({row}) .choice.chosen").split()) for row in (1, 2)] == [
        "forward 100 %",
        "stay 100 %",
    ]
    assert "action\n[0.0125, 0, 0.0125, 0, 0, 0, 1]" in browser.text(".readings")
    assert browser.run("return document.querySelector('.axis .track i:last-child').style.width") == "50%"
    assert "gripper\nopen, measured 100 %" in browser.text(".readings")
    browser.wait("document.querySelector('.frame').naturalWidth === 256")
    server.engine.phrase = "move down, close gripper"
    server.act("/s/left/act?details=1")
    browser.wait("document.querySelector('.phrase').innerText === 'move down, close gripper'")
    browser.wait("document.getElementById('counters').innerText.replace(/\\s+/g, ' ').includes('steps 3')")
    assert not browser.read_log()


def test_a_person_says_what_a_detector_should_have_said(browser, server, tmp_path):
    server.engine.phrase = "yes"
    ask(server.port, "POST", "/answer", build_question())
    browser.open(f"{server.url}/#detector")
    browser.wait("document.querySelector('.tile img')?.naturalWidth === 48")
    assert browser.text(".tile .muted") == DRAWER and str(tmp_path) in browser.text("#answers-place")
    assert "yes, 100 % sure" in browser.text(".tile")
    browser.click(".choices button:nth-child(2)")
    browser.wait("document.querySelector('.choices [aria-pressed=true]')?.innerText === 'no'")
    (image,) = open_labelled(tmp_path / "run/answers").open_images(pytest.fail)
    assert image.answer == "no" and (image.image == BRIGHT).all()
    assert not browser.read_log()


@pytest.mark.slow
def test_four_robots_stand_beside_each_other_and_their_charts_fill_their_cards(browser, server):
    server.act("/s/a/act?details=1")
    _open_anew(browser, server.url)
    browser.wait("document.querySelectorAll('.card').length === 1")
    for name in "bcd":
        server.act(f"/s/{name}/act?details=1")
    browser.open(server.url, 1400, 900)
    browser.wait("document.querySelectorAll('.card').length === 4")
    tops = browser.run("return [...document.querySelectorAll('.card')].map((card) => card.getBoundingClientRect().top)")
    assert len(set(tops)) == 1
    browser.wait("[...document.querySelectorAll('.tape')].every((tape) => tape.width === tape.clientWidth)")
    assert not browser.read_log()


@pytest.mark.slow
def test_a_robot_that_is_idle_folds_below_the_others_and_comes_back(browser, server):
    server.act("/s/a/act?details=1")
    _open_anew(browser, server.url)
    browser.wait("document.querySelector('#robots .card')")
    browser.run("const now = performance.now(); performance.now = () => now + 61e3;")  # the page's clock
    browser.wait("document.querySelector('#folded .card') && !document.querySelector('#robots .card')")
    assert browser.text("#folded .robot") == "a"
    assert not browser.run("return document.querySelector('#folded .tape').clientHeight")
    browser.click("#folded .hold")
    browser.wait("document.querySelector('.card.held')")
    browser.click("#release-all")
    server.act("/s/a/act?details=1")
    browser.wait("document.querySelector('#robots .card .tape')?.width > 300")


@pytest.mark.slow
def test_an_answer_that_was_drawn_says_so_and_which_was_likelier(browser):
    class Torn(SteeredEngine):
        def generate(self, requests):
            (request,) = requests
            probabilities = np.array(
                [{"move left": 0.83, "move up": 0.17}.get(each, 0.0) for each in request.sentences]
            )
            return [Generation("move up", probabilities, 0.0)]

    with observe(engine=Torn(), decide="sample") as server:
        server.act()
        _open_anew(browser, server.url)
        browser.wait("document.querySelector('.sure')?.innerText === '17 % sure, sampled; likeliest: move left 83 %'")
        browser.press("3")  # Try it
        browser.wait("document.querySelector('#borrow button')")
        browser.click("#borrow button")
        browser.wait("document.getElementById('preview').naturalWidth === 256")
        browser.click("#ask")
        browser.wait("document.querySelector('#answer table')")
        told = browser.run(
            "return [...document.querySelectorAll('#answer tr')].map((row) => row.innerText.split(/\\s*\\t/))"
        )
        assert told == [["move left", "83 %"], ["move up", "17 %"]]
        assert not browser.read_log()


@pytest.mark.slow
def test_everything_works_below_a_token(browser, tmp_path):
    settings = ServerSettings(gate=Gate("secret-token"))
    with observe(tmp_path, settings) as server:
        server.act("/t/secret-token/act?details=1")
        browser.open(f"{server.url}/t/secret-token")
        browser.wait(f"document.querySelector('.phrase')?.innerText === '{PHRASE}'")
        browser.wait("document.querySelector('.frame').naturalWidth === 256")
        assert browser.text("#state") == "healthy" and not browser.read_log()


@pytest.mark.slow
def test_a_fault_and_its_end_are_seen(browser, server):
    server.engine.fault = EngineError("out of memory <b>now</b>")
    server.act()
    browser.open(server.url)
    browser.wait("document.querySelector('.card.faulty')")
    assert "out of memory <b>now</b>" in browser.text(".badges")
    server.engine.fault = None
    server.act()
    browser.wait("document.querySelector('.card:not(.faulty)')")
    browser.wait(f"document.querySelector('.phrase').innerText === '{PHRASE}'")
    for _ in range(FROZEN_AFTER):
        server.act()
    browser.wait(f"document.querySelector('.badges').innerText === 'Same picture for {FROZEN_AFTER} steps'")


def _open_anew(browser, url):
    """Without what the page of the test before still writes about its server, which is gone."""
    browser.open("about:blank")
    browser.read_log()
    browser.open(url)


def _find_tops(browser):
    return browser.run("return [...document.querySelectorAll('.stop')].map((row) => row.getBoundingClientRect().top)")


def test_a_robot_is_stopped_and_let_go_by_its_buttons(browser, server):
    for name in ("constructor", "right"):
        server.act(f"/s/{name}/act?details=1")
    _open_anew(browser, server.url)
    browser.wait("document.querySelectorAll('.card').length === 2")
    tops = _find_tops(browser)
    browser.click(".stop .hold")
    browser.wait("document.querySelectorAll('.card.held').length === 1")
    assert browser.text("#held-text").startswith("Held: constructor")
    for name, is_held in (("constructor", True), ("right", False)):
        assert bool(server.act(f"/s/{name}/act?details=1")["fault"]) is is_held
    browser.wait("document.querySelector('.badges').innerText.includes('held by a person: Hold on the live page')")
    assert _find_tops(browser) == tops  # whatever is said, no button moves away from under a hand
    browser.click(".stop .release")
    browser.wait("!document.querySelector('.card.held') && document.getElementById('held').hidden")
    assert server.act("/s/constructor/act?details=1")["phrase"] == PHRASE
    assert not browser.read_log()


@pytest.mark.slow
def test_the_space_bar_stops_all_and_never_starts_them_again(browser, server):
    server.act()
    _open_anew(browser, f"{server.url}/s/robot/")  # also here, all means all
    browser.wait("document.querySelector('.card')")
    browser.press(" ")
    browser.wait("document.querySelector('.card.held')")
    browser.run("document.getElementById('release-all').focus()")
    browser.press(" ")
    browser.press(" ")
    assert server.act("/s/other/act?details=1")["fault"] == "held by a person: space bar on the live page"
    browser.wait("document.querySelectorAll('.card.held').length === 2")
    browser.click("#release-all")
    browser.wait("!document.querySelector('.card.held')")
    browser.open(f"{server.url}/#try")
    browser.type("#instruction", "lift the cup")  # with spaces
    assert server.act()["fault"] is None
    assert not browser.read_log()


@pytest.mark.slow
def test_a_server_that_says_nothing_more_is_not_shown_as_healthy(browser, server, monkeypatch):
    _open_anew(browser, server.url)
    browser.wait("document.getElementById('state').innerText === 'healthy'")
    monkeypatch.setattr("vlm_local.server.live._STATUS_EVERY_S", 600)  # as a stopped process, or a link that is gone
    browser.wait("document.getElementById('state').innerText === 'no connection'")
    browser.wait("document.getElementById('state').innerText === 'healthy'")  # it connects anew by itself
    assert not browser.read_log()


@pytest.mark.slow
def test_a_stop_that_does_not_reach_the_server_is_said_loudly(browser):
    with observe() as server:
        _open_anew(browser, server.url)
        browser.wait("document.getElementById('state').innerText === 'healthy'")
    browser.click("#hold-all")
    browser.wait("document.getElementById('hold-failed').innerText.includes('The robot may be moving')")
    browser.read_log()  # the failed connections


@pytest.mark.slow
def test_the_page_says_when_the_server_is_gone_and_that_a_hold_is_what_it_heard_last(browser):
    with observe() as server:
        _open_anew(browser, server.url)
        browser.wait("document.getElementById('state').innerText === 'healthy'")
        browser.click("#hold-all")
        browser.wait("document.getElementById('held-text').innerText.includes('All robots are held')")
        added = "getComputedStyle(document.getElementById('held-text'), '::after').content"
        assert browser.run(f"return {added}") == "none"
    browser.wait("document.getElementById('state').innerText === 'no connection'")
    browser.wait(f"{added}.includes('no connection now')")
    browser.read_log()  # the failed connections


@pytest.mark.slow
def test_a_page_that_is_refused_says_why(browser, server, monkeypatch):
    monkeypatch.setattr("vlm_local.server.live.MAX_VIEWERS", 0)  # an old token is refused in the same way
    _open_anew(browser, server.url)
    browser.wait("document.getElementById('state').innerText === 'refused'")
    assert "times already; close one" in browser.text("#notice")
    browser.read_log()  # the refusals


@pytest.mark.slow
def test_a_past_episode_is_played(browser, server):
    for phrase in ("move up", "move down", "stop"):
        server.engine.phrase = phrase
        server.act()
    browser.open(server.url)
    browser.open(f"{server.url}/#episodes")
    browser.wait("document.querySelector('#rows .steps')?.innerText === '3'")
    browser.click("#rows a")
    browser.wait("document.querySelector('#stage .phrase')?.innerText === 'move up'")
    browser.wait("document.querySelector('#stage .frame').naturalWidth === 256")
    browser.click("#play")
    browser.wait("document.querySelector('#stage .phrase').innerText === 'stop'")
    assert browser.text("#where") == "3 of 3"
    assert not browser.read_log()


@pytest.mark.slow
def test_the_try_it_box_shows_an_answer(browser, server, tmp_path):
    Image.fromarray(np.zeros((64, 80, 3), np.uint8)).save(tmp_path / "black.png")
    browser.open(f"{server.url}/#try")
    browser.type("#file", str(tmp_path / "black.png"))
    browser.type("#instruction", "lift the cup")
    browser.click("#ask")
    browser.wait(f"document.querySelector('#answer .phrase')?.innerText === '{PHRASE}'")
    assert server.engine.requests[-1].image.shape == (64, 80, 3)
    server.engine.fault = EngineError("out of memory")
    browser.click("#ask")
    browser.wait("document.getElementById('refusal').innerText === 'out of memory'")
    (refusal,) = browser.read_log()  # taken out of the log, which the tests share
    assert "503" in refusal


@pytest.mark.slow
def test_the_try_it_box_borrows_what_a_robot_sees(browser, server):
    server.act("/s/left/act?details=1", instruction="open the drawer")
    browser.open(f"{server.url}/#try")
    browser.wait("document.querySelector('#borrow button')")
    browser.click("#borrow button")
    browser.wait("document.getElementById('preview').naturalWidth === 256")
    assert browser.run("return document.getElementById('instruction').value") == "open the drawer"
    browser.click("#ask")
    browser.wait("document.querySelector('#answer .phrase')")
    np.testing.assert_array_equal(server.engine.requests[-1].image, IMAGE)
    assert not browser.read_log()


@pytest.mark.slow
@pytest.mark.parametrize("device", WIDTHS)
@pytest.mark.parametrize("dark", [False, True])
def test_it_fits_the_screen_dark_and_light(browser, server, device, dark):
    server.engine.phrase = "move backward right down, tilt down, rotate counterclockwise, close gripper"
    for name in ("a", "b"):
        server.act(f"/s/{name}/act?details=1", instruction="put the small carrot on the second plate from the left")
    for part in ("live", "episodes", "try"):
        browser.open("about:blank")
        browser.open(f"{server.url}/#{part}", *WIDTHS[device], dark=dark)
        browser.wait("document.getElementById('state').innerText === 'healthy'")
        assert browser.run("return document.documentElement.scrollWidth <= innerWidth"), part
        ground = browser.run("return getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
        assert (max(ground) < 40) if dark else (min(ground) > 230)
