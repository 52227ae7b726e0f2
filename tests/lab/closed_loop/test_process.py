"""An environment in a process of its own."""

import os
import signal

import numpy as np
import pytest

from tests import serving
from vlm_local.lab.closed_loop.process import EnvironmentDied, EnvironmentProcess, borrow_environment


def test_a_dead_environment_is_no_fault_of_the_policy():
    environment = EnvironmentProcess("ours", "easy", 32)
    environment.reset("reach", 0, drawn=False)
    os.kill(environment.pid, signal.SIGKILL)
    with pytest.raises(EnvironmentDied, match="status -9"):
        environment.step(np.zeros(7))
    environment.close()


def test_a_process_is_used_again_as_long_as_it_lives():
    pids = []
    for _ in range(3):
        with borrow_environment("ours", "easy", 32) as environment:
            pids.append(environment.pid)
            assert environment.reset("reach", 0, drawn=False).observation.instruction
        if len(pids) == 2:
            os.kill(environment.pid, signal.SIGKILL)
            serving.until(lambda: not environment.is_alive)
    assert pids[0] == pids[1] != pids[2]
