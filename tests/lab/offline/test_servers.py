"""Policies behind real sockets: our own server, and one that only speaks AutoEval's protocol."""

import json
from collections import Counter

import numpy as np
import pytest

from tests import recordings
from tests.serving import PHRASE, serve, until
from tests.test_client import ForeignServer
from vlm_local.cli import main


@pytest.fixture
def data_set(tmp_path):
    recordings.write_walks(tmp_path / "data", 3, num_steps=9)
    return str(tmp_path / "data")


def _eval(data_set, out, *flags):
    status = main(["eval", "--data", data_set, "--out", str(out), *flags])
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    return status, rows


@pytest.mark.parametrize("workers", ["1", "3"])
def test_our_own_server_says_phrases_and_probabilities(data_set, tmp_path, workers):
    with serve() as served:
        status, rows = _eval(data_set, tmp_path / "out", "--policy", served.url, "--workers", workers)
        until(lambda: len(served.records) == 27)
    assert status == 0 and len(rows) == 27
    assert {(row["phrase"], row["phrase_source"], row["probability"]) for row in rows} == {(PHRASE, "phrase", 1.0)}
    assert all(row["fault"] is None for row in rows)
    # Each worker is a robot of its own, so that the server takes each recording for one episode.
    assert set(Counter((record.robot, record.episode) for record in served.records).values()) == {9}
    assert 1 <= len({record.robot for record in served.records}) <= int(workers)


def test_a_foreign_server_is_scored_by_its_actions(data_set, tmp_path):
    with ForeignServer(b"[0, 0.02, 0, 0, 0, -0.2, 1]") as server:
        status, rows = _eval(data_set, tmp_path / "out", "--policy", server.url, "--every", "3")
    assert status == 0 and [row["step"] for row in rows] == [0, 3, 6] * 3
    assert {row["phrase_source"] for row in rows} == {"actions"}
    # The recordings begin closed, so the constant command opens the gripper once.
    assert [row["phrase"] for row in rows[:3]] == [
        "move left, rotate clockwise, open gripper",
        "move left, rotate clockwise",
        "move left, rotate clockwise",
    ]
    np.testing.assert_allclose(rows[0]["action"], [0, 0.02, 0, 0, 0, -0.2, 1])


def test_a_server_that_goes_away_ends_the_evaluation_in_a_sentence(data_set, tmp_path, capsys):
    with ForeignServer() as server:
        pass
    assert main(["eval", "--data", data_set, "--out", str(tmp_path / "out"), "--policy", server.url]) == 2
    assert server.url.rpartition("/")[2] in capsys.readouterr().err
