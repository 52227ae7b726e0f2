"""Rows of any setting of a tuning: asked of the model, or read where they were written before."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from vlm_local.assembly import Policies, open_policies, share_engine
from vlm_local.data.selection import OpenData, Selection
from vlm_local.errors import ConfigError, DataError, RequestError
from vlm_local.lab.results import ResultFolder, RowFile
from vlm_local.lab.tune.episodes import DEVELOPMENT, Split, score_episode, time_steps
from vlm_local.lab.tune.rungs import Setting
from vlm_local.policy_options import PolicyOptions
from vlm_local.provenance import choose_deciding
from vlm_local.resolved_options import ResolvedOptions
from vlm_local.types import Episode

REFUSED, TIMED = "refused", "timed"  # rows beside those of DEVELOPMENT and HELD_OUT
BASE: Setting = {}


@dataclass(frozen=True)
class TuningPlan:
    """What decides the rows, beside the base's options. policy: as named by the user. data: path of the data set.

    selection: what is read of it. every: ask every N-th step. limit: of episodes. seed: of the split, of draws,
    intervals and tests. rungs, prompts: names joined by commas, None for all rungs and for shipped prompts.
    """

    policy: str
    data: str
    selection: Selection
    every: int = 1
    limit: int | None = None
    seed: int = 0
    rungs: str | None = None
    prompts: str | None = None


class Refused(Exception):
    """Why a setting cannot be asked."""


class Asker:
    """Rows of any setting, from the file where they are there. The model is loaded for the first that is not."""

    def __init__(
        self,
        plan: TuningPlan,
        folder: ResultFolder,
        file: RowFile,
        options: PolicyOptions,
        open_data: OpenData,
        split: Split,
    ):
        self._plan, self._folder, self._file = plan, folder, file
        # Every step is asked, whatever the robot would hold.
        self._options = replace(options, steps_per_phrase=1)
        self._open_data, self._split = open_data, split
        self._rows = list(file.rows)
        self._base: Policies | None = None

    def close(self) -> None:
        if self._base is not None:
            self._base.close()

    def is_same(self, one: Setting, other: Setting) -> bool:
        """Whether two settings come to the same options."""
        first, second = (ResolvedOptions(self._build_options(each)) for each in (one, other))
        return all(first.choose(name) == second.choose(name) for name in {**one, **other})

    def score(self, setting: Setting, part: str, tell: Callable[[int], object]) -> list[dict[str, Any]]:
        """A row for each episode of a part.

        tell: is given the number of steps of each episode that is done. Raises Refused where, in development, the model
        cannot be asked with this setting.
        """
        refused = self._find(REFUSED, setting)
        if refused:
            raise Refused(refused[0]["reason"])
        done = {row["episode"]: row for row in self._find(part, setting)}
        for number in done:
            tell(self._split.num_steps[number])
        todo = set(getattr(self._split, part)) - set(done)
        if todo:
            try:
                policy = self._open(setting).build("tune", tell_all=True)
                for episode in self._read(todo):
                    scores = score_episode(policy, episode, self._plan.every, self._plan.seed)
                    done[episode.index] = self._add(part, setting, {"episode": episode.index, **scores})
                    tell(self._split.num_steps[episode.index])
            except (ConfigError, RequestError) as error:
                if not setting or part != DEVELOPMENT:
                    raise
                raise Refused(self._add(REFUSED, setting, {"reason": str(error)})["reason"]) from None
        return [done[number] for number in sorted(done)]

    def time(self, setting: Setting) -> dict[str, Any]:
        """A row with the milliseconds of steps as they are served, asked of the base and of this setting in turns."""
        known = self._find(TIMED, setting)
        if known:
            return known[0]
        policies = [self._open(BASE).build("tune-base"), self._open(setting).build("tune-other")]
        base_ms, ms = time_steps(policies, self._read(set(self._split.development)), self._plan.seed)
        return self._add(TIMED, setting, {"base_ms": base_ms, "ms": ms})

    def _find(self, part: str, setting: Setting) -> list[dict[str, Any]]:
        return [row for row in self._rows if row["part"] == part and row["setting"] == setting]

    def _add(self, part: str, setting: Setting, fields: Mapping[str, Any]) -> dict[str, Any]:
        row = {"part": part, "setting": dict(setting), **fields}
        self._file.add(row)
        self._rows.append(row)
        return row

    def _read(self, numbers: set[int]) -> Iterator[Episode]:
        """These episodes. Raises DataError where one is not there any more."""
        left = set(numbers)
        for episode in self._open_data(lambda problem: None):
            if episode.index in left:
                left.remove(episode.index)
                yield episode
            if not left:
                return
        raise DataError(f"episode {min(left)} was there when the tuning began and cannot be read any more")

    def _open(self, setting: Setting) -> Policies:
        if self._base is None:
            self._base = open_policies(self._options)
            self._base.build("first")  # waits until the model is loaded, and raises what that raised
            here = {**self._folder.settings, "policy": dict(self._base.metadata)}
            self._folder.begin(here, lambda made: choose_deciding(made.get("policy", {})), bool(self._file.rows))
        if not setting:
            return self._base
        assert self._base.worker is not None  # a model that is loaded has one
        return share_engine(self._base.worker, self._build_options(setting))

    def _build_options(self, setting: Setting) -> PolicyOptions:
        fields = dict(setting)
        if "examples" in fields:
            fields["examples"] = str(self._folder.path.resolve() / fields["examples"])
        return replace(self._options, **fields)
