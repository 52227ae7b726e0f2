"""Episodes under all settings, played in processes and kept as they are finished.

DIR/ceiling.json says what is played under which settings, and with what. DIR/rows.jsonl gets a line when an episode was
played under all of them: `task`, `seed`, `steps` (to success, null for none, one number a setting). The
same command goes on after a kill; with more episodes or tasks it adds those.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import product, repeat
from pathlib import Path
from typing import Any

from vlm_local.environments import OURS, find_suite
from vlm_local.errors import ConfigError, DataError
from vlm_local.files import read_json_lines
from vlm_local.lab.ceiling.play import play_settings
from vlm_local.lab.results import ResultFolder, RowFile
from vlm_local.processes import open_pool
from vlm_local.progress import open_bar
from vlm_local.provenance import describe_machine

SETTINGS = "ceiling.json"
_ROWS_FILE = "rows.jsonl"
_DECIDES = ("level", "seed", "settings")

PlayOne = Callable[[str, str, int, Sequence[Any]], list[int | None]]


@dataclass(frozen=True)
class CeilingPlan:
    """What is played: seeds `seed` to `seed + episodes - 1` of each task, the same for every setting."""

    tasks: tuple[str, ...]
    level: str
    episodes: int
    seed: int
    env: str = OURS

    def __post_init__(self):
        find_suite(self.env).check(self.tasks, self.level)

    @property
    def seeds(self) -> range:
        return range(self.seed, self.seed + self.episodes)


class Episodes:
    """The finished episodes of a result folder."""

    def __init__(
        self, folder: ResultFolder, plan: CeilingPlan, settings: Sequence[Any], play_one: PlayOne = play_settings
    ):
        """settings: dataclass objects. play_one: (task, level, seed, settings) -> a row's steps.

        Raises ConfigError where the folder holds another study, DataError where its rows were changed.
        """
        self._plan, self._settings, self._play_one = plan, settings, play_one
        self._file = RowFile(folder.path / _ROWS_FILE)
        rows = self._file.rows
        try:
            self._steps: dict[tuple[str, int], list[int | None]] = {(r["task"], r["seed"]): r["steps"] for r in rows}
        except (KeyError, TypeError) as error:
            raise DataError(f"{folder.path / _ROWS_FILE}: {error!r}; something else changed the file") from None
        here = {"level": plan.level, "seed": plan.seed, "settings": [asdict(setting) for setting in settings]}
        plays = not rows or bool(self.find_missing())
        folder.begin(here | (describe_machine() if plays else {}), _list_settings, bool(rows))
        if len(self._steps) < len(rows) or any(len(row["steps"]) != len(settings) for row in rows):
            raise DataError(f"{folder.path / _ROWS_FILE} has episodes twice or not all settings; it was changed")

    def close(self) -> None:
        self._file.close()

    def find_missing(self) -> list[tuple[str, int]]:
        """(task, seed) of the plan, seed by seed: what is there at any time has about as many of each task."""
        wanted = ((task, seed) for seed, task in product(self._plan.seeds, self._plan.tasks))
        return [episode for episode in wanted if episode not in self._steps]

    def play_missing(self, label: str, workers: int) -> None:
        """label: of the progress bar."""
        missing = self.find_missing()
        with open_bar(label, len(missing), "episode") as bar, open_players(workers) as play:
            tasks, seeds = [task for task, _ in missing], [seed for _, seed in missing]
            results = play(self._play_one, tasks, repeat(self._plan.level), seeds, repeat(self._settings))
            for (task, seed), steps in zip(missing, results, strict=True):
                self._file.add({"task": task, "seed": seed, "steps": steps})
                self._steps[task, seed] = steps
                bar.update(1)

    def collect(self) -> dict[tuple[str, Any], list[int | None]]:
        """Task and setting -> control steps to success of the plan's episodes, in order of their seeds."""
        return {
            (task, setting): [self._steps[task, seed][index] for seed in self._plan.seeds]
            for task in self._plan.tasks
            for index, setting in enumerate(self._settings)
        }


def find_played(folder: Path) -> CeilingPlan:
    """The largest study that is whole in this folder. Raises ConfigError where there is none."""
    there: dict[str, Any] = {}
    try:
        there = json.loads((folder / SETTINGS).read_bytes())
        played = {(row["task"], row["seed"]) for row in read_json_lines(folder / _ROWS_FILE)}
    except (OSError, ValueError):
        played = set()
    tasks = tuple(task for task in find_suite(OURS).tasks if any(of == task for of, _ in played))
    episodes = 0
    while tasks and all((task, there["seed"] + episodes) in played for task in tasks):
        episodes += 1
    if not episodes:
        raise ConfigError(f"{folder} holds no whole episode yet: `ceiling --out {folder}` plays some")
    return CeilingPlan(tasks, there["level"], episodes, there["seed"])


def _list_settings(made: Mapping[str, Any]) -> dict[str, Any]:
    return {name: made[name] for name in _DECIDES}


def list_made_with(settings: Mapping[str, Any]) -> dict[str, Any]:
    """`versions`, `git`, `machine` of the rows, and `continued_with` where later ones differ."""
    return {name: value for name, value in settings.items() if name not in _DECIDES}


@contextmanager
def open_players(workers: int) -> Iterator[Callable]:
    """`map`, in processes: results in order, each as soon as it and those before are there.

    One worker plays in this process.
    """
    if workers == 1:
        yield map
        return
    with open_pool(workers) as pool:
        yield pool.map
