"""Which files of a result folder are evidence. Pages are not: they are made from what is."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from vlm_local.errors import DataError


@dataclass(frozen=True)
class Layout:
    """One kind of result. needs: files without which it is none. texts, pictures: patterns of relative paths.

    marks: a file and a key of its JSON object that only this kind has.
    """

    kind: str
    needs: tuple[str, ...]
    marks: tuple[str, str]
    texts: str
    pictures: str

    def holds(self, name: str) -> bool:
        """Whether a file of this relative path belongs to such a result; nothing outside the folder does."""
        return bool(re.fullmatch(f"{self.texts}|{self.pictures}", name))

    def is_picture(self, name: str) -> bool:
        return bool(re.fullmatch(self.pictures, name))


LAYOUTS = {
    layout.kind: layout
    for layout in (
        Layout(
            kind="eval",
            needs=("evaluation.json", "episodes.jsonl", "rows.jsonl", "report.json"),
            marks=("evaluation.json", "plan"),
            texts=r"(evaluation|report)\.json|(episodes|rows)\.jsonl",
            pictures=r"(?!)",  # an evaluation keeps none
        ),
        Layout(
            kind="sim",
            needs=("meta.json", "report.json"),
            marks=("meta.json", "simulator"),
            texts=r"(meta|report)\.json|episodes/[a-z_]+-[0-9]+/(meta\.json|steps\.jsonl)",
            pictures=r"episodes/[a-z_]+-[0-9]+/(frames/[0-9]{6}\.png|film\.(mp4|gif))",
        ),
        Layout(
            kind="spatial",
            needs=("study.json", "rows.jsonl", "report.json"),
            marks=("study.json", "set"),
            texts=r"(study|report|set)\.json|rows\.jsonl",
            pictures=r"(?!)",  # its set draws them again
        ),
    )
}


def find_layout(folder: Path) -> Layout:
    """Raises DataError for a folder that holds no finished result."""
    for layout in LAYOUTS.values():
        name, key = layout.marks
        try:
            marked = key in json.loads((folder / name).read_bytes())
        except (OSError, ValueError, TypeError):
            continue
        missing = [name for name in layout.needs if not (folder / name).is_file()]
        if marked and not missing:
            return layout
        if marked:
            raise DataError(f"{folder} is a result of `{layout.kind}` without {', '.join(missing)}; finish it first")
    raise DataError(f"{folder} is no result folder; expected the --out of {', '.join(LAYOUTS)}")
