import re

import numpy as np
import pytest

from vlm_local.errors import ConfigError
from vlm_local.prompts import Frame, Reasoning, build_prompt, load_template
from vlm_local.types import Observation, Picture, Thought

IMAGE = np.zeros((64, 64, 3), np.uint8)
PROPRIO = np.array([0.3, -0.104, 0.2, 0.1, 0.0, -0.5, 0.5])


@pytest.mark.parametrize("style", ["chat", "paligemma"])
def test_a_prompt_shows_task_state_and_history(style):
    prompt = build_prompt(load_template(style), Observation(IMAGE, " open\nthe drawer ", PROPRIO), ["move up", "stop"])
    text = prompt.before + prompt.after
    for part in (
        "open the drawer",
        "30 cm in front",
        "10 cm to the right",
        "20 cm high",
        "50 percent",
        "move up; stop",
    ):
        assert part in text


def test_what_stays_the_same_in_an_episode_stands_before_the_image():
    template = load_template("chat")
    first = build_prompt(template, Observation(IMAGE, "open the drawer"))
    later = build_prompt(template, Observation(IMAGE, "open the drawer", PROPRIO), ["move up"])
    assert first.before == later.before and first.after != later.after


@pytest.mark.parametrize("style", ["chat", "paligemma"])
@pytest.mark.parametrize("proprio", [None, PROPRIO])
@pytest.mark.parametrize("history", [[], ["stop"]])
def test_a_prompt_reads_naturally_without_state_and_history(style, proprio, history):
    prompt = build_prompt(load_template(style), Observation(IMAGE, "open the drawer", proprio), history)
    for text in (prompt.before, prompt.after):
        assert text == text.strip() and "  " not in text and " \n" not in text and "$" not in text
    assert ("not measured" in prompt.after) == (proprio is None)


def test_an_empty_value_at_the_end_leaves_no_space(tmp_path):
    file = tmp_path / "mine.txt"
    file.write_text("[before]\nDo $instruction.\n[after]\nNow? $history\n")
    assert build_prompt(load_template(file), Observation(IMAGE, "it")).after == "Now?"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Do $instruction", "one of the two is missing"),
        ("[before]\nHello\n[after]\nthere\n", "never shows the instruction"),
        ("[before]\nDo $$instruction\n[after]\nthere\n", "never shows the instruction"),
        ("[before]\nDo it\n[frame]\n$$picture\n[after]\n$instruction\n", r"must hold \$picture once"),
        ("[before]\n$instruction $colour\n[after]\n\n", "unknown colour"),
        ("[before]\n$instruction costs 5$ now\n[after]\n\n", "unknown"),
    ],
)
def test_a_wrong_template_is_refused_with_the_reason(tmp_path, text, reason):
    file = tmp_path / "mine.txt"
    file.write_text(text)
    with pytest.raises(ConfigError, match=reason):
        load_template(file)


def test_names_in_braces_are_the_same_names(tmp_path):
    plain = (
        "[before]\nIt\n[reasoning]\nYou wrote: $reasoning.\n[frame]\nThen $picture here\n[after]\nDo $instruction now\n"
    )
    prompts = []
    for text in (plain, re.sub(r"\$(\w+)", r"${\1}", plain)):
        (tmp_path / "mine.txt").write_text(text)
        template, shown = load_template(tmp_path / "mine.txt"), [Frame(0, Picture(IMAGE))]
        reasoning = Reasoning(0, Thought("a block", 2))
        prompts.append(build_prompt(template, Observation(IMAGE, "it"), frames=shown, reasoning=reasoning))
    plain, braced = prompts
    assert braced.earlier[:2] == plain.earlier[:2] and len(braced.earlier) == len(plain.earlier) == 4
    assert (braced.before, braced.after) == (plain.before, plain.after) == ("It", "Do it now")
