"""Layers that keep a state instead of KV, over a prompt and a tree behind it.

Most of LFM2's are a causal convolution over a few tokens, between two gates: its state are the last inputs, and a
node's window the last tokens of its own path. Three of four of Qwen3.5's have such a convolution before linear
attention, the gated delta rule, with one state S (key dim, value dim) for each head:
    S_t = exp(g_t) S_p + beta_t k_t (v_t - exp(g_t) S_p^T k_t)^T        o_t = S_t^T q_t
where p is the token before t (Yang et al., Gated Delta Networks, 2024, eq. 10). For a node of a tree p is its parent,
so a forward cannot go from token to token. It need not: with S_0 the state where a block of tokens begins, G_t the
sum of g from there to t, and u_t what t writes,
    u_t = beta_t (v_t - exp(G_t) S_0^T k_t - sum of exp(G_t - G_j) (k_j . k_t) u_j over t's ancestors j in the block)
    o_t = exp(G_t) S_0^T q_t + sum of exp(G_t - G_j) (k_j . q_t) u_j over t and its ancestors
which is one triangular system, because ancestors come first. A prompt is the tree without branches, block by block.

No branch here depends on a tensor's values and all is written in place, so that a GPU can replay it as a graph.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.nn.functional import pad, silu, softplus

from vlm_local.decoding.families import Family
from vlm_local.decoding.forward import DynamicKV, Kept, PlacedImage
from vlm_local.decoding.layout import Chunk
from vlm_local.decoding.states import States, begin_states, list_modules

BLOCK = 64  # tokens of a prompt whose system is solved at once


@dataclass(frozen=True, eq=False)
class Paths:
    """Where the tokens of a chunk stand, whose first `split` columns are prompts' and whose other n are nodes.

    num_prompt, noted: int (B,), as a chunk's. own: int (n,), the nodes' slots in the states.
    ancestors: bool (B, n, S), whose slots precede a node on its path. window: int (B, n, kernel), the last tokens of
        its path, itself last; 0 to kernel - 2 are the prompt's last tokens, kernel - 1 + i is slot i.
    """

    split: int
    num_prompt: torch.Tensor
    noted: torch.Tensor
    own: torch.Tensor
    ancestors: torch.Tensor
    window: torch.Tensor


def trace_paths(
    split: int, num_prompt: torch.Tensor, noted: torch.Tensor, own: torch.Tensor, seen: torch.Tensor, kernel: int
) -> Paths:
    """seen: bool (B, n, S), the slots that each node may see; its own is one of them, those behind its own are not."""
    slots = torch.arange(-kernel, seen.shape[2], device=seen.device)  # the prompt's last tokens have negative ones
    last = torch.where(pad(seen, (kernel, 0), value=True), slots, slots[0]).topk(kernel).values.flip(-1)
    return Paths(split, num_prompt, noted, own, seen & (slots[kernel:] != own[:, None]), last + kernel - 1)


@contextmanager
def remembering(family: Family, states: States, paths: Paths) -> Iterator[None]:
    """While open, the family's layers with a state go along these paths and keep it here."""
    modules = list_modules(family)
    for place, module in enumerate(modules):
        run = _attend if hasattr(module, "conv1d") else _mix
        module.forward = partial(run, module, states.of_layer(place), paths)
    try:
        yield
    finally:
        for module in modules:
            del module.forward


class RecurrentKV(DynamicKV):
    """KV of the layers that attend, states of those that do not."""

    align = 1

    def __init__(self, family: Family, kept: Sequence[Kept | None], states: States | None = None):
        """kept: as DynamicKV takes it. states: behind the same columns; None where those are all kept of a step."""
        super().__init__(family, kept)
        if states is None:
            states = begin_states(family, len(kept), 0)
            states.begin(kept)
        self._states = states
        self._slots = self.filled - np.arange(states.inputs.shape[2], 0, -1)  # the column of each

    def run(self, chunk: Chunk, images: Sequence[PlacedImage], picks: Sequence[np.ndarray]) -> list[torch.Tensor]:
        device, num_old = self._family.device, len(self._slots)
        columns = self.filled + np.arange(chunk.split, chunk.token_ids.shape[1])
        self._slots = np.concatenate([self._slots, columns])
        self._states = self._states.extend(len(columns))
        paths = trace_paths(
            chunk.split,
            torch.as_tensor(chunk.num_prompt, device=device),
            torch.as_tensor(chunk.noted, device=device),
            torch.arange(num_old, len(self._slots), device=device),
            torch.as_tensor(chunk.visible[:, chunk.split :, self._slots], device=device),
            self._family.conv_kernel,
        )
        with remembering(self._family, self._states, paths):
            return super().run(chunk, images, picks)

    def copy_columns(self, row: int, columns: np.ndarray) -> Kept:
        return self._states.complete(super().copy_columns(row, columns), row)

    def narrow(self, rows: np.ndarray) -> None:
        super().narrow(rows)
        self._states = self._states.select(torch.as_tensor(rows, device=self._family.device))


def _mix(module: Any, state: States, paths: Paths, hidden_states: torch.Tensor, **options: Any) -> torch.Tensor:
    """In place of transformers' forward of an Lfm2ShortConv. hidden_states: (B, T, hidden), and so what is returned."""
    before, behind, inputs = module.in_proj(hidden_states).chunk(3, dim=-1)
    return module.out_proj(behind * _convolve(module.conv, state, paths, before * inputs))


def _convolve(conv: Any, state: States, paths: Paths, inputs: torch.Tensor) -> torch.Tensor:
    """(B, T, channels) -> the same. The tails go on to behind the prompts' tokens, the nodes' inputs to their slots."""
    split = paths.split
    parts = [_tap_prompt(state, paths, inputs[:, :split])] if split else []
    if split < inputs.shape[1]:
        parts.append(_tap_nodes(state, paths, inputs[:, split:]))
    taps = map(partial(torch.cat, dim=1), zip(*parts, strict=True))
    weight = conv.weight[:, 0].float().unbind(-1)
    products = [tap.float() * each for tap, each in zip(taps, weight, strict=True)]
    summed = torch.stack(products).sum(0)
    return (summed if conv.bias is None else summed + conv.bias).to(inputs.dtype)


def _tap_prompt(state: States, paths: Paths, inputs: torch.Tensor) -> list[torch.Tensor]:
    """(B, n, channels) -> the same for each place of the kernel, the token itself last."""
    num_before, count = state.tail.shape[1], inputs.shape[1]
    inputs = torch.cat([state.start_tail, inputs], dim=1)
    place = torch.arange(num_before, device=inputs.device)
    for tail, number in ((state.tail, paths.num_prompt), (state.noted_tail, paths.noted)):
        last = number[:, None] + place
        tail.copy_(inputs.gather(1, last[..., None].expand_as(tail)))
    return [inputs[:, tap : tap + count] for tap in range(num_before + 1)]


def _tap_nodes(state: States, paths: Paths, inputs: torch.Tensor) -> list[torch.Tensor]:
    """As `_tap_prompt`."""
    state.inputs.index_copy_(1, paths.own, inputs)
    inputs = torch.cat([state.tail, state.inputs], dim=1)
    rows = torch.arange(len(inputs), device=inputs.device)[:, None]
    return [inputs[rows, tap] for tap in paths.window.unbind(-1)]


def _attend(module: Any, state: States, paths: Paths, hidden_states: torch.Tensor, **options: Any) -> torch.Tensor:
    """In place of transformers' forward of a GatedDeltaNet. hidden_states: (B, T, hidden), and so what is returned."""
    mixed = silu(_convolve(module.conv1d, state, paths, module.in_proj_qkv(hidden_states)))  # (B, T, channels)
    rate = softplus(module.in_proj_a(hidden_states).float() + module.dt_bias)  # (B, T, heads)
    rate = -module.A_log.float().exp() * rate
    beta = module.in_proj_b(hidden_states).sigmoid().float()
    split = paths.split
    parts = []
    if split:
        parts.append(_read_prompt(module, state, paths, mixed[:, :split], rate[:, :split], beta[:, :split]))
    if split < mixed.shape[1]:
        parts.append(_read_nodes(module, state, paths, mixed[:, split:], rate[:, split:], beta[:, split:]))
    attended = torch.cat(parts, dim=2).transpose(1, 2).to(mixed.dtype)  # (B, T, heads, value dim)
    gate = module.in_proj_z(hidden_states)
    normed = module.norm(attended.reshape(-1, module.head_v_dim), gate.reshape(-1, module.head_v_dim))
    return module.out_proj(normed.view(*mixed.shape[:2], -1))


@dataclass(eq=False)
class _Tokens:
    """float32: query, key (B, heads, n, key dim), value (B, heads, n, value dim), rate, beta (B, heads, n)."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    rate: torch.Tensor
    beta: torch.Tensor

    def fold(self, size: int) -> "_Tokens":
        """(B, heads, blocks, size, dim) and (B, heads, blocks, size), padded by tokens that change nothing."""
        spare = -self.beta.shape[2] % size
        vectors = (pad(each, (0, 0, 0, spare)) for each in (self.query, self.key, self.value))
        numbers = (pad(each, (0, spare)) for each in (self.rate, self.beta))
        return _Tokens(*(each.unflatten(2, (-1, size)) for each in (*vectors, *numbers)))


def _read_prompt(
    module: Any, state: States, paths: Paths, mixed: torch.Tensor, rate: torch.Tensor, beta: torch.Tensor
) -> torch.Tensor:
    """(B, n, channels), (B, n, heads) twice -> (B, heads, n, value dim). The state goes on to behind these tokens."""
    count = mixed.shape[1]
    place = torch.arange(count, device=mixed.device)
    is_there = (place < paths.num_prompt[:, None])[..., None]  # padding neither writes nor fades
    tokens = _split(module, mixed, rate * is_there, beta * is_there)
    blocks = tokens.fold(min(BLOCK, count))
    decay = blocks.rate.cumsum(-1)
    square = decay.shape[-1], decay.shape[-1]
    before = torch.ones(square, dtype=torch.bool, device=mixed.device).tril()
    weight = (decay[..., None] - decay[..., None, :]).masked_fill(~before, -torch.inf).exp()
    beta, faded = blocks.beta[..., None], decay.exp()[..., None]
    # What a block writes, u = own - through S, for a state S before it that is not known yet.
    system = beta * weight * (blocks.key @ blocks.key.mT)
    given = torch.cat([beta * blocks.value, beta * faded * blocks.key], dim=-1)
    solved = torch.linalg.solve_triangular(system, given, upper=False, unitriangular=True)
    own, through = solved.split([blocks.value.shape[-1], blocks.key.shape[-1]], dim=-1)
    query, reads = faded * blocks.query, weight * (blocks.query @ blocks.key.mT)
    end = decay[..., -1:, None]
    left = (end - decay[..., None]).exp() * blocks.key  # what a block's end still has of each token
    memories, written, parts = [state.start], [], []
    for block in range(decay.shape[2]):
        written.append(own[:, :, block] - through[:, :, block] @ memories[-1])
        parts.append(query[:, :, block] @ memories[-1] + reads[:, :, block] @ written[-1])
        memories.append(end[:, :, block].exp() * memories[-1] + left[:, :, block].mT @ written[-1])
    state.noted.copy_(_find_state(paths.noted, memories, written, blocks.key, decay))
    state.memory.copy_(memories[-1])
    return torch.cat(parts, dim=2)[:, :, :count]


def _find_state(
    count: torch.Tensor,
    memories: Sequence[torch.Tensor],
    written: Sequence[torch.Tensor],
    keys: torch.Tensor,
    decay: torch.Tensor,
) -> torch.Tensor:
    """S (B, heads, key dim, value dim) behind the first tokens of prompts, so many of each row, int (B,).

    memories, written: S before each block (the last: behind all) and u in it. keys: (B, heads, blocks, size, dim).
    decay: (B, heads, blocks, size).
    """
    size, rows = decay.shape[-1], torch.arange(len(count), device=count.device)
    block = (count - 1).clamp(min=0) // size
    inside = count - block * size  # tokens of that block: 0 to size
    before, each = torch.stack(list(memories), 1)[rows, block], torch.stack(list(written), 1)[rows, block]
    keys, decay = keys[rows, :, block], decay[rows, :, block]
    end = pad(decay, (1, 0)).gather(-1, inside[:, None, None].expand(-1, decay.shape[1], 1))  # (B, heads, 1)
    is_in = (rows.new_ones(size).cumsum(0) <= inside[:, None])[:, None]
    left = (end - decay).masked_fill(~is_in, -torch.inf).exp()[..., None] * keys
    return end.exp()[..., None] * before + left.mT @ each


def _read_nodes(
    module: Any, state: States, paths: Paths, mixed: torch.Tensor, rate: torch.Tensor, beta: torch.Tensor
) -> torch.Tensor:
    """As `_read_prompt`. The state stays behind the prompt, and takes the nodes along in their slots."""
    tokens = _split(module, mixed, rate, beta)
    decay = tokens.rate + state.rates.index_copy_(2, paths.own, tokens.rate) @ paths.ancestors.float().mT
    state.keys.index_copy_(2, paths.own, tokens.key)
    state.decay.index_copy_(2, paths.own, decay)
    between = decay[..., None] - state.decay[..., None, :]  # (B, heads, n, S)
    weight = between.masked_fill(~paths.ancestors[:, None], -torch.inf).exp()
    beta, faded = tokens.beta[..., None], decay.exp()[..., None]
    system = beta * weight * (tokens.key @ state.keys.mT)
    known = faded * (tokens.key @ state.memory)  # what the prompt has written
    given = beta * (tokens.value - known) - system @ state.written.index_fill_(2, paths.own, 0)
    among = system.index_select(3, paths.own)
    written = torch.linalg.solve_triangular(among, given, upper=False, unitriangular=True)
    state.written.index_copy_(2, paths.own, written)
    itself = (tokens.query * tokens.key).sum(-1, keepdim=True) * written
    return faded * (tokens.query @ state.memory) + weight * (tokens.query @ state.keys.mT) @ state.written + itself


def _split(module: Any, mixed: torch.Tensor, rate: torch.Tensor, beta: torch.Tensor) -> _Tokens:
    sizes = [module.key_dim, module.key_dim, module.value_dim]
    query, key, value = mixed.split(sizes, dim=-1)
    shared = module.num_v_heads // module.num_k_heads
    query, key = (_norm(each.unflatten(2, (-1, module.head_k_dim)).float()) for each in (query, key))
    query, key = (each.repeat_interleave(shared, dim=2).transpose(1, 2) for each in (query, key))
    value = value.unflatten(2, (-1, module.head_v_dim)).float().transpose(1, 2)
    return _Tokens(query * module.head_k_dim**-0.5, key, value, rate.mT, beta.mT)


def _norm(vectors: torch.Tensor) -> torch.Tensor:
    """Each to length 1, as the model was trained."""
    return vectors * torch.rsqrt((vectors * vectors).sum(dim=-1, keepdim=True) + 1e-6)


def open_kv(family: Family, kept: Sequence[Kept | None]) -> DynamicKV:
    """For rows that begin with what is kept of an earlier step, where a family can keep anything."""
    return RecurrentKV(family, kept) if family.is_recurrent else DynamicKV(family, kept)
