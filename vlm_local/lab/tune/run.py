"""A tuning: the rungs one after the other on episodes for development, then the choice once on those held out.

Every answer is a row of rows.jsonl, and the choice follows from the rows: the same command goes on where it was.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vlm_local.assembly import is_url
from vlm_local.errors import ConfigError
from vlm_local.examples import write_example_file
from vlm_local.lab.formats import format_name
from vlm_local.lab.results import ResultFolder, RowFile
from vlm_local.lab.tune.ask import BASE, Asker, OpenData, Refused, TuningPlan
from vlm_local.lab.tune.episodes import DEVELOPMENT, HELD_OUT, Split, split_episodes
from vlm_local.lab.tune.report import write_report
from vlm_local.lab.tune.rungs import EXAMPLES, Base, Rung, Setting, describe_setting, find_rungs
from vlm_local.lab.tune.scores import choose, compare, describe, summarise_times
from vlm_local.policy_options import PolicyOptions, write_settings
from vlm_local.provenance import describe_machine, tell_making
from vlm_local.registry import DEFAULT
from vlm_local.resolved_options import ResolvedOptions

SETTINGS, CHOSEN = "tune.json", "vlm_local.json"
_OF_THE_MACHINE = ("device", "max_batch", "offline", "deadline_ms")  # options that decide no answer

Progress = Callable[[int, int, str], object]


def tune(
    plan: TuningPlan,
    path: Path,
    options: PolicyOptions,
    open_data: OpenData,
    about_data: Mapping[str, Any],
    progress: Progress,
) -> dict[str, Any]:
    """Choose, score and report into the folder `path`; returns the report.

    options: the base. open_data: from a collector of records that cannot be read to the episodes of the plan; called
    for every setting. about_data: what is read of the data set, for the report. progress: is given steps done, steps in
    all, and what is asked. Raises ConfigError where options or folder do not fit, DataError for too few episodes,
    EngineError where the model fails.
    """
    rungs = find_rungs(plan.rungs)
    _refuse(options)
    base = _describe_base(options, plan)
    problems: list[str] = []
    split = split_episodes(open_data(lambda error: problems.append(str(error))), plan.every, plan.seed, problems)
    with ResultFolder(path, "tune", SETTINGS) as folder, closing(RowFile(path / "rows.jsonl")) as file:
        told = {name: value for name, value in asdict(options).items() if name not in _OF_THE_MACHINE}
        parts = {DEVELOPMENT: split.development, HELD_OUT: split.held_out}
        here = {"plan": asdict(plan), "base": told, "split": parts, **describe_machine()}
        folder.begin(here, _list_settings, bool(file.rows))
        write_example_file(path / EXAMPLES, plan.data, plan.selection, split.development)
        with closing(Asker(plan, folder, file, options, open_data, split)) as asker:
            report = _Climb(asker, split, plan.seed, progress).climb(rungs, base)
        report |= {
            **{name: folder.settings[name] for name in ("plan", "split")},
            **tell_making(folder.settings),
            "policy": {"name": plan.policy, **folder.settings.get("policy", {})},
            "data": {"name": format_name(plan.data), **about_data},
            "left_out": list(split.left_out),
        }
        _write_chosen(path, options, report)
        write_report(path, report)
        return report


def _refuse(options: PolicyOptions) -> None:
    """What cannot be tuned: raises ConfigError."""
    if is_url(options.model) or options.engine == "openai":
        raise ConfigError(
            "`tune` needs the probability of every phrase, which no server tells; name a model that is loaded here"
        )
    if options.examples is not None:
        raise ConfigError("--examples is tried by `tune` itself, from episodes that are not scored; leave it out")


def _describe_base(options: PolicyOptions, plan: TuningPlan) -> Base:
    resolved = ResolvedOptions(options)
    if resolved.checkpoint is None:
        raise ConfigError(f"no model is loaded for {options.model!r}, so there is nothing to tune")
    resolved.refuse_unused()
    about = resolved.metadata
    return Base(about["prompt"]["name"], about["grammar"]["name"], plan.prompts.split(",") if plan.prompts else ())


def _list_settings(made: Mapping[str, Any]) -> dict[str, Any]:
    """What must be the same in all parts. A second choice on the same folder would look at the held-out twice."""
    return {name: made[name] for name in ("plan", "base", "split")}


class _Climb:
    """The greedy choice: on each rung the best variant, beside what was kept before."""

    def __init__(self, asker: Asker, split: Split, seed: int, progress: Progress):
        self._asker, self._split, self._seed = asker, split, seed
        self._progress = progress
        self._done = self._total = 0

    def climb(self, rungs: Sequence[Rung], base: Base) -> dict[str, Any]:
        """The report's "base", "rungs", "chosen" (the setting) and "held_out"."""
        tried = {rung.name: _list_variants(rung, base) for rung in rungs}
        num_settings = 1 + sum(len(variants) for variants in tried.values() if not isinstance(variants, str))
        self._total = num_settings * self._split.count_steps(DEVELOPMENT) + 2 * self._split.count_steps(HELD_OUT)
        current: Setting = BASE
        rows = self._score(current, DEVELOPMENT)
        told = {"base": describe(rows, self._seed), "rungs": []}
        for rung in rungs:
            about = {"name": rung.name, "about": rung.about}
            variants = tried[rung.name]
            if isinstance(variants, str):
                told["rungs"].append({**about, "skipped": variants, "variants": []})
                continue
            entries, scored = self._try(current, rows, variants)
            told["rungs"].append({**about, "skipped": _find_common_reason(entries), "variants": entries})
            compared = [entry for entry in entries if "difference" in entry]
            kept = choose([entry["difference"] for entry in compared])
            if kept is not None:
                compared[kept]["kept"] = True
                current = {**current, **compared[kept]["setting"]}
                rows = scored[describe_setting(current)]
        return {**told, "chosen": current, "held_out": self._score_held_out(current)}

    def _try(self, current: Setting, rows, variants: Sequence[Setting]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """An entry of the report for each variant beside the present setting, and the rows by name of the setting."""
        entries, scored = [], {}
        for variant in variants:
            setting = {**current, **variant}
            entry: dict[str, Any] = {"setting": dict(variant), "kept": False}
            entries.append(entry)
            outcome = self._ask(setting, current)
            if isinstance(outcome, str):
                entry["refused"] = outcome
                continue
            scored[describe_setting(setting)] = outcome
            entry |= {"development": describe(outcome, self._seed), "difference": compare(outcome, rows, self._seed)}
            timed = self._asker.time(setting)
            entry["cost"] = summarise_times(timed["base_ms"], timed["ms"])
        return entries, scored

    def _ask(self, setting: Setting, current: Setting):
        try:
            if not self._asker.is_same(setting, current):
                return self._score(setting, DEVELOPMENT)
            outcome = "the same as without"
        except (ConfigError, Refused) as error:
            outcome = str(error)
        self._total -= self._split.count_steps(DEVELOPMENT)
        return outcome

    def _score(self, setting: Setting, part: str) -> list[dict[str, Any]]:
        """Raises Refused for a setting that the model cannot be asked with."""
        what = f"{part.replace('_', ' ')}: {describe_setting(setting)}"
        begun = self._done

        def tell(num_steps: int) -> None:
            self._done += num_steps
            self._progress(self._done, self._total, what)

        try:
            return self._asker.score(setting, part, tell)
        except Refused:
            self._done = begun
            raise

    def _score_held_out(self, chosen: Setting) -> dict[str, Any]:
        """The only place that asks about episodes that are held out."""
        base = self._score(BASE, HELD_OUT)
        told: dict[str, Any] = {"base": describe(base, self._seed), "chosen": None, "difference": None}
        if chosen:
            rows = self._score(chosen, HELD_OUT)
            timed = self._asker.time(chosen)
            told["chosen"] = describe(rows, self._seed)
            told["difference"] = compare(rows, base, self._seed)
            told["cost"] = summarise_times(timed["base_ms"], timed["ms"])
        self._progress(self._total, self._total, "done")
        return told


def _list_variants(rung: Rung, base: Base) -> Sequence[Setting] | str:
    """Or why there is nothing to try."""
    try:
        return rung.list_variants(base)
    except ConfigError as error:
        return str(error)


def _find_common_reason(entries: Sequence[Mapping[str, Any]]) -> str | None:
    """Why no variant of a rung could be tried, where that is one reason."""
    reasons = {entry.get("refused") for entry in entries}
    return reasons.pop() if len(reasons) == 1 else None


def _write_chosen(path: Path, options: PolicyOptions, report: Mapping[str, Any]) -> None:
    """vlm_local.json: the base's options, what was chosen and what it reached. A prompt's file is copied beside it."""
    fields = {**asdict(options), **report["chosen"], "model": options.model or DEFAULT}
    prompt = fields.get("prompt")
    if prompt and "." in prompt:
        (path / Path(prompt).name).write_bytes(Path(prompt).read_bytes())
        fields["prompt"] = Path(prompt).name
    if fields.get("steps"):
        fields["steps"] = str(Path(fields["steps"]).resolve())
    held_out = report["held_out"]
    results = {"tuned_on": report["data"]["name"], "held_out": held_out}
    write_settings(path / CHOSEN, fields, results | {"checkpoint_sha256": report["policy"].get("checkpoint_sha256")})
