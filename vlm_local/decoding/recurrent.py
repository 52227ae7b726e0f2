"""Linear attention over a prompt and a tree behind it: the gated delta rule of Qwen3.5's hybrid models.

Three of four layers of such a model keep no keys and values, but one state S (key dim, value dim) for each head:
    S_t = exp(g_t) S_p + beta_t k_t (v_t - exp(g_t) S_p^T k_t)^T        o_t = S_t^T q_t
where p is the token before t (Yang et al., Gated Delta Networks, 2024, eq. 10). For a node of a tree p is its parent,
so a forward cannot go from token to token. It need not: with S_0 the state where a block of tokens begins, G_t the
sum of g from there to t, and u_t what t writes,
    u_t = beta_t (v_t - exp(G_t) S_0^T k_t - sum of exp(G_t - G_j) (k_j . k_t) u_j over t's ancestors j in the block)
    o_t = exp(G_t) S_0^T q_t + sum of exp(G_t - G_j) (k_j . q_t) u_j over t and its ancestors
which is one triangular system, because ancestors come first. A prompt is the tree without branches, block by block.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.nn.functional import conv1d, pad, silu, softplus

from vlm_local.decoding.families import Family
from vlm_local.decoding.forward import DynamicKV, PlacedImage
from vlm_local.decoding.layout import Chunk

_BLOCK = 64  # tokens of a prompt whose system is solved at once


@dataclass(frozen=True, eq=False)
class _Path:
    """One row's tokens of a chunk: so many of the prompt (num_prompt), then n nodes.

    Nodes are numbered as they were read: N with those of earlier chunks, the new ones last.
    ancestors: bool (n, N), the nodes that precede each new one on its path. window: int (n, kernel), the last tokens of
        its path, itself last; 0 to kernel - 2 are the prompt's last tokens, kernel - 1 + i is node i.
    """

    num_prompt: int
    ancestors: torch.Tensor
    window: torch.Tensor


@dataclass(eq=False)
class _State:
    """What one layer keeps of one row: the state behind the prompt, and what its nodes wrote.

    memory: S, float32 (heads, key dim, value dim). tail: (kernel - 1, channels), the prompt's last inputs of the
        convolution. inputs: (N, channels), those of the nodes. keys, written: k and u of the nodes, (heads, N, dim).
    decay: G of the nodes, (heads, N).
    """

    memory: torch.Tensor
    tail: torch.Tensor
    inputs: torch.Tensor
    keys: torch.Tensor
    written: torch.Tensor
    decay: torch.Tensor


@dataclass(eq=False)
class _Tokens:
    """Of one row: query, key (heads, n, key dim), value (heads, n, value dim), decay, beta (heads, n); float32."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    decay: torch.Tensor
    beta: torch.Tensor

    def fold(self, size: int) -> "_Tokens":
        """In blocks: (heads, blocks, size, dim) and (heads, blocks, size), padded by tokens that change nothing."""
        spare = -self.beta.shape[1] % size
        vectors = (pad(each, (0, 0, 0, spare)) for each in (self.query, self.key, self.value))
        numbers = (pad(each, (0, spare)) for each in (self.decay, self.beta))
        return _Tokens(*(each.unflatten(1, (-1, size)) for each in (*vectors, *numbers)))


@dataclass(eq=False)
class _Solved:
    """What n tokens write and read, for a state S before them that need not be known yet.

    u = own - through S, o = query S + reads u, where the u of ancestors that were read earlier come first.
    own (heads, n, value dim), through and query (heads, n, key dim), reads (heads, n, N); decay: G (heads, n).
    """

    own: torch.Tensor
    through: torch.Tensor
    query: torch.Tensor
    reads: torch.Tensor
    decay: torch.Tensor


@dataclass(eq=False)
class _Row:
    """states: layer's number -> its state, empty before the first forward. nodes: columns of all nodes read."""

    states: dict[int, _State] = field(default_factory=dict)
    nodes: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))


class RecurrentKV(DynamicKV):
    """KV of the layers that attend, states of those that do not. A row never begins with an earlier step's."""

    def __init__(self, family: Family, num_rows: int):
        super().__init__(family, [None] * num_rows)
        self._rows = [_Row() for _ in range(num_rows)]

    def run(self, chunk: Chunk, images: Sequence[PlacedImage], picks: Sequence[np.ndarray]) -> list[torch.Tensor]:
        paths = [self._trace(row, chunk, index) for index, row in enumerate(self._rows)]
        with _remembering(self._family, self._rows, paths):
            return super().run(chunk, images, picks)

    def narrow(self, rows: np.ndarray) -> None:
        super().narrow(rows)
        self._rows = [self._rows[index] for index in rows]

    def _trace(self, row: _Row, chunk: Chunk, index: int) -> _Path:
        """Which nodes precede each of this row's new nodes, and which tokens the convolution sees with it."""
        kernel = self._family.conv_kernel
        num_prompt, num_nodes = int(chunk.num_prompt[index]), int(chunk.num_nodes[index])
        row.nodes = np.concatenate([row.nodes, self.filled + num_prompt + np.arange(num_nodes)])
        path = chunk.visible[index, num_prompt : num_prompt + num_nodes][:, row.nodes]  # each sees its path, and itself
        num_old = len(row.nodes) - num_nodes
        ancestors = path & ~np.eye(num_nodes, len(row.nodes), num_old, dtype=bool)
        before = np.arange(kernel - 1)
        places = [np.concatenate([before, kernel - 1 + np.flatnonzero(each)])[-kernel:] for each in path]
        window = np.stack(places) if places else np.zeros((0, kernel), dtype=np.int64)
        device = self._family.device
        return _Path(num_prompt, torch.as_tensor(ancestors, device=device), torch.as_tensor(window, device=device))


@contextmanager
def _remembering(family: Family, rows: Sequence[_Row], paths: Sequence[_Path]) -> Iterator[None]:
    """While open, the linear attention of the family's layers goes along these paths and keeps its states in `rows`."""
    modules = [layer.linear_attn for layer in family.language_model.layers if hasattr(layer, "linear_attn")]
    for module in modules:
        module.forward = partial(_attend, module, rows, paths)
    try:
        yield
    finally:
        for module in modules:
            del module.forward


def _attend(
    module: Any, rows: Sequence[_Row], paths: Sequence[_Path], hidden_states: torch.Tensor, **options: Any
) -> torch.Tensor:
    """In place of transformers' forward of a GatedDeltaNet. hidden_states: (B, T, hidden), and so what is returned."""
    mixed = module.in_proj_qkv(hidden_states)  # (B, T, channels)
    rate = softplus(module.in_proj_a(hidden_states).float() + module.dt_bias)  # (B, T, heads)
    rate = -module.A_log.float().exp() * rate
    beta = module.in_proj_b(hidden_states).sigmoid().float()
    attended = torch.zeros_like(mixed[..., -module.value_dim :])
    for index, (row, path) in enumerate(zip(rows, paths, strict=True)):
        parts = mixed[index], rate[index], beta[index]
        end, stop = path.num_prompt, path.num_prompt + len(path.ancestors)
        state = row.states.get(module.layer_idx) or _begin(module, hidden_states.device, mixed.dtype)
        if end:
            attended[index, :end] = _read_prompt(module, state, *(part[:end] for part in parts))
        if stop > end:
            attended[index, end:stop] = _read_nodes(module, state, path, *(part[end:stop] for part in parts))
        row.states[module.layer_idx] = state
    gate = module.in_proj_z(hidden_states)
    heads = attended.shape[-1] // module.head_v_dim
    shape = (*attended.shape[:2], heads, module.head_v_dim)
    normed = module.norm(attended.reshape(-1, module.head_v_dim), gate.reshape(-1, module.head_v_dim)).reshape(shape)
    return module.out_proj(normed.flatten(2))


def _begin(module: Any, device: torch.device, dtype: torch.dtype) -> _State:
    """The state before the first token: zeros."""
    heads, keys, values = module.num_v_heads, module.head_k_dim, module.head_v_dim
    none = partial(torch.zeros, device=device)
    tail = none((module.conv_kernel_size - 1, module.conv_dim), dtype=dtype)
    empty = none((heads, 0, keys)), none((heads, 0, values)), none((heads, 0))
    return _State(none((heads, keys, values)), tail, tail[:0], *empty)


def _read_prompt(
    module: Any, state: _State, mixed: torch.Tensor, rate: torch.Tensor, beta: torch.Tensor
) -> torch.Tensor:
    """(n, channels), (n, heads) twice -> (n, value dim of all heads). The state goes on to behind these tokens."""
    inputs = torch.cat([state.tail, mixed])
    state.tail = inputs[-len(state.tail) :]
    convolved = conv1d(inputs.T[None], module.conv1d.weight, groups=module.conv_dim)[0].T
    tokens = _split(module, convolved, rate, beta)
    blocks = tokens.fold(min(_BLOCK, len(mixed)))
    count = blocks.beta.shape[2]
    above = torch.ones((count, count), dtype=torch.bool, device=mixed.device).tril(-1)
    nothing = blocks.key[..., :0, :], blocks.value[..., :0, :], blocks.decay[..., :0]
    solved = _solve(blocks, above, *nothing)
    end = solved.decay[..., -1:]  # (heads, blocks, 1)
    left = (end - solved.decay).exp()[..., None] * blocks.key  # what a block's end still has of each token
    parts = []
    for block in range(end.shape[1]):
        written = solved.own[:, block] - solved.through[:, block] @ state.memory
        parts.append(solved.query[:, block] @ state.memory + solved.reads[:, block] @ written)
        state.memory = end[:, block, :, None].exp() * state.memory + left[:, block].mT @ written
    return _join(torch.cat(parts, dim=1)[:, : len(mixed)], mixed.dtype)


def _read_nodes(
    module: Any, state: _State, path: _Path, mixed: torch.Tensor, rate: torch.Tensor, beta: torch.Tensor
) -> torch.Tensor:
    """As `_read_prompt`. The state stays behind the prompt and takes the nodes along."""
    state.inputs = torch.cat([state.inputs, mixed])
    windows = torch.cat([state.tail, state.inputs])[path.window]  # (n, kernel, channels)
    convolved = (windows.float() * module.conv1d.weight[:, 0].T.float()).sum(1)
    tokens = _split(module, convolved.to(mixed.dtype), rate, beta)
    solved = _solve(tokens, path.ancestors, state.keys, state.written, state.decay)
    state.keys = torch.cat([state.keys, tokens.key], dim=1)
    state.written = torch.cat([state.written, solved.own - solved.through @ state.memory], dim=1)
    state.decay = torch.cat([state.decay, solved.decay], dim=1)
    return _join(solved.query @ state.memory + solved.reads @ state.written, mixed.dtype)


def _split(module: Any, convolved: torch.Tensor, rate: torch.Tensor, beta: torch.Tensor) -> _Tokens:
    sizes = [module.key_dim, module.key_dim, module.value_dim]
    query, key, value = silu(convolved).split(sizes, dim=-1)
    shared = module.num_v_heads // module.num_k_heads
    query, key = (_norm(each.unflatten(1, (-1, module.head_k_dim)).float()) for each in (query, key))
    query, key = (each.repeat_interleave(shared, dim=1).transpose(0, 1) for each in (query, key))
    value = value.unflatten(1, (-1, module.head_v_dim)).float().transpose(0, 1)
    return _Tokens(query * module.head_k_dim**-0.5, key, value, rate.T, beta.T)


def _norm(vectors: torch.Tensor) -> torch.Tensor:
    """Each to length 1, as the model was trained."""
    return vectors * torch.rsqrt((vectors * vectors).sum(dim=-1, keepdim=True) + 1e-6)


def _join(attended: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(heads, n, value dim) -> (n, all of them)."""
    return attended.transpose(0, 1).flatten(1).to(dtype)


def _solve(
    tokens: _Tokens,
    ancestors: torch.Tensor,
    old_keys: torch.Tensor,
    old_written: torch.Tensor,
    old_decay: torch.Tensor,
) -> _Solved:
    """n tokens along their ancestors, bool (n, N), of which the last n are these tokens.

    old_keys, old_written, old_decay: of the first N - n.
    """
    num_old = old_keys.shape[-2]
    among = ancestors[:, num_old:].float()
    # G: what the path from the state on has decayed; of an old ancestor it is known, of new ones it adds up.
    decay = tokens.decay + tokens.decay @ among.T
    if num_old:
        decay = decay + _last(old_decay, ancestors[:, :num_old])
    keys = torch.cat([old_keys, tokens.key], dim=-2)
    between = decay[..., None] - torch.cat([old_decay, decay], dim=-1)[..., None, :]  # (heads, n, N)
    weight = between.masked_fill(~ancestors, -torch.inf).exp()
    beta, faded = tokens.beta[..., None], decay.exp()[..., None]
    system = beta * weight * (tokens.key @ keys.mT)
    own = beta * tokens.value - system[..., :num_old] @ old_written
    both = torch.cat([own, beta * faded * tokens.key], dim=-1)
    solved = torch.linalg.solve_triangular(system[..., num_old:], both, upper=False, unitriangular=True)
    own, through = solved.split([tokens.value.shape[-1], tokens.key.shape[-1]], dim=-1)
    itself = pad(torch.eye(len(ancestors), device=weight.device), (num_old, 0))
    return _Solved(own, through, faded * tokens.query, (tokens.query @ keys.mT) * (weight + itself), decay)


def _last(old_decay: torch.Tensor, ancestors: torch.Tensor) -> torch.Tensor:
    """G (heads, n) of the last of each one's old ancestors, 0 without one. ancestors: bool (n, N), the nearest last."""
    order = torch.arange(1, ancestors.shape[1] + 1, device=ancestors.device)
    last = (ancestors * order).max(dim=1).values
    return pad(old_decay, (1, 0))[:, last]


def open_kv(family: Family, kept: Sequence[torch.Tensor | None]) -> DynamicKV:
    """For rows that begin with what is kept of an earlier step, where a family can keep anything."""
    return RecurrentKV(family, len(kept)) if family.is_recurrent else DynamicKV(family, kept)
