"""Free text under named fields, token by token, in pieces that are short enough to stand between two steps.

What is written is greedy. The names of the fields are put into the text, the words behind them are the model's: until
it ends the line or the field's tokens are spent.
"""

import functools
from collections.abc import Generator, Sequence

import numpy as np
import torch

from vlm_local.decoding.families import Family, LoadedModel
from vlm_local.decoding.forward import PlacedImage
from vlm_local.decoding.layout import Chunk, see_prompt
from vlm_local.decoding.prepared import ImageFeatures, PreparedRequest, join_features
from vlm_local.decoding.recurrent import open_kv
from vlm_local.decoding.session import PrefixStore, count_reusable, list_unread
from vlm_local.errors import EngineError
from vlm_local.plain import make_line
from vlm_local.types import Thought

# Tokens of a prompt that one piece reads. A CPU takes longer for more, a GPU hardly.
_CPU_CHUNK, _GPU_CHUNK = 64, 512

# Yields the name of each piece before it is done: "look" at a picture, "read" a part of a prompt, "write" a token.
Pieces = Generator[str, None, Thought | None]


class ThoughtWriter:
    """Writes thoughts, and reads prompts ahead, for the episodes of one model."""

    def __init__(self, loaded: LoadedModel, family: Family, store: PrefixStore):
        """store: of the decoder that answers the steps."""
        self._tokenizer, self._lead, self._end = loaded.tokenizer, loaded.lead, loaded.eos_token_id
        self._family, self._store = family, store
        self._chunk = _CPU_CHUNK if loaded.device.type == "cpu" else _GPU_CHUNK
        self._num_tokens = len(loaded.tokenizer)  # the head may have more rows
        added = loaded.tokenizer.added_tokens_decoder.items()
        num_rows = loaded.model.config.get_text_config().vocab_size  # Gemma's tokenizer has a <mask> more
        # Not what ends a line: Gemma's vocabulary has it among the added tokens.
        banned = [
            number for number, token in added if number != self._end and number < num_rows and token.content.strip()
        ]
        self._banned = torch.tensor(banned, dtype=torch.long, device=loaded.device)

    def write(self, prepared: PreparedRequest, fields: Sequence[tuple[str, int]], max_tokens: int) -> Pieces:
        """fields, max_tokens: as in ThoughtRequest."""
        reading = _Reading(self._family, prepared, self._store)
        yield from reading.read(len(prepared.input_ids), self._chunk)
        lines: list[str] = []
        num_spent = 0
        pending: list[int] = []  # tokens that were not read yet
        for place, (name, limit) in enumerate(fields):
            limit = min(limit, max_tokens - num_spent)
            if limit <= 0:
                break
            pending += self._spell(("\n" if place else self._lead) + f"{name}:")
            written: list[int] = []
            rest = ""
            for _ in range(limit):
                yield "write"
                token = self._choose(reading.append(pending))
                num_spent, pending = num_spent + 1, []
                text = "" if token == self._end else self._tokenizer.decode([token])
                if token == self._end or "\n" in text:
                    rest = text.partition("\n")[0]
                    break
                written.append(token)
                pending = [token]
            if words := make_line(self._tokenizer.decode(written) + rest):
                lines.append(f"{name}: {words}")
        return Thought("\n".join(lines), num_spent)

    def read_ahead(self, prepared: PreparedRequest) -> Pieces:
        """Keep the KV of what comes before the present picture, for the step of the episode whose prompt it is."""
        reading = _Reading(self._family, prepared, self._store)
        if reading.filled < reading.num_reusable:
            yield from reading.read(reading.num_reusable, self._chunk)
            reading.keep(self._store)
        return None

    def _spell(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]

    def _choose(self, hidden: torch.Tensor) -> int:
        """hidden: (1, hidden) behind the last norm. Raises EngineError where nothing is finite."""
        logits = self._family.head(hidden)[0, : self._num_tokens].float()
        logits[self._banned] = -torch.inf
        best = logits.max(dim=0)
        if not np.isfinite(float(best.values)):
            raise EngineError("the model's numbers are not finite while it thinks")
        return int(best.indices)


class _Reading:
    """One prompt on a KV of its own, read in pieces. filled: columns that are read."""

    def __init__(self, family: Family, prepared: PreparedRequest, store: PrefixStore):
        if family.is_bidirectional:
            raise EngineError("this model attends to its whole prompt at once, so it cannot read one in pieces")
        self._family, self._prepared = family, prepared
        self._ids = prepared.input_ids.numpy()
        self._positions, self._behind = family.position_prompt(prepared)
        self._blocks = family.find_blocks(prepared)
        self._keys = family.hash_columns(prepared)
        self.num_reusable = count_reusable(family, prepared)
        kept, _ = store.find(prepared.request.episode, self._keys[: self.num_reusable])
        self._kv = open_kv(family, [kept])

    @property
    def filled(self) -> int:
        return self._kv.filled

    def read(self, end: int, chunk: int) -> Generator[str, None, None]:
        """The columns up to `end`; the present picture, where it is among them, too."""
        family, start = self._family, self.filled
        pictures = list_unread(family, self._prepared, start)
        has_present = end > self.num_reusable
        seen: list[ImageFeatures] = []
        for picture in pictures:
            yield "look"
            seen += family.earlier.find([picture])
        if has_present:
            yield "look"
            seen += family.encode_images([self._prepared])
        places = start + np.flatnonzero(self._ids[start:end] == family.image_token_id)
        features = join_features(seen) if seen else None
        while self.filled < end:
            yield "read"
            stop = self._find_stop(min(self.filled + chunk, end))
            here = np.flatnonzero((places >= self.filled) & (places < stop))
            images = [_place(features, here, places[here] - self.filled)] if features and len(here) else []
            self._run(self._ids[self.filled : stop], self._positions[:, self.filled : stop], images)

    def _find_stop(self, stop: int) -> int:
        """From where on a part of the prompt may end: a block's tokens are read together."""
        begun = self._blocks[self.filled : stop]
        places = np.flatnonzero(np.isin(self._blocks, begun[begun >= 0]))
        return max(stop, int(places[-1]) + 1 if len(places) else 0)

    def append(self, ids: Sequence[int]) -> torch.Tensor:
        """Hidden state (1, hidden) behind the last of these tokens, which follow the prompt."""
        first = self._behind + self.filled - len(self._ids)
        positions = np.tile(first + np.arange(len(ids)), (self._family.axes, 1))
        return self._run(np.array(ids, dtype=np.int64), positions, [])

    def keep(self, store: PrefixStore) -> None:
        columns = np.arange(self.num_reusable)
        episode = self._prepared.request.episode
        assert episode is not None  # a thought is always an episode's
        store.keep(episode, self._keys[: self.num_reusable], self._kv.copy_columns(0, columns), "ahead")

    def _run(self, ids: np.ndarray, positions: np.ndarray, images: Sequence[PlacedImage]) -> torch.Tensor:
        count, start, window = len(ids), self.filled, self._family.window
        written = max(0, start + count - len(self._blocks))
        blocks = np.pad(self._blocks, (0, written), constant_values=-1)
        see = functools.partial(see_prompt, blocks, start, start + count, cuts_blocks=self._family.cuts_blocks)
        visible, near = see(), None if window is None else see(window)[None]
        chunk = Chunk(ids[None], positions[:, None], np.array([count]), np.array([count]), count, visible[None], near)
        [hidden] = self._kv.run(chunk, images, [np.array([count - 1])])
        return hidden


def _place(features: ImageFeatures, here: np.ndarray, columns: np.ndarray) -> PlacedImage:
    """Of the features of a prompt those at `here`, which go to `columns` of a chunk."""
    index = torch.as_tensor(here, device=features.tokens.device)
    deep = tuple(level.index_select(0, index) for level in features.deep)
    return PlacedImage(ImageFeatures(features.tokens.index_select(0, index), deep), columns)
