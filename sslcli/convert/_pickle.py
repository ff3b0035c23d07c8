"""A pickle read as a description: nothing it names is imported, nothing it asks for is called.

Pickle is a small programming language. Here its words are carried out on plain data alone: numbers, text, lists,
dictionaries. Where a program would fetch a class and call it, a `Thing` is put down that says so. The few things that
checkpoints consist of (tensors, ordered dictionaries, NumPy arrays) are then read out of their descriptions.
"""

import pickletools
from dataclasses import dataclass, field
from typing import IO, Any

import numpy as np


@dataclass(frozen=True, slots=True)
class Named:
    """A class or function, by name."""

    name: str


@dataclass(slots=True, eq=False)
class Thing:
    """What a pickle would have made by calling something."""

    name: str
    """Of the class or function, e.g. `argparse.Namespace`."""
    args: tuple[Any, ...] = ()
    state: Any = None
    items: list[Any] = field(default_factory=list)
    """Appended or set afterwards."""


@dataclass(frozen=True, slots=True)
class Storage:
    """A block of numbers kept outside the pickle."""

    kind: str
    """Element type as torch names it, e.g. `FloatStorage`."""
    key: str
    count: int
    """Elements."""


@dataclass(frozen=True, slots=True)
class TensorAt:
    """Where a tensor lies in a storage, counted in elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: str = ""
    """Where it differs from the storage's."""


class Unreadable(ValueError):
    """The bytes are not a pickle, or use a part of the language that no checkpoint needs."""


MARK = object()
_PUSH_ARG = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING",
    "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8", "UNICODE", "SHORT_BINUNICODE",
    "BINUNICODE", "BINUNICODE8",
}  # fmt: skip
_PUSH_NEW: dict[str, Any] = {
    "NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False, "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple, "EMPTY_DICT": dict, "EMPTY_SET": lambda: Thing("set"),
}  # fmt: skip
_LONGEST = 20_000_000
"""Words of the longest pickle that is read; a checkpoint has some ten thousand."""


def read(file: IO[bytes], storages: dict[str, Storage] | None = None) -> Any:
    """The next pickle in a file, which is left at its end.

    Args:
        file: what to read.
        storages: takes up the storages that are spoken of, by key.

    Raises:
        Unreadable: it is none, or is cut short.
    """
    try:
        return _run(file, {} if storages is None else storages)
    except Unreadable:
        raise
    except (ValueError, OverflowError) as error:
        raise Unreadable(str(error).splitlines()[0] if str(error) else type(error).__name__) from error
    except (KeyError, IndexError, TypeError, AttributeError, MemoryError, EOFError) as error:
        raise Unreadable("it makes no sense as a pickle") from error  # what such errors say means nothing to a reader


def _run(file: IO[bytes], storages: dict[str, Storage]) -> Any:
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    for count, (opcode, arg, _) in enumerate(pickletools.genops(file)):
        name = opcode.name
        if count > _LONGEST:
            raise Unreadable("it never ends")
        if name in _PUSH_ARG:
            stack.append(arg)
        elif name in _PUSH_NEW:
            stack.append(_PUSH_NEW[name]())
        elif name == "STOP":
            return stack.pop()
        elif name in ("PROTO", "FRAME"):
            pass
        elif name == "MARK":
            stack.append(MARK)
        elif name == "POP":
            stack.pop()
        elif name == "POP_MARK":
            _from_mark(stack)
        elif name == "DUP":
            stack.append(stack[-1])
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(memo[int(str(arg))])
        elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
            memo[int(str(arg))] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("APPEND", "APPENDS", "ADDITEMS"):
            added = [stack.pop()] if name == "APPEND" else _from_mark(stack)
            _list_of(stack[-1]).extend(added)
        elif name in ("SETITEM", "SETITEMS"):
            flat = [stack.pop(), stack.pop()][::-1] if name == "SETITEM" else _from_mark(stack)
            _set(stack[-1], flat)
        elif name == "LIST":
            stack.append(_from_mark(stack))
        elif name == "DICT":
            flat = _from_mark(stack)
            stack.append({})
            _set(stack[-1], flat)
        elif name in ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"):
            parts = _from_mark(stack) if name == "TUPLE" else [stack.pop() for _ in range(int(name[-1]))][::-1]
            stack.append(tuple(parts))
        elif name == "FROZENSET":
            stack.append(Thing("frozenset", (_from_mark(stack),)))
        elif name == "GLOBAL":
            stack.append(Named(str(arg).replace(" ", ".")))
        elif name == "STACK_GLOBAL":
            last, module = stack.pop(), stack.pop()
            stack.append(Named(f"{module}.{last}"))
        elif name in ("REDUCE", "NEWOBJ"):
            args, function = stack.pop(), stack.pop()
            stack.append(_described(function, args))
        elif name == "NEWOBJ_EX":
            keywords, args, function = stack.pop(), stack.pop(), stack.pop()
            stack.append(_described(function, (*args, keywords)))
        elif name == "INST":
            stack.append(_described(Named(str(arg).replace(" ", ".")), tuple(_from_mark(stack))))
        elif name == "OBJ":
            function, *rest = _from_mark(stack)
            stack.append(_described(function, tuple(rest)))
        elif name == "BUILD":
            state = stack.pop()
            if isinstance(stack[-1], Thing):
                stack[-1].state = state
        elif name in ("BINPERSID", "PERSID"):
            told = _storage(stack.pop() if name == "BINPERSID" else arg)
            if isinstance(told, Storage) and storages.setdefault(told.key, told) != told:
                raise Unreadable(f"storage {told.key} is described in two ways")
            stack.append(told)
        else:
            raise Unreadable(f"it uses `{name}`, which no checkpoint needs")
    raise Unreadable("it is cut short")


def _from_mark(stack: list[Any]) -> list[Any]:
    at = len(stack) - 1 - next(i for i, item in enumerate(reversed(stack)) if item is MARK)
    found = stack[at + 1 :]
    del stack[at:]
    return found


def _list_of(target: Any) -> list[Any]:
    if isinstance(target, Thing):
        return target.items
    if isinstance(target, list):
        return target
    raise Unreadable(f"it appends to a {type(target).__name__}")


def _set(target: Any, flat: list[Any]) -> None:
    for key, value in zip(flat[::2], flat[1::2], strict=True):
        if isinstance(target, Thing):
            target.items.append((key, value))
        elif isinstance(target, dict):
            target[key] = value
        else:
            raise Unreadable(f"it sets an item of a {type(target).__name__}")


def _described(function: Any, args: Any) -> Any:
    """What calling `function` stands for: data for the few names that data is made with, otherwise a description."""
    if not isinstance(args, tuple):
        raise Unreadable("it calls something with no list of arguments")
    if not isinstance(function, Named):
        return Thing("?", args)
    name = function.name
    if name in ("collections.OrderedDict", "collections.defaultdict"):
        pairs = args[0] if args and isinstance(args[0], list | tuple) else ()
        return {pair[0]: pair[1] for pair in pairs}
    if name == "torch._utils._rebuild_tensor_v2" or name == "torch._utils._rebuild_tensor":
        return _tensor_at(*args[:4])
    if name == "torch._utils._rebuild_tensor_v3":
        return _tensor_at(args[0], args[1], args[2], args[3], args[6].name)
    if name in ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"):
        return args[0]
    if name == "torch._tensor._rebuild_from_type_v2":
        return _described(args[0], args[2])
    if name in ("torch.Size", "builtins.tuple", "__builtin__.tuple"):
        return tuple(args[0]) if args else ()
    if name == "_codecs.encode":  # how Python 2's bytes are written
        return args[0].encode(args[1]) if args[1] in ("latin1", "latin-1") else Thing(name, args)
    return Thing(name, args)


def _tensor_at(storage: Any, offset: Any, shape: Any, stride: Any, dtype: str = "") -> TensorAt:
    numbers = (offset, *shape, *stride)
    if not isinstance(storage, Storage) or not all(type(n) is int and n >= 0 for n in numbers):
        raise Unreadable("a tensor is described by something else than whole numbers")
    last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    if 0 not in shape and last >= storage.count and not dtype:
        raise Unreadable(f"a tensor of shape {tuple(shape)} reaches beyond its {storage.count} numbers")
    return TensorAt(storage, offset, tuple(shape), tuple(stride), dtype)


def _storage(told: Any) -> Any:
    if isinstance(told, tuple) and len(told) >= 5 and told[0] == "storage" and isinstance(told[1], Named):
        if type(told[4]) is not int or told[4] < 0 or (len(told) > 5 and told[5] is not None):
            raise Unreadable("a storage is described in a way that torch left in 2017")
        return Storage(told[1].name.rsplit(".", 1)[-1], str(told[2]), told[4])
    return Thing("persistent", (told,))


_ARRAYS = ("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct")
_SCALARS = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
_BUFFERS = ("numpy.core.numeric._frombuffer", "numpy._core.numeric._frombuffer")
_NUMBERS = frozenset(f"{kind}{size}" for kind in "iuf" for size in (1, 2, 4, 8)) | {"b1"}


def as_array(thing: Thing) -> np.ndarray[Any, Any] | None:
    """The NumPy array or number that was described, None where it is none or is not made of numbers."""
    if thing.name in _ARRAYS and isinstance(thing.state, tuple) and len(thing.state) == 5:
        _, shape, kind, fortran, data = thing.state
    elif thing.name in _SCALARS and len(thing.args) == 2:
        shape, kind, fortran, data = (), thing.args[0], False, thing.args[1]
    elif thing.name in _BUFFERS and len(thing.args) == 4:
        data, kind, shape, fortran = *thing.args[:3], thing.args[3] == "F"
    elif thing.name == "numpy.ndarray" and len(thing.args) == 3:  # as `detectron2.write` puts it
        shape, kind, data, fortran = *thing.args, False
        data = data.args[0] if isinstance(data, Thing) and data.name == "builtins.bytearray" and data.args else data
    else:
        return None
    dtype = _dtype(kind)
    if isinstance(data, str):
        data = data.encode("latin1")
    if dtype is None or not isinstance(data, bytes | bytearray) or not all(type(n) is int and n >= 0 for n in shape):
        return None
    found = np.frombuffer(data, dtype)
    return found.reshape(shape, order="F" if fortran else "C") if found.size == np.prod(shape, dtype=int) else None


def _dtype(kind: Any) -> np.dtype[Any] | None:
    if isinstance(kind, str) and kind[:1] in ("<", ">", "|") and kind[1:] in _NUMBERS:
        return np.dtype(kind)
    if not (isinstance(kind, Thing) and kind.name == "numpy.dtype" and kind.args and kind.args[0] in _NUMBERS):
        return None
    order = kind.state[1] if isinstance(kind.state, tuple) and len(kind.state) > 1 else "<"
    return np.dtype(f"{'>' if order == '>' else '<'}{kind.args[0]}")
