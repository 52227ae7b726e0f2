"""Messages to an engine's process: what every request of a robot repeats crosses the pipe once."""

import pickle
from collections import OrderedDict
from io import BytesIO
from typing import Any

from vlm_local.types import Picture

_SHORT = 64  # sentences, as a question's choices: a list of so few is sent each time; 729 phrases take 36 kB

_Parts = OrderedDict[tuple[int, int], Any]  # name (bytes, roughly, and a hash) -> part; the last used stands last


class RepeatedParts:
    """What every request of a robot repeats, earlier pictures and its grammar's sentences, crosses the pipe once.

    Later messages hold its name, and find the same object: both sides see all messages and so know the same.
    """

    def __init__(self, max_bytes: int = 1 << 28):
        self._max_bytes = max_bytes
        self._known: _Parts = OrderedDict()

    def pack(self, message: Any) -> bytes:
        _Packer(file := BytesIO(), self._known).dump(message)
        self._drop_oldest()
        return file.getvalue()

    def unpack(self, packed: bytes) -> Any:
        message = _Unpacker(BytesIO(packed), self._known).load()
        self._drop_oldest()
        return message

    def _drop_oldest(self) -> None:
        while sum(num_bytes for num_bytes, _ in self._known) > self._max_bytes:
            self._known.popitem(last=False)


class _Packer(pickle.Pickler):
    def __init__(self, file: BytesIO, known: _Parts):
        super().__init__(file)
        self._known, self._new = known, None

    def persistent_id(self, part: Any) -> tuple[tuple[int, int], Any] | None:
        """(name, part) where it is new to the other side, (name, None) where it is known; None for anything else."""
        if part is self._new:  # written behind its name
            return None
        if isinstance(part, Picture):
            name = part.pixels.nbytes, part.key
        elif isinstance(part, tuple) and len(part) > _SHORT and set(map(type, part)) == {str}:
            name = 64 * len(part), hash(part)
        else:
            return None
        known = self._known.pop(name, None)
        is_known = known is not None and (isinstance(part, Picture) or known == part)  # two lists may have one hash
        self._new = None if is_known else part
        self._known[name] = part
        return name, self._new


class _Unpacker(pickle.Unpickler):
    def __init__(self, file: BytesIO, known: _Parts):
        super().__init__(file)
        self._known = known

    def persistent_load(self, pid: tuple[tuple[int, int], Any]) -> Any:
        name, part = pid
        self._known[name] = self._known.pop(name) if part is None else part
        return self._known[name]
