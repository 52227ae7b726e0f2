"""Steps whose gradients are not finite are skipped, counted, and not borne for long; what a kill leaves on disk."""

import json
import math
import os

import pytest
import torch

from vlm_local.errors import EngineError
from vlm_local.training.optimisation import Optimisation, Recipe


def _train(folder, bad, num_steps=40, stop=None):
    """A line's slope under loss 1, 2, 3 ...; the steps of `bad` have a loss that is NaN."""
    torch.manual_seed(0)
    module = torch.nn.Linear(2, 1)
    optimisation = Optimisation(module, Recipe(num_steps, warmup_steps=0, log_every=10, save_every=10), folder)

    def compute(step):
        loss = module(torch.ones(2)).square().sum()
        return loss * (math.nan if step in bad else 1.0), {}

    optimisation.run(stop or num_steps, compute)
    return optimisation, torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


def test_a_skipped_step_is_counted_and_leaves_nothing_behind(tmp_path):
    optimisation, weights = _train(tmp_path / "run", bad={3, 17})
    assert optimisation.num_skipped == 2 and all(weight.isfinite().all() for weight in weights)
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["skipped"] for line in log] == [1, 2, 2, 2] and all(math.isfinite(line["loss"]) for line in log)


def test_the_count_survives_a_kill(tmp_path):
    _train(tmp_path / "run", bad={3}, stop=15)
    optimisation, _ = _train(tmp_path / "run", bad={17})
    assert optimisation.num_skipped == 2


def test_too_many_skipped_steps_end_the_training(tmp_path):
    with pytest.raises(EngineError, match="3 of the first 30 training steps gave gradients that are not finite"):
        _train(tmp_path / "run", bad={3, 17, 29})


def test_a_state_is_on_the_disk_before_it_takes_the_place_of_the_last(tmp_path, monkeypatch):
    """Else a power cut leaves neither."""
    synced = []
    monkeypatch.setattr("os.fsync", lambda descriptor: synced.append(os.fstat(descriptor)))
    _train(tmp_path / "run", bad=(), num_steps=10)
    state = (tmp_path / "run" / "state.pt").stat()
    assert [(each.st_ino, each.st_size) for each in synced] == [(state.st_ino, state.st_size)]


def test_a_kill_while_the_log_is_cut_leaves_the_old_one(tmp_path):
    _train(tmp_path / "run", bad=(), stop=20)
    log, old = tmp_path / "run" / "log.jsonl", tmp_path / "old.jsonl"
    with log.open("a") as file:
        file.write('{"step": 25, "loss": 1.0}\n')
    os.link(log, old)
    before = old.read_text()
    _train(tmp_path / "run", bad=(), stop=30)
    assert old.read_text() == before  # another file took its place
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [10, 20, 30]
