"""A true, if tiny, language model: the next word depends on a picture and the words so far."""

import functools
import hashlib
import math
import re

import numpy as np

END = "<|im_end|>"


@functools.cache  # asked for the same sentences thousands of times
def cut_words(sentence: str) -> tuple[str, ...]:
    """The model's tokens: a word with the space before it, or a comma."""
    return tuple(re.findall(r" ?[^\s,]+|,", sentence))


def weigh_next(picture: str, words: list[str], choices: list[str], sharpness: float = 1.0) -> np.ndarray:
    """float64 (len(choices),) probabilities of the next word among `choices`."""
    digests = [hashlib.sha256(f"{picture}/{words}/{word}".encode()).digest() for word in choices]
    logits = np.array([int.from_bytes(digest[:4], "big") / 2**31 for digest in digests]) * 3 * sharpness
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def list_next(sentences: list[str], words: list[str]) -> list[str]:
    return _list_nexts(tuple(sentences)).get(tuple(words), [])


@functools.lru_cache(maxsize=16)
def _list_nexts(sentences: tuple[str, ...]) -> dict[tuple[str, ...], list[str]]:
    """What may follow each beginning, in the order of the sentences."""
    found: dict[tuple[str, ...], dict[str, None]] = {}
    for sentence in sentences:
        words = (*cut_words(sentence), END)
        for count, word in enumerate(words):
            found.setdefault(words[:count], {})[word] = None
    return {words: list(following) for words, following in found.items()}


def weigh_sentences(picture: str, sentences: tuple[str, ...], temperature: float = 1.0) -> np.ndarray:
    """The exact distribution over the sentences: product of the restricted softmax over the words."""
    after = {
        words: dict(zip(choices, weigh_next(picture, list(words), choices, 1 / temperature), strict=True))
        for words, choices in _list_nexts(sentences).items()
    }
    probabilities = []
    for sentence in sentences:
        words = (*cut_words(sentence), END)
        probabilities.append(math.prod(after[words[:count]][word] for count, word in enumerate(words)))
    return np.array(probabilities)
