"""A LoRA adapter's tensors into a loaded model: each has its place, or the adapter is refused.

Read without peft: adapter_config.json comes from strangers, and peft acts on fields of it that have
nothing to do with the weights. LoRA: Hu et al., 2021; DoRA: Liu et al., 2024; rsLoRA: Kalajdzievski, 2023.
"""

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping

from vlm_local.errors import ConfigError
from vlm_local.weights import ADAPTER, list_weights, read_json

_PREFIX = "base_model.model."
_PART = re.compile(r"(.+)\.lora_(embedding_A|embedding_B|A|B|magnitude_vector)(?:\.default)?(?:\.weight)?")
_WRAPPERS = re.compile(r"\.base_layer|\.modules_to_save(?:\.default)?")
_LAYERS = (nn.Linear, nn.Embedding, nn.Conv2d, nn.Conv3d)
_LAYER_NAME = re.compile(r"\^?[\w.]+")

# Fields of adapter_config.json that say how it was trained, or again what the tensors' names and shapes say.
_NO_MATTER = {
    *("auto_mapping", "base_model_name_or_path", "bias", "eva_config", "exclude_modules", "inference_mode"),
    *("layers_pattern", "layers_to_transform", "lora_dropout", "loftq_config", "megatron_config", "megatron_core"),
    *("modules_to_save", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision"),
    *("runtime_config", "target_modules", "task_type"),
}
_KNOWN = _NO_MATTER | {"alpha_pattern", "init_lora_weights", "lora_alpha", "use_dora", "use_rslora"}
# The other ways to begin change the base model's own weights, which an adapter does not bring along.
_PLAIN_BEGINNINGS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class _Scaling:
    """What a product of two LoRA matrices is multiplied with. is_dora: the rows' lengths are weights of their own."""

    alpha: float
    alpha_of_layer: Mapping[str, float]
    is_rank_stabilised: bool
    is_dora: bool

    def compute(self, layer: str, rank: int) -> float:
        """layer: the module's name as the adapter's file spells it."""
        ends = (key for key in self.alpha_of_layer if re.fullmatch(rf"(?:.*\.)?(?:{key})", layer))
        alpha = self.alpha_of_layer.get(next(ends, ""), self.alpha)
        return alpha / (rank**0.5 if self.is_rank_stabilised else rank)


@dataclass(frozen=True, eq=False)
class _Change:
    """Of one layer: weight + up @ down, float32 (out, r) and (r, in). lengths: (out,) of DoRA's rows, or None."""

    down: torch.Tensor
    up: torch.Tensor
    lengths: torch.Tensor | None


def add_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Add an adapter's weights into a model's own; into quantised layers as a term beside them.

    Raises ConfigError for an adapter of another kind than LoRA, and names the tensor that has no place.
    """
    scaling = _read_scaling(folder / ADAPTER)
    (file,) = list_weights(folder)
    layers, whole = _sort_tensors(model, safetensors.torch.load_file(file), file)
    whole = {name: value.to(model.get_parameter(name)) for name, value in whole.items()}
    whole = {name: value for name, value in whole.items() if not torch.equal(model.get_parameter(name), value)}
    _untie(model, [*layers, *(name.rpartition(".")[0] for name in whole)])
    for name, value in whole.items():
        _store(model.get_parameter(name), value, name, file)
    embedding: Any = model.get_input_embeddings()
    for name, (spelling, parts) in layers.items():
        module: Any = model.get_submodule(name)
        change = _build_change(module, parts, scaling, spelling, file)
        if module.weight.is_floating_point():
            _store(module.weight, _merge(module.weight, change), spelling, file)
        else:
            module.register_forward_hook(_build_term(change, embedding.weight.dtype))


def _read_scaling(file: Path) -> _Scaling:
    config = read_json(file)
    if config.get("peft_type") != "LORA":
        raise ConfigError(f"{file}: expected peft_type 'LORA', the only kind of adapter that is understood")
    strange = sorted(name for name in config.keys() - _KNOWN if config[name])
    if strange or config.get("init_lora_weights") not in _PLAIN_BEGINNINGS:
        name = strange[0] if strange else "init_lora_weights"
        raise ConfigError(
            f"{file}: {name} is {str(config[name])[:100]!r}, which is more than plain LoRA; merge the adapter into "
            f"its base where it was trained, and give the merged folder"
        )
    alphas = config.get("alpha_pattern") or {}
    numbers = [config.get("lora_alpha", 8), *(alphas.values() if isinstance(alphas, dict) else [None])]
    if not all(map(_is_number, numbers)) or not all(map(_LAYER_NAME.fullmatch, alphas)):
        raise ConfigError(f"{file}: expected numbers for lora_alpha and for each layer's name in alpha_pattern")
    return _Scaling(numbers[0], alphas, bool(config.get("use_rslora")), bool(config.get("use_dora")))


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _sort_tensors(model: PreTrainedModel, tensors: Mapping[str, torch.Tensor], file: Path) -> tuple[dict, dict]:
    """(module name -> its spelling in the file and its LoRA parts; parameter name -> its whole value)."""
    renamings = get_model_conversion_mapping(model)
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters(remove_duplicate=False))
    layers: dict[str, tuple[str, dict[str, torch.Tensor]]] = {}
    whole: dict[str, torch.Tensor] = {}
    for key, value in tensors.items():
        plain = _WRAPPERS.sub("", key.removeprefix(_PREFIX))
        part = _PART.fullmatch(plain)
        spelling = part[1] if part else plain
        name = find_place(spelling if part else plain, renamings, modules if part else parameters)
        if name is not None and part is None and not parameters[name].is_floating_point():
            raise ConfigError(
                f"{file}: the tensor {key} is to replace weights that are quantised in the base model; leave "
                f"--quantize out, or merge the adapter into the unquantised model where it was trained"
            )
        if name is None or (part is None and parameters[name].shape != value.shape):
            raise ConfigError(
                f"{file}: the tensor {key} {tuple(value.shape)} has no place in the adapter's base model; "
                f"is it the model that the adapter was trained on?"
            )
        kept, kind = (layers.setdefault(name, (spelling, {}))[1], part[2]) if part else (whole, name)
        if kind in kept:
            raise ConfigError(f"{file}: the tensor {key} stands in the place of another one of the adapter")
        kept[kind] = value
    if not layers:
        raise ConfigError(f"{file} holds no LoRA weights")
    return layers, whole


def find_place(name: str, renamings, known: Mapping[str, Any]) -> str | None:
    """The name as it is, or what transformers has renamed it to, as in 4.52; None where neither is known."""
    if name in known:
        return name
    renamed = name if name.endswith((".weight", ".bias")) else f"{name}.weight"
    for renaming in renamings:
        renamed, _ = renaming.rename_source_key(renamed)
    return next((each for each in (renamed, renamed.removesuffix(".weight")) if each in known), None)


def _untie(model: PreTrainedModel, touched: list[str]) -> None:
    """Give head and embedding a tensor each before one of them changes; training had kept the other as it was."""
    head: Any = model.get_output_embeddings()
    embedding: Any = model.get_input_embeddings()
    is_touched = any(model.get_submodule(name) in (head, embedding) for name in touched)
    if is_touched and head.weight is embedding.weight:
        head.weight = nn.Parameter(head.weight.detach().clone())
        model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = False


def _build_change(module: Any, parts: Mapping[str, torch.Tensor], scaling: _Scaling, layer: str, file: Path) -> _Change:
    """Raises ConfigError where the parts are not those of such a layer, or of another shape."""
    kinds = _list_kinds(module, scaling.is_dora)
    if parts.keys() != set(kinds):
        raise ConfigError(
            f"{file}: {layer} is a {type(module).__name__} in the base model, which LoRA weights of the kinds "
            f"{', '.join(sorted(parts))} cannot change"
        )
    weight = module.weight
    first, second, *magnitudes = (parts[kind].to(weight.device, torch.float32) for kind in kinds)
    down, up = (torch.atleast_2d(each).flatten(1) for each in (first, second))
    if isinstance(module, nn.Embedding):
        down, up = up.T, down.T  # its weight has a row for each input
    lengths = magnitudes[0].flatten() if magnitudes else None
    is_whole = weight.is_floating_point()
    expected = tuple(weight.flatten(1).shape) if is_whole else (module.out_features, module.in_features)
    is_product = (len(up), down.shape[1]) == expected and up.shape[1] == len(down) > 0
    if not is_product or (lengths is not None and len(lengths) != len(up)):
        shapes = ", ".join(f"{kind} {tuple(part.shape)}" for kind, part in sorted(parts.items()))
        raise ConfigError(f"{file} does not fit its base: {layer} is {expected} there, the adapter has {shapes}")
    return _Change(down, scaling.compute(layer, len(down)) * up, lengths)


def _list_kinds(module: Any, is_dora: bool) -> tuple[str, ...]:
    """The parts that change such a module, () where none can."""
    if isinstance(module, nn.Embedding):
        return "embedding_A", "embedding_B"
    if not isinstance(module, _LAYERS) or (is_dora and not module.weight.is_floating_point()):
        return ()
    return ("A", "B", "magnitude_vector") if is_dora else ("A", "B")


def _merge(weight: torch.Tensor, change: _Change) -> torch.Tensor:
    """float32, in the weight's shape."""
    rows = weight.detach().float().flatten(1) + change.up @ change.down
    if change.lengths is not None:
        rows = (change.lengths / rows.norm(dim=1))[:, None] * rows
    return rows.view(weight.shape)


def _build_term(change: _Change, dtype: torch.dtype):
    """A hook that adds up @ down @ x to what a layer gives: a merge into quantised weights would be rounded away."""
    down, up = change.down.T.to(dtype), change.up.T.to(dtype)
    return lambda module, inputs, output: output + (inputs[0].to(dtype) @ down @ up).to(output.dtype)


def _store(parameter: nn.Parameter, value: torch.Tensor, name: str, file: Path) -> None:
    value = value.to(parameter.dtype)
    if not torch.isfinite(value).all():
        raise ConfigError(
            f"{file}: with the adapter, {name} holds numbers that are not finite as {parameter.dtype}; "
            f"try --dtype float32, or train the adapter again"
        )
    parameter.data = value
