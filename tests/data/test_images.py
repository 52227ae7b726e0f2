"""Pictures out of files, and made square as a station makes them."""

from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from tests.test_wire import deep_png
from vlm_local.data.images import decode_image, squeeze
from vlm_local.errors import DataError


def test_a_camera_held_sideways_is_turned_as_at_the_server():
    upright = np.zeros((32, 48, 3), np.uint8)
    upright[:16] = 250
    note, file = Image.Exif(), BytesIO()
    note[0x0112] = 6  # to be turned clockwise
    Image.fromarray(np.rot90(upright)).save(file, "PNG", exif=note)
    assert (decode_image(file.getvalue(), "a photo") == upright).all()


def test_colours_of_sixteen_bits_are_refused_as_at_the_server():
    with pytest.raises(DataError, match="this PNG has 16"):
        decode_image(deep_png(), "a photo")


def test_a_picture_is_squeezed_between_the_centres_of_pixels_without_smoothing():
    """The numbers are those of OpenCV's bilinear resize: half-pixel centres, edges held, two pixels weighed."""
    row = np.repeat(np.array([[0, 100]], np.uint8)[..., None], 3, axis=2)
    assert squeeze(row, 4)[..., 0].tolist() == [[0, 25, 75, 100]] * 4
    stripes = np.zeros((4, 8, 3), np.uint8)
    stripes[:, ::4] = 200  # every fourth column: of a smoothed picture each pixel would have a share
    assert squeeze(stripes, 2)[..., 0].tolist() == [[0, 0]] * 2
    same = np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    assert (squeeze(same, 16) == same).all()
