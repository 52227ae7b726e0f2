"""Chat templates of strangers that would keep a model's load from ending."""

import pytest

from tests.tiny_models import tiny_checkpoint
from vlm_local.cli import main
from vlm_local.engines import templates
from vlm_local.engines.processors import load_processor
from vlm_local.errors import ConfigError

NEST = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}"
BOMBS = {
    "loops": (NEST + "x" + "{% endfor %}" * 3, "may never end"),
    "loops without text": (NEST + "{% endfor %}" * 3, "may never end"),
    "a macro of its own": (
        "{% macro m(n) %}{% for i in range(9) %}{{ m(n) }}{% endfor %}{% endmacro %}{{ m(1) }}",
        "may never end",
    ),
    "doubled text": (
        "{% set n = namespace(t='xxxxxxxx') %}{% for i in range(60) %}{% set n.t = n.t ~ n.t %}{% endfor %}{{ n.t }}",
        "makes more text",
    ),
    "repeated text": ("{{ ('x' * 99999999999)|length }}", "makes more text"),
    "a wide number": ("{{ '%099999999999d'|format(1) }}", "makes more text"),
    "powers": ("{{ 9 ** 9 ** 9 ** 9 }}", "computes powers"),
    "only with an answer": (
        "{% if messages|length > 1 %}" + NEST + "{% endfor %}" * 3 + "{% endif %}x",
        "may never end",
    ),
    "only with a second question": (
        "{% if messages|length > 2 %}" + NEST + "{% endfor %}" * 3 + "{% endif %}x",
        "may never end",
    ),
    "only with a picture": (
        "{% if messages[0].content|length > 1 %}" + NEST + "{% endfor %}" * 3 + "{% endif %}x",
        "may never end",
    ),
}


def _set_template(folder, template):
    (folder / "chat_template.json").unlink()
    (folder / "chat_template.jinja").write_text(template)


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_template_without_an_end_is_refused(folder, bomb, monkeypatch):
    monkeypatch.setattr(templates, "MAX_TEMPLATE_LINES", 50_000)
    template, says = BOMBS[bomb]
    _set_template(folder, template)
    with pytest.raises(ConfigError, match=says):
        load_processor(folder, "qwen2-vl")


def test_the_command_says_so_and_ends(folder, tmp_path, capsys):
    _set_template(folder, BOMBS["repeated text"][0])
    (tmp_path / "run/episodes").mkdir(parents=True)
    assert main(["replay", str(tmp_path / "run"), "--policy", str(folder)]) == 2
    assert "the chat template makes more text" in capsys.readouterr().err


@pytest.mark.parametrize("family", ["qwen2-vl", "qwen3-vl", "smolvlm2"])
def test_real_templates_are_far_from_the_bounds(family, monkeypatch):
    monkeypatch.setattr(templates, "MAX_TEMPLATE_LINES", templates.MAX_TEMPLATE_LINES // 10)
    load_processor(tiny_checkpoint(family), family)
