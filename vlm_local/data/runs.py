"""Run folders: what the server and the simulator record, step by step.

RUN/meta.json, RUN/episodes/<robot>-<n>/{meta.json, steps.jsonl, frames/000000.png}. A line of
steps.jsonl is the answer (as /act?details=1) plus time, instruction and proprio; line i belongs to
frame i. proprio and `meant` are in the Bridge frame, `action` is what the robot was sent. The
picture is written before its line and lines are flushed, so whatever stands there after a kill can
be read; a line that was cut off is reported.
"""

import re
import shutil
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vlm_local.data.images import read_image, require_one_size
from vlm_local.data.selection import DataSet, Selection, refuse_selection, summarise_instructions
from vlm_local.embodiments import AUTO, load_embodiment
from vlm_local.embodiments.rotations import base_to_bridge
from vlm_local.errors import DataError, Report
from vlm_local.files import append_whole, encode_json, read_json_lines, read_json_object, write_json
from vlm_local.types import Episode

RECORDED_RUN = "recorded run"  # the format, in what is told of a data set
MAX_REFUSAL_BYTES = 4 << 20  # in each of two files: some 20,000 refusals

# Run lengths alone, after the filters: a photo takes a third of the time of the default and no more room.
_PNG: dict[str, Any] = {"compress_level": 1, "compress_type": zlib.Z_RLE}


class RunWriter:
    """Writes one run folder; several robots may have an open episode each. Not thread-safe."""

    def __init__(self, folder: str | Path, meta: Mapping[str, Any] | None = None):
        """folder: made where missing; new episodes are added to those of an existing run.

        meta: of the run; None leaves what an existing run says of itself.
        """
        self.folder = Path(folder)
        self._open: dict[str, _EpisodeFiles] = {}
        self._episodes = self.folder / "episodes"
        self._episodes.mkdir(parents=True, exist_ok=True)
        if meta is not None or not (self.folder / "meta.json").exists():
            self.write_meta(meta or {})

    def write_meta(self, meta: Mapping[str, Any]) -> None:
        """Replace the run's meta.json."""
        write_json(self.folder / "meta.json", dict(meta))

    def start_episode(self, robot: str, meta: Mapping[str, Any] | None = None, number: int | None = None) -> Path:
        """Begin the robot's next episode, ending its last; returns the episode's folder.

        number: None for the one after the highest there is. Raises FileExistsError for one that is there.
        """
        self.end_episode(robot)
        number, folder = self._make_folder(robot, number)
        fields = {"robot": robot, "episode": number, **(meta or {})}
        try:
            (folder / "frames").mkdir()
            write_json(folder / "meta.json", fields)
            steps = (folder / "steps.jsonl").open("ab", buffering=0)
        except OSError:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        self._open[robot] = _EpisodeFiles(folder, steps, fields)
        return folder

    def _make_folder(self, robot: str, number: int | None) -> tuple[int, Path]:
        """Never one that another writer has made."""
        if number is not None:
            folder = self._episodes / f"{robot}-{number}"
            folder.mkdir(parents=True)
            return number, folder
        taken = [number for name, number, _ in list_folders(self._episodes) if name == robot]
        number = max(taken, default=-1) + 1
        while True:
            with suppress(FileExistsError):
                return self._make_folder(robot, number)
            number += 1

    def add_step(self, line: Mapping[str, Any], image: np.ndarray | None) -> int:
        """Append to the open episode of the robot that `line["robot"]` names; returns the bytes written.

        image: uint8 (H, W, 3), None to keep no frame. Raises OSError (a full disk); the step is then
        not there at all and the next one takes its place.
        """
        files = self._open[line["robot"]]
        text = (encode_json(line) + "\n").encode()
        size = len(text)
        if image is not None:
            frame = files.folder / "frames" / f"{files.num_steps:06d}.png"
            Image.fromarray(image).save(frame, **_PNG)
            size += frame.stat().st_size
        append_whole(files.steps, text)
        files.num_steps += 1
        return size

    def add_refusal(self, line: Mapping[str, Any]) -> None:
        """Append to RUN/refusals.jsonl: a request that was told why instead of what to do.

        Anyone can be refused as often as he likes, so the newest are kept: a full file becomes
        refusals.old.jsonl, in place of the one before.
        """
        path = self.folder / "refusals.jsonl"
        with path.open("ab", buffering=0) as file:
            append_whole(file, (encode_json(line) + "\n").encode())
            is_full = file.tell() > MAX_REFUSAL_BYTES
        if is_full:
            path.replace(self.folder / "refusals.old.jsonl")

    def end_episode(self, robot: str, meta: Mapping[str, Any] | None = None) -> None:
        """End the robot's episode, adding `meta` (its outcome) to meta.json; nothing where none is open."""
        files = self._open.pop(robot, None)
        if files is None:
            return
        files.steps.close()
        if meta:
            write_json(files.folder / "meta.json", {**files.meta, **meta})

    def close(self) -> None:
        for robot in list(self._open):
            self.end_episode(robot)


@dataclass
class _EpisodeFiles:
    folder: Path
    steps: FileIO
    meta: dict[str, Any]
    num_steps: int = 0


@dataclass(frozen=True, eq=False)
class RecordedEpisode:
    """An episode of a run folder as it was written.

    index: 0-based reading order. lines: of steps.jsonl. load_image: step -> uint8 (H, W, 3).
    """

    index: int
    robot: str
    meta: Mapping[str, Any]
    lines: list[dict[str, Any]]
    load_image: Callable[[int], np.ndarray]
    source: str


def read_run(path: str | Path, report: Report, names: Collection[str] = ()) -> Iterator[RecordedEpisode]:
    """Episodes of a run folder by robot and number; with `names` (<robot>-<number>) only these.

    What cannot be read goes to `report`. Raises DataError for a name that is not there.
    """
    folders = [entry for entry in list_folders(Path(path) / "episodes") if not names or entry[2].name in names]
    if missing := set(names) - {folder.name for _, _, folder in folders}:
        raise DataError(f"{path} has no episode {', '.join(sorted(missing))}; `runs` lists those that it has")
    for index, (robot, _, folder) in enumerate(folders):
        torn: list[int] = []
        try:
            lines = read_steps(folder, torn.append)
            meta = read_json_object(folder / "meta.json")
            seed = meta.get("seed")
            if seed is not None and not (_is_whole(seed) and 0 <= seed < 2**64):
                raise ValueError(f"meta.json: seed must be a whole number from 0 to 2**64 - 1, not {_show(seed)}")
        except (OSError, ValueError) as error:
            report(DataError(f"{folder}: {error}; the episode is left out"))
            continue
        if torn:
            report(
                DataError(f"{folder}: the last line of steps.jsonl was cut off; the {len(lines)} steps before it count")
            )
        load_image = require_one_size(_frame_loader(folder / "frames"), str(folder))
        yield RecordedEpisode(index, robot, meta, lines, load_image, str(folder))


def read_steps(folder: Path, report_torn: Callable[[int], None]) -> list[dict[str, Any]]:
    """The lines of an episode's steps.jsonl. Raises OSError or ValueError, also for fields of another kind."""
    path = folder / "steps.jsonl"
    lines = list(read_json_lines(path, report_torn))
    for number, line in enumerate(lines, 1):
        if wrong := _find_wrong(line):
            raise ValueError(f"{path}, line {number}: {wrong}")
    return lines


def _find_wrong(line: Any) -> str | None:
    """What is wrong with a step's fields, as far as they are read anywhere; fields may be missing or null."""
    if not isinstance(line, dict):
        return f"a JSON object was expected, not {_show(line)}"
    if not _is_whole(line.get("step", 0)):
        return f"step must be a whole number, not {_show(line['step'])}"
    for name in ("instruction", "phrase", "fault"):
        if not isinstance(line.get(name), str | None):
            return f"{name} must be text, not {_show(line[name])}"
    for name in ("proprio", "action", "meant"):
        if line.get(name) is not None and not _is_vector(line[name]):
            return f"{name} must be 7 numbers, not {_show(line[name])}"
    return None


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_vector(value: Any) -> bool:
    """7 numbers that are finite; nothing measured or commanded is near a million."""
    return (
        isinstance(value, list)
        and len(value) == 7
        and all(isinstance(number, int | float) and abs(number) < 1e6 for number in value)
    )


def _show(value: Any) -> str:
    return f"{value if isinstance(value, int | float | str) else type(value).__name__}"[:60]


def open_data_set(path: Path, selection: Selection, report: Report) -> DataSet:
    """`read_run` as what can be labelled; episodes without measured states go to `report`."""
    refuse_selection(selection, f"{path} is a recorded run, which", "camera", "split", "state_layout")
    about = {"format": RECORDED_RUN, "camera": None, "splits": [], "state_layout": "pose"}
    return DataSet(about, _read_episodes(read_run(path, report), selection.embodiment, report))


def count_episodes(path: Path, split: str | None) -> int:
    return len(list_folders(path / "episodes"))


def _read_episodes(run: Iterator[RecordedEpisode], embodiment: str, report: Report) -> Iterator[Episode]:
    is_base = embodiment != AUTO and load_embodiment(embodiment).rotation_frame == "base"
    for recorded in run:
        try:
            yield _to_episode(recorded, is_base, report)
        except DataError as error:
            report(error)


def choose_action(line: Mapping[str, Any]) -> list[float] | None:
    """The action of a step in the Bridge frame; of old recordings, which know no frame, the action that was sent."""
    return line.get("action") if line.get("meant") is None else line["meant"]


def _to_episode(recorded: RecordedEpisode, is_base: bool, report: Report) -> Episode:
    """is_base: whether states of lines that name no frame are to be taken for those of the base frame."""
    if not recorded.lines:
        raise DataError(f"{recorded.source}: the episode has no steps")
    lines = _cut_at_gap(recorded.lines)
    if len(lines) < len(recorded.lines):
        lost = len(recorded.lines) - len(lines)
        report(
            DataError(
                f"{recorded.source}: a step was lost after step {lines[-1]['step']}, and a label across the gap "
                f"would be wrong; the {lost} steps after it are left out"
            )
        )
    unmeasured = [step for step, line in enumerate(lines) if line.get("proprio") is None]
    if unmeasured:
        raise DataError(f"{recorded.source}: step {unmeasured[0]} has no proprio, and without it there is no label")
    if any(choose_action(line) is None for line in lines):
        raise DataError(f"{recorded.source}: action must be 7 numbers in every line")
    states = np.array([line["proprio"] for line in lines], np.float64)
    if is_base and "frame" not in lines[0]:
        states[:, 3:6] = base_to_bridge(states[:, 3:6])
    states, actions = states.astype(np.float32), np.array([choose_action(line) for line in lines], np.float32)
    said = summarise_instructions([str(line.get("instruction") or "") for line in lines])
    return Episode(recorded.index, said[0], states, actions, recorded.load_image, recorded.source, said[1])


def _cut_at_gap(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines before the first whose step does not follow the one before."""
    steps = [line.get("step", index) for index, line in enumerate(lines)]
    gaps = (index for index, step in enumerate(steps) if step - steps[0] != index)
    return lines[: next(gaps, len(lines))]


def _frame_loader(frames: Path) -> Callable[[int], np.ndarray]:
    return lambda step: read_image(frames / f"{step:06d}.png")


def list_folders(episodes: Path) -> list[tuple[str, int, Path]]:
    """(robot, number, folder) of the episodes that are there, in order. Raises DataError where that is no folder."""
    try:
        folders = list(episodes.iterdir())
    except OSError as error:
        raise DataError(
            f"{episodes.parent} is no run folder ({episodes.name}: {error.strerror}); `runs` lists them"
        ) from None
    matches = ((re.fullmatch(r"(.+)-(\d+)", folder.name), folder) for folder in folders)
    return sorted((match[1], int(match[2]), folder) for match, folder in matches if match)
