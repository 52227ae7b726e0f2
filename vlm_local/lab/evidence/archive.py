"""A result folder as one archive: a zip whose first member names every other with its size and sha256.

The sha256 of that manifest is the archive's seal: it stands for every byte of the result, however the
bytes were compressed. The same folder gives the same archive.
"""

import hashlib
import json
import os
import shutil
import zipfile
import zlib
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from vlm_local.errors import ConfigError, DataError
from vlm_local.files import check_no_folder, encode_json
from vlm_local.lab.results import LAYOUTS, find_layout
from vlm_local.plain import holds_secret

MANIFEST = "evidence.json"
_FORMAT = "vlm-local evidence 1"
_DATE = (1980, 1, 1, 0, 0, 0)  # the earliest a zip can say: when it was packed is no evidence
_CHUNK = 1 << 20
_MAX_MANIFEST_BYTES = 64 << 20
_MAX_BYTES = 16 << 30
_MAX_RATIO, _ALLOWANCE = 200, 1 << 20  # rows shrink by 5 to 30; deflate could do 1000

Manifest = Mapping[str, Any]


def build_manifest(folder: Path, pictures: bool = True, episodes: Collection[str] = ()) -> dict[str, Any]:
    """format, kind and files {relative path: {bytes, sha256}}, in order.

    pictures: with frames and films; with `episodes` only with theirs. Raises DataError for an episode that has none.
    """
    layout = find_layout(folder)
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    names = [name for name in names if layout.holds(name)]
    shown = {name for name in names if layout.is_picture(name)} if pictures else set()
    if episodes:
        if missing := set(episodes).difference(*(name.split("/") for name in shown)):
            raise DataError(f"{folder} has no pictures of an episode {', '.join(sorted(missing))}")
        shown = {name for name in shown if not set(episodes).isdisjoint(name.split("/"))}
    files = {name: _describe(folder / name) for name in names if name in shown or not layout.is_picture(name)}
    return {"format": _FORMAT, "kind": layout.kind, "files": files}


def seal(manifest: Manifest) -> str:
    """What stands for the whole result: sha256, hexadecimal."""
    return hashlib.sha256(_encode(manifest)).hexdigest()


def pack(folder: Path, out: Path, pictures: bool = True, episodes: Collection[str] = ()) -> Manifest:
    """Write the archive. pictures, episodes: as `build_manifest`.

    Raises DataError where the folder holds no result or not an episode, ConfigError where nothing can be written.
    """
    check_no_folder(out)
    manifest = build_manifest(folder, pictures, episodes)
    layout = LAYOUTS[manifest["kind"]]
    _refuse_secrets(folder, [name for name in manifest["files"] if not layout.is_picture(name)])
    beside = out.with_name(out.name + ".new")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(beside, "w") as archive:
            archive.writestr(_member(MANIFEST), _encode(manifest))
            for name, file in manifest["files"].items():
                member = _member(name, zipfile.ZIP_STORED if layout.is_picture(name) else zipfile.ZIP_DEFLATED)
                member.file_size = file["bytes"]
                with archive.open(member, "w") as target, (folder / name).open("rb") as source:
                    shutil.copyfileobj(source, target, _CHUNK)
        os.replace(beside, out)
    except OSError as error:
        raise ConfigError(f"cannot write {out}: {error.strerror}; choose another --out") from None
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
    return manifest


def unpack(path: Path, folder: Path) -> Manifest:
    """Check every byte of an archive and write its texts (not its pictures) into `folder`.

    Raises DataError for an archive that is damaged, not as packed, or not to be opened safely: nothing
    is written outside `folder`, and never more than the manifest says.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = {member.filename: member for member in archive.infolist()}
            if len(members) != len(archive.infolist()):
                raise DataError(f"{path} holds a file twice, so one of them was added after packing")
            manifest = _read_manifest(path, archive, members)
            _check_members(path, manifest, members)
            layout = LAYOUTS[manifest["kind"]]
            for name, file in manifest["files"].items():
                target = None if layout.is_picture(name) else folder / name
                _check_file(path, archive, members[name], file, target)
            return manifest
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from None
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise DataError(f"{path} is no archive of `pack`, or was damaged on the way ({error})") from None


def _refuse_secrets(folder: Path, names: list[str]) -> None:
    """Results made by an earlier version hold the token of a URL such as http://host/t/TOKEN."""
    for name in names:
        with (folder / name).open(encoding="utf-8", errors="replace") as file:
            if any("://" in line and holds_secret(line) for line in file):
                raise DataError(
                    f"{folder / name} holds a token or password in a URL, and an archive is there to be published: "
                    "make the result again, or replace the token by *** in all of its files"
                )


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return {"bytes": file.tell(), "sha256": digest.hexdigest()}


def _encode(manifest: Manifest) -> bytes:
    return (encode_json(manifest, indent=1) + "\n").encode()


def _member(name: str, compression: int = zipfile.ZIP_DEFLATED) -> zipfile.ZipInfo:
    member = zipfile.ZipInfo(name, _DATE)
    member.compress_type = compression
    member.create_system, member.external_attr = 3, 0o644 << 16  # as if packed on Unix, wherever it was
    return member


def _read_manifest(path: Path, archive: zipfile.ZipFile, members: Mapping[str, zipfile.ZipInfo]) -> Manifest:
    if MANIFEST not in members:
        raise DataError(f"{path} has no {MANIFEST}: it was not made by `pack`")
    data = b"".join(_read(archive, members[MANIFEST], _MAX_MANIFEST_BYTES))
    manifest: Any = None
    try:
        manifest = json.loads(data)
        known = manifest["format"] == _FORMAT and manifest["kind"] in LAYOUTS
        sound = known and all(
            type(file["bytes"]) is int and file["bytes"] >= 0 and type(file["sha256"]) is str
            for file in manifest["files"].values()
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        known = sound = False
    if not sound:
        raise DataError(f"{path}: {MANIFEST} is not of the form {_FORMAT!r}; this version reads no other")
    if data != _encode(manifest):
        raise DataError(f"{path}: {MANIFEST} is not as `pack` writes it, so it was changed")
    return manifest


def _check_members(path: Path, manifest: Manifest, members: Mapping[str, zipfile.ZipInfo]) -> None:
    files, layout = manifest["files"], LAYOUTS[manifest["kind"]]
    strange = [name for name in files if not layout.holds(name)]
    added = [name for name in members if name != MANIFEST and name not in files]
    removed = [name for name in files if name not in members]
    lacking = [name for name in layout.needs if name not in files]
    for names, what in (
        (strange, f"names {{}}, which no result of `{layout.kind}` has"),
        (added, f"holds {{}}, which {MANIFEST} does not name: it was added after packing"),
        (removed, f"lacks {{}}, which {MANIFEST} names: it was removed after packing"),
        (lacking, f"lacks {{}}, without which nothing of `{layout.kind}` can be scored"),
    ):
        if names:
            raise DataError(f"{path} {what.format(repr(names[0]))}")
    total, size = sum(file["bytes"] for file in files.values()), path.stat().st_size
    if total > min(_MAX_BYTES, _MAX_RATIO * size + _ALLOWANCE):
        raise DataError(f"{path} has {size} bytes and would unpack to {total}; that is no result, and is not unpacked")


def _check_file(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo, file: Mapping, target: Path | None):
    """Read one member against its line of the manifest, into `target` if it is wanted."""
    digest = hashlib.sha256()
    if target is not None:
        target.parent.mkdir(parents=True, exist_ok=True)
    with open(target or os.devnull, "wb") as copy:
        for chunk in _read(archive, member, file["bytes"]):
            digest.update(chunk)
            copy.write(chunk)
    if digest.hexdigest() != file["sha256"]:
        raise DataError(f"{path}: {member.filename!r} is not what was packed (another sha256), so it was changed")


def _read(archive: zipfile.ZipFile, member: zipfile.ZipInfo, most_bytes: int) -> Iterator[bytes]:
    """A member in pieces. Raises DataError as soon as it is longer than it may be."""
    if member.flag_bits & 1 or member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise DataError(f"{archive.filename}: {member.filename!r} is encrypted or compressed as `pack` never does")
    left = most_bytes
    with archive.open(member) as source:
        while chunk := source.read(min(_CHUNK, left + 1)):
            left -= len(chunk)
            if left < 0:
                raise DataError(
                    f"{archive.filename}: {member.filename!r} is longer than its {most_bytes} bytes; it was changed"
                )
            yield chunk
