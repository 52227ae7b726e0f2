"""Small recorded data sets of every format, written by the tests themselves."""

import io
import json
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from vlm_local.data.tfrecord import mask_crc


def make_states(num_steps: int, seed: int = 0) -> np.ndarray:
    """A random walk with steps of about the labeller's threshold, float32 (T, 7)."""
    random = np.random.default_rng(seed)
    steps = random.normal(0, 1, (num_steps, 7)) * [0.02, 0.02, 0.02, 0.2, 0.2, 0.2, 0]
    states = np.array([0.3, 0, 0.15, 0, 0, 0, 0]) + steps.cumsum(axis=0)
    states[:, :6] = np.clip(states[:, :6], -2, 2)
    states[:, 6] = (np.arange(num_steps) // 5) % 2
    return states.astype(np.float32)


def make_images(num_steps: int, seed: int = 0, side: int = 32) -> np.ndarray:
    """uint8 (T, side, side, 3): flat tiles, so that JPEG and video keep them nearly as they are."""
    tiles = np.random.default_rng(seed).integers(0, 256, (num_steps, 2, 2, 3), np.uint8)
    return tiles.repeat(side // 2, axis=1).repeat(side // 2, axis=2)


def encode_image(image: np.ndarray, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, kind)
    return buffer.getvalue()


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _field(number: int, payload: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(payload)) + payload


def encode_example(features: dict[str, Sequence[bytes] | np.ndarray]) -> bytes:
    """A tf.Example: lists of bytes become bytes lists, arrays packed float lists."""
    entries = b""
    for name, values in features.items():
        if isinstance(values, np.ndarray):
            feature = _field(2, _field(1, np.asarray(values, "<f4").tobytes()))
        else:
            feature = _field(1, b"".join(_field(1, value) for value in values))
        entries += _field(1, _field(1, name.encode()) + _field(2, feature))
    return _field(1, entries)


def encode_record(data: bytes) -> bytes:
    length = struct.pack("<Q", len(data))
    return length + struct.pack("<I", mask_crc(length)) + data + struct.pack("<I", mask_crc(data))


def _tensor(*shape: int) -> dict:
    return {"tensor": {"shape": {"dimensions": [str(size) for size in shape]}, "dtype": "float32", "encoding": "none"}}


def write_features(
    folder: Path, state_width: int = 7, cameras: Sequence[str] = ("image_0",), description: str = ""
) -> None:
    state = _tensor(state_width) | {"description": description}
    observation = {camera: {"image": {"encodingFormat": "png"}} for camera in cameras} | {"state": state}
    step = {
        "action": _tensor(7),
        "observation": {"featuresDict": {"features": observation}},
        "language_instruction": {"text": {}},
    }
    steps = {"sequence": {"feature": {"featuresDict": {"features": step}}}}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "features.json").write_text(json.dumps({"featuresDict": {"features": {"steps": steps}}}))


def make_rlds_record(
    states: np.ndarray, instruction: str | Sequence[str] = "lift the cup", images: Sequence[bytes] = ()
) -> bytes:
    """The Example of one episode; images default to `make_images`, actions to the states' differences.

    instruction: of all steps, or one for each.
    """
    num_steps = len(states)
    instructions = [instruction] * num_steps if isinstance(instruction, str) else instruction
    actions = np.diff(states, axis=0, append=states[-1:])[:, :7]
    return encode_example(
        {
            "steps/action": actions,
            "steps/observation/state": states,
            "steps/observation/image_0": images or [encode_image(image) for image in make_images(num_steps)],
            "steps/language_instruction": [instruction.encode() for instruction in instructions],
            "steps/observation/unused": [b"x"] * num_steps,
        }
    )


def write_rlds(folder: Path, records: Sequence[bytes], shards: int = 1) -> list[Path]:
    """features.json and the records (Examples) dealt to shards; returns the shards' paths."""
    write_features(folder)
    paths = []
    for shard, part in enumerate(np.array_split(np.arange(len(records)), shards)):
        paths.append(folder / f"demo-train.tfrecord-{shard:05d}-of-{shards:05d}")
        paths[-1].write_bytes(b"".join(encode_record(records[index]) for index in part))
    return paths


def write_walks(folder: Path, num_episodes: int, num_steps: int) -> list[Path]:
    """As `write_rlds`: episodes of random walks, each another one."""
    return write_rlds(folder, [make_rlds_record(make_states(num_steps, seed)) for seed in range(num_episodes)])


def write_lerobot(
    folder: Path,
    episodes: Sequence[np.ndarray],
    version: str = "v2.1",
    images: str = "video",
    names: object = None,
    state_width: int = 8,
    side: int = 32,
) -> None:
    """A LeRobot data set of states (T, 7), or (T, state_width). images: "video" or "image" (PNG in the table).

    state_width 8 is Bridge's padding of 7 numbers. v3.0 packs two episodes into a file; fps is 5.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    key, is_v3 = "observation.images.image_0", version == "v3.0"
    tables, meta, row, video_s = {}, [], 0, {}
    for number, states in enumerate(episodes):
        file = number // 2 if is_v3 else number
        name = f"file-{file:03d}" if is_v3 else f"episode_{number:06d}"
        columns = {
            "observation.state": _pad(states, state_width).tolist(),
            "action": np.diff(states, axis=0, append=states[-1:])[:, :7].tolist(),
            "timestamp": np.arange(len(states), dtype=np.float32) / 5,
            "frame_index": range(len(states)),
            "episode_index": [number] * len(states),
            "task_index": [number % 2] * len(states),
        }
        if images == "image":
            columns[key] = [{"bytes": encode_image(i), "path": None} for i in make_images(len(states), number, side)]
        tables.setdefault(name, []).append(pa.table({k: pa.array(list(v)) for k, v in columns.items()}))
        start_s = video_s.get(file, 0.0)
        video_s[file] = start_s + len(states) / 5
        meta.append(
            {
                "episode_index": number,
                "tasks": [TASKS[number % 2]],
                "length": len(states),
                "data/chunk_index": 0,
                "data/file_index": file,
                "dataset_from_index": row,
                f"videos/{key}/chunk_index": 0,
                f"videos/{key}/file_index": file,
                f"videos/{key}/from_timestamp": start_s,
                "stats/action/min": [0.0] * 7,
            }
        )
        row += len(states)
    (folder / "meta").mkdir(parents=True)
    (folder / "data/chunk-000").mkdir(parents=True)
    for name, parts in tables.items():
        with pq.ParquetWriter(folder / f"data/chunk-000/{name}.parquet", parts[0].schema) as writer:
            for part in parts:
                writer.write_table(part)
        if images == "video":
            numbers = sorted({n for part in parts for n in part["episode_index"].to_pylist()})
            frames = np.concatenate([make_images(len(episodes[n]), n, side) for n in numbers])
            path = f"videos/{key}/chunk-000/{name}.mp4" if is_v3 else f"videos/chunk-000/{key}/{name}.mp4"
            write_video(folder / path, frames)
    _write_lerobot_meta(folder, meta, version, key, images, names, state_width)


def _pad(states: np.ndarray, width: int) -> np.ndarray:
    return np.insert(states, 6, 0, axis=1) if (states.shape[1], width) == (7, 8) else states


TASKS = ("lift the cup", "close the drawer")


def _write_lerobot_meta(folder, meta, version, key, images, names, state_width) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    data, video = (
        "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "videos/chunk-{episode_chunk:03d}",
    )
    video += "/{video_key}/episode_{episode_index:06d}.mp4"
    if version == "v3.0":
        data = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
        video = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
        (folder / "meta/episodes/chunk-000").mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(meta), folder / "meta/episodes/chunk-000/file-000.parquet")
        tasks = pa.table({"task_index": [0, 1], "__index_level_0__": list(TASKS)})
        pq.write_table(tasks, folder / "meta/tasks.parquet")
    else:
        lines = [{k: line[k] for k in ("episode_index", "tasks", "length")} for line in meta]
        (folder / "meta/episodes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        tasks = [{"task_index": i, "task": task} for i, task in enumerate(TASKS)]
        (folder / "meta/tasks.jsonl").write_text("".join(json.dumps(line) + "\n" for line in tasks))
    info = {
        "codebase_version": version,
        "fps": 5,
        "chunks_size": 1000,
        "total_episodes": len(meta),
        "data_path": data,
        "video_path": video if images == "video" else None,
        "features": {
            key: {"dtype": images, "shape": [32, 32, 3]},
            "observation.state": {"dtype": "float32", "shape": [state_width], "names": names},
            "action": {"dtype": "float32", "shape": [7]},
        },
    }
    (folder / "meta/info.json").write_text(json.dumps(info))


def write_video(path: Path, frames: np.ndarray, fps: int = 5) -> None:
    """H.264 with key frames 12 apart. frames: uint8 (T, H, W, 3)."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "4", "g": "12"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv444p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
