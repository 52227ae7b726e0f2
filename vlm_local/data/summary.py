"""Episodes of run folders at a glance: for `runs` and the list on the live page."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from vlm_local.data.runs import list_folders, read_steps
from vlm_local.files import read_json_object


@dataclass(frozen=True)
class EpisodeSummary:
    """id: the folder's name, <robot>-<number>. started: Unix seconds of the first step, None without one.

    lowest: probability of the answer that the model was least sure of, None where none is known.
    outcome: as the simulator's meta.json says it, None where nothing judged the episode. has_frames: whether pictures
    were kept. problem: why it cannot be read in full, or None.
    """

    id: str
    robot: str
    number: int
    instruction: str
    num_steps: int
    num_faults: int
    started: float | None
    duration_s: float
    lowest: float | None
    outcome: str | None
    has_frames: bool
    problem: str | None


def list_runs(parent: str | Path) -> list[Path]:
    """Run folders in `parent`, or `parent` itself where it is one; by name, which starts with the time."""
    parent = Path(parent)
    if (parent / "episodes").is_dir():
        return [parent]
    return sorted(folder for folder in parent.glob("*") if (folder / "episodes").is_dir())


def summarise_run(run: str | Path) -> Iterator[EpisodeSummary]:
    """One summary an episode, by robot and number."""
    for robot, number, folder in list_folders(Path(run) / "episodes"):
        steps = folder / "steps.jsonl"
        try:
            status = steps.stat()
            summary = _summarise(robot, number, folder, status.st_size, status.st_mtime_ns)
        except (OSError, ValueError) as error:
            summary = EpisodeSummary(folder.name, robot, number, "", 0, 0, None, 0.0, None, None, False, str(error))
        outcome = read_meta(folder).get("outcome")  # written after the last step
        yield replace(summary, outcome=outcome if isinstance(outcome, str) else None)


@lru_cache(2**15)  # 1 KB each; a list that is longer finds none again
def _summarise(robot: str, number: int, folder: Path, size: int, changed_ns: int) -> EpisodeSummary:
    """size, changed_ns: of steps.jsonl; an episode that has ended is read once."""
    torn: list[int] = []
    lines = read_steps(folder, torn.append)
    times = [line["time"] for line in lines if isinstance(line.get("time"), int | float) and 0 <= line["time"] < 1e11]
    return EpisodeSummary(
        id=folder.name,
        robot=robot,
        number=number,
        instruction=str(lines[0].get("instruction") or "") if lines else "",
        num_steps=len(lines),
        num_faults=sum(line.get("fault") is not None for line in lines),
        started=times[0] if times else None,
        duration_s=times[-1] - times[0] if times else 0.0,
        lowest=min(
            (line["probability"] for line in lines if isinstance(line.get("probability"), float | int)), default=None
        ),
        outcome=None,
        has_frames=bool(lines) and (folder / "frames" / f"{len(lines) - 1:06d}.png").is_file(),
        problem=f"the last line was cut off after {torn[0]} bytes" if torn else None,
    )


def read_meta(folder: str | Path) -> dict:
    """meta.json of a run or an episode; {} where it cannot be read."""
    try:
        return read_json_object(Path(folder) / "meta.json")
    except (OSError, ValueError):
        return {}
