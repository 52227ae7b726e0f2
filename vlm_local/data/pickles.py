"""Pickles of strangers, read without running anything: numbers, text, bytes, plain containers and number arrays.

A pickle is a program for a stack machine. Python's own machine, however restricted, calls numpy's constructors with
whatever the file says, and those build arrays of object pointers from raw bytes. So the program is taken apart by
pickletools, and the machine here makes every value itself: names of functions stand for the few below, an array is
made of bytes that fill it exactly, and the keys of dictionaries and sets are numbers and text.
"""

import pickletools
import re
from collections.abc import Callable
from math import prod
from typing import IO, Any, BinaryIO, cast

import numpy as np

from vlm_local.errors import DataError

MAX_BYTES = 1 << 31  # of a file, unpacked
MAX_OPCODES = 2_000_000  # each may make an object

# The logger says that the class of an episode does not matter; its example's is one of the program itself.
_SHELLS = re.compile(r"robot_eval_logger\..*:TrajData|wandb\..*:Histogram|__main__:\w+")
_DTYPE = re.compile(r"b1|[iu][1248]|f[248]|[US]\d{1,5}")
_KEYS = (str, int, float, bytes, type(None))


class Shell:
    """Stands for an object of AutoEval's logger: attributes, no code."""


class _Unbuilt:
    """An array or dtype between its making and the opcode BUILD that fills it. places: in the memo."""

    def __init__(self, build: Callable[[Any], Any]):
        self.build = build
        self.places: list[int] = []


class _Class:
    """The name of a class, which only some opcodes take."""

    def __init__(self, make: Callable[[], Any] | None):
        self.make = make


class LimitedFile:
    """What pickletools reads from: refuses to read more than `limit` bytes, before there is room for them."""

    def __init__(self, file: BinaryIO, limit: int):
        self._file, self._limit, self._position = file, limit, 0

    def read(self, size: int) -> bytes:
        left = self._limit - self._position
        if size > left:
            raise DataError(
                f"the pickle is cut off, or over {MAX_BYTES >> 30} GiB: {size} bytes are to follow, but {left} do"
            )
        return self._count(self._file.read(size))

    def readline(self) -> bytes:
        return self._count(self._file.readline(self._limit - self._position))

    def tell(self) -> int:
        return self._position

    def _count(self, data: bytes) -> bytes:
        self._position += len(data)
        return data


def load_plain(file: LimitedFile) -> Any:
    """What a pickle holds. Raises DataError for one that asks for code, and nearly anything for a damaged one."""
    machine = _Machine()
    for count, (opcode, argument, _) in enumerate(pickletools.genops(cast("IO[bytes]", file))):  # it reads, no more
        if count > MAX_OPCODES:
            raise DataError(f"the pickle has more than {MAX_OPCODES} opcodes, which no recording needs")
        machine.run(opcode.name, argument)
    return machine.stack.pop()


class _Machine:
    def __init__(self):
        self.stack: list[Any] = []
        self._below: list[list[Any]] = []  # the stacks under each mark
        self._memo: dict[int, Any] = {}

    def run(self, name: str, argument: Any) -> None:
        if name in _LITERALS:
            self.stack.append(argument)
        elif name in _VALUES:
            self.stack.append(_VALUES[name]())
        elif name in _MARKED:
            items = self._pop_mark()  # which changes the stack
            self.stack.append(_MARKED[name](items))
        elif name in _TUPLES:
            first = len(self.stack) - _TUPLES[name]
            self.stack[first:] = [tuple(self.stack[first:])]
        elif name not in _IGNORED:
            method = getattr(self, f"_do_{name.lower()}", None)
            if method is None:
                raise DataError(f"the pickle holds the opcode {name}, which no recording of plain values needs")
            method(argument)

    def _pop_mark(self) -> list[Any]:
        items, self.stack = self.stack, self._below.pop()
        return items

    def _do_mark(self, _) -> None:
        self._below.append(self.stack)
        self.stack = []

    def _do_pop(self, _) -> None:
        self.stack.pop()

    def _do_pop_mark(self, _) -> None:
        self._pop_mark()

    def _do_append(self, _) -> None:
        self._extend([self.stack.pop()])

    def _do_appends(self, _) -> None:
        self._extend(self._pop_mark())

    def _extend(self, items: list[Any]) -> None:
        _expect(self.stack[-1], list).extend(items)

    def _do_setitem(self, _) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        _expect(self.stack[-1], dict).update(_make_dict([key, value]))

    def _do_setitems(self, _) -> None:
        items = self._pop_mark()
        _expect(self.stack[-1], dict).update(_make_dict(items))

    def _do_additems(self, _) -> None:
        items = self._pop_mark()
        _expect(self.stack[-1], set).update(_check_keys(items))

    def _do_memoize(self, _) -> None:
        self._do_put(len(self._memo))

    def _do_put(self, place: int) -> None:
        top = self.stack[-1]
        self._memo[place] = top
        if isinstance(top, _Unbuilt):
            top.places.append(place)

    _do_binput = _do_long_binput = _do_put

    def _do_get(self, place: int) -> None:
        self.stack.append(self._memo[place])

    _do_binget = _do_long_binget = _do_get

    def _do_global(self, argument: str) -> None:
        self.stack.append(_find(*argument.split(" ", 1)))

    def _do_stack_global(self, _) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self.stack.append(_find(_expect(module, str), _expect(name, str)))

    def _do_reduce(self, _) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if isinstance(function, _Class) or not callable(function):
            raise DataError(f"the pickle calls a {type(function).__name__}")
        self.stack.append(function(*_expect(arguments, tuple)))

    def _do_newobj(self, _) -> None:
        _, named = self.stack.pop(), self.stack.pop()
        make = _expect(named, _Class).make
        if make is None:
            raise DataError("the pickle makes an array without a shape")
        self.stack.append(make())

    def _do_build(self, _) -> None:
        state, top = self.stack.pop(), self.stack[-1]
        if isinstance(top, Shell):
            fields = state[0] if isinstance(state, tuple) else state  # the other part would be slots
            vars(top).update({_expect(name, str): value for name, value in _expect(fields, dict).items()})
            return
        unbuilt = _expect(top, _Unbuilt)
        self.stack[-1] = unbuilt.build(_expect(state, tuple))
        self._memo.update(dict.fromkeys(unbuilt.places, self.stack[-1]))


_IGNORED = ("PROTO", "FRAME", "STOP")
_LITERALS = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
_VALUES: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_SET": set,
}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def _expect(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise DataError(f"the pickle has a {type(value).__name__} where a {kind.__name__.lstrip('_')} belongs")
    return value


def _check_keys(keys: list[Any]) -> list[Any]:
    """Numbers and text: hashing nested tuples could take for ever."""
    for key in keys:
        if not isinstance(key, _KEYS):
            raise DataError(f"the pickle has a key that is a {type(key).__name__}; numbers and text were expected")
    return keys


def _make_dict(items: list[Any]) -> dict[Any, Any]:
    """Keys and values in turn."""
    return dict(zip(_check_keys(items[::2]), items[1::2], strict=True))


_MARKED: dict[str, Callable[[list[Any]], Any]] = {  # of what lies above the last mark
    "TUPLE": tuple,
    "LIST": list,
    "DICT": _make_dict,
    "FROZENSET": lambda items: frozenset(_check_keys(items)),
}


def _make_dtype(code: Any, *_: Any) -> _Unbuilt:
    """numpy.dtype: its state is (version, byte order, no subarray, no fields ...)."""

    def build(state: tuple[Any, ...]) -> np.dtype:
        _, order, *structure = state[:5]
        if order not in ("<", ">", "|", "=") or any(part is not None for part in structure):
            raise DataError("the pickle has an array with fields; plain numbers were expected")
        return np.dtype(order + code)

    if not isinstance(code, str) or not _DTYPE.fullmatch(code):
        kind = code if isinstance(code, str) else type(code).__name__
        raise DataError(f"the pickle has an array of dtype {kind[:20]!r}; plain numbers were expected")
    return _Unbuilt(build)


def _make_array(*_: Any) -> _Unbuilt:
    """numpy's _reconstruct: the state is (version, shape, dtype, whether in Fortran's order, bytes)."""

    def build(state: tuple[Any, ...]) -> np.ndarray:
        _, shape, dtype, is_fortran, data = state
        return _fill_array(data, dtype, shape, "F" if is_fortran is True else "C")

    return _Unbuilt(build)


def _fill_array(data: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    """numpy's _frombuffer."""
    _expect(dtype, np.dtype)
    if not isinstance(data, bytes | bytearray) or order not in ("C", "F"):
        raise DataError("the pickle has an array that is not made of bytes; plain numbers were expected")
    sizes = [_expect(size, int) for size in _expect(shape, tuple)]
    if min(sizes, default=1) < 0 or prod(sizes) * dtype.itemsize != len(data):
        raise DataError(f"the pickle has an array of {len(data)} bytes that do not fill its shape")
    return np.frombuffer(data, dtype).reshape(sizes, order=order)


def _make_scalar(dtype: Any, data: Any) -> Any:
    return _fill_array(data, dtype, (), "C").item()


def _make_bytes(text: Any = b"", *encoding: Any) -> bytes:
    """bytearray(bytes), and in older protocols bytearray(text, "latin-1") and _codecs.encode(text, "latin1")."""
    if isinstance(text, bytes | bytearray) and not encoding:
        return bytes(text)
    if encoding not in (("latin1",), ("latin-1",)):
        raise DataError("the pickle encodes text otherwise than numpy does")
    return _expect(text, str).encode("latin-1")


def _make_ordered(pairs: Any = ()) -> dict[Any, Any]:
    """collections.OrderedDict, empty or of pairs."""
    return _make_dict([part for pair in pairs for part in pair])


def _make_set(items: Any = ()) -> set[Any]:
    return set(_check_keys(list(items)))


_FUNCTIONS: dict[str, Any] = {
    **dict.fromkeys(("numpy.core.multiarray:_reconstruct", "numpy._core.multiarray:_reconstruct"), _make_array),
    **dict.fromkeys(("numpy.core.multiarray:scalar", "numpy._core.multiarray:scalar"), _make_scalar),
    **dict.fromkeys(("numpy.core.numeric:_frombuffer", "numpy._core.numeric:_frombuffer"), _fill_array),
    "numpy:ndarray": _Class(None),
    "numpy:dtype": _make_dtype,
    "collections:OrderedDict": _make_ordered,
    **dict.fromkeys(("builtins:set", "builtins:frozenset", "__builtin__:set", "__builtin__:frozenset"), _make_set),
    **dict.fromkeys(("builtins:bytes", "__builtin__:bytes"), _make_bytes),
    **dict.fromkeys(("builtins:bytearray", "__builtin__:bytearray", "_codecs:encode"), _make_bytes),
}


def _find(module: str, name: str) -> Any:
    """What stands for a global name."""
    full = f"{module}:{name}"
    if _SHELLS.fullmatch(full):
        return _Class(Shell)
    if full not in _FUNCTIONS:
        raise DataError(
            f"the pickle asks for {module[:100]}.{name[:100]}; only numpy arrays and plain containers are read, "
            "because unpickling anything else could run code"
        )
    return _FUNCTIONS[full]
