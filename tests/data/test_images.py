"""Pictures made square as a station makes them."""

import numpy as np

from vlm_local.data.images import squeeze


def test_a_picture_is_squeezed_between_the_centres_of_pixels_without_smoothing():
    """The numbers are those of OpenCV's bilinear resize: half-pixel centres, edges held, two pixels weighed."""
    row = np.repeat(np.array([[0, 100]], np.uint8)[..., None], 3, axis=2)
    assert squeeze(row, 4)[..., 0].tolist() == [[0, 25, 75, 100]] * 4
    stripes = np.zeros((4, 8, 3), np.uint8)
    stripes[:, ::4] = 200  # every fourth column: of a smoothed picture each pixel would have a share
    assert squeeze(stripes, 2)[..., 0].tolist() == [[0, 0]] * 2
    same = np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    assert (squeeze(same, 16) == same).all()
