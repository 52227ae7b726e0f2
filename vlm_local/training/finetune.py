"""Fine-tunes a model folder of any supported family on recorded episodes, wholly or by LoRA."""

import functools
import logging
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError
from torch import nn

from vlm_local.checkpoint import SIDECAR, Checkpoint, copy_around_weights
from vlm_local.decoding.families import LoadedModel
from vlm_local.decoding.prepared import pad_pictures
from vlm_local.decoding.trie import tokenize_sentences
from vlm_local.decoding.views import POOLING, count_on
from vlm_local.embodiments import AUTO, BRIDGE, load_embodiment
from vlm_local.engines.loading import load_model
from vlm_local.engines.processing import Processing
from vlm_local.errors import ConfigError, EngineError
from vlm_local.files import list_missing, remove_unused, write_json
from vlm_local.models import name_base
from vlm_local.prompts import load_template
from vlm_local.training.optimisation import SETTINGS, Optimisation, Recipe, claim_folder, draw_curves
from vlm_local.training.samples import Sample
from vlm_local.types import GenerationRequest

_IGNORED = -100
_PROMPT, _EMBODIMENT = "prompt.txt", "embodiment.json"
_HELD_OUT = 64  # samples that were never trained on, asked each time the state is saved
_FOR_TOKENS = ("mm_token_type_ids", "token_type_ids")  # of vision, one number a token; the rest is one row a picture
_RECURRENT = r"linear_attn\.(in_proj_\w+|out_proj)"  # by which three of four layers of Qwen3.5 attend
_PER_LAYER = r"per_layer_(input_gate|projection|model_projection)"  # Gemma 4's, of tokens' embeddings for each layer
_LINEAR = rf"\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|gate_up_proj|down_proj|{_RECURRENT}|{_PER_LAYER})"
_OF_LFM2 = r"\.(conv\.in_proj|out_proj|w[123])"
_ADAPTED = rf".*(language_model|text_model).*({_LINEAR}|{_OF_LFM2})"
# In the vision tower, too, where it has layers of these names.
_ADAPTED_EVERYWHERE = rf"{_ADAPTED}|.*{_LINEAR}(\.linear)?"


@dataclass(frozen=True)
class Tuning:
    """samples: of a step, in forwards of `at_once`. lora: rank of the adapters, 0 trains all weights.

    lora_alpha: their scale is this by the rank, None for twice the rank. adapts_vision: also in the vision tower.
    Weights that are trained are float32; with adapters and recipe.bfloat16 the others are bfloat16.
    """

    recipe: Recipe
    samples: int = 16
    at_once: int = 4
    lora: int = 0
    device: str = "auto"
    lora_alpha: int | None = None
    adapts_vision: bool = False

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the weights; `at_once` and `device` say only where and in what portions they are computed.

        `lora_alpha` and `adapts_vision` stand there only where they are not the default, as the newest of Recipe's.
        """
        newest = {"lora_alpha": self.lora_alpha, "adapts_vision": self.adapts_vision}
        newest = {name: value for name, value in newest.items() if value}
        return {**self.recipe.settings, "samples_per_step": self.samples, "lora": self.lora, **newest}


class Samples(Protocol):
    """What a training draws from: the same samples for the same step, whenever it is asked."""

    @property
    def num_episodes(self) -> int: ...

    def __len__(self) -> int: ...

    def draw(self, step: int, num_samples: int) -> list[Sample]: ...

    def draw_held_out(self, num_samples: int) -> list[Sample]:
        """At most so many that are never trained on."""
        ...


class Finetuning:
    """The model, its optimiser, and the samples; `run` trains and writes what `--model` takes."""

    def __init__(self, checkpoint: Checkpoint, samples: Samples, tuning: Tuning, folder: Path, seed: int):
        """folder: the result, and until then the state to go on from after a kill."""
        if checkpoint.adapter is not None:
            raise ConfigError(f"{checkpoint.adapter} is an adapter; fine-tune the model {checkpoint.folder} itself")
        if checkpoint.quant_method:
            raise ConfigError(
                f"{checkpoint.folder} is quantised ({checkpoint.quant_method}), so it cannot be trained; "
                "fine-tune the model's unquantised folder"
            )
        torch.manual_seed(seed)
        self._checkpoint, self._samples, self._tuning, self._folder = checkpoint, samples, tuning, folder
        self._seed = seed
        is_frozen_small = tuning.lora and tuning.recipe.bfloat16
        loaded = load_model(checkpoint, "none", tuning.device, "bfloat16" if is_frozen_small else "float32")
        self._batches = Batches(loaded)
        self._model = loaded.model.train()
        self._trained = _add_adapters(self._model, tuning) if tuning.lora else self._model.requires_grad_(True)
        self._optimisation = Optimisation(self._trained, tuning.recipe, folder / "training")

    def run(self, sidecar: Mapping[str, Any], files: Mapping[str, bytes]) -> None:
        """files: by name what the sidecar names of them, and the project does not ship."""
        held_out = self._samples.draw_held_out(_HELD_OUT)
        measure = functools.partial(self._measure, held_out) if held_out else dict
        self._optimisation.run(self._tuning.recipe.num_steps, self._step, measure)
        skipped = {"skipped_steps": self._optimisation.num_skipped}
        try:
            self._write({**sidecar, "training": {**sidecar["training"], **skipped}}, files)
        except (OSError, SafetensorError) as error:
            raise EngineError(
                f"the trained model cannot be written to {self._folder} ({error}); mend that, and the same command "
                f"writes it: its training is done and saved"
            ) from error
        draw_curves(self._folder / "training", ("loss", "loss held_out", "exact", "exact held_out"))

    def _step(self, step: int) -> tuple[torch.Tensor, Mapping[str, float]]:
        """Loss a token over all samples of the step; all but the last forward's is backpropagated already."""
        torch.manual_seed(int(np.random.SeedSequence([self._seed, step]).generate_state(1)[0]))  # of dropout
        samples = self._samples.draw(step, self._tuning.samples)
        groups = [
            samples[start : start + self._tuning.at_once] for start in range(0, len(samples), self._tuning.at_once)
        ]
        batches = [self._batches.build(group) for group in groups]
        num_tokens = sum(int((batch["labels"] != _IGNORED).sum()) for batch in batches)
        loss, total, num_exact = torch.zeros(()), 0.0, 0
        for index, batch in enumerate(batches):
            loss, exact = compute_loss(self._model, batch)
            loss = loss / num_tokens
            total += float(loss.detach())
            num_exact += exact
            if index + 1 < len(batches):
                loss.backward()
        return loss, {"loss": total, "exact": num_exact / len(samples)}

    @torch.no_grad()
    def _measure(self, samples: Sequence[Sample]) -> dict[str, float]:
        """Loss a token, and share of exact answers, of samples that were never trained on."""
        self._model.eval()
        total, num_tokens, num_exact = 0.0, 0, 0
        for start in range(0, len(samples), self._tuning.at_once):
            batch = self._batches.build(samples[start : start + self._tuning.at_once])
            with torch.autocast(self._model.device.type, torch.bfloat16, enabled=self._tuning.recipe.bfloat16):
                loss, exact = compute_loss(self._model, batch)
            total += float(loss)
            num_tokens += int((batch["labels"] != _IGNORED).sum())
            num_exact += exact
        self._model.train()
        shares = {"loss held_out": total / num_tokens, "exact held_out": num_exact / len(samples)}
        return {name: round(value, 5) for name, value in shares.items()}

    def _write(self, sidecar: Mapping[str, Any], files: Mapping[str, bytes]) -> None:
        """A folder as the one that was trained, or an adapter's folder beside it. Its weights come last: without them
        it is refused, where after a kill they would be served by the prompt of their base.
        """
        if not self._tuning.lora:
            copy_around_weights(self._checkpoint.folder, self._folder)
        for name, content in files.items():
            (self._folder / name).write_bytes(content)
        write_json(self._folder / SIDECAR, sidecar)
        if self._tuning.lora:
            self._trained.peft_config["default"].base_model_name_or_path = name_base(self._checkpoint)
            # Of embeddings nothing is trained; peft would ask the hub for them.
            self._trained.save_pretrained(str(self._folder), save_embedding_layers=False)
            (self._folder / "README.md").unlink(missing_ok=True)  # peft's form with nothing filled in
        else:
            self._model.save_pretrained(self._folder)
        for file in self._folder.glob("*.safetensors"):
            file.chmod(0o644)  # safetensors writes 0600, which a package would keep


def _add_adapters(model: nn.Module, tuning: Tuning):
    """LoRA (Hu et al., 2021) on linear layers; the rest stays as it is."""
    # peft imports bitsandbytes, which says on some CPUs that a kernel for 4 bits is missing: nothing here has 4 bits.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise ConfigError("--lora needs peft: .venv/bin/pip install -e '.[train]'") from None
    alpha = 2 * tuning.lora if tuning.lora_alpha is None else tuning.lora_alpha
    adapted = _ADAPTED_EVERYWHERE if tuning.adapts_vision else _ADAPTED
    # Gemma 4's vision tower has its linear layers within others, which clip their numbers and bear the names.
    named = [(name, module) for name, module in model.named_modules() if re.fullmatch(adapted, name)]
    around = [name for name, module in named if not isinstance(module, nn.Linear)]
    config = LoraConfig(r=tuning.lora, lora_alpha=alpha, target_modules=adapted, exclude_modules=around or None)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*gradient_checkpointing", FutureWarning)  # peft asks for the old name
        return get_peft_model(model, config)


class Batches:
    """Samples -> what a family's forward takes, right-padded, with labels on the answer alone."""

    def __init__(self, loaded: LoadedModel):
        self._loaded = loaded
        self._processing = Processing(loaded.processor, loaded.family, loaded.dtype)

    def build(self, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
        """input_ids, attention_mask, labels: int64 (B, L); the others as the family names them."""
        loaded = self._loaded
        rows = [self._encode(sample) for sample in samples]
        length = max(len(row["input_ids"]) for row in rows)
        pads = {"input_ids": loaded.tokenizer.pad_token_id or 0, "labels": _IGNORED}
        batch = {}
        for name in rows[0]:
            values = [row[name] for row in rows]
            if values[0].ndim == 1:
                pad = pads.get(name, 0)
                values = [nn.functional.pad(value, (0, length - len(value)), value=pad)[None] for value in values]
            batch[name] = (count_on(values) if name == POOLING else torch.cat(pad_pictures(values))).to(loaded.device)
        return batch

    def _encode(self, sample: Sample) -> dict[str, torch.Tensor]:
        loaded = self._loaded
        request = GenerationRequest(sample.image, sample.prompt, (sample.phrase,))
        prepared = self._processing.prepare(request)
        head = prepared.input_ids
        end = loaded.eos_token_id
        (answer,) = tokenize_sentences(loaded.tokenizer, request.sentences, int(head[-1]), end, loaded.lead)
        tail = torch.tensor([*answer, end])
        row = {
            "input_ids": torch.cat([head, tail]),
            "attention_mask": torch.ones(len(head) + len(tail), dtype=torch.int64),
            "labels": torch.cat([torch.full_like(head, _IGNORED), tail]),
        }
        for name, value in prepared.vision.items():
            if name in _FOR_TOKENS:
                # 1 is what PaliGemma calls the answer, which it reads from left to right; 0 is others' text.
                kind = int(loaded.family.startswith("paligemma"))
                value = nn.functional.pad(value[0].cpu(), (0, len(tail)), value=kind)
            row[name] = value
        return row


def compute_loss(model: Any, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
    """Cross-entropy summed over the answers' tokens, and how many answers were right token by token."""
    labels = batch["labels"]
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    hidden = model.model(**inputs, use_cache=False).last_hidden_state[:, :-1]
    following = labels[:, 1:]
    is_answer = following != _IGNORED
    # Only these rows: a whole sequence over 150,000 tokens of vocabulary would not fit.
    logits = model.lm_head(hidden[is_answer]).float()
    bound = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    if bound is not None:
        logits = bound * torch.tanh(logits / bound)
    loss = nn.functional.cross_entropy(logits, following[is_answer], reduction="sum")
    right = torch.ones_like(is_answer)
    right[is_answer] = logits.argmax(-1) == following[is_answer]
    return loss, int(right.all(1).sum())


def finetune(
    checkpoint: Checkpoint,
    samples: Samples,
    tuning: Tuning,
    prompt: Path | str,
    history: int,
    folder: Path,
    seed: int,
    data: Mapping[str, Any],
    embodiment: str = AUTO,
) -> None:
    """Train and write `folder`. prompt, history: as the samples were asked; a file goes into the folder.

    data: what the samples were made from, JSON values. embodiment: whose words about the camera their prompts have; the
    sidecar names it where these are not Bridge's, since `serve` would else show others, and where the base's does.
    Raises ConfigError where `folder` holds a training with other settings.
    """
    words, usual = (dict(load_embodiment(BRIDGE if name == AUTO else name).camera) for name in (embodiment, BRIDGE))
    settings = {
        "base_sha256": checkpoint.sha256,
        "data": dict(data),
        "prompt_sha256": load_template(prompt).sha256,
        "history": history,
        "seed": seed,
        **({} if words == usual else {"camera_words": words}),
        **tuning.settings,
    }
    files: dict[str, bytes] = {}
    is_told = words != usual or embodiment == checkpoint.sidecar.get("embodiment")
    sidecar = {
        "trained": True,
        "decide": "greedy",
        "temperature": 1.0,
        "history": history,
        "steps_per_phrase": 1,
        "prompt": _take_along(str(prompt), _PROMPT, files),
        **({"embodiment": _take_along(embodiment, _EMBODIMENT, files)} if is_told else {}),
        "results": {},
        "training": {
            "base": checkpoint.name,
            "samples": len(samples),
            "episodes": samples.num_episodes,
            **settings,
        },
    }
    made = list_missing(folder / "training")
    with claim_folder(folder, folder / "training", settings):
        try:
            training = Finetuning(checkpoint, samples, tuning, folder, seed)
        except Exception:
            remove_unused(made, (SETTINGS,))
            raise
        training.run(sidecar, files)


def _take_along(name: str, own: str, files: dict[str, bytes]) -> str:
    """What the sidecar is to say for `name`: a file goes into `files` under its `own` name."""
    if "." not in name:
        return name
    files[own] = Path(name).read_bytes()
    return own
