import tracemalloc

import numpy as np

from tests import recordings
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
