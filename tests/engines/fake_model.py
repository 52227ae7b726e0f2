"""A true, if tiny, language model: the next word depends on a picture and the words so far."""

import functools
import hashlib
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
    found = {}
    for sentence in sentences:
        cut = [*cut_words(sentence), END]
        if cut[: len(words)] == words and len(cut) > len(words):
            found[cut[len(words)]] = None
    return list(found)


def weigh_sentences(picture: str, sentences: tuple[str, ...], temperature: float = 1.0) -> np.ndarray:
    """The exact distribution over the sentences: product of the restricted softmax over the words."""
    probabilities = []
    for sentence in sentences:
        product, words = 1.0, []
        for word in [*cut_words(sentence), END]:
            choices = list_next(list(sentences), words)
            weights = weigh_next(picture, words, choices, 1 / temperature)
            product *= weights[choices.index(word)]
            words.append(word)
        probabilities.append(product)
    return np.array(probabilities)
