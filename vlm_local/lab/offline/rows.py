"""The rows of an evaluation: on disk as JSON lines, in memory as arrays.

rows.jsonl has a row a step. episodes.jsonl gets a line when an episode is finished: an evaluation that goes on keeps
the rows of the episodes named there and asks about the others again, so that no row is lost or doubled.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vlm_local.errors import DataError
from vlm_local.files import read_json_lines
from vlm_local.lab.results import RowFile
from vlm_local.primitives import list_phrases, list_slight_phrases, parse_phrase
from vlm_local.types import AXES

_SIGNS = {phrase: parse_phrase(phrase) for phrase in list_phrases() + list_slight_phrases()}
_NO_ANSWER = (0,) * len(AXES)


class RowWriter:
    """Rows of episodes that are answered in parallel. Threads may share it.

    An episode's rows count once it is finished; those of the others are dropped when the folder is opened again.
    episodes: a line for each finished episode. done: their numbers.
    """

    def __init__(self, folder: Path, progress: Callable[[float], object] = lambda episodes: None):
        """progress: is given the share of an episode that was done."""
        self.progress = progress
        self._finished = RowFile(folder / "episodes.jsonl")
        self.episodes = list(self._finished.rows)
        self.done = {line["episode"] for line in self.episodes}
        self._rows = RowFile(folder / "rows.jsonl", keep=lambda row: row["episode"] in self.done)

    def add_row(self, row: Mapping[str, Any]) -> None:
        self._rows.add(row)

    def finish_episode(self, line: Mapping[str, Any]) -> None:
        """line: episode, and what was left out of it: `unscored` {step: reason} or `left_out` reason."""
        self._finished.add(line)
        self.episodes.append(dict(line))
        self.done.add(line["episode"])

    def close(self) -> None:
        self._finished.close()
        self._rows.close()
        self._rows.sort(key=lambda row: (row["episode"], row["step"]))


@dataclass(frozen=True, eq=False)
class Rows:
    """N rows in order of episode and step.

    episode: int (N,), 0..E-1 in order of appearance; episode_ids: int (E,) as in the rows.
    step: int (N,) raw step index. instructions, label_phrases, previous_phrases (None for a first
    step): text. answered: bool (N,), whether the policy gave a phrase. are_said: bool (N,), False for phrases that were
    read from actions.
    label, answer: int8 (N, 6) signs in the order of AXES; zeros where there is none.
    full_window: bool (N,). probability: float (N,), marginals: float (N, 6, 3) for -, 0, +;
    action, recorded_action: float (N, 7); all NaN where not known.
    """

    episode: np.ndarray
    episode_ids: np.ndarray
    step: np.ndarray
    instructions: list[str]
    label_phrases: list[str]
    previous_phrases: list[str | None]
    are_said: np.ndarray
    answered: np.ndarray
    label: np.ndarray
    answer: np.ndarray
    full_window: np.ndarray
    probability: np.ndarray
    marginals: np.ndarray
    action: np.ndarray
    recorded_action: np.ndarray

    def __len__(self) -> int:
        return len(self.step)


def load_rows(path: Path) -> Rows:
    """rows.jsonl, or the folder it is in. Raises DataError for a file that is none or holds no row."""
    path = path / "rows.jsonl" if path.is_dir() else path
    if not path.exists():
        raise DataError(f"there is no {path}; expected the --out folder of an evaluation")
    try:
        rows = list(read_json_lines(path))
    except ValueError as error:
        raise DataError(f"{error}; something else changed the file") from None
    if not rows:
        raise DataError(f"{path} holds no rows: no step could be scored")
    try:
        return build_rows(rows)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} is no evaluation's rows: {error!r}") from None


def build_rows(rows: Sequence[Mapping[str, Any]]) -> Rows:
    """Rows as dictionaries -> arrays, sorted by episode and step."""
    rows = sorted(rows, key=lambda row: (row["episode"], row["step"]))
    episode_ids, episode = np.unique([row["episode"] for row in rows], return_inverse=True)
    phrases = [row["phrase"] for row in rows]
    return Rows(
        episode=episode,
        episode_ids=episode_ids,
        step=np.array([row["step"] for row in rows]),
        instructions=[row["instruction"] for row in rows],
        label_phrases=[row["label"] for row in rows],
        previous_phrases=[row.get("previous_label") for row in rows],
        are_said=np.array([row.get("phrase_source") != "actions" for row in rows]),
        answered=np.array([phrase is not None for phrase in phrases]),
        label=encode_signs([row["label"] for row in rows]),
        answer=encode_signs(phrases),
        full_window=np.array([row["full_window"] for row in rows], bool),
        probability=np.array([row.get("probability") for row in rows], np.float64),
        marginals=_stack([_order_marginals(row.get("marginals")) for row in rows], (len(AXES), 3)),
        action=_stack([row.get("action") for row in rows], (7,)),
        recorded_action=_stack([row.get("recorded_action") for row in rows], (7,)),
    )


def encode_signs(phrases: Sequence[str | None]) -> np.ndarray:
    """Phrases (None for none) -> int8 (N, 6)."""
    return np.array([_NO_ANSWER if phrase is None else _SIGNS[phrase] for phrase in phrases], np.int8)


def _order_marginals(marginals: Mapping[str, Sequence[float]] | None) -> list[Sequence[float]] | None:
    return None if marginals is None else [marginals[axis] for axis in AXES]


def _stack(values: Sequence[Any], shape: tuple[int, ...]) -> np.ndarray:
    """Values of one shape, None where missing -> float (N, *shape) with NaN."""
    missing = np.full(shape, np.nan)
    return np.array([missing if value is None else value for value in values], np.float64).reshape(-1, *shape)


def hash_labels(rows: Rows) -> str:
    """sha256 of (episode, step, label) of all rows: alike for two evaluations of the same steps."""
    digest = hashlib.sha256()
    for episode, step, label in zip(rows.episode_ids[rows.episode], rows.step, rows.label_phrases, strict=True):
        digest.update(f"{episode}/{step}/{label}\n".encode())
    return digest.hexdigest()
