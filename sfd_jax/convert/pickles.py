"""Read a pickle as data: nothing that it names is imported, and nothing is called.

A pickle is a program for a small stack machine, and can have any function called by name. This is
such a machine without the dangerous part. The opcodes are decoded by the standard library's
`pickletools.genops`, which checks every length against the bytes that remain. A name becomes a `Name`, and
calling it makes a `Record` of name, arguments and state; a short table lists the calls that are read
as plain data (dicts, paths, NumPy arrays). Memory is counted in a `Budget` before it is allocated.

Although recording is harmless, a file that would run code in other programs is refused, and the message gives
the name it asks for:
- names of the standard library are refused unless listed: os.system, builtins.eval, subprocess.Popen;
- calls into torch, numpy and omegaconf are refused unless listed: torch.hub.load, numpy.load;
- calls of other packages are recorded where the name is written like a class (train.TrainConfig), and
  refused where it is written like a function (joblib.load).
A record beside the weights is left out of a conversion, with a note.
"""

import pickletools
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, BinaryIO

import numpy as np

from sfd_jax.budget import Budget
from sfd_jax.convert.lazy_array import LazyArray, checked_shape
from sfd_jax.errors import SfdError

MAX_DEPTH = 200  # of nested containers
_MAX_BITS = 1024  # of an integer; Python refuses to print those of more than 14,000
# Bytes counted for a container, or for an entry of a dict or of the memo. Measured.
_OBJECT = 80


class Name:
    """The full name of a class or function in a pickle; it is not looked up."""

    def __init__(self, name: str):
        self.name = name

    def __repr__(self):
        return f"<{self.name}>"


class Record(Name):
    """An object that was not built: its class's name, arguments and state."""

    def __init__(self, name: str, args: tuple = ()):
        super().__init__(name)
        self.args, self.state = args, None
        self.items: dict = {}  # if the class extends dict
        self.entries: list = []  # if it extends list or set


class _Set(list):
    """Elements of a set, as a list: hashing objects from a file could take exponential time."""


def unpickle(
    stream: BinaryIO,
    budget: Budget,
    builders: Mapping[str, Callable] = {},
    persistent: Callable[[Any], Any] | None = None,
) -> Any:
    """Read one pickle of any protocol; leave the stream at its end.

    Args:
      stream: binary file whose `read` never allocates more than the file holds.
      budget: memory that the result may take.
      builders: name -> function of the recorded arguments, for calls that become more than a `Record`.
      persistent: resolves persistent ids.

    Returns:
      The tree of dicts, lists, tuples, scalars, `Name`s, `Record`s and results of the builders.

    Raises:
      SfdError: a refused name, or more than the budget.
      Exception: of many kinds, where the pickle is damaged.
    """
    builders = _BUILDERS | builders
    stack: list[Any] = []
    marks: list[list[Any]] = []
    memo: dict[int, Any] = {}

    def since_mark() -> list[Any]:
        nonlocal stack
        top, stack = stack, marks.pop()
        return top

    def popped(count: int) -> list[Any]:
        if len(stack) < count:
            raise ValueError("missing operands")
        top = stack[-count:]
        del stack[-count:]
        return top

    def call(function: Any, args: Any, new: bool = False) -> Any:
        if not isinstance(function, Name) or isinstance(function, Record) or not isinstance(args, tuple):
            raise ValueError("a call of something that is not a function")
        # Counted, since a call may copy its arguments, and one opcode can repeat it.
        budget.take(_OBJECT * (1 + len(args)))
        budget.take(sum(_copied(argument) for argument in args))
        if function.name in builders:
            return builders[function.name](*args)
        if function.name == "torch._tensor._rebuild_from_type_v2":  # a tensor of a subclass, and its attributes
            return call(*args[:1], args[2])
        if function.name == "copyreg._reconstructor" and args:  # an object under protocols 0 and 1
            record = Record(args[0].name)
            record.items = dict(args[2]) if isinstance(args[2], dict) else {}
            return record
        if function.name == "copyreg.__newobj__":
            return call(args[0], args[1:], new=True)
        if not new and not _may_be_called(function.name):
            raise refusal(budget.path, function.name)
        return Record(function.name, args)

    def name(module: str, attribute: str) -> Name:
        budget.take(_OBJECT + len(module) + len(attribute))
        if len(module) + len(attribute) > 500:
            raise ValueError("a name that is too long")
        module = {"__builtin__": "builtins", "copy_reg": "copyreg"}.get(module, module)
        full = f"{module}.{attribute}"
        if not _may_be_named(full):
            raise refusal(budget.path, full)
        return Name(full)

    for opcode, value, _ in pickletools.genops(stream):
        code = opcode.name
        if code in _VALUES:
            if isinstance(value, int) and value.bit_length() > _MAX_BITS:
                raise ValueError(f"an integer of {value.bit_length():,} bits")
            budget.take(8 + sys.getsizeof(value))
            stack.append(value)
        elif code in ("BINPUT", "LONG_BINPUT", "PUT", "MEMOIZE"):
            budget.take(_OBJECT)
            memo[len(memo) if code == "MEMOIZE" else value] = stack[-1]
        elif code in ("BINGET", "LONG_BINGET", "GET"):
            budget.take(8)
            stack.append(memo[value])
        elif code in _CONSTANTS:
            budget.take(8)
            stack.append(_CONSTANTS[code])
        elif code in _EMPTY:
            budget.take(_OBJECT)
            stack.append(_EMPTY[code]())
        elif code == "MARK":
            budget.take(_OBJECT)
            marks.append(stack)
            stack = []
        elif code in ("TUPLE1", "TUPLE2", "TUPLE3"):
            budget.take(_OBJECT)
            stack.append(tuple(popped(int(code[-1]))))
        elif code in ("TUPLE", "LIST", "FROZENSET"):
            budget.take(_OBJECT)
            values = since_mark()
            stack.append({"TUPLE": tuple, "LIST": list, "FROZENSET": _Set}[code](values))
        elif code in ("DICT", "SETITEM", "SETITEMS"):
            pairs = popped(2) if code == "SETITEM" else since_mark()
            if code == "DICT":
                stack.append({})
            _put(stack[-1], pairs, budget)
        elif code in ("APPEND", "APPENDS", "ADDITEMS"):
            values = popped(1) if code == "APPEND" else since_mark()
            _extend(stack[-1], values)
        elif code == "GLOBAL":
            stack.append(name(*value.split(" ", 1)))
        elif code == "STACK_GLOBAL":
            module, attribute = popped(2)
            if not isinstance(module, str) or not isinstance(attribute, str):
                raise ValueError("a name that is not text")
            stack.append(name(module, attribute))
        elif code in ("REDUCE", "NEWOBJ", "NEWOBJ_EX"):
            function, args, *_ = popped(3 if code == "NEWOBJ_EX" else 2)
            stack.append(call(function, args, new=code != "REDUCE"))
        elif code == "INST":
            args = tuple(since_mark())
            stack.append(call(name(*value.split(" ", 1)), args))
        elif code == "OBJ":
            function, *args = since_mark()
            stack.append(call(function, tuple(args)))
        elif code == "BUILD":
            state, target = stack.pop(), stack[-1]
            if isinstance(target, Record):
                target.state = state
            elif not isinstance(target, (dict, list, LazyArray)):  # whose attributes are left out
                raise ValueError("a state for an object that cannot have one")
        elif code in ("BINPERSID", "PERSID"):
            if persistent is None:
                raise ValueError("a persistent id")
            stack.append(persistent(stack.pop() if code == "BINPERSID" else value))
        elif code == "POP":
            if stack:
                stack.pop()
            else:
                since_mark()
        elif code == "POP_MARK":
            since_mark()
        elif code == "DUP":
            budget.take(8)
            stack.append(stack[-1])
        elif code == "STOP":
            return stack.pop()
        elif code not in ("PROTO", "FRAME"):  # extension codes, buffers outside the pickle
            raise ValueError(f"the opcode {code}")
    raise AssertionError("unreachable: genops ends with STOP")


def plain(tree: Any, budget: Budget) -> Any:
    """Turn records of plain data into that data, and check that the tree can be written out.

    OmegaConf nodes become their content, objects that extend dict or list become dicts and lists, namespaces
    become dicts, NumPy arrays `LazyArray`s. Printing, comparing or storing a tree follows every path in it,
    so a part with two places in it counts twice.

    Raises:
      SfdError: written out, it is larger than the budget.
      ValueError: deeper than MAX_DEPTH, or a part contains itself.
    """
    seen: dict[int, tuple[Any, int, int]] = {}  # object -> its result, size and height

    def walk(node: Any, depth: int) -> tuple[Any, int, int]:
        if depth > MAX_DEPTH:
            raise ValueError(f"containers nested more than {MAX_DEPTH} deep, or in themselves")
        if not isinstance(node, (dict, list, tuple, Name)):
            return node, 16 + (len(node) if isinstance(node, (str, bytes)) else 0), 0
        if id(node) in seen:
            if depth + seen[id(node)][2] > MAX_DEPTH:
                raise ValueError(f"containers nested more than {MAX_DEPTH} deep")
            return seen[id(node)]
        size, height, inner = 16, 0, _inside(node)
        if inner is not node:
            result, size, height = walk(inner, depth + 1)
        elif isinstance(inner, (dict, list, tuple)):
            children = []
            for child in inner.values() if isinstance(inner, dict) else inner:
                result, child_size, child_height = walk(child, depth + 1)
                children.append(result)
                size, height = size + child_size, max(height, child_height + 1)
                if size > budget.left:
                    budget.take(size)
            if isinstance(inner, dict):
                size += sum(16 + len(key) if isinstance(key, (str, bytes)) else 16 for key in inner)
                result = dict(zip(inner, children, strict=True))
            elif isinstance(inner, _Set):
                result = set(children) if all(_hashes_quickly(child) for child in children) else children
            else:
                result = type(inner)(children)
        else:
            result = inner
        seen[id(node)] = result, size, height
        return seen[id(node)]

    result, size, _ = walk(tree, 0)
    budget.take(size)
    return result


def left_out(tree: Any) -> list[str]:
    """Return a note for each class whose objects in a tree are not read as data."""
    found: dict[str, str] = {}

    def walk(node, where):
        if isinstance(node, Name):
            found.setdefault(node.name, where)
        elif isinstance(node, (dict, list, tuple)):
            for key, value in node.items() if isinstance(node, dict) else enumerate(node):
                walk(value, f"{where}.{key}" if where else str(key))

    walk(tree, "")
    return [f"left out: {where or 'the file'} is an object of {name}" for name, where in found.items()]


def refusal(path: Path, name: str) -> SfdError:
    """Return the error for a name that a file must not ask for."""
    return SfdError(
        f"refused: '{path}' asks for {name[:200]}, which is not on the list of harmless names; no code from a "
        "checkpoint is run, and nothing was loaded (if you trust the file, load it with torch and save only its state "
        "dict)"
    )


def _inside(node: Any) -> Any:
    """Return the container or value that a node is read as."""
    if not isinstance(node, Record):
        if isinstance(node, Name) and node.name in _TORCH_DTYPES:
            return node.name
        return node
    if node.name.endswith("._reconstruct") and isinstance(node.state, tuple):
        return _numpy_array(node)
    if isinstance(node.state, dict):
        if node.name.startswith("omegaconf."):
            return node.state.get("_content", node.state.get("_val", Record(node.name)))
        if node.name in ("argparse.Namespace", "types.SimpleNamespace"):
            return node.state
    return node.items or node.entries or node


def _put(target: Any, pairs: list[Any], budget: Budget) -> None:
    target = target.items if isinstance(target, Record) else target
    if not isinstance(target, dict) or len(pairs) % 2:
        raise ValueError("entries for something that is not a dict")
    budget.take(_OBJECT * (1 + len(pairs) // 2))
    for key, value in zip(pairs[::2], pairs[1::2], strict=True):
        _put_one(target, key, value)


def _put_one(target: dict, key: Any, value: Any) -> None:
    """Set an entry; a key that is not safe to hash is replaced by text."""
    if not _hashes_quickly(key):
        short = isinstance(key, tuple) and len(key) <= 8
        if isinstance(key, Name):
            key = key.name
        elif isinstance(key, int) or short and all(_hashes_quickly(k) and len(str(k)) < 200 for k in key):
            key = repr(key)
        else:
            key = f"<{type(key).__name__}>"
        if key in target:
            key = f"{key} #{len(target)}"
    target[key] = value


def _hashes_quickly(value: Any) -> bool:
    # A tuple of tuples takes exponential time, and integers beyond 61 bits can be made to share one hash.
    return isinstance(value, (str, bytes, float, type(None))) or isinstance(value, int) and abs(value) < 2**60


def _extend(target: Any, values: list[Any]) -> None:
    target = target.entries if isinstance(target, Record) else target
    if not isinstance(target, list):
        raise ValueError("entries for something that is not a list")
    target.extend(values)


def _copied(argument: Any) -> int:
    if isinstance(argument, (str, bytes, bytearray)):
        return 4 * len(argument)
    return _OBJECT * len(argument) if isinstance(argument, (list, tuple, dict)) else 0


# --- Names -------------------------------------------------------------------------------------------


def _table(names: dict[str, str]) -> frozenset[str]:
    return frozenset(f"{module}.{name}" for module, all_names in names.items() for name in all_names.split())


_TORCH_DTYPES = _table(
    {
        "torch": "float16 float32 float64 bfloat16 half float double int8 int16 int32 int64 short int long uint8 "
        "uint16 uint32 uint64 bool complex32 complex64 complex128 cfloat cdouble qint8 quint8 qint32 quint4x2 quint2x4 "
        "float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz float8_e8m0fnu float4_e2m1fn_x2",
    }
)

# Packages that are commonly installed: only listed names in them are harmless.
_LISTED = {"torch", "numpy", "omegaconf", "sfd_jax"}


def _may_be_named(name: str) -> bool:
    if name in _HARMLESS:
        return True
    package = name.split(".")[0]
    # Functions of this name make sparse, quantised and nested tensors, which are not plain numbers.
    return package not in sys.stdlib_module_names and not name.startswith("torch._utils._rebuild_")


def _may_be_called(name: str) -> bool:
    return name in _HARMLESS or (
        name.split(".")[0] not in _LISTED and name.rpartition(".")[2].lstrip("_")[:1].isupper()
    )


# --- Calls that are read as data ---------------------------------------------------------------------


def _numpy_dtype(record: Any) -> np.dtype | None:
    """Return the dtype of a record where it is one of plain numbers or text, else None."""
    if not isinstance(record, Record) or record.name != "numpy.dtype":
        return None
    match = re.fullmatch(r"[<>|=]?([biufcSU]\d{1,5})", str(record.args[0]) if record.args else "")
    order = record.state[1] if isinstance(record.state, tuple) and len(record.state) > 1 else "<"
    if match is None or order not in ("<", ">", "|", "="):
        return None
    return np.dtype(order.replace("|", "") + match[1])


def _numpy_scalar(dtype: Any, data: Any = None, *_) -> Any:
    if (kind := _numpy_dtype(dtype)) is None:
        return Record("numpy scalar")
    if not isinstance(data, bytes) or len(data) != kind.itemsize:
        raise ValueError("a scalar of the wrong size")
    return np.frombuffer(data, kind)[0].item() if data else ""


def _numpy_buffer(data: Any, dtype: Any, shape: Any, order: Any = "C", *_) -> Any:
    """Return an array whose bytes are in the pickle."""
    if (kind := _numpy_dtype(dtype)) is None:
        return Record("numpy.ndarray")
    shape, size = checked_shape(shape, kind)
    if not isinstance(data, (bytes, bytearray)) or len(data) != size:
        raise ValueError("an array of the wrong size")
    return LazyArray(shape, kind, lambda: np.ndarray(shape, kind, data, order="F" if order == "F" else "C"))


def _numpy_array(record: Record) -> Any:
    _, shape, dtype, fortran, data = record.state
    return _numpy_buffer(data, dtype, shape, "F" if fortran is True else "C")


def _dict(*args: Any) -> dict:
    result: dict = {}
    given = next((a for a in args if isinstance(a, (dict, list))), ())
    for key, value in given.items() if isinstance(given, dict) else given:
        _put_one(result, key, value)
    return result


def _entries(kind: type) -> Callable:
    def build(entries: Any = (), *_):
        return kind(entries) if isinstance(entries, (list, tuple)) else Record(f"builtins.{kind.__name__}")

    return build


def _text(join: str = ":") -> Callable:
    return lambda *args: join.join(str(a) for a in args if isinstance(a, (str, int)))


def _bytes(data: Any = b"", encoding: Any = "", *_) -> Any:
    if isinstance(data, str) and encoding in ("latin1", "latin-1"):
        return data.encode("latin-1")
    return bytes(data) if isinstance(data, (bytes, bytearray)) else Record("builtins.bytes")


_BUILDERS: dict[str, Callable] = {
    "collections.OrderedDict": _dict,
    "collections.defaultdict": _dict,
    "collections.Counter": _dict,
    "builtins.dict": _dict,
    "collections.deque": _entries(list),
    "builtins.list": _entries(list),
    "builtins.tuple": _entries(tuple),
    "builtins.set": _entries(_Set),
    "builtins.frozenset": _entries(_Set),
    "builtins.bytes": _bytes,
    "builtins.bytearray": _bytes,
    "_codecs.encode": _bytes,  # how Python 3 stores bytes for Python 2
    "torch.Size": _entries(tuple),
    "torch.device": _text(),
    "torch.torch_version.TorchVersion": _text(),
    "torch.serialization._get_layout": _text(),
    "fractions.Fraction": _text("/"),
    "decimal.Decimal": _text(),
    "numpy.core.numeric._frombuffer": _numpy_buffer,
    "numpy._core.numeric._frombuffer": _numpy_buffer,
    "numpy.core.multiarray.scalar": _numpy_scalar,
    "numpy._core.multiarray.scalar": _numpy_scalar,
} | {
    f"{module}.{name}": (lambda *parts, kind=PureWindowsPath if "Windows" in name else PurePosixPath: str(kind(*parts)))
    for module in ("pathlib", "pathlib._local")
    for name in ("Path", "PurePath", "PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")
}

# Types and plain constructors that training scripts leave in their checkpoints; no functions with side effects.
_HARMLESS = (
    _TORCH_DTYPES
    | _BUILDERS.keys()
    | _table(
        {
            "builtins": "int float complex bool str long unicode object slice range type Ellipsis NotImplemented "
            "Exception ValueError print",
            "typing": "Any Union Optional Dict List Tuple Callable",
            "collections": "ChainMap UserDict UserList",
            "copyreg": "_reconstructor __newobj__",
            "argparse": "Namespace",
            "types": "SimpleNamespace",
            "functools": "partial",
            "datetime": "date time datetime timedelta timezone",
            "uuid": "UUID SafeUUID",
            "enum": "Enum IntEnum Flag IntFlag",
            "random": "Random",
            "re": "_compile",
            "time": "struct_time",
            "zoneinfo": "ZoneInfo ZoneInfo._unpickle",
            "string": "Template",
            "logging": "Logger getLogger",
            "numpy": "dtype ndarray bool_ float16 float32 float64 int8 int16 int32 int64 uint8 uint16 uint32 uint64 "
            "str_",
            "numpy.core.multiarray": "_reconstruct",
            "numpy._core.multiarray": "_reconstruct",
            "numpy.random._pickle": "__randomstate_ctor __generator_ctor __bit_generator_ctor",
            "numpy.random.bit_generator": "__pyx_unpickle_SeedSequence",
            "torch": "Generator",
            "torch.nn.parameter": "Parameter Buffer",
            "torch._utils": "_rebuild_tensor _rebuild_tensor_v2 _rebuild_tensor_v3 _rebuild_parameter "
            "_rebuild_parameter_with_state",
            "torch._tensor": "_rebuild_from_type_v2",
            "omegaconf.dictconfig": "DictConfig",
            "omegaconf.listconfig": "ListConfig",
            "omegaconf.base": "ContainerMetadata Metadata SCMode",
            "omegaconf.nodes": "AnyNode StringNode IntegerNode FloatNode BooleanNode EnumNode BytesNode PathNode",
        }
    )
)

# Opcodes that push their own argument: a number or text.
_VALUES = frozenset(
    opcode.name
    for opcode in pickletools.opcodes
    if opcode.arg and opcode.stack_after and opcode.stack_after[0] is not pickletools.anyobject
)
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_EMPTY = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": _Set}
