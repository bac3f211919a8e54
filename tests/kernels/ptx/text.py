"""A PTX file as text -> one entry: its parameters, registers, shared variables, labels and instructions (PTX ISA, 4 "Syntax", 5)."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

WIDTHS = {"pred": 1, "b16": 16, "u16": 16, "s16": 16, "f16": 16, "b32": 32, "u32": 32, "s32": 32, "f32": 32}
WIDTHS |= {"b64": 64, "u64": 64, "s64": 64, "f64": 64}
SIZES = {"b8": 1, "u8": 1, "s8": 1} | {name: width // 8 for name, width in WIDTHS.items() if width > 1}


class Fault(Exception):
    """What a PTX program must not do, or what this interpreter does not know."""


@dataclass(frozen=True)
class Register:
    name: str
    width: int  # bits; 1: a predicate
    index: int  # among those of its width


@dataclass(frozen=True)
class Literal:
    text: str


@dataclass(frozen=True)
class Special:
    """A register that the machine fills: %tid.x and its like."""

    name: str


@dataclass(frozen=True)
class Symbol:
    """A parameter, a shared variable or a label."""

    name: str


@dataclass(frozen=True)
class Negated:
    predicate: Register


@dataclass(frozen=True)
class Pair:
    """d|p: a result and a predicate."""

    first: Register
    second: Register


@dataclass(frozen=True)
class Vector:
    parts: tuple["Operand", ...]


@dataclass(frozen=True)
class Address:
    base: "Operand"
    offset: int


Operand = Register | Literal | Special | Symbol | Negated | Pair | Vector | Address


@dataclass(frozen=True)
class Instruction:
    line: int  # in the file, from 1
    text: str
    guard: Register | Negated | None
    name: str  # with all that follows its dots
    operands: tuple[Operand, ...]

    def fault(self, problem: object) -> Fault:
        return Fault(f"PTX line {self.line}, `{self.text}`: {problem}")


@dataclass
class Entry:
    name: str
    parameters: dict[str, int] = field(default_factory=dict)  # bytes of each, in order
    shared: dict[str, tuple[int, int]] = field(
        default_factory=dict
    )  # bytes and alignment; 0 bytes: what the launch gives
    registers: dict[str, Register] = field(default_factory=dict)
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)  # -> index of an instruction

    def count(self, width: int) -> int:
        return sum(register.width == width for register in self.registers.values())


def entries(source: str) -> list[str]:
    """Names of the kernels of a file."""
    return re.findall(r"^\s*(?:\.visible\s+)?\.entry\s+([\w$]+)", source, re.M)


def parse(source: str, name: str) -> Entry:
    """Raises: Fault, where a statement is none that is known."""
    lines = [line.partition("//")[0] for line in source.splitlines()]
    begins = re.compile(rf"\s*(\.visible\s+)?\.entry\s+{re.escape(name)}\b")
    starts = [index for index, line in enumerate(lines) if ".entry" in line and begins.match(line)]
    if len(starts) != 1:
        raise Fault(f"one .entry {name} wanted, {len(starts)} found")
    entry = Entry(name)
    for line in lines[: starts[0]]:
        if re.match(r"\s*\.extern\s+\.shared", line):
            _variable(entry, line.replace(".extern", "").strip(" \t;"))
    body = starts[0]
    while lines[body].strip() != "{":
        declared = re.search(r"\.param\s+(.*?)([\w$]+)(?:\[(\d+)\])?\s*,?\s*\)?$", lines[body].strip())
        if declared:
            kind = re.findall(r"\.(\w+)", declared[1])[0 if ".align" not in declared[1] or ".ptr" in declared[1] else 1]
            entry.parameters[declared[2]] = SIZES[kind] * int(declared[3] or 1)
        body += 1
    for number, statement in _statements(lines, body):
        _take(entry, number, statement)
    return entry


def _statements(lines: list[str], body: int) -> Iterator[tuple[int, str]]:
    """(line, statement without its semicolon) of a body, `{` on line `body`; inner braces are scopes of inline assembly."""
    depth, kept, began = 0, "", body
    for index in range(body, len(lines)):
        if not kept and re.match(r"\s*\.(loc|file)\b", lines[index]):
            continue
        for piece in re.findall(r"::|[;{}:]|[^;{}:]+", lines[index]):
            if piece == "{" and not kept:
                depth += 1
            elif piece == "}" and not kept:
                depth -= 1
                if not depth:
                    return
            elif piece == ";":
                yield began + 1, " ".join(kept.split())
                kept = ""
            elif piece == ":" and re.fullmatch(r"\s*\$[\w$]+\s*", kept):
                yield began + 1, kept.strip() + ":"
                kept = ""
            elif kept or piece.strip():
                began = began if kept else index
                kept += piece
        kept += " " if kept else ""
    raise Fault("the body of the entry does not end")


def _take(entry: Entry, number: int, statement: str) -> None:
    if statement.endswith(":"):
        entry.labels[statement[:-1]] = len(entry.instructions)
    elif statement.startswith(".reg"):
        kind, names = re.fullmatch(r"\.reg\s+\.(\w+)\s+(.*)", statement).groups()  # pyright: ignore[reportOptionalMemberAccess]
        if kind not in WIDTHS:
            raise Fault(f"PTX line {number}, `{statement}`: registers of .{kind} are not known")
        counts = {width: entry.count(width) for width in (1, 16, 32, 64)}
        for name in re.split(r"\s*,\s*", names):
            several = re.fullmatch(r"(%?[\w$]+)<(\d+)>", name)
            for each in [f"{several[1]}{i}" for i in range(int(several[2]))] if several else [name]:
                if each in entry.registers:
                    raise Fault(f"PTX line {number}: {each} is declared twice, in scopes that are not told apart here")
                entry.registers[each] = Register(each, WIDTHS[kind], counts[WIDTHS[kind]])
                counts[WIDTHS[kind]] += 1
    elif statement.startswith(".shared"):
        _variable(entry, statement)
    elif statement.startswith("."):
        if not statement.startswith(".pragma"):
            raise Fault(f"PTX line {number}, `{statement}`: the directive is not known")
    else:
        entry.instructions.append(_instruction(entry, number, statement))


def _variable(entry: Entry, statement: str) -> None:
    found = re.fullmatch(r"\.shared\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)(?:\[(\d*)\])?", statement)
    if found is None:
        raise Fault(f"`{statement}`: the shared variable is not understood")
    alignment, kind, name, count = found.groups()
    size = SIZES[kind] * (1 if count is None else int(count or 0))
    entry.shared[name] = (size, int(alignment or SIZES[kind]))


def _instruction(entry: Entry, number: int, statement: str) -> Instruction:
    found = re.fullmatch(r"(?:@(!?[%\w$]+)\s+)?([a-z][\w.:]*)(?:\s+(.*))?", statement)
    if found is None:
        raise Fault(f"PTX line {number}, `{statement}`: not an instruction")
    guard = None if found[1] is None else _operand(entry, number, found[1])
    assert guard is None or isinstance(guard, Register | Negated), statement
    operands = tuple(_operand(entry, number, text) for text in _split(found[3] or ""))
    return Instruction(number, statement, guard, found[2], operands)


def _split(text: str) -> list[str]:
    """At commas outside brackets and braces."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "[{(") - (character in "]})")
        if character == "," and not depth:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]


def _operand(entry: Entry, number: int, text: str) -> Operand:
    if text in entry.registers:
        return entry.registers[text]
    if text.startswith("!"):
        return Negated(_register(entry, number, text[1:]))
    if text.startswith("{"):
        return Vector(tuple(_operand(entry, number, part) for part in _split(text[1:-1])))
    if text.startswith("["):
        found = re.fullmatch(r"\[\s*([%\w$.]+?)\s*(?:\+\s*(-?\w+))?\s*\]", text)
        if found is None:
            raise Fault(f"PTX line {number}: the address {text} is not understood")
        return Address(_operand(entry, number, found[1]), int(found[2] or "0", 0))
    if "|" in text:
        first, second = text.split("|")
        return Pair(_register(entry, number, first.strip()), _register(entry, number, second.strip()))
    if re.fullmatch(r"%[a-z_]+(\.[xyz])?", text):
        return Special(text)
    if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?|0[fF][0-9a-fA-F]{8}|0[dD][0-9a-fA-F]{16}", text):
        return Literal(text)
    if re.fullmatch(r"[A-Za-z_$][\w$]*", text):
        return Symbol(text)
    raise Fault(f"PTX line {number}: the operand {text} is not understood")


def _register(entry: Entry, number: int, name: str) -> Register:
    if name not in entry.registers:
        raise Fault(f"PTX line {number}: {name} is not declared")
    return entry.registers[name]
