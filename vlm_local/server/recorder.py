"""A subscriber that writes every answered step to a run folder; what is lost is counted and shown."""

import logging
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vlm_local.data.runs import RunWriter
from vlm_local.errors import ConfigError
from vlm_local.files import holds_lock, lock_folder
from vlm_local.server.records import Record, Refusal, StepRecord

logger = logging.getLogger(__name__)

_COMPLAIN_EVERY_S = 60.0
_MAX_REASON = 500  # characters of a refusal, which may quote what a stranger sent
_MAX_OPEN = 64  # episodes; more than robots that act, and few enough that old ones can be deleted


class Recorder:
    """Writes records as they come. Its subscription's thread calls it and may wait for the disk.

    A step that cannot be written (a full disk) is lost alone, and the next one is tried again. Folders that someone
    removed or moved meanwhile are made anew, with the rest of the episode.
    """

    def __init__(self, folder: str | Path, describe: Callable[[], Mapping[str, Any]], max_bytes: int | None = None):
        """folder: of the run; an existing one is added to. describe: the metadata of run and episode,
        asked at each episode's start, since the model may still be loading now.

        max_bytes: above it the oldest ended episodes of this folder are deleted; None keeps all. Raises
        ConfigError for a folder that cannot be written, or that another process records into.
        """
        self._describe = describe
        self._meta = dict(describe())
        try:
            self._open_run(Path(folder))
        except OSError as error:
            raise explain_refusal(folder, error) from None
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._stats: dict[str, Any] = {"written": 0, "lost": 0, "deleted_episodes": 0, "error": None}
        self._complained = -_COMPLAIN_EVERY_S
        self._is_losing = False  # as the log was told

    def _open_run(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._lock_file = lock_folder(folder)  # first: what the run of another server says of itself stays
        self._writer = RunWriter(folder, self._meta)
        self._open: dict[str, tuple[int, Path]] = {}  # robot -> the episode's number on the server, its folder
        self._sizes = _measure_episodes(folder / "episodes")

    def stats(self) -> dict[str, Any]:
        """written, lost: steps; deleted_episodes; error: why the last step was lost, None if it was not."""
        with self._lock:
            return dict(self._stats)

    def __call__(self, record: Record) -> None:
        try:
            if isinstance(record, Refusal):
                self._writer.add_refusal({**asdict(record), "reason": record.reason[:_MAX_REASON]})
            else:
                self._write(record)
        except Exception as error:  # whatever it is, the next step gets its chance
            self._lose(error, num_steps=int(isinstance(record, StepRecord)))

    def close(self) -> None:
        """Close the files and give the folder free. Called when no record comes any more."""
        self._writer.close()
        self._lock_file.close()

    def _write(self, record: StepRecord) -> None:
        number, folder = self._open.pop(record.robot, (None, None))
        if folder is None or number != record.episode or not (folder / "frames").is_dir():
            folder = self._start_episode(record)
        self._open[record.robot] = record.episode, folder  # the last one written to stands last
        if len(self._open) > _MAX_OPEN:
            del self._open[next(iter(self._open))]
        self._sizes[folder] += self._writer.add_step(record.build_line(), record.observation.image)
        with self._lock:
            self._stats |= {"written": self._stats["written"] + 1, "error": None}
            lost = self._stats["lost"]
        if self._is_losing:
            self._is_losing = False
            logger.warning("recording into %s goes on; %d steps were lost so far", self._writer.folder, lost)
        if self._max_bytes is not None:
            self._delete_oldest(self._max_bytes)

    def _start_episode(self, record: StepRecord) -> Path:
        if not (holds_lock(self._lock_file, self._writer.folder) and (self._writer.folder / "episodes").is_dir()):
            self.close()
            self._open_run(self._writer.folder)
            logger.warning("%s was removed or moved while recording into it; it was made anew", self._writer.folder)
        # Restarted servers count from 0 again, so the folder's number may differ from the server's.
        known = dict(self._describe())
        if known != self._meta:
            self._writer.write_meta(known)
            self._meta = known
        meta = {**known, "server_episode": record.episode, "seed": record.seed, "started_by": record.started_by}
        folder = self._writer.start_episode(record.robot, {**meta, "started": record.time})
        self._sizes[folder] = 0
        return folder

    def _delete_oldest(self, max_bytes: int) -> None:
        if sum(self._sizes.values()) <= max_bytes:
            return
        still_open = {folder for _, folder in self._open.values()}
        oldest = next((folder for folder in self._sizes if folder not in still_open), None)
        if oldest is None:
            return
        shutil.rmtree(oldest, ignore_errors=True)
        del self._sizes[oldest]
        with self._lock:
            self._stats["deleted_episodes"] += 1

    def _lose(self, error: Exception, num_steps: int) -> None:
        with self._lock:
            self._stats |= {"lost": self._stats["lost"] + num_steps, "error": str(error) or type(error).__name__}
            lost = self._stats["lost"]
        if time.monotonic() - self._complained >= _COMPLAIN_EVERY_S:
            self._complained = time.monotonic()
            self._is_losing = True
            logger.error("recording into %s fails, %d steps were lost so far: %s", self._writer.folder, lost, error)


def explain_refusal(folder: str | Path, error: OSError) -> ConfigError:
    """Why a server does not start. What it would do without this folder may move a robot that a person holds."""
    return ConfigError(
        f"cannot record into {folder} ({error}); make room there, or choose another --record DIR, or off: then it is "
        "not known who was held and what a gripper was told"
    )


def _measure_episodes(episodes: Path) -> dict[Path, int]:
    """Bytes of the episodes that are there already, oldest first."""
    folders = sorted(episodes.iterdir(), key=lambda folder: folder.stat().st_mtime)
    return {folder: sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) for folder in folders}
