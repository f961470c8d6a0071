"""Read from a compiled program's text what no API provides: the traffic between chips, and what it overlaps with.

XLA prints a program as computations that call each other. Every collective is counted as often as it is executed,
e.g. once per layer in a scan over layers. Only loops that run until a condition on the data holds (an adaptive
solver) have no known length: they are counted once, and named.

The text is that of `jax.stages.Compiled.as_text`, after all optimisation. Its format is not stable: `tests/pod` has
examples with results known by hand, and one real compiled program.
"""

import collections
import dataclasses
import math
import re

COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line: `%name = shape opcode(operands), attributes`."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    rest: str  # what follows the operands
    argument: str  # the text between the parentheses: the value of a constant, the number of a parameter

    def attribute(self, name: str) -> str | None:
        """Return the value of `name=value` if it is a word, or of `name={...}` without braces."""
        found = re.search(rf"\b{name}=(?:\{{([^{{}}]*)\}}|%?([\w.\-]+))", self.rest)
        return found and (found.group(2) or found.group(1))


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Data sent between devices in one run of a program.

    Attributes:
      sent: kind of collective -> bytes of its result on one device, over all its executions.
      operations: kind of collective -> number of executions.
      unknown_loops: names of loops of unknown length, whose bodies are counted once.
    """

    sent: dict[str, int]
    operations: dict[str, int]
    unknown_loops: tuple[str, ...]


def read_traffic(text: str) -> Traffic:
    """Count a compiled program's collectives on one device.

    Args:
      text: from `Compiled.as_text()`.
    """
    computations, entry = parse(text)
    times, unknown = executions(computations, entry)
    sent, operations = collections.Counter(), collections.Counter()
    started = _channels_started(computations)
    for name, instructions in computations.items():
        if not times[name]:
            continue
        shapes = {i.name: i.shape for i in instructions}
        scattered = _is_reduce_scatter(instructions)
        starts = _has_call(instructions, "AsyncCollectiveStart")
        for i in instructions:
            kind = i.opcode.removesuffix("-start")
            if kind not in COLLECTIVES or (i.attribute("channel_id") in started and not starts):
                continue
            if kind == "all-reduce" and scattered:
                kind, size = "reduce-scatter", array_bytes(instructions[-1].shape)
            else:
                size = _result_bytes(i, shapes)
            sent[kind] += times[name] * size
            operations[kind] += times[name]
    return Traffic(dict(sent), dict(operations), tuple(unknown))


@dataclasses.dataclass(frozen=True)
class Schedule:
    """What a device does in one run, by the order of the compiled program: an estimate, not a time.

    Attributes:
      cycles: of the operations, as the compiler estimates them.
      overlapped: bytes of collectives that start before other operations and end after them.
      waited: bytes of the others, for which the device waits.
      seconds: of the operations, and of the collectives where no operation covers them.
    """

    cycles: int
    overlapped: int
    waited: int
    seconds: float


def read_schedule(text: str, clock: float, bandwidth: float) -> Schedule:
    """Estimate from a scheduled program how long it takes.

    A collective takes its result's bytes at `bandwidth`, less the cycles of the operations between its start and its
    end. Other transfers (to fast memory, to the host) count as hidden.

    Args:
      text: from `Compiled.as_text()` for a TPU.
      clock: cycles a second.
      bandwidth: bytes a second of one chip to others.
    """
    computations, entry = parse(text)
    times, _ = executions(computations, entry)
    bodies = {i.attribute("calls") for each in computations.values() for i in each if i.opcode in _WITH_BODY}
    sent, total, seconds = {"overlapped": 0, "waited": 0}, 0, 0.0
    for name, instructions in computations.items():
        if not times[name] or name in bodies:
            continue
        cycles, running, ended = 0, {}, []  # running: name or channel -> bytes, cycles at its start
        for i in instructions:
            body = computations.get(i.attribute("calls"), []) if i.opcode in _WITH_BODY else []
            size, channel = _sent(i, instructions, body)
            if size and (i.opcode.endswith("-start") or _has_call(body, "AsyncCollectiveStart")):
                running[i.name if i.opcode.endswith("-start") else channel] = size, cycles
            elif size and channel not in running:
                sent["waited"] += times[name] * size
                seconds += times[name] * size / bandwidth
            elif (i.opcode.endswith("-done") and (key := i.operands[0]) in running) or (
                _has_call(body, "AsyncCollectiveDone") and (key := channel) in running
            ):
                ended.append((*running.pop(key), cycles))
            found = re.search(r'"estimated_cycles":"(\d+)"', i.rest)
            cycles += int(found.group(1)) if found else 0
        for size, first, last in [*ended, *((*each, cycles) for each in running.values())]:
            seconds += times[name] * max(0.0, size / bandwidth - (last - first) / clock)
            sent["overlapped" if last > first else "waited"] += times[name] * size
        total += times[name] * cycles
    return Schedule(total, **sent, seconds=total / clock + seconds)


_WITH_BODY = ("fusion", "async-start")


def _sent(i: Instruction, home: list[Instruction], body: list[Instruction]) -> tuple[int, str | None]:
    """Return the bytes and the channel of the collectives that an instruction is or contains; 0 for none."""
    scope = body or home
    found = [each for each in body or [i] if each.opcode.removesuffix("-start") in COLLECTIVES]
    if not found:
        return 0, None
    channel = found[0].attribute("channel_id")
    if body and _is_reduce_scatter(body):
        return array_bytes(body[-1].shape), channel
    shapes = {each.name: each.shape for each in scope}
    return sum(_result_bytes(each, shapes) for each in found), channel


def parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """Split a program's text into its computations.

    Returns:
      Name -> instructions in order, and the name of the entry computation.
    """
    computations, current, entry = {}, None, None
    for line in text.splitlines():
        if head := _HEAD.match(line):
            current = computations[head.group(2)] = []
            entry = head.group(2) if head.group(1) else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and (instruction := _instruction(line)):
            current.append(instruction)
    return computations, entry


_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_LINE = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")


def _instruction(line: str) -> Instruction | None:
    found = _LINE.match(line)
    if not found:
        return None
    name, rest = found.groups()
    end = _closing(rest) if rest.startswith("(") else rest.find(" ")
    shape, rest = rest[: end + 1].strip(), rest[end + 1 :].lstrip()
    opcode, _, rest = rest.partition("(")
    end = _closing("(" + rest) - 1
    inside, rest = rest[:end], rest[end + 1 :]
    return Instruction(name, shape, opcode, tuple(re.findall(r"%([\w.\-]+)", inside)), rest, inside)


def _closing(text: str) -> int:
    """Return the index of the parenthesis that closes the first one."""
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return place
    return len(text)


def executions(computations: dict[str, list[Instruction]], entry: str) -> tuple[dict[str, int], list[str]]:
    """Return how often each computation runs when the entry runs once, and the loops of unknown length.

    All branches of a conditional count, although only one runs.
    """
    times, unknown = collections.Counter(), []
    order = _callers_first(computations, entry)
    times[entry] = 1
    for name in order:
        for i in computations[name]:
            if i.opcode == "while":
                trips = trip_count(i, computations, name)
                if trips is None:
                    unknown.append(i.name)
                times[i.attribute("body")] += times[name] * (1 if trips is None else trips)
                times[i.attribute("condition")] += times[name] * (1 if trips is None else trips + 1)
            else:
                for callee in _callees(i):
                    times[callee] += times[name]
    return times, unknown


def _callees(i: Instruction) -> list[str]:
    """Return the computations that an instruction runs once; the operator of a reduction does not count."""
    if i.opcode == "while":
        return [i.attribute("body"), i.attribute("condition")]
    names = []
    for attribute in ("calls", "branch_computations", "true_computation", "false_computation"):
        value = i.attribute(attribute)
        names += [name.strip().lstrip("%") for name in value.split(",")] if value else []
    if i.opcode in ("call", "async-start"):
        names += [name for name in (i.attribute("to_apply"), i.attribute("called_computation")) if name]
    return names


def _callers_first(computations, entry: str) -> list[str]:
    order, seen = [], set()

    def visit(name):
        if name in seen:
            return
        seen.add(name)
        for i in computations[name]:
            for callee in _callees(i):
                visit(callee)
        order.append(name)

    visit(entry)
    return order[::-1]


def trip_count(loop: Instruction, computations: dict[str, list[Instruction]], home: str) -> int | None:
    """Return how often a `while` runs its body, or None if unknown.

    XLA states it if it knows; otherwise it follows from a condition `counter < constant` whose counter
    starts at a constant and grows by a constant.
    """
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.rest):
        return int(known.group(1))
    condition = computations[loop.attribute("condition")]
    body, before = computations[loop.attribute("body")], computations[home]
    root = _resolve(condition[-1].name, condition)
    if root.opcode == "fusion":  # the comparison alone, wrapped
        inner = computations[root.attribute("calls")]
        compare, outer = inner[-1], [_resolve(name, condition) for name in root.operands]
        sides = [_resolve(name, inner) for name in compare.operands]
        sides = [outer[int(side.argument)] if side.opcode == "parameter" else side for side in sides]
    else:
        compare, sides = root, [_resolve(name, condition) for name in root.operands]
    if compare.opcode != "compare" or len(sides) != 2 or sides[0].opcode != "get-tuple-element":
        return None
    index = int(sides[0].attribute("index"))
    first = _tuple_element(before, loop.operands[0], index)
    last = sides[1]
    if last.opcode == "get-tuple-element":  # the bound is an unchanged loop variable
        place = int(last.attribute("index"))
        carried = _tuple_element(body, body[-1].name, place)
        if carried is None or carried.opcode != "get-tuple-element" or int(carried.attribute("index")) != place:
            return None
        last = _tuple_element(before, loop.operands[0], place)
    if not (first and last and first.opcode == last.opcode == "constant"):
        return None
    step = _increment(body, index, computations)
    if step is None or step <= 0:
        return None
    begin, end = int(first.argument), int(last.argument) + (compare.attribute("direction") == "LE")
    return max(0, -(-(end - begin) // step)) if compare.attribute("direction") in ("LT", "LE") else None


def _increment(body: list[Instruction], index: int, computations) -> int | None:
    """Return the constant that a loop's body adds to its counter."""
    new = _tuple_element(body, body[-1].name, index)
    if new is None:
        return None
    scope, outer = body, None
    if new.opcode == "fusion":
        scope, outer = computations[new.attribute("calls")], [_resolve(name, body) for name in new.operands]
        new = _resolve(scope[-1].name, scope)
    if new.opcode != "add":
        return None
    sides = [_resolve(name, scope) for name in new.operands]
    if outer:
        sides = [outer[int(side.argument)] if side.opcode == "parameter" else side for side in sides]
    constants = [int(side.argument) for side in sides if side.opcode == "constant"]
    return constants[0] if len(constants) == 1 else None


def _tuple_element(instructions, name: str, index: int) -> Instruction | None:
    made = _resolve(name, instructions)
    if made.opcode != "tuple" or index >= len(made.operands):
        return None
    return _resolve(made.operands[index], instructions)


def _resolve(name: str, instructions) -> Instruction:
    """Return the instruction of a name, skipping copies and the like."""
    by_name = {i.name: i for i in instructions}
    found = by_name[name]
    while found.opcode in ("copy", "bitcast", "convert", "reshape", "copy-done", "copy-start", "opt-barrier"):
        found = by_name[found.operands[0]]
    return found


def _channels_started(computations) -> set[str]:
    """Return the channels of collectives that the TPU compiler spreads over several fusions.

    Such a collective occurs in the fusion that starts it, in those that overlap with it and in the one that
    waits for it, always with the same channel. It is one operation, counted where it starts.
    """
    channels = set()
    for instructions in computations.values():
        if _has_call(instructions, "AsyncCollectiveStart"):
            channels |= {i.attribute("channel_id") for i in instructions if i.opcode in COLLECTIVES}
    return channels


def _has_call(instructions, target: str) -> bool:
    return any(i.opcode == "custom-call" and f'"{target}"' in i.rest for i in instructions)


def _is_reduce_scatter(instructions) -> bool:
    """Return whether a fusion is the TPU's reduce-scatter: an all-reduce and a slice of each of its arrays."""
    if [i.opcode for i in instructions].count("all-reduce") != 1:
        return False
    root = instructions[-1]
    kept = root.operands if root.opcode == "tuple" else [root.name]
    return all(_resolve(name, instructions).opcode == "dynamic-slice" for name in kept)


def _result_bytes(i: Instruction, shapes: dict[str, str]) -> int:
    """Return the bytes of a collective's result; that of -start also holds operands and flags."""
    if not i.opcode.endswith("-start"):
        return array_bytes(i.shape)
    inputs = sum(array_bytes(shapes[name]) for name in i.operands)
    if i.opcode == "all-gather-start":
        return array_bytes(i.shape) - inputs
    return inputs  # for reductions, permutations and exchanges, results are as large as operands


_ARRAY = re.compile(r"\b(pred|[a-z]+\d+(?:e\d+m\d+\w*)?)\[([\d,]*)\]")


def array_bytes(shape: str) -> int:
    """Return the bytes of an array's shape, or of all arrays in a tuple's, without padding."""
    total = 0
    for dtype, dims in _ARRAY.findall(shape):
        bits = 8 if dtype == "pred" else int(re.search(r"\d+", dtype).group())
        total += math.ceil(bits * math.prod(map(int, filter(None, dims.split(",")))) / 8)
    return total
