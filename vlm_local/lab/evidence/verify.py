"""A result scored again without its weights: does every number of its report follow?"""

import json
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_local.checkup.findings import conclude
from vlm_local.checkup.scores import PARTS, score_pictures, summarise_part
from vlm_local.errors import ConfigError, DataError
from vlm_local.files import read_json_lines, read_json_object
from vlm_local.lab.closed_loop.rescore import rescore as rescore_sim
from vlm_local.lab.evidence.archive import build_manifest, seal, unpack
from vlm_local.lab.multiple_choice.rescore import rescore as rescore_choices
from vlm_local.lab.offline.rescore import rescore as rescore_eval
from vlm_local.lab.spatial.rescore import rescore as rescore_spatial

_SHOWN = 5  # differences that an error names

# What a last digit may differ by between processors.
_RELATIVE, _ABSOLUTE = 1e-9, 1e-12

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class VerifiedResult:
    """A result that holds.

    num_numbers: of the report, that follow. trusted: fields of the report that say how it was made.
    """

    kind: str
    seal: str
    num_files: int
    num_numbers: int
    report: Mapping[str, Any]
    trusted: list[str]


def verify(path: Path, progress: Progress = lambda done, total: None) -> VerifiedResult:
    """path: an archive of `pack`, or a result folder, which is scored as it stands.

    progress: is told episodes played again and their number. Raises DataError for an archive that was
    changed, and for a report of which a number does not follow.
    """
    if path.is_dir():
        return _verify_folder(path, path, build_manifest(path), progress)
    with tempfile.TemporaryDirectory() as folder:
        manifest = unpack(path, Path(folder))
        return _verify_folder(path, Path(folder), manifest, progress)


def _verify_folder(path: Path, folder: Path, manifest: Mapping[str, Any], progress: Progress) -> VerifiedResult:
    kind = manifest["kind"]
    try:
        report = read_json_object(folder / "report.json")
        scored, stated = _RESCORE[kind](folder, report, progress)
        scored = json.loads(json.dumps(scored))  # tuples become lists, as in the report
        differing = list(_compare({**scored, **stated}, report, ""))
    except (ConfigError, OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise DataError(f"{path}: its files are not those of `{kind}` ({error!r})") from None
    if differing:
        more = f" and {len(differing) - _SHOWN} more" if len(differing) > _SHOWN else ""
        raise DataError(
            f"{path}: the report does not follow from its own rows: {'; '.join(differing[:_SHOWN])}{more}. "
            "It was changed, or made with another version: make it again"
        )
    return VerifiedResult(kind, seal(manifest), len(manifest["files"]), _count_numbers(scored), report, sorted(stated))


def _rescore_checkup(folder: Path, report: dict[str, Any], progress: Progress) -> tuple[dict[str, Any], dict[str, Any]]:
    """Each result inside is verified as one by itself; what loading took and speed are only told."""
    stages = {name: report[name] for name in ("loads", "decoding", "speed", *PARTS) if name in report}
    scored: dict[str, Any] = {"parts": {}}
    if "failed" not in stages["decoding"]:
        stages["decoding"] = scored["decoding"] = score_pictures(list(read_json_lines(folder / "pictures.jsonl")))
    for name in PARTS:
        if "failed" in stages.get(name, {"failed": ""}):
            continue
        result = _verify_folder(folder / name, folder / name, build_manifest(folder / name, pictures=False), progress)
        scored["parts"][name] = {"kind": result.kind, "seal": result.seal}
        stages[name] = scored[name] = summarise_part(result.kind, result.report)
    scored["findings"] = conclude(stages)
    return scored, {name: value for name, value in report.items() if name not in scored}


_RESCORE = {
    "eval": rescore_eval,
    "sim": rescore_sim,
    "spatial": rescore_spatial,
    "eval-choices": rescore_choices,
    "doctor": _rescore_checkup,
}


def _compare(again: Any, told: Any, where: str) -> Iterator[str]:
    """A sentence for every place where the report says something else than comes out."""
    if isinstance(again, dict) and isinstance(told, dict):
        for name in {**again, **told}:
            if name not in told or name not in again:
                yield f"{where}{name} is {'missing' if name in again else 'nothing that is scored'}"
            else:
                yield from _compare(again[name], told[name], f"{where}{name}.")
    elif isinstance(again, list) and isinstance(told, list) and len(again) == len(told):
        for index, (one, other) in enumerate(zip(again, told, strict=True)):
            yield from _compare(one, other, f"{where}{index}.")
    elif not _is_same(again, told):
        yield f"{where[:-1]} is {_shorten(told)} and comes out as {_shorten(again)}"


def _is_same(again: Any, told: Any) -> bool:
    if _is_number(again) and _is_number(told):
        return math.isclose(again, told, rel_tol=_RELATIVE, abs_tol=_ABSOLUTE)
    return type(again) is type(told) and again == told


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _count_numbers(value: Any) -> int:
    if isinstance(value, dict | list):
        return sum(map(_count_numbers, value.values() if isinstance(value, dict) else value))
    return int(_is_number(value))


def _shorten(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
