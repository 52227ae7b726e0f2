"""A second station at the same time: another process, scene, task and connection."""

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from vlm_local.errors import ConfigError
from vlm_local.lab.comparison import read_report
from vlm_local.lab.station.run import JobPlan, require_free
from vlm_local.processes import end_process

_BEGIN_S, _FINISH_S = 60.0, 3600.0
# Of the other scene: at AutoEval drawer and sink run at the same time.
_OTHERS = {
    "open_drawer": "eggplant_in_sink",
    "close_drawer": "eggplant_in_basket",
    "eggplant_in_sink": "open_drawer",
    "eggplant_in_basket": "close_drawer",
}


class SecondStation:
    """Runs from the start; its files are in OUT/second."""

    def __init__(self, url: str, plan: JobPlan, task: str, out: Path):
        """url: of the policy server, without a robot's name. task: "other" for one of the other scene."""
        self._out = out / "second"
        require_free(out)
        chosen = _OTHERS[plan.task] if task == "other" else task
        words = [url, "--task", chosen, "--episodes", plan.episodes, "--max-steps", plan.max_steps, "--clock"]
        words += [plan.clock, "--test-every", plan.test_every, "--seed", plan.seed, "--out", self._out, "-q"]
        command = [sys.executable, "-m", "vlm_local", "station", *map(str, words)]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    def wait_begun(self) -> None:
        """Until its first episode begins, or it has ended."""
        end = time.monotonic() + _BEGIN_S
        while self._process.poll() is None and time.monotonic() < end:
            if (self._out / "station.jsonl").is_file():
                return
            time.sleep(0.05)

    def finish(self) -> dict[str, Any]:
        """Wait for its end; its report. Raises ConfigError where it could not be played."""
        try:
            _, said = self._process.communicate(timeout=_FINISH_S)
        except subprocess.TimeoutExpired:
            raise ConfigError(f"the second station has not ended {_FINISH_S / 60:g} minutes after the first") from None
        if self._process.returncode not in (0, 1):
            last = said.strip().splitlines()[-1:] or [f"status {self._process.returncode}"]
            raise ConfigError(f"the second station ended: {last[0]}")
        return read_report(self._out)

    def close(self) -> None:
        end_process(self._process, seconds=30.0)
