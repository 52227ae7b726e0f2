"""What the layers with a state keep of some rows, beside the KV of those that attend."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch.nn.functional import pad

from vlm_local.decoding.families import Family
from vlm_local.decoding.forward import Kept


@dataclass(eq=False)
class States:
    """What layers keep of B rows: the state behind their prompts, and what S nodes wrote, each in a slot.

    The first dimension are the layers, in what `of_layer` returns there is none.
    memory: S, (L, B, heads, key dim, value dim). tail: (L, B, kernel - 1, channels), the prompts' last inputs of the
        convolution. start, noted: the same where a chunk of prompts begins, and behind those of its tokens that are to
        be noted.
    inputs: (L, B, S, channels), those of the nodes. keys, written: k and u of the nodes, (L, B, heads, S, dim).
    rates, decay: g and G of the nodes, (L, B, heads, S). All are float32 but tails and inputs. LFM2, whose state are
        the tails alone, has no heads.
    """

    memory: torch.Tensor
    tail: torch.Tensor
    start: torch.Tensor
    start_tail: torch.Tensor
    noted: torch.Tensor
    noted_tail: torch.Tensor
    inputs: torch.Tensor
    keys: torch.Tensor
    written: torch.Tensor
    rates: torch.Tensor
    decay: torch.Tensor

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return tuple(vars(self).values())

    def of_layer(self, place: int) -> "States":
        """A view."""
        return States(*(each[place] for each in self.tensors))

    def begin(self, kept: Sequence[Kept | None]) -> None:
        """For each row where its prompt begins: behind what is kept, or at nothing."""
        for row, each in enumerate(kept):
            if each and each.memory is not None and each.tail is not None:
                self.start[:, row], self.start_tail[:, row] = each.memory, each.tail
            else:
                self.start[:, row], self.start_tail[:, row] = 0, 0

    def complete(self, kept: Kept, row: int) -> Kept:
        """The same with a copy of the state that was noted of a row."""
        return replace(kept, memory=self.noted[:, row].clone(), tail=self.noted_tail[:, row].clone())

    def select(self, rows: torch.Tensor) -> "States":
        """A copy with these rows, whose prompts are read."""
        return States(*(each.index_select(1, rows) for each in self.tensors))

    def cut(self, count: int) -> "States":
        """With so many slots, the first."""
        inputs, rates, decay = self.inputs[:, :, :count], self.rates[..., :count], self.decay[..., :count]
        keys, written = self.keys[..., :count, :], self.written[..., :count, :]
        return replace(self, inputs=inputs, keys=keys, written=written, rates=rates, decay=decay)

    def extend(self, count: int) -> "States":
        """With room for so many more nodes."""
        inputs, keys, written = (pad(each, (0, 0, 0, count)) for each in (self.inputs, self.keys, self.written))
        rates, decay = (pad(each, (0, count)) for each in (self.rates, self.decay))
        return replace(self, inputs=inputs, keys=keys, written=written, rates=rates, decay=decay)


def begin_states(family: Family, num_rows: int, num_slots: int, is_replayed: bool = False) -> States:
    """Before the first token: zeros. is_replayed: a chunk is computed again from where it began; else the next one
    begins where it ended.
    """
    modules = list_modules(family)
    module, size = modules[0], (len(modules), num_rows)
    heads, keys, values = (getattr(module, name, 0) for name in ("num_v_heads", "head_k_dim", "head_v_dim"))
    channels, kernel = (module.conv1d if heads else module.conv).in_channels, family.conv_kernel
    numbers = partial(torch.zeros, dtype=torch.float32, device=family.device)
    inputs = partial(torch.zeros, dtype=family.dtype, device=family.device)
    memory, start, noted = (numbers((*size, heads, keys, values)) for _ in range(3))
    tail, start_tail, noted_tail = (inputs((*size, kernel - 1, channels)) for _ in range(3))
    return States(
        memory=memory,
        tail=tail,
        start=start if is_replayed else memory,
        start_tail=start_tail if is_replayed else tail,
        noted=noted,
        noted_tail=noted_tail,
        inputs=inputs((*size, num_slots, channels)),
        keys=numbers((*size, heads, num_slots, keys)),
        written=numbers((*size, heads, num_slots, values)),
        rates=numbers((*size, heads, num_slots)),
        decay=numbers((*size, heads, num_slots)),
    )


def list_modules(family: Family) -> list[Any]:
    """What has a state in the layers, in their order."""
    layers = [dict(layer.named_children()) for layer in family.language_model.layers]
    return [each[name] for each in layers for name in ("linear_attn", "conv") if name in each]
