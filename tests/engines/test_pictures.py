from dataclasses import replace

import numpy as np

from vlm_local.engines.parts import RepeatedParts
from vlm_local.types import GenerationRequest, Picture, Prompt

SIDE = 64
NUM_BYTES = 3 * SIDE**2


def show(*earlier):
    return GenerationRequest(np.zeros((4, 4, 3), np.uint8), Prompt("a", "b", earlier), ("stop",))


def test_a_picture_crosses_once_until_it_is_dropped_on_both_sides():
    here, there = (RepeatedParts(max_bytes=3 * NUM_BYTES) for _ in range(2))
    pictures = [Picture(np.full((SIDE, SIDE, 3), value, np.uint8)) for value in range(5)]
    crossed = []
    for shown in ((0, 1), (0, 1, 2), (), (2, 3, 3), (0,), (2, 3, 0), (4, 3, 2, 1, 0), (0,)):
        requests = [show("text", *(pictures[index] for index in shown)), show()]
        message = here.pack(requests)
        came = there.unpack(message)
        assert [each.pixels[0, 0, 0] for each in came[0].prompt.pictures] == list(shown)
        assert came[0].prompt.earlier[0] == "text" and came[1].prompt.earlier == ()
        crossed.append(len(message) // NUM_BYTES)
    assert crossed == [2, 1, 0, 1, 1, 0, 2, 0]  # 0 was dropped for 3, 1 for 0; 4 and 1 are new


def test_a_list_of_sentences_crosses_once_and_is_the_same_object_at_every_step():
    here, there = RepeatedParts(), RepeatedParts()

    def send(*lists):
        requests = [replace(show(), sentences=sentences) for sentences in lists]
        message = here.pack(requests)
        came = [each.sentences for each in there.unpack(message)]
        assert came == list(lists)
        return len(message), came

    phrases = tuple(f"move {number}" for number in range(729))
    first, (before, _) = send(phrases, ("stop",))
    again, (after,) = send(phrases)
    assert again < first - 5_000 and after is before
    for number in range(9):  # others come between
        assert send((f"choice {number}", "other"), phrases, ("stop",))[1][1] is before


def test_a_list_of_sentences_that_was_dropped_for_others_crosses_again():
    lists = [tuple(f"{name} {number}" for number in range(100)) for name in ("move", "turn", "close")]
    here, there = (RepeatedParts(max_bytes=2 * 64 * 100) for _ in range(2))
    crossed = []
    for index in (0, 1, 0, 2, 0, 1):  # 1 was dropped for 2
        message = here.pack([replace(show(), sentences=lists[index])])
        assert there.unpack(message)[0].sentences == lists[index]
        crossed.append(len(message) > 1_000)
    assert crossed == [True, True, False, True, False, True]


class _OneHash(tuple):
    def __hash__(self):
        return 7


def test_two_lists_of_sentences_with_one_hash_are_not_mixed_up():
    here, there = RepeatedParts(), RepeatedParts()
    lists = [_OneHash(f"{name} {number}" for number in range(100)) for name in ("move", "turn")]
    for index in (0, 1, 1, 0):
        packed = here.pack([replace(show(), sentences=lists[index])])
        assert there.unpack(packed)[0].sentences == lists[index]
