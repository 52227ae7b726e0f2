import base64
import json
import struct
import zlib
from io import BytesIO

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from vlm_local.bounds import MAX_LISTED
from vlm_local.embodiments.frame import Frame
from vlm_local.errors import RequestError
from vlm_local.types import Decision
from vlm_local.wire import build_details, decode_act, decode_reset, encode_action, encode_array

SMALL = np.random.default_rng(1).integers(0, 256, (16, 24, 3), np.uint8)


def _body(image=None, **fields) -> bytes:
    image = encode_array(SMALL) if image is None else image
    return json.dumps({"image": image, "instruction": "lift the cup", **fields}).encode()


def _file(image: np.ndarray = SMALL, kind: str = "PNG", mode: str | None = None) -> str:
    buffer = BytesIO()
    picture = Image.fromarray(image)
    (picture.convert(mode) if mode else picture).save(buffer, kind)
    return base64.b64encode(buffer.getvalue()).decode()


@pytest.mark.parametrize(
    ("image", "form"),
    [
        (encode_array(SMALL), "json_numpy"),
        (SMALL.tolist(), "list"),
        (_file(), "list"),
        ("data:image/png;base64," + _file(), "list"),
        ("\n".join(_file()[i : i + 76] for i in range(0, 10_000, 76)), "list"),
        (_file(mode="RGBA"), "list"),
    ],
    ids=["json_numpy", "nested", "png", "data-url", "wrapped-base64", "alpha"],
)
def test_an_image_comes_in_many_forms(image, form):
    message = decode_act(_body(image))
    np.testing.assert_array_equal(message.image, SMALL)
    assert (message.instruction, message.state, message.form) == ("lift the cup", None, form)


def test_a_jpeg_is_read_too():
    smooth = np.full((32, 32, 3), 90, np.uint8)
    assert abs(decode_act(_body(_file(smooth, "JPEG"))).image.astype(int) - 90).max() <= 2


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_picture_of_a_camera_held_sideways_is_turned_as_viewers_turn_it(kind):
    corners = np.zeros((32, 48, 3), np.uint8)
    corners[:16, :24], corners[16:, 24:] = 250, 120
    turned = {
        1: corners,
        2: corners[:, ::-1],
        3: corners[::-1, ::-1],
        4: corners[::-1],
        5: corners.transpose(1, 0, 2),
        6: np.rot90(corners, -1),
        7: corners[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(corners),
    }
    for orientation, expected in turned.items():
        buffer, note = BytesIO(), Image.Exif()
        note[0x0112] = orientation
        Image.fromarray(corners).save(buffer, kind, exif=note)
        image = decode_act(_body(base64.b64encode(buffer.getvalue()).decode())).image
        assert image.shape == expected.shape and abs(image.astype(int) - expected).max() < 20, orientation


def test_a_byte_order_mark_before_the_json_is_none_of_it():
    assert decode_act(b"\xef\xbb\xbf" + _body()).instruction == "lift the cup"


def test_json_numpy_of_the_library_is_ours():
    json_numpy = pytest.importorskip("json_numpy")
    body = json_numpy.dumps({"image": SMALL, "instruction": "go", "proprio": np.arange(7.0)}).encode()
    message = decode_act(body)
    np.testing.assert_array_equal(message.image, SMALL)
    np.testing.assert_array_equal(message.state, np.arange(7))
    action = np.linspace(-1, 1, 7)
    np.testing.assert_array_equal(json_numpy.loads(encode_action(action, "json_numpy")), action)
    np.testing.assert_array_equal(json_numpy.loads(json.loads(encode_action(action, "encoded"))), action)


def test_eight_numbers_are_autoevals_and_seven_are_ours():
    def read(proprio):
        return Frame().read(decode_act(_body(proprio=proprio)).state)

    np.testing.assert_allclose(read([1, 2, 3, 4, 5, 6, 99, 0.195]), [1, 2, 3, 4, 5, 6, 0.5])
    np.testing.assert_array_equal(read([1, 2, 3, 4, 5, 6, 0.5]), [1, 2, 3, 4, 5, 6, 0.5])
    assert read([0] * 7 + [0.4])[6] == 1.0


@settings(max_examples=50, deadline=None)
@given(
    hnp.arrays(
        hnp.floating_dtypes(sizes=(32, 64)),
        st.sampled_from([7, 8]),
        elements={"allow_nan": False, "min_value": -9, "max_value": 9},
    )
)
def test_proprio_survives_the_wire_in_any_precision_and_byte_order(proprio):
    decoded = decode_act(_body(proprio=encode_array(proprio))).state
    assert decoded.dtype == np.float64 and decoded.shape == proprio.shape and decoded.dtype.isnative
    np.testing.assert_array_equal(decoded, proprio.astype(np.float64))


@settings(max_examples=50, deadline=None)
@given(hnp.arrays(np.float64, 7, elements={"allow_nan": False, "allow_infinity": False}))
def test_an_action_survives_each_form(action):
    np.testing.assert_array_equal(json.loads(encode_action(action, "list")), action)
    for text in (encode_action(action, "json_numpy"), json.loads(encode_action(action, "encoded"))):
        array = json.loads(text)
        data = base64.b64decode(array["__numpy__"])
        np.testing.assert_array_equal(np.frombuffer(data, array["dtype"]).reshape(array["shape"]), action)


def deep_png() -> bytes:
    """A PNG of 12-bit colours in 16 bits a channel, as some cameras write it: the upper 8 bits are nearly black."""
    size = struct.pack(">IIBBBBB", 24, 16, 16, 2, 0, 0, 0)
    rows = b"".join(b"\0" + (SMALL[row].astype(">u2") * 16).tobytes() for row in range(16))
    parts = ((b"IHDR", size), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    packed = (
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in parts
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def _array(**changes) -> dict:
    return {**encode_array(SMALL), **changes}


FLOATS = encode_array(SMALL / 255.0)
WIDE = np.zeros((16, 5000, 3), np.uint8)
SENTENCES = {
    b"": "the body is empty",
    b"\xff\xd8\xff": "byte 0 is 0xff; send JSON, a picture in it as base64",
    _body().decode().encode("utf-16"): "looks like text in UTF-16; send JSON in UTF-8",
    _body().decode().encode("utf-32-le"): "looks like text in UTF-32-LE; send JSON in UTF-8",
    b'{"image": 1, "instruction": "left", "instruction": "right"}': '"instruction" comes twice',
    b'{"image": 1, "instruction": "go", "Proprio": [1]}': "\"Proprio\" must be written 'proprio'",
    b'{"full_image": 1, "instruction": "go"}': '{image, instruction, proprio}, but "full_image", ',
    b"{}": "but nothing came",
    b'{"image": [': "not complete JSON",
    b"[1, 2]": "must be a JSON object",
    b"null": "must be a JSON object",
    b"[" * 100_000: "nested too deeply",
    b'{"instruction": "go"}': "'image' is missing",
    json.dumps({"image": encode_array(SMALL)}).encode(): "'instruction' is missing",
    json.dumps({"encoded": 3}).encode(): "encoded: expected",
    json.dumps({"encoded": "{"}).encode(): "not complete JSON",
    json.dumps({"encoded": "\ud800"}).encode(): "not UTF-8",
    _body(None, instruction=7): "instruction: expected a string",
    _body(None, instruction="  "): "it is empty",
    _body(None, instruction="a" * 3000): "3000 characters",
    _body(None, instruction="\ud800"): "surrogate",
    _body(7): "image: expected a json_numpy array",
    _body(FLOATS): "expected dtype uint8 with values 0..255, got float64",
    _body(encode_array(SMALL[None])): "got (1, 16, 24, 3)",
    _body(encode_array(SMALL[:0])): "is no shape",
    _body(_array(__numpy__="", shape=[0, 2**31, 2**31, 2**31])): "is no shape",
    _body(encode_array(SMALL[:8])): "sides 16 to 4096, got (8, 24, 3)",
    _body(encode_array(WIDE)): "got (16, 5000, 3)",
    _body(encode_array(SMALL[..., 0])): "got (16, 24)",
    _body(_array(shape=[16, 25, 3])): "takes 1200 bytes, but 1152 came",
    _body(_array(shape=[16, -24, 3])): "is no shape",
    _body(_array(shape=[2**62, 2**62, 3])): "is no shape",
    _body(_array(shape=[2**31] * 3)): "bytes, but 1152 came",
    _body(_array(shape=[16, 24.0, 3])): "is no shape",
    _body(_array(shape="16")): "expected a json_numpy object",
    _body(_array(dtype="|O")): "dtype '|O' is not allowed",
    _body(_array(dtype="<M8[ns]")): "is not allowed",
    _body(_array(dtype=[["a", "<f8"]])): "expected a json_numpy object",
    _body(_array(__numpy__="a")): "broken base64",
    _body(_array(__numpy__="ä" * 1152)): "broken base64",
    _body([*SMALL.tolist()[:-1], [[1, 2, 3]]]): "ragged",
    _body([[[1, 2, 3]] * 16] * 15 + [[[1, 2, 3]] * 15 + [7]]): "a pixel is not 3 numbers",
    _body([]): "got (0,)",
    _body([1, 2]): "got (2,)",
    _body(["abc"] * 20): "got (20,)",
    _body(SMALL.transpose(2, 0, 1).tolist()): "got (3, 16, 24)",
    _body([SMALL.tolist()]): "got (1, 16, 24, 3)",
    _body((SMALL > 128).tolist()): "whole numbers 0..255 in the nested list, got ",
    _body(np.full((16, 16, 3), 0.5).tolist()): "whole numbers 0..255 in the nested list, got 0.5",
    _body(np.full((16, 16, 3), 128.0).tolist()): "whole numbers 0..255 in the nested list, got 128.0",
    _body((SMALL.astype(int) + 200).tolist()): "whole numbers 0..255",
    _body([[["1", "2", "3"]] * 16] * 16): "whole numbers 0..255",
    _body([[[1, 2]] * 16] * 16): "got (16, 16, 2)",
    _body("not base64!"): "broken base64",
    _body(base64.urlsafe_b64encode(bytes([251, 255] * 30)).decode()): "its alphabet is A-Z, a-z, 0-9, + and /",
    _body("aGVsbG8="): "no PNG or JPEG file",
    _body(_file()[:200]): "no PNG or JPEG file",
    _body(_file(kind="GIF")): "no PNG or JPEG file",
    _body("data:text/plain;base64,aGVsbG8="): "a data URL must start with",
    _body(_file(SMALL.astype(np.uint16)[..., 0])): "8 bits a channel, got a PNG of 16 bits",
    _body(base64.b64encode(deep_png()).decode()): "8 bits a channel, got a PNG of 16 bits",
    _body(_file(np.zeros((16, 5000, 3), np.uint8))): "got (16, 5000, 3)",
    _body(None, proprio=[1, 2, 3]): "got float64 of shape (3,)",
    _body(None, proprio="here"): "proprio: expected 7 numbers",
    _body(None, proprio=[0] * 6 + ["1"]): 'got "1" among them',
    _body(None, proprio=[0, None] + [0] * 5): "got null among them",
    _body(None, proprio=[True] * 7): "got true among them",
    _body(None, proprio=[300, 0, 150, 0, 0, 0, 1]): "x, y, z in metres, up to 10",
    _body(None, proprio=[0.3, 0, 0.15, 180, 0, 0, 1]): "angles in radians, up to 12.6",
    _body(None, proprio=[0] * 6 + [float("nan")]): "all finite",
    _body(None, proprio=[0] * 6 + [float("inf")]): "all finite",
    _body(None, proprio=[10**400] * 7): "too large",
    _body(None, proprio=[1e308] * 7): "in metres",
    _body(None, proprio=[0] * 7 + [-1e300]): "in metres",
    _body(None, proprio=encode_array(np.zeros((1, 7)))): "shape (1, 7)",
    _body(None, proprio=encode_array(np.full(8, np.nan))): "all finite",
    _body(None, proprio=encode_array(np.zeros(7, bool))): "got bool",
}


@pytest.mark.parametrize("body", SENTENCES, ids=[f"{i}-{s[:24]}" for i, s in enumerate(SENTENCES.values())])
def test_what_cannot_be_read_is_refused_with_the_reason(body):
    with pytest.raises(RequestError) as caught:
        decode_act(body)
    assert SENTENCES[body] in str(caught.value)
    assert caught.value.status == 400
    assert len(str(caught.value)) < 400


def test_a_camera_picture_fits_as_a_nested_list():
    image = np.full((480, 640, 3), 255, np.uint8)
    assert decode_act(_body(image.tolist())).image.shape == (480, 640, 3)


def test_a_large_picture_fits_as_one_text():
    image = np.zeros((2000, 2000, 3), np.uint8)
    body = _body(encode_array(image))
    assert len(body) > MAX_LISTED and decode_act(body).image.shape == image.shape
    assert decode_act(json.dumps({"encoded": body.decode()}).encode()).image.shape == image.shape


@pytest.mark.parametrize(
    ("bulk", "status", "sentence"),
    [
        (b"[]," * (MAX_LISTED // 3), 413, "the picture must be one text"),
        (b"[[1,2,3]]," * (MAX_LISTED // 10), 413, "the picture must be one text"),
        (b'"' + b"\\u0041" * (MAX_LISTED // 6) + b'",', 413, "the picture must be one text"),
        (b"[]," * 1_000_000, 400, "more lists than"),
        (b"{}," * 1_000_000, 400, "more objects and fields than"),
        (b'{"a":0,"b":0,"c":0},' * 10_000, 400, "more objects and fields than"),
    ],
)
def test_a_body_that_would_take_long_to_parse_is_refused_unread(bulk, status, sentence):
    for body in (
        b'{"instruction":"go","image":[' + bulk + b"1]}",
        b'{"encoded":"[' + bulk.replace(b'"', b'\\"') + b'1]"}',
    ):
        with pytest.raises(RequestError, match=sentence) as caught:
            decode_act(body)
        assert caught.value.status == status


def test_spaces_in_base64_cost_no_object_each():
    with pytest.raises(RequestError, match="no PNG or JPEG file"):
        decode_act(_body("AA AA\r\n" * 10_000))


def test_a_small_file_that_claims_to_be_huge_is_refused_before_it_is_unpacked():
    buffer = BytesIO()
    Image.new("1", (16_000, 16_000)).save(buffer, "PNG")  # 32 kB for 768 MB of pixels
    assert len(buffer.getvalue()) < 100_000
    with pytest.raises(RequestError):
        decode_act(_body(base64.b64encode(buffer.getvalue()).decode()))


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300))
def test_random_bytes_are_the_clients_fault(body):
    with pytest.raises(RequestError):
        decode_act(body)


_KEYS = st.sampled_from(["__numpy__", "dtype", "shape", "a"])
# Not text(): which characters UTF-8 has it finds out by trying all, seconds in a fresh folder.
_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | _TEXT,
    lambda inner: st.lists(inner, max_size=9) | st.dictionaries(_KEYS, inner),
    max_leaves=20,
)


@settings(max_examples=40, deadline=None)
@given(st.fixed_dictionaries({"image": _JSON, "instruction": _JSON, "proprio": _JSON}))
def test_random_json_is_the_clients_fault(value):
    with pytest.raises(RequestError):
        decode_act(json.dumps(value).encode())


def test_a_seed_comes_with_a_reset():
    for body in (b"", b"  ", b"{}", b"null", b'{"seed": null}', b'{"other": 1}'):
        assert decode_reset(body) is None
    assert decode_reset(b'{"seed": 18446744073709551615}') == 2**64 - 1
    for body in (
        b'{"Seed": 1}',
        b'{"seed": 1, "seed": 2}',
        b'{"seed": -1}',
        b'{"seed": 1.0}',
        b'{"seed": true}',
        b'{"seed": 18446744073709551616}',
        b"[]",
        b"{",
    ):
        with pytest.raises(RequestError):
            decode_reset(body)


def test_details_are_plain_json():
    decision = Decision(np.zeros(7), "move up, open gripper", marginals={"x": (0.1, 0.8, 0.1)}, timings_ms={"a": 1 / 3})
    details = json.loads(json.dumps(build_details(decision, robot="left", step=3)))
    assert details["axes"] == {"x": 0, "y": 0, "z": 1, "tilt": 0, "yaw": 0, "gripper": 1}
    assert (details["robot"], details["step"], details["fault"]) == ("left", 3, None)
    assert details["marginals"] == {"x": [0.1, 0.8, 0.1]} and details["timings_ms"] == {"a": 0.333}
    assert build_details(Decision(np.zeros(7)))["axes"] is None
