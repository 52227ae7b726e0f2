"""A user's words made plain, so that none of them reaches a model as a control token."""

import re
from collections.abc import Collection
from functools import lru_cache

from vlm_local.errors import RequestError

# Innermost first: taking <b> out of <|<b>|> may leave a token, which the next pass finds.
_MARKED = re.compile(r"<[^<>]*>|\[[^\[\]]*\]")
# What tokens look like where the tokenizer is not known: <|im_end|>, </s>, <start_of_turn>, [INST];
# DeepSeek writes a wide bar (U+FF5C).
_LOOKS_LIKE_ONE = re.compile(r"<[|\uff5c/]*[\w▁.-]+[|\uff5c/]*>|\[/?[A-Z][A-Z_]+\]")
_MAX_CHECKED = 64
_PLACEHOLDER = re.compile(r"image|img|vision|video", re.IGNORECASE)


class Disarmer:
    """Turns control tokens into plain words, however they are nested: <|<|im_end|>|> becomes im_end."""

    def __init__(self, tokens: Collection[str] | None):
        """tokens: of the model's tokenizer; None where it is not known: then whatever looks like one."""
        self._tokens = None if tokens is None else frozenset(tokens)
        # Those that _MARKED does not find; one that is only space or a single letter is no mark.
        bare = [re.escape(token) for token in tokens or () if len(token.strip()) > 1 and not _MARKED.fullmatch(token)]
        self._pattern = re.compile("|".join([_MARKED.pattern, *sorted(bare, key=len, reverse=True)]))
        self.check_sentences = lru_cache(_MAX_CHECKED)(self._check_sentences)  # robots ask for the same list each step

    def __call__(self, text: str) -> str:
        """Raises RequestError for a placeholder of a picture: where it stands, the model would look for one."""
        while (plain := self._pattern.sub(self._make_plain, text)) != text:
            text = plain
        return text

    def _check_sentences(self, sentences: tuple[str, ...]) -> None:
        """Raises RequestError where what may be answered holds a control token."""
        for sentence in sentences:
            if any(self._is_token(match[0]) for match in self._pattern.finditer(sentence)):
                raise RequestError(f"{sentence!r} holds a control token of the model and cannot be answered")

    def _is_token(self, word: str) -> bool:
        known = _LOOKS_LIKE_ONE.fullmatch(word) if self._tokens is None else word in self._tokens
        return bool(known)

    def _make_plain(self, match: re.Match) -> str:
        word = match[0]
        if not self._is_token(word):
            return word
        if _PLACEHOLDER.search(word):
            raise RequestError(f"the words hold {word!r}, which stands for a picture in a prompt; leave it out")
        plain = word.strip("<|\uff5c>[]")
        return plain if plain != word else ""
