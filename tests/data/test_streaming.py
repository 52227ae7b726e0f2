import os
import pickle
import tracemalloc

import numpy as np
import pytest

from tests import recordings
from tests.slow import slow
from vlm_local import data
from vlm_local.data import count_episodes, open_episodes


def test_memory_does_not_grow_with_the_data_set(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (4, 256, 256, 3), np.uint8)
    images = [recordings.encode_image(image) for image in noise]  # 0.8 MB an episode
    record = recordings.make_rlds_record(recordings.make_states(4), images=images)
    recordings.write_rlds(tmp_path, [record] * 40, shards=4)

    def measure_peak(num_episodes):
        tracemalloc.start()
        for episode in open_episodes(tmp_path):
            episode.load_image(0)
            if episode.index + 1 == num_episodes:
                break
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    measure_peak(1)  # imports
    assert measure_peak(40) < 1.5 * measure_peak(3)


def test_episodes_are_counted_without_reading_them(tmp_path):
    for name, write in (
        (
            "rlds",
            lambda folder: recordings.write_rlds(
                folder, [recordings.make_rlds_record(recordings.make_states(3))] * 5, 2
            ),
        ),
        ("lerobot", lambda folder: recordings.write_lerobot(folder, [recordings.make_states(3)] * 5, images="image")),
    ):
        write(tmp_path / name)
        assert count_episodes(tmp_path / name) == 5


SIDE = 128
NUM_STEPS = 4  # 200 kB of noise an episode


def _write_many(folder, kind, num_episodes):
    noise = np.random.default_rng(0).integers(0, 256, (NUM_STEPS, SIDE, SIDE, 3), np.uint8)
    states = recordings.make_states(NUM_STEPS)
    if kind == "rlds":
        record = recordings.make_rlds_record(states, images=[recordings.encode_image(image) for image in noise])
        recordings.write_rlds(folder, [record] * num_episodes, shards=2)
    elif kind == "autoeval":
        folder.mkdir()
        trajectory = {"obs": {"image_primary": list(noise)}, "proprio": list(states), "language_command": "go"}
        for number in range(num_episodes):
            (folder / f"traj_{number}.pkl").write_bytes(pickle.dumps(trajectory, 4))
    else:
        recordings.write_lerobot(folder, [states] * num_episodes, *kind.split(), side=SIDE)


def _measure_held_by_readers():
    """Bytes. Threads that another test left in this process allocate too, so only what the readers asked for counts."""
    readers = os.path.join(os.path.dirname(data.__file__), "")
    held = tracemalloc.take_snapshot().statistics("traceback")
    return sum(each.size for each in held if any(frame.filename.startswith(readers) for frame in each.traceback))


@pytest.mark.parametrize("kind", ["rlds", "autoeval", slow("v2.1 image"), "v3.0 image", "v2.1 video"])
def test_episodes_that_are_kept_hold_neither_frames_nor_files(tmp_path, kind):
    """As a fine-tune keeps them: it draws from all of them in any order."""
    _write_many(tmp_path / "data", kind, 24)
    first_use = next(open_episodes(tmp_path / "data"))
    first_use.load_image(0)
    num_files = len(os.listdir("/proc/self/fd"))
    tracemalloc.start(25)
    episodes = list(open_episodes(tmp_path / "data"))
    for step in (0, NUM_STEPS - 1):
        for episode in episodes:
            assert episode.load_image(step).shape == (SIDE, SIDE, 3)
    held = _measure_held_by_readers()
    tracemalloc.stop()
    assert len(episodes) == 24
    assert held < 3 * NUM_STEPS * SIDE * SIDE * 3
    assert len(os.listdir("/proc/self/fd")) <= num_files + 3
