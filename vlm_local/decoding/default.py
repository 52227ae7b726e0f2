"""The tree decoder where a grammar's tokens form a trie, the outlines reference where they do not."""

import logging
from collections.abc import Sequence
from typing import Any

from vlm_local.decoding.outlines import OutlinesDecoder
from vlm_local.decoding.tree import TreeDecoder
from vlm_local.decoding.trie import MAX_GRAMMARS
from vlm_local.decoding.types import LoadedModel, PreparedRequest
from vlm_local.errors import GrammarError, RequestError
from vlm_local.types import Generation

# Of one sentence, where outlines decodes: a forward each, and every robot of this engine waits for all of them.
MAX_OUTLINES_TOKENS = 32

_log = logging.getLogger(__name__)


class DefaultDecoder:
    """refusals: why sentences were left to outlines, by the first of them, the latest; for metadata."""

    def __init__(self, loaded: LoadedModel, max_batch: int = 1):
        """max_batch: as TreeDecoder's."""
        self._tree = TreeDecoder(loaded, max_batch=max_batch)
        self._loaded = loaded
        self._outlines: OutlinesDecoder | None = None
        self.refusals: dict[str, str] = {}

    @property
    def metadata(self) -> dict[str, Any]:
        """What the engine's own metadata cannot know."""
        refusals = {"decoder_refusals": dict(self.refusals)} if self.refusals else {}
        return {**self._tree.metadata, **refusals}

    def decode(self, prepared: Sequence[PreparedRequest]) -> list[Generation | RequestError]:
        """A request whose sentences cannot be decoded, or take too long, has its error in its place."""
        reasons = [self._tree.refuse(each) for each in prepared]
        fits = [each for each, reason in zip(prepared, reasons, strict=True) if reason is None]
        answers = iter(self._tree.decode(fits) if fits else ())
        return [
            next(answers) if reason is None else self._decode_slowly(each, reason)
            for each, reason in zip(prepared, reasons, strict=True)
        ]

    def _decode_slowly(self, prepared: PreparedRequest, reason: str) -> Generation | RequestError:
        sentences = prepared.request.sentences
        longest = max(map(len, self._loaded.tokenizer(list(sentences), add_special_tokens=False)["input_ids"]))
        if longest > MAX_OUTLINES_TOKENS:
            return RequestError(
                f"{reason}; such choices may have {MAX_OUTLINES_TOKENS} tokens each, but one has {longest}: "
                "use shorter ones, or none that begins with another"
            )
        first = sentences[0]
        if first not in self.refusals:
            self.refusals[first] = reason
            if len(self.refusals) > MAX_GRAMMARS:
                del self.refusals[next(iter(self.refusals))]
            _log.warning("outlines decodes %r and the other sentences of its grammar: %s", first, reason)
        if self._outlines is None:
            self._outlines = OutlinesDecoder(self._loaded)
        try:
            return self._outlines.decode([prepared])[0]
        except GrammarError as error:
            return RequestError(str(error))

    def forget(self, episode: str) -> None:
        self._tree.forget(episode)
