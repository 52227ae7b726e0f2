"""Episodes under all settings, played in processes and kept as they are finished.

DIR/ceiling.json says what is played under which settings, and with what. DIR/rows.jsonl gets a line when an episode was
played under all of them: `task`, `seed`, `steps` (to success, null for none, one number a setting). The
same command goes on after a kill; with more episodes or tasks it adds those.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import product, repeat
from pathlib import Path
from typing import Any

from vlm_local.errors import ConfigError, DataError
from vlm_local.files import encode_json, open_replacing, read_json_lines, write_json
from vlm_local.lab.ceiling.play import play_settings
from vlm_local.lab.ceiling.settings import Setting
from vlm_local.processes import open_pool
from vlm_local.provenance import describe_machine, join_parts
from vlm_local.sim.levels import find_level
from vlm_local.sim.tasks import TASKS, find_task

_PLAN_FILE, _ROWS_FILE = "ceiling.json", "rows.jsonl"
_DECIDES = ("level", "seed", "settings")


@dataclass(frozen=True)
class Plan:
    """What is played: seeds `seed` to `seed + episodes - 1` of each task, the same for every setting."""

    tasks: tuple[str, ...]
    level: str
    episodes: int
    seed: int

    def __post_init__(self):
        find_level(self.level)
        for task in self.tasks:
            find_task(task)

    @property
    def seeds(self) -> range:
        return range(self.seed, self.seed + self.episodes)


class Episodes:
    """The finished episodes of a folder. Raises ConfigError where it holds anything else."""

    def __init__(self, folder: Path, plan: Plan, settings: Sequence[Setting]):
        self._folder, self._plan, self._settings, self._path = folder, plan, settings, folder / _ROWS_FILE
        _open_folder(folder, plan, settings)
        self._steps: dict[tuple[str, int], list[int | None]] = {}
        if self._path.exists():
            self._load()

    def _load(self) -> None:
        """Keeps whole lines; the one that a kill cut off is played again."""
        torn: list[int] = []
        try:
            rows = list(read_json_lines(self._path, torn.append))
            self._steps = {(row["task"], row["seed"]): row["steps"] for row in rows}
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{self._path}: {error!r}; it was changed by something else than `ceiling`") from None
        if len(self._steps) < len(rows) or any(len(row["steps"]) != len(self._settings) for row in rows):
            raise DataError(f"{self._path} has episodes twice or not all settings; it was changed by something else")
        if torn:  # else the file is left as it is: another process may be adding to it
            with open_replacing(self._path) as file:
                file.writelines(encode_json(row) + "\n" for row in rows)

    def find_missing(self) -> list[tuple[str, int]]:
        """(task, seed) of the plan, seed by seed: what is there at any time has about as many of each task."""
        wanted = ((task, seed) for seed, task in product(self._plan.seeds, self._plan.tasks))
        return [episode for episode in wanted if episode not in self._steps]

    def play(self, missing: Sequence[tuple[str, int]], workers: int, progress: Callable[[int], None]) -> None:
        """progress: is called with 1 after every episode."""
        if missing:
            _write_made(self._folder)
        with self._path.open("a", encoding="utf-8") as file, open_players(workers) as play:
            tasks, seeds = [task for task, _ in missing], [seed for _, seed in missing]
            results = play(play_settings, tasks, repeat(self._plan.level), seeds, repeat(self._settings))
            for (task, seed), steps in zip(missing, results, strict=True):
                file.write(encode_json({"task": task, "seed": seed, "steps": steps}) + "\n")
                file.flush()
                self._steps[task, seed] = steps
                progress(1)

    def collect(self) -> dict[tuple[str, Setting], list[int | None]]:
        """Task and setting -> control steps to success of the plan's episodes, in order of their seeds."""
        return {
            (task, setting): [self._steps[task, seed][index] for seed in self._plan.seeds]
            for task in self._plan.tasks
            for index, setting in enumerate(self._settings)
        }


def find_played(folder: Path) -> Plan:
    """The largest study that is whole in this folder. Raises ConfigError where there is none."""
    try:
        there = json.loads((folder / _PLAN_FILE).read_bytes())
        played = {(row["task"], row["seed"]) for row in read_json_lines(folder / _ROWS_FILE)}
    except (OSError, ValueError):
        played = set()
    tasks = tuple(task for task in TASKS if any(of == task for of, _ in played))
    episodes = 0
    while tasks and all((task, there["seed"] + episodes) in played for task in tasks):
        episodes += 1
    if not episodes:
        raise ConfigError(f"{folder} holds no whole episode yet: `ceiling --out {folder}` plays some")
    return Plan(tasks, there["level"], episodes, there["seed"])


def _open_folder(folder: Path, plan: Plan, settings: Sequence[Setting]) -> None:
    path = folder / _PLAN_FILE
    here = dict(zip(_DECIDES, (plan.level, plan.seed, [asdict(setting) for setting in settings]), strict=True))
    if path.exists():
        there = json.loads(path.read_bytes())
        differing = [name for name in here if there.get(name) != here[name]]
        if differing:
            raise ConfigError(f"{folder} holds a study with another {', '.join(differing)}; choose another --out")
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} holds something else than a study of `ceiling`; choose another --out")
    else:
        write_json(path, here)


def _write_made(folder: Path) -> None:
    """Into ceiling.json: what the rows are made with from now on, beside what those that are there were made with."""
    path = folder / _PLAN_FILE
    there, here = json.loads(path.read_bytes()), describe_machine()
    is_first = not (folder / _ROWS_FILE).exists()
    write_json(path, there | here if is_first else join_parts(there, here))


def read_made(folder: Path) -> dict[str, Any]:
    """`versions`, `git`, `machine` of the rows, and `continued_with` where later ones differ."""
    there = json.loads((folder / _PLAN_FILE).read_bytes())
    return {name: value for name, value in there.items() if name not in _DECIDES}


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
