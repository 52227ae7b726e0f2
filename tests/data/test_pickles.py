"""Pickles of strangers: plain values come back as they were, and nothing else is made of them."""

import collections
import os
import pickle
import struct

import lz4.frame
import numpy as np
import pytest

from tests import recordings
from vlm_local.data import open_episodes
from vlm_local.data.autoeval import load_pickle
from vlm_local.errors import DataError

PLAIN = {
    "numbers": [0, 1, -1, 255, 65536, -(2**40), 2**70, 0.5, -1e300, True, False, None],
    "text": ["", "open the drawer", "ä\n\\u0041\x00", "x" * 300],
    "bytes": [b"", b"\x00\xff", b"y" * 300, bytearray(b"z" * 9)],
    "containers": [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), [], {}, {"a": {1: [2]}}, {1, "x"}, frozenset({2})],
    "ordered": collections.OrderedDict([("b", 1), ("a", 2)]),
}
ARRAYS = [
    np.arange(6).astype(dtype).reshape(2, 3) for dtype in ("u1", "<i4", ">i8", "f2", "<f4", "f8", "?", "U3", "S2")
] + [np.asfortranarray(np.arange(6.0).reshape(2, 3)), np.zeros((0, 7)), np.array(3.5), np.arange(12)[::2]]


@pytest.mark.parametrize("protocol", range(6))
def test_plain_values_and_arrays_come_back(tmp_path, protocol):
    path = tmp_path / "traj_0.pkl"
    shared = [1.0]
    path.write_bytes(pickle.dumps([PLAIN, shared, shared], protocol))
    plain, first, second = load_pickle(path)
    assert plain == PLAIN and first is second
    path.write_bytes(pickle.dumps([*ARRAYS, ARRAYS[0], np.float32(0.5), np.int64(7), np.str_("go")], protocol))
    *arrays, half, seven, go = load_pickle(path)
    for array, expected in zip(arrays, [*ARRAYS, ARRAYS[0]], strict=True):
        assert array.dtype == expected.dtype
        np.testing.assert_array_equal(array, expected)
    assert (half, seven, go) == (0.5, 7, "go")


class _Calls:
    """Pickles as a call."""

    def __init__(self, function, *arguments):
        self._call = function, arguments

    def __reduce__(self):
        return self._call


class _ObjectDtype:
    """numpy's own dtype of objects, whose flags say that it holds none."""

    def __reduce__(self):
        return np.dtype, ("O", False, True), (3, "|", None, None, None, -1, -1, 0)


class _Array:
    def __init__(self, *state):
        self._state = state

    def __reduce__(self):
        return np._core.multiarray._reconstruct, (np.ndarray, (0,), b"b"), (1, *self._state)


def _nest(make, depth):
    nested = make(0.0)
    for _ in range(depth):
        nested = make(nested)
    return nested


def _double(container):
    nested = container([0.0])
    for _ in range(60):
        nested = container([nested, nested])
    return nested


def _describe(**fields):
    trajectory = {
        "obs": {"image_primary": list(recordings.make_images(3))},
        "proprio": list(recordings.make_states(3)),
        "language_command": "go",
    }
    return pickle.dumps(trajectory | fields, 4)


BOMBS = {
    "object pointers from bytes": _describe(
        action=_Calls(np._core.numeric._frombuffer, bytearray(64), _ObjectDtype(), (8,), "C")
    ),
    "object pointers from a state": _describe(action=_Array((8,), _ObjectDtype(), False, b"\x41" * 64)),
    "objects": _describe(action=np.array([{}, []], object)),
    "fields": _describe(action=np.zeros(3, [("a", "f4")])),
    "a shape beyond its bytes": _describe(action=_Array((1 << 40,), np.dtype("f8"), False, b"\x00" * 8)),
    "a negative shape": _describe(action=_Array((-1, -8), np.dtype("u1"), False, b"\x00" * 8)),
    "a place far out in the memo": b"\x80\x04]r\xff\xff\xff\x7f.",
    "bytes that are not there": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40) + b"abc.",
    "a line without an end": b"S'" + b"x" * 2_000_000,
    "keys that take for ever to hash": b"\x80\x04}" + pickle.dumps(_double(tuple), 4)[2:-1] + b"K\x01s.",
    "members that take for ever to hash": b"\x80\x04\x8f(" + pickle.dumps(_double(tuple), 4)[2:-1] + b"\x90.",
    "endless text": _describe(language_command=_double(list)),
    "endless numbers": _describe(proprio=_double(list)),
    "endless frames": _describe(obs={"image_primary": _double(list)}),
    "endless steps": pickle.dumps(
        [{"observation": {"image": _double(list), "state": _double(list)}, "done": ARRAYS[1]}]
    ),
    "many objects": b"\x80\x04" + b"]" * 60_000 + b".",
    "many objects, packed": lz4.frame.compress(b"\x80\x04" + b"]" * 60_000 + b"."),
    "an attribute of a function": b"\x80\x04c__builtin__\nset.__init__\n.",
    "a call of an array": b"\x80\x04cnumpy\nndarray\nK\x01\x85R.",
    "a class without its shape": b"\x80\x04cnumpy\nndarray\n)\x81.",
    "an extension code": b"\x80\x04\x82\x01.",
    "a persistent name": b"Pname\n.",
    "half": _describe()[:200],
    "nothing": b"",
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_is_reported_and_the_next_file_is_read(tmp_path, bomb, monkeypatch):
    monkeypatch.setattr("vlm_local.data.pickles.MAX_OPCODES", 50_000)
    (tmp_path / "traj_0.pkl").write_bytes(BOMBS[bomb])
    (tmp_path / "traj_1.pkl").write_bytes(_describe())
    problems = []
    episodes = list(open_episodes(tmp_path, report=problems.append))
    assert [episode.index for episode in episodes] == [1] and len(problems) == 1
    assert "traj_0.pkl" in str(problems[0]) and len(str(problems[0])) < 600


def test_depth_is_no_matter(tmp_path):
    path = tmp_path / "traj_0.pkl"
    path.write_bytes(b"\x80\x04" + b"]" * 20_000 + b"a" * 19_999 + b".")
    assert len(load_pickle(path)) == 1


def test_a_fifo_or_a_folder_is_reported_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "traj_0.pkl")
    (tmp_path / "traj_2.pkl").mkdir()
    (tmp_path / "traj_1.pkl").write_bytes(_describe())
    problems = []
    assert [episode.index for episode in open_episodes(tmp_path, report=problems.append)] == [1]
    assert [str(problem).rpartition(": ")[2] for problem in problems] == ["not a regular file"] * 2


def test_more_than_is_read_at_most_is_refused_before_it_takes_room(tmp_path, monkeypatch):
    monkeypatch.setattr("vlm_local.data.autoeval.MAX_BYTES", 1000)
    path = tmp_path / "traj_0.pkl"
    path.write_bytes(lz4.frame.compress(pickle.dumps([bytes(5000)], 4)))
    with pytest.raises(DataError, match="bytes are to follow"):
        load_pickle(path)
