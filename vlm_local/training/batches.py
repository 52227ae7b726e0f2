"""Several questions about each of several pictures as one batch for a Qwen2-VL.

The vision tower sees each picture once, however much is asked about it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

from vlm_local.decoding.families import Family, LoadedModel
from vlm_local.decoding.prepared import PreparedPicture, PreparedRequest
from vlm_local.engines.processing import Processing
from vlm_local.prompts import Frame, build_prompt, load_template
from vlm_local.training.examples import Example
from vlm_local.training.questions import SLOTS, Question
from vlm_local.types import Observation, Picture

_IGNORED = -100
_ATTENTION = "sdpa_in_float32"
_NO_IMAGE = np.zeros((0, 0, 3), np.uint8)  # the text does not depend on it
_UNIT_M = 0.1  # what the auxiliary heads count in
_AUXILIARY_WEIGHT = 0.5
_SHARP = 0.05  # error in _UNIT_M above which it counts linearly


@dataclass(frozen=True, eq=False)
class Batch:
    """B present pictures and E earlier ones, Q questions, L tokens, P patches a picture.

    pixels: float32 ((B + E) * P, 1536), the present ones first. grid: int64 (B + E, 3). picture: which ones the
    prompts of all questions show, in their order.
    ids: int64 (Q, L), right-padded. positions: int64 (3, Q, L). targets: int64 (Q, L), the next
    token where it belongs to the answer, else -100. ends: (Q,) place of the prompt's last token.
    meant: float32 (Q, 3), from the finger tips to the thing that is meant, NaN for none. seen_picture,
    seen_slot, seen_offset: (S,), (S,), (S, 3), the same of all things in the pictures. tips: float32
    (B, 3), NaN where the picture does not show them. Lengths in _UNIT_M.
    """

    pixels: torch.Tensor
    grid: torch.Tensor
    picture: torch.Tensor
    ids: torch.Tensor
    positions: torch.Tensor
    targets: torch.Tensor
    ends: torch.Tensor
    meant: torch.Tensor
    seen_picture: torch.Tensor
    seen_slot: torch.Tensor
    seen_offset: torch.Tensor
    tips: torch.Tensor


class BatchBuilder:
    """Builds batches for the model of a folder such as checkpoints/tiny."""

    def __init__(self, folder: Path, loaded: LoadedModel):
        self._processing = Processing(loaded.processor, loaded.family, loaded.dtype)
        self._tokenizer = loaded.tokenizer
        self._pictures = loaded.processor.image_processor
        self._image = loaded.processor.image_token
        self._template = load_template(folder / "prompt.txt")
        self._family = Family(loaded)

    def build(self, examples: Sequence[Example], shown: np.ndarray, tint: np.ndarray) -> Batch:
        """shown: bool (B,), whether prompts about an example tell its proprio. tint: float (B, 2, 3), a factor and a
        summand for each colour channel of its pictures, whose pixels are 0 to 1.
        """
        with_first = [index for index, each in enumerate(examples) if each.first is not None]
        pictures = [*(each.frame for each in examples), *(examples[index].first for index in with_first)]
        pixels, grid = self._cut_patches(np.stack(pictures), np.concatenate([tint, tint[with_first]]))
        sequences = [[index] for index in range(len(examples))]  # of each example, which pictures its prompts show
        for picture, index in enumerate(with_first, len(examples)):
            sequences[index].insert(0, picture)
        asked = [(index, question) for index, each in enumerate(examples) for question in each.asked]
        seen = [(index, question) for index, each in enumerate(examples) for question in each.things]
        heads = self._encode(
            [
                self._write_prompt(examples[index].proprio if shown[index] else None, question, grid[sequences[index]])
                for index, question in asked
            ]
        )
        ids, targets = self._lay_out(heads, [question for _, question in asked])
        positions = [
            self._count_positions(head, grid[sequences[index]], ids.shape[1])
            for (index, _), head in zip(asked, heads, strict=True)
        ]
        tips = np.array([each.proprio[:3] if each.things else [np.nan] * 3 for each in examples], np.float32)
        return Batch(
            pixels,
            grid,
            torch.tensor([picture for index, _ in asked for picture in sequences[index]]),
            torch.from_numpy(ids),
            torch.from_numpy(np.stack(positions, axis=1)),
            torch.from_numpy(targets),
            torch.tensor([len(head) - 1 for head in heads]),
            torch.tensor([question.offset_m for _, question in asked]) / _UNIT_M,
            torch.tensor([index for index, _ in seen], dtype=torch.int64),
            torch.tensor([question.slot for _, question in seen], dtype=torch.int64),
            torch.tensor([question.offset_m for _, question in seen]).view(-1, 3) / _UNIT_M,
            torch.from_numpy(tips) / _UNIT_M,
        )

    def _lay_out(self, heads: list[list[int]], questions: Sequence[Question]) -> tuple[np.ndarray, np.ndarray]:
        """Batch's ids and targets: each prompt with the answer to its question, whose end token is never read."""
        answers = [[*ids, self._tokenizer.eos_token_id] for ids in self._encode([each.phrase for each in questions])]
        totals = [len(head) + len(answer) - 1 for head, answer in zip(heads, answers, strict=True)]
        ids = np.zeros((len(heads), max(totals)), np.int64)
        targets = np.full_like(ids, _IGNORED)
        for row, (head, answer, total) in enumerate(zip(heads, answers, totals, strict=True)):
            ids[row, :total] = head + answer[:-1]
            targets[row, len(head) - 1 : total] = answer
        return ids, targets

    def find_tokens(self, word: str) -> torch.Tensor:
        """The ids (int64) of a word that is one token, at the start of a sentence and within."""
        return torch.tensor([id_ for (id_,) in self._encode([word, f" {word}"])])

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return self._tokenizer(texts, add_special_tokens=False)["input_ids"]

    def _write_prompt(self, proprio: np.ndarray | None, question: Question, grids: torch.Tensor) -> str:
        frames = [Frame(0, Picture(_NO_IMAGE))] * (len(grids) - 1)
        observation = Observation(_NO_IMAGE, question.instruction, None if proprio is None else proprio.astype(float))
        text = self._processing.render(build_prompt(self._template, observation, frames=frames))
        return text.replace(self._image, self._image * (int(grids[0].prod()) // self._pictures.merge_size**2))

    def _count_positions(self, head: Sequence[int], grids: torch.Tensor, length: int) -> np.ndarray:
        request: Any = None  # positions do not depend on it
        *earlier, present = ({"image_grid_thw": grid[None]} for grid in grids)
        pictures = tuple(PreparedPicture(0, 0, vision) for vision in earlier)
        prepared = PreparedRequest(request, torch.tensor(head), 0, present, pictures)
        positions, following = self._family.position_prompt(prepared)
        rest = following + np.arange(length - positions.shape[1])
        return np.concatenate([positions, np.tile(rest, (3, 1))], axis=1)

    def _cut_patches(self, frames: np.ndarray, tint: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """As Qwen2VLImageProcessor, for many pictures at once."""
        options = self._pictures
        batch, size = frames.shape[:2]
        patch, merge = options.patch_size, options.merge_size
        cells = size // patch // merge
        mean, std = torch.tensor(options.image_mean), torch.tensor(options.image_std)
        factor, summand = torch.from_numpy(tint).float()[:, :, None, None].unbind(1)  # (B, 1, 1, 3)
        scaled = torch.from_numpy(frames).float() / 255 * factor + summand
        scaled = (scaled.clamp(0, 1) - mean) / std
        patches = scaled.view(batch, cells, merge, patch, cells, merge, patch, 3).permute(0, 1, 4, 2, 5, 7, 3, 6)
        patches = patches.reshape(-1, 3, 1, patch * patch).expand(-1, 3, options.temporal_patch_size, -1)
        grid = torch.tensor([1, size // patch, size // patch]).repeat(batch, 1)
        return patches.reshape(len(patches), -1), grid


class TrainableTiny(nn.Module):
    """A Qwen2-VL and the auxiliary heads that exist in training only.

    They ask the vision tower where the finger tips and all things are, and the prompt's last token
    where the thing is that is meant: that breaks the plateau on which a model knows where things
    are and not which one the words mean.
    """

    unknown: torch.Tensor

    def __init__(self, model: Any, unknown: torch.Tensor):
        """unknown: ids of tokens whose embeddings do not learn from being read; see wordings.UNKNOWN."""
        super().__init__()
        self.register_buffer("unknown", unknown, persistent=False)
        self.model: Any = model
        width = model.config.get_text_config().hidden_size
        num_tokens = 16
        self.places = nn.Linear(num_tokens * width, 3 + 3 * len(SLOTS))
        self.meant = nn.Linear(width, 3)
        model.set_attn_implementation(_ATTENTION)
        patches = model.model.visual.patch_embed
        # The same sum as its Conv3d, whose gradient takes a fifth of a training step on a CPU.
        patches.forward = lambda pixels: nn.functional.linear(pixels, patches.proj.weight.flatten(1))

    def forward(self, batch: Batch) -> tuple[torch.Tensor, dict[str, float]]:
        """The loss and what to log beside it."""
        inner = self.model.model
        seen = inner.visual(batch.pixels, grid_thw=batch.grid).pooler_output
        seen = seen.view(len(batch.grid), -1, seen.shape[-1])  # (B, T, H)
        embedded = inner.get_input_embeddings()(batch.ids)  # (Q, L, H)
        is_unknown = torch.isin(batch.ids, self.unknown)[..., None]
        embedded = torch.where(is_unknown, embedded.detach(), embedded)
        is_image = (batch.ids == self.model.config.image_token_id)[..., None]
        embedded = embedded.masked_scatter(is_image, seen[batch.picture].to(embedded.dtype))
        hidden = inner.language_model(
            inputs_embeds=embedded, position_ids=batch.positions, use_cache=False
        ).last_hidden_state
        is_answer = batch.targets != _IGNORED
        logits = self.model.lm_head(hidden[is_answer]).float()
        answer = nn.functional.cross_entropy(logits, batch.targets[is_answer])
        last = hidden[torch.arange(len(hidden)), batch.ends]
        auxiliary = self._locate(batch, seen.flatten(1)) + _distance(self.meant(last), batch.meant)
        right = torch.ones_like(is_answer)
        right[is_answer] = logits.argmax(-1) == batch.targets[is_answer]
        measured = {
            "answer": float(answer.detach()),
            "auxiliary": float(auxiliary.detach()),
            "exact": float(right.all(1).float().mean()),
        }
        return answer + _AUXILIARY_WEIGHT * auxiliary, measured

    def _locate(self, batch: Batch, seen: torch.Tensor) -> torch.Tensor:
        """Error of what the vision tower says of tips and things, m / _UNIT_M."""
        places = self.places(seen[: len(batch.tips)]).view(len(batch.tips), -1, 3)  # (B, 1 + slots, 3)
        things = places[batch.seen_picture, 1 + batch.seen_slot]
        return _distance(things, batch.seen_offset) + _distance(places[:, 0], batch.tips)


def _attend(module, query, key, value, attention_mask=None, **options):
    """As "sdpa"; its gradient in bfloat16 takes eight times as long on a CPU."""
    with torch.autocast(query.device.type, enabled=False):
        return sdpa_attention_forward(module, query.float(), key.float(), value.float(), attention_mask, **options)


AttentionInterface.register(_ATTENTION, _attend)
AttentionMaskInterface.register(_ATTENTION, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


def _distance(said: torch.Tensor, true: torch.Tensor) -> torch.Tensor:
    """Mean over what is known: `true` is NaN elsewhere."""
    is_known = true.isfinite()
    total = nn.functional.smooth_l1_loss(said[is_known].float(), true[is_known], beta=_SHARP, reduction="sum")
    return total / is_known.sum().clamp(min=1)
