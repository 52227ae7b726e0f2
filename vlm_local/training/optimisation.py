"""Steps of AdamW that survive a kill: the same numbers come out as without one.

Batch t must be a function of t alone; then weights, moments and t are all there is to keep.
"""

import json
import math
import os
import pickle
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, TextIO

import psutil
import torch
from torch import nn

from vlm_local.errors import ConfigError, EngineError
from vlm_local.files import encode_json, lock_folder, open_replacing, read_json_lines, write_json
from vlm_local.progress import open_bar
from vlm_local.provenance import list_differences

_STATE, _LOG, _CURVES, SETTINGS = "state.pt", "log.jsonl", "curves.png", "settings.json"
_SHARES = ("exact", "success")
_WORK = (_STATE, "shards/*.npz")  # what is left of a training that was killed
_MAX_SKIPPED = 0.05  # of all steps; beyond that the weights are not those of the recipe


@dataclass(frozen=True)
class Recipe:
    """How many steps, and how large.

    learning_rate rises linearly over `warmup_steps`, stays, and falls as half a cosine to nothing
    over the last `decay` (0 to 1) of all steps; 1 is the usual cosine schedule. falls_linearly: not as a cosine.
    beta2: of AdamW, whose first is 0.9.
    """

    num_steps: int
    learning_rate: float = 1e-3
    warmup_steps: int = 150
    decay: float = 1.0
    weight_decay: float = 0.01
    clip: float = 1.0
    bfloat16: bool = False
    log_every: int = 20
    save_every: int = 500
    beta2: float = 0.95
    falls_linearly: bool = False

    def scale(self, step: int) -> float:
        """Share of the learning rate at this step."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        start = max(self.warmup_steps, (1 - self.decay) * self.num_steps)
        if step < start:
            return 1.0
        gone = (step - start) / max(1.0, self.num_steps - start)
        return 1 - gone if self.falls_linearly else 0.5 * (1 + math.cos(math.pi * gone))

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the weights. The newest fields stand there only where they are not the default, so that
        trainings go on that were begun before there were any.
        """
        newest = {"beta2": Recipe.beta2, "falls_linearly": Recipe.falls_linearly}
        silent = {"log_every", "save_every", *(name for name, value in newest.items() if getattr(self, name) == value)}
        return {name: value for name, value in asdict(self).items() if name not in silent}


def claim_folder(folder: Path, place: Path, settings: Mapping[str, Any]) -> TextIO:
    """Begin a training in `folder`, or make sure that it is the same one that goes on there.

    place: where it keeps its state, `folder` or a folder in it. settings: all that decides the weights,
    JSON values only. Returns a lock, held until it is closed. Raises ConfigError that names each setting that
    differs, for a folder of something else, and while another process trains there.
    """
    path = place / SETTINGS
    here = json.loads(encode_json(settings))
    if not path.exists() and folder.exists() and not _is_free(folder):
        raise ConfigError(f"{folder} holds something else than a training that can go on; choose another --out")
    place.mkdir(parents=True, exist_ok=True)
    lock = lock_folder(place)
    try:
        if path.exists() and any(next(place.glob(pattern), None) for pattern in _WORK):
            _check_same(folder, path, here)
        else:
            write_json(path, here)
    except BaseException:
        lock.close()
        raise
    return lock


def _is_free(folder: Path) -> bool:
    """Whether it holds nothing, or only what a kill or a full disk left before the settings were written."""
    files = (each for each in folder.rglob("*") if not each.is_dir() and each.name != f"{SETTINGS}.new")
    return folder.is_dir() and not any(each.lstat().st_size for each in files)


def _check_same(folder: Path, path: Path, here: Mapping[str, Any]) -> None:
    """path: the settings of the training in `folder`. Raises ConfigError where they are not `here`."""
    try:
        differences = list(list_differences(json.loads(path.read_bytes()), here))
    except (AttributeError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); choose another --out") from None
    if differences:
        raise ConfigError(
            f"{folder} holds a training with other settings: {'; '.join(differences)}; "
            "go on with the same ones, or choose another --out"
        )


class Optimisation:
    """The trainable parameters of `module`, their moments, and the log, kept in `folder`."""

    def __init__(self, module: nn.Module, recipe: Recipe, folder: Path):
        """Continues from `folder` where it holds a state, else starts at step 0."""
        self.recipe = recipe
        self.folder = folder
        self.step = 0
        self.seconds = 0.0
        self.num_skipped = 0  # steps whose gradients were not finite
        self._parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self._adam = torch.optim.AdamW(_group(self._parameters, recipe), betas=(0.9, recipe.beta2), fused=True)
        self._device = next(iter(self._parameters.values())).device
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / _STATE).exists():
            self._load()
        _cut_log(folder / _LOG, self.step)
        self._sums: dict[str, float] = {}
        self._last_means = ""  # what was logged last, for the bar
        self._num_noted = 0
        self._begun = perf_counter()

    def run(
        self,
        until: int,
        compute: Callable[[int], tuple[torch.Tensor, Mapping[str, float]]],
        measure: Callable[[], Mapping[str, float]] = dict,
    ) -> None:
        """Take steps up to `until`. compute: step -> loss to minimise, and what to log beside it.

        measure: what to log of the weights each time they are saved; before, so that no kill comes in between.
        Raises EngineError when too many steps were skipped since their gradients were not finite.
        """
        with open_bar("training", self.recipe.num_steps, initial=self.step, leave=False) as bar:
            while self.step < min(until, self.recipe.num_steps):
                with torch.autocast(self._device.type, torch.bfloat16, enabled=self.recipe.bfloat16):
                    loss, measured = compute(self.step)
                is_taken = self._apply(loss)
                self._note({"loss": float(loss.detach()), **measured} if is_taken else {})
                self._check_skipped()
                if self.step % self.recipe.save_every == 0 or self.step == self.recipe.num_steps:
                    self._log_means()
                    if told := measure():
                        self.log({"step": self.step, **told})
                    self._save()
                bar.set_postfix_str(f"{self._last_means}{_measure_memory(self._device) / 1e9:.1f} GB", refresh=False)
                bar.update()

    def _apply(self, loss: torch.Tensor) -> bool:
        """Take a step, or skip it (False) where its gradients are not finite."""
        for group in self._adam.param_groups:
            group["lr"] = self.recipe.learning_rate * self.recipe.scale(self.step)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self._parameters.values(), self.recipe.clip)
        is_taken = bool(torch.isfinite(norm))
        if is_taken:  # one bad batch must not spoil the moments
            self._adam.step()
        self._adam.zero_grad(set_to_none=True)
        self.num_skipped += not is_taken
        self.step += 1
        return is_taken

    def _check_skipped(self) -> None:
        if self.num_skipped > _MAX_SKIPPED * self.recipe.num_steps:
            raise EngineError(
                f"{self.num_skipped} of the first {self.step} training steps gave gradients that are not finite and "
                f"were skipped, so no model is written; lower the learning rate, leave --bfloat16 out, or look for "
                f"damaged weights, and choose another folder for the next run"
            )

    def _note(self, measured: Mapping[str, float]) -> None:
        for name, value in measured.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._num_noted += bool(measured)
        if self.step % self.recipe.log_every == 0:
            self._log_means()

    def _log_means(self) -> None:
        now = perf_counter()
        self.seconds, self._begun = self.seconds + now - self._begun, now
        if self._num_noted:
            means = {name: round(total / self._num_noted, 5) for name, total in self._sums.items()}
            self._last_means = "".join(f"{name} {means[name]:.3f}, " for name in ("loss", "exact") if name in means)
            skipped = {"skipped": self.num_skipped} if self.num_skipped else {}
            self.log({"step": self.step, "seconds": round(self.seconds, 1), **means, **skipped})
        self._sums, self._num_noted = {}, 0

    def log(self, fields: Mapping[str, Any]) -> None:
        """Append one JSON line."""
        with (self.folder / _LOG).open("a", encoding="utf-8") as file:
            file.write(json.dumps(fields) + "\n")

    def _save(self) -> None:
        """Raises EngineError where there is no room; what was saved before stays."""
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "skipped": self.num_skipped,
            "parameters": {name: p.detach() for name, p in self._parameters.items()},
            "adam": self._adam.state_dict(),
        }
        partial = self.folder / f"{_STATE}.partial"
        try:
            torch.save(state, partial)
            with partial.open("rb") as file:
                os.fsync(file.fileno())  # before the last state goes: a power cut must leave one of them
            os.replace(partial, self.folder / _STATE)
        except (OSError, RuntimeError) as error:  # torch's own writer knows no OSError
            partial.unlink(missing_ok=True)
            free, size = shutil.disk_usage(self.folder).free, sum(3 * p.nbytes for p in self._parameters.values())
            raise EngineError(
                f"the state after step {self.step} cannot be written to {self.folder / _STATE} ({error}); it takes "
                f"{size / 1e9:.1f} GB beside the one before, {free / 1e9:.1f} GB are free; make room, and the same "
                f"command goes on from the last saved state"
            ) from error

    def _load(self) -> None:
        try:
            state = torch.load(self.folder / _STATE, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise ConfigError(
                f"{self.folder / _STATE} cannot be read: {str(error)[:200]}; without the file, the training begins anew"
            ) from error
        if state["parameters"].keys() != self._parameters.keys():
            raise ConfigError(f"{self.folder} holds the training of another model; choose another folder for this one")
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(state["parameters"][name])
        self._adam.load_state_dict(state["adam"])
        self.step, self.seconds, self.num_skipped = state["step"], state["seconds"], state.get("skipped", 0)


def _measure_memory(device: torch.device) -> int:
    """Bytes that the training has at most held on a GPU, or this process holds now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return psutil.Process().memory_info().rss


def _group(parameters: Mapping[str, nn.Parameter], recipe: Recipe) -> list[dict]:
    """Matrices decay; vectors (norms, biases) do not."""
    matrices = [p for p in parameters.values() if p.ndim > 1]
    vectors = [p for p in parameters.values() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _cut_log(path: Path, step: int) -> None:
    """Drop what was logged after the last saved state: those steps are taken again."""
    if path.exists():
        with open_replacing(path) as file:
            file.writelines(json.dumps(line) + "\n" for line in read_json_lines(path) if line["step"] <= step)


def draw_curves(folder: Path, names: Iterable[str]) -> None:
    """Plot what the log of a training holds by step into curves.png, a panel for each first word of the names.

    Losses are on a logarithmic axis; shares ("exact", "success TASK") from 0 to 1.
    """
    from matplotlib.figure import Figure

    lines = list(read_json_lines(folder / _LOG))
    panels: dict[str, list[str]] = {}
    for name in names:
        if any(name in line for line in lines):
            panels.setdefault(name.split(" ")[0], []).append(name)
    height, has_legend = 2.2 * len(panels), any(len(several) > 1 for several in panels.values())
    figure = Figure(figsize=(7, height))  # a layout that looks for its margins takes as long as all the drawing
    figure.subplots_adjust(0.14, 0.45 / height, 0.77 if has_legend else 0.96, 1 - 0.1 / height, hspace=0.12)
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axis, (title, several) in zip(axes, panels.items(), strict=True):
        for name in several:
            points = [(line["step"], line[name]) for line in lines if name in line]
            axis.plot(*zip(*points, strict=True), linewidth=1, label=name.removeprefix(f"{title} ").replace("_", " "))
        if title in _SHARES:
            axis.set_ylim(0, 1.02)
        else:
            axis.set_yscale("log")
        if len(several) > 1:
            axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=8)
        axis.set_ylabel(title)
        axis.grid(alpha=0.3)
    axes[-1].set_xlim(0, lines[-1]["step"])
    axes[-1].set_xlabel("step")
    figure.savefig(folder / _CURVES, dpi=120)
