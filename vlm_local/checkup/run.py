"""The stages of a checkup in their order, each written to STAGES/NAME.json at once; then a report and an archive.

The same command goes on: a stage whose file is there is not made again, but for one that failed. A study inside
(`spatial`, `eval`, `sim`) goes on in its own folder.
"""

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from vlm_local.checkup.findings import conclude, describe, is_faulty
from vlm_local.checkup.scores import PARTS
from vlm_local.checkup.stages import Stages
from vlm_local.data import Selection, open_data_set
from vlm_local.errors import ConfigError
from vlm_local.files import write_json
from vlm_local.lab.evidence.archive import build_manifest, pack, seal
from vlm_local.lab.results import ResultFolder
from vlm_local.plain import hide_secrets
from vlm_local.policy_options import PolicyOptions
from vlm_local.provenance import describe_machine
from vlm_local.resolved_options import ResolvedOptions

SETTINGS = "doctor.json"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CheckupPlan:
    """model: as named by the user. data: recorded episodes for `eval`, or None.

    minutes: for all stages together; a slow machine gets the least of each, which may take longer.
    """

    model: str
    data: str | None
    minutes: float
    quantize: str | None = None
    device: str | None = None
    dtype: str | None = None

    @property
    def options(self) -> PolicyOptions:
        return PolicyOptions(model=self.model, quantize=self.quantize, device=self.device, dtype=self.dtype)


@dataclass(frozen=True)
class Checkup:
    """findings: sentences. archive: to send to others. is_faulty: a stage failed, or the decoder is wrong."""

    findings: list[str]
    archive: Path
    is_faulty: bool


def run_checkup(plan: CheckupPlan, path: Path, tell: Callable[[str], None]) -> Checkup:
    """tell: is given a line for every stage as it ends.

    Raises ConfigError where the model is not here or the folder holds another result, DataError where `data` is no data
    set, EngineError where the model cannot be loaded.
    """
    if plan.data is not None:
        open_data_set(plan.data, Selection(), lambda problem: None)
    if ResolvedOptions(plan.options).checkpoint is None:
        raise ConfigError(f"{plan.model!r} has no weights on this machine to examine; name a model or a folder")
    with ResultFolder(path, "doctor", SETTINGS) as folder:
        here = {"checkup": asdict(plan) | {"model": hide_secrets(plan.model)}, **describe_machine()}
        folder.begin(here, lambda made: made["checkup"], (path / "stages").is_dir())
        results = _run_stages(plan, path, tell)
        seconds = {name: result.pop("seconds") for name, result in results.items()}
        parts = {name: describe_part(path / name) for name in PARTS if "failed" not in results.get(name, {"failed": 0})}
        findings = conclude(results)
        report = {**folder.settings, **results, "seconds": seconds, "parts": parts, "findings": findings}
        write_json(path / "report.json", report)
    archive = path.resolve().with_name(f"{path.resolve().name}.evidence.zip")
    pack(path, archive)
    return Checkup(findings, archive, is_faulty(results))


def describe_part(folder: Path) -> dict[str, Any]:
    """What stands for a result inside: its kind, and its seal without pictures."""
    manifest = build_manifest(folder, pictures=False)
    return {"kind": manifest["kind"], "seal": seal(manifest)}


def _run_stages(plan: CheckupPlan, path: Path, tell: Callable[[str], None]) -> dict[str, dict[str, Any]]:
    """Name -> result, in order, each with `seconds`."""
    results: dict[str, dict[str, Any]] = {}
    stages = Stages(plan.options, plan.data, 60 * plan.minutes, path, results)
    try:
        for name, make in stages.list_all():
            file = path / "stages" / f"{name}.json"
            result = _read(file)
            if result is None:
                result = _make(name, make)
                write_json(file, result)
            results[name] = result
            tell(f"{name}, {result['seconds']:.0f} s: {describe(name, result)}")
    finally:
        stages.close()
    return results


def _make(name: str, make: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    start = perf_counter()
    try:
        result = dict(make())
    except Exception as error:  # whatever one stage meets on a machine not seen before, the others still tell something
        if name == "loads":
            raise
        logger.warning("the stage %s failed", name, exc_info=True)
        result = {"failed": hide_secrets(str(error).strip() or type(error).__name__)}
    return json.loads(json.dumps(result)) | {"seconds": round(perf_counter() - start, 1)}


def _read(file: Path) -> dict[str, Any] | None:
    """The result of a stage that is done."""
    if not file.is_file():
        return None
    result = json.loads(file.read_bytes())
    return None if "failed" in result else result
