"""What the documents show is true: every command is one, every snippet runs, every link leads somewhere."""

import os
import re
import sys
from configparser import ConfigParser
from contextlib import contextmanager
from glob import glob
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from tests import recordings
from tests.documents import DOCUMENTS, OURS, ROOT, list_blocks, list_inline_commands
from tests.serving import ask, serve
from tests.tiny_models import tiny_checkpoint
from vlm_local.checkpoint import open_checkpoint
from vlm_local.cli import build_parser, main
from vlm_local.data.runs import RunWriter

SERVED = "http://127.0.0.1:8000"
LANGUAGES = ("bash", "python", "json", "text", "mermaid", "ini", "")
BLOCKS = [block for document in DOCUMENTS for block in list_blocks(document)]
NUMBERS = ("N", "FIRST")  # where a sentence leaves a number open
COMMANDS = tuple(build_parser().commands.choices)


def _of(language, *kept):
    blocks = [block for block in BLOCKS if block.language == language and block.kept in kept]
    return pytest.mark.parametrize("block", blocks, ids=str)


def _check_ours(words, capsys):
    """Fails unless the command line's own parser takes the words."""
    try:
        build_parser().parse_args(words)
    except SystemExit as end:
        if end.code == 0:  # --help
            return
        pytest.fail(f"{' '.join(words)}: {capsys.readouterr().err}")


def _check_command(words, capsys):
    if words[:3] == OURS:
        _check_ours(words[3:], capsys)
    elif words[:2] == ["bash", "run_server.sh"]:
        _check_ours(["serve", *words[2:]], capsys)
    elif words[0] == "bash":
        assert (ROOT / words[1]).is_file()
    elif words[:3] == [".venv/bin/pip", "install", "-e"]:
        setup = ConfigParser()
        setup.read(ROOT / "setup.cfg")
        (extras,) = re.findall(r"\.\[([a-z,]+)\]", words[3])
        assert set(extras.split(",")) <= set(setup["options.extras_require"])
    else:
        assert words[0] in ("curl", ".venv/bin/pre-commit"), f"{words[0]} is not ours: say why it is not run"


def test_the_documents_are_found():
    names = set(map(str, DOCUMENTS))
    assert {"README.md", "docs/evaluation.md", "deploy/README.md", "checkpoints/tiny/README.md"} <= names
    assert sum(len(block.list_commands()) for block in BLOCKS if block.language == "bash") > 50


@_of("bash", "", "only parsed")
def test_every_command_is_one(block, capsys):
    for words in block.list_commands():
        _check_command(words, capsys)


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_commands_within_sentences_are_some(document, capsys):
    for words in list_inline_commands(document):
        _check_command(["1" if word in NUMBERS else word for word in words], capsys)


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_a_block_says_its_language(block):
    assert block.language in LANGUAGES
    if block.language not in ("bash", "python"):
        assert not re.search(r"vlm_local |vlm-local |^curl |^pip ", block.text, re.M)


def _list_own_text():
    for path in [*DOCUMENTS, *(p.relative_to(ROOT) for p in (ROOT / "vlm_local").rglob("*.*"))]:
        if path.suffix in (".md", ".py", ".html", ".txt"):
            yield path, (ROOT / path).read_text(encoding="utf-8")


def test_a_command_is_spelt_in_one_way():
    other = re.compile(rf"(?<!bin/)python -m vlm_local(?= )|`vlm-local ({'|'.join(COMMANDS)})\b|'vlm-local\[")
    for path, text in _list_own_text():
        found = [match[0] for match in other.finditer(text)]
        assert not found or str(path) == "vlm_local/cli/__init__.py", f"{path}: {found}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_every_link_leads_somewhere(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if not target.startswith(("http://", "https://", "mailto:")):
            assert (ROOT / document.parent / target).exists(), f"{document}: {target}"


def test_what_the_architecture_names_is_there():
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    paths = re.findall(r"`((?:vlm_local|tests|grammars)/[^`*]*)`", text)
    assert len(set(paths)) > 40
    for path in paths:
        assert (ROOT / path).exists(), path
    for name, path in re.findall(r"`([A-Za-z_]+)` (?:of|in) `(vlm_local/[^`]+)`", text):
        assert name in (ROOT / path).read_text(encoding="utf-8"), f"{path} has no {name}"
    for path, name in re.findall(r"`(vlm_local/[^`]+\.py)`, (?:beside )?`([A-Za-z_]+)", text):
        assert name in (ROOT / path).read_text(encoding="utf-8"), f"{path} has no {name}"
    decisions = (ROOT / "docs/decisions.md").read_text(encoding="utf-8")
    for title in re.findall(r'docs/decisions\.md, "([^"]+)"', text):
        assert f"**{title}" in decisions


def test_the_card_names_the_hash_that_results_name():
    card = (ROOT / "checkpoints/tiny/README.md").read_text(encoding="utf-8")
    assert re.findall(r"\b[0-9a-f]{64}\b", card) == [open_checkpoint(ROOT / "checkpoints/tiny").sha256]


@contextmanager
def _in_folder(folder):
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def _write_run(folder):
    writer = RunWriter(folder, {"model": "tiny"})
    writer.start_episode("robot")
    for step in range(6):
        line = {"robot": "robot", "step": step, "instruction": "reach the red block", "phrase": "stop"}
        line |= {"action": [0.0] * 6 + [1.0], "proprio": [0.3, 0.01 * step, 0.1, 0, 0, 0, 1.0]}
        writer.add_step(line, np.full((64, 64, 3), step, np.uint8))
    writer.close()


@pytest.fixture
def place(tmp_path):
    """A folder in which a document's examples find what they name: a picture, a run, a data set."""
    Image.new("RGB", (256, 256), "gray").save(tmp_path / "view.png")
    _write_run(tmp_path / "runs" / "20260101-120000-tiny")
    _write_run(tmp_path / "RUN")
    for name in ("DATA", "bridge/1.0.0"):
        recordings.write_rlds(
            tmp_path / name, [recordings.make_rlds_record(recordings.make_states(9, seed)) for seed in range(2)]
        )
    recordings.write_lerobot(tmp_path / "LEROBOT_V3", [recordings.make_states(9, 0)], "v3.0", "image")
    with _in_folder(tmp_path):
        yield tmp_path


@_of("python", "")
def test_every_snippet_runs(block, place, request, capsys):
    if "SimEnv" in block.text and not request.config.getoption("--slow"):
        pytest.skip("draws an episode: --slow runs it")
    with serve() as server:
        exec(compile(block.text.replace(SERVED, server.url), str(block), "exec"), {"__name__": "snippet"})
    assert capsys.readouterr().out


# What keeps a command short; of an option given twice the last one counts.
SHORTER = {
    "sim": "--task reach --episodes 1 --max-steps 2 --films 1 --workers 1",
    "spatial": "--scenes 2",
    "ceiling": "--tasks reach --episodes 1 --workers 1",
    "train": "--steps 1 --samples 2 --at-once 1",
}
OTHER_MODELS = {"qwen2-vl": "stop", "MODEL": "stop"}


def _shorten(words, url):
    """A command as a test runs it: small, on what is here."""
    words = [word.replace(SERVED, url).replace("http://gpu-machine:8000", url) for word in words]
    models = OTHER_MODELS | ({"qwen2-vl": str(tiny_checkpoint("qwen2-vl"))} if words[0] == "train" else {})
    words = [models.get(word, word) for word in words]
    if "--set" in words:
        at = words.index("--set")
        words = words[:at] + words[at + 2 :]
    words = [path for word in words for path in (sorted(glob(word)) or [word] if "*" in word else [word])]
    return words + SHORTER.get(words[0], "").split()


def _run_command(words, server):
    if words[:3] == OURS and words[3] != "serve":  # one runs already
        assert main(_shorten(words[3:], server.url)) == 0
    elif words[0] == "curl":
        options = dict(pairwise(words))
        route = next(word for word in words if word.startswith(SERVED)).removeprefix(SERVED)
        body = options.get("-d", "").encode()
        assert ask(server.port, "POST", route, body, {"Content-Type": "application/json"})[0] == 200


@pytest.mark.long
@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_every_command_runs(document, place):
    """In the order of the document, so that later ones find what earlier ones wrote."""
    with serve() as server:
        for block in list_blocks(document):
            if block.language == "bash" and not block.kept:
                for words in block.list_commands():
                    print("$", *words, file=sys.stderr)
                    _run_command(words, server)


def test_the_list_of_decisions_has_every_topic_and_title_in_their_order():
    text = (ROOT / "docs/decisions.md").read_text(encoding="utf-8")
    listed = re.findall(r"^- \[(.+?)\]\(.+?\): (.+)\.$", text, re.MULTILINE)
    topics = re.split(r"^## (.+)\n", text, flags=re.MULTILINE)[1:]
    found = []
    for topic, paragraphs in zip(topics[::2], topics[1::2], strict=True):
        titles = re.findall(r"^\*\*(.+?)\*\*", paragraphs, re.MULTILINE | re.DOTALL)
        found.append((topic, "; ".join(" ".join(title.split()).rstrip(".") for title in titles)))
    assert listed == found
