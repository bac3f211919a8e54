"""Instructions of the PTX interpreter, each by itself against values that the PTX ISA gives."""

import struct

import numpy as np
import pytest
from ptx.memory import Memory
from ptx.opcodes import TYPES
from ptx.running import GLOBAL
from ptx.running import run as run_program
from ptx.text import entries
from ptx_programs import HEADER, program

NAN, INF = float("nan"), float("inf")
TINY = 2.0**-149  # float32's smallest number above 0


def one(name: str, result: str, *sources: tuple[str, list], immediate: str = "") -> np.ndarray:
    """An instruction on up to 32 lanes of operands, given as (type, values), and an immediate after them."""
    memory, count = Memory(GLOBAL, 1 << 14), len(sources[0][1])
    letters = {2: "%h", 4: "%r", 8: "%rd1"}
    body, operands = "", []
    for index, (kind, values) in enumerate(sources):
        width = TYPES[kind].itemsize
        padded = np.resize(np.array(values).astype(TYPES[kind]), 32).view(f"u{width}")
        memory.place(f"operand {index}", padded.astype("u8"))
        register = f"{letters[width]}{index + 1}"
        body += f"add.s64 %rd15, %rd{index}, %rd9;\nld.global.b{8 * width} {register}, [%rd15];\n"
        operands.append(register)
    width = TYPES[result].itemsize
    target = {2: "%h7", 4: "%r7", 8: "%rd7"}[width]
    operands = ", ".join([target, *operands, *([immediate] if immediate else [])])
    body += f"{name} {operands};\nadd.s64 %rd15, %rd6, %rd9;\nst.global.b{8 * width} [%rd15], {target};\n"
    memory.place("result", 256)
    addresses = [memory.spans[f"operand {index}"][0] + GLOBAL for index in range(len(sources))]
    addresses += [GLOBAL + memory.spans["result"][0]] * (7 - len(addresses))
    run_program(program(body, 7), memory, [struct.pack("<Q", address) for address in addresses], 1, 32, seed=0)
    return memory.content("result").view("u8").astype(f"u{width}").view(TYPES[result])[:count]


def f32(*bits: int) -> list[float]:
    return np.array(bits, "u4").view("f4").tolist()


EXACT = {
    "bf16 to even": ("cvt.rn.bf16.f32", "b16", [("f32", f32(0x3F808000, 0x3F818000, 0x3F808001, 0x7F7FFFFF))],
                     [0x3F80, 0x3F82, 0x3F81, 0x7F80]),  # 1 + half a place: to even; the largest float: infinity
    "bf16 of what is no number": ("cvt.rn.bf16.f32", "b16", [("f32", [NAN, -INF, -0.0, 2.0**-133])], [0x7FFF, 0xFF80, 0x8000, 1]),
    "first operand above": ("cvt.rn.bf16x2.f32", "b32", [("f32", [1.0, NAN]), ("f32", [-2.0, 3.0])], [0x3F80C000, 0x7FFF4040]),
    "halves, relu": ("cvt.rn.relu.f16x2.f32", "b32", [("f32", [-1.0, 65520.0]), ("f32", [0.5, NAN])], [0x3800, 0x7C007FFF]),
    "half to even": ("cvt.rn.f16.f32", "b16", [("f32", [1 + 2.0**-11, 1 + 3 * 2.0**-11, 65519.0, 2.0**-25])],
                     [0x3C00, 0x3C02, 0x7BFF, 0]),
    "from bf16": ("cvt.f32.bf16", "f32", [("b16", [0x3F80, 0xFF80, 1])], [1.0, -INF, 2.0**-133]),
    "from half": ("cvt.f32.f16", "f32", [("b16", [0x3C01, 1])], [1 + 2.0**-10, 2.0**-24]),
    "to the even integer": ("cvt.rni.f32.f32", "f32", [("f32", [0.5, 1.5, -2.5])], [0.0, 2.0, -2.0]),
    "saturated": ("cvt.sat.f32.f32", "f32", [("f32", [-3.0, 0.25, 7.0, NAN])], [0.0, 0.25, 1.0, 0.0]),
    "float to integer": ("cvt.rzi.s32.f32", "s32", [("f32", [-1.9, 3e9, -3e9, NAN])], [-1, 2**31 - 1, -(2**31), 0]),
    "float to long": ("cvt.rni.s64.f32", "s64", [("f32", [2.5, 1e30, NAN])], [2, 2**63 - 1, -(2**63)]),
    "sign goes on": ("cvt.s64.s32", "s64", [("s32", [-5, 7])], [-5, 7]),
    "no sign goes on": ("cvt.u64.u32", "u64", [("u32", [2**32 - 1])], [2**32 - 1]),
    "low half": ("cvt.u32.u64", "u32", [("u64", [2**40 + 3])], [3]),
    "bytes": ("prmt.b32", "b32", [("b32", [0x44332211] * 3), ("b32", [0x88776655] * 3), ("b32", [0x7531, 0x3210, 0x0FB4])],
              [0x88664422, 0x44332211, 0x11FF0055]),  # f: the sign of byte 7, 0x88; b: of byte 3, 0x44
    "a & b | ~c": ("lop3.b32", "b32", [("b32", [0xF0F0]), ("b32", [0xFF00]), ("b32", [0xFFFF00FF])], [0xFF00], "0xD5"),
    "a ^ b ^ c": ("lop3.b32", "b32", [("b32", [0b1100]), ("b32", [0b1010]), ("b32", [0b1001])], [0b1111], "0x96"),
    "wide, signed": ("mul.wide.s32", "s64", [("s32", [-3, -(2**31)]), ("s32", [2**31 - 1, -(2**31)])], [-3 * (2**31 - 1), 2**62]),
    "wide, unsigned": ("mul.wide.u32", "u64", [("u32", [2**32 - 3]), ("u32", [2**32 - 1])], [(2**32 - 3) * (2**32 - 1)]),
    "high": ("mul.hi.s32", "s32", [("s32", [-3, 1 << 30]), ("s32", [5, 12])], [-1, 3]),
    "wide and more": ("mad.wide.s32", "s64", [("s32", [-2]), ("s32", [8]), ("s64", [2**40])], [2**40 - 16]),
    "low and more": ("mad.lo.s32", "s32", [("s32", [2**30]), ("s32", [4]), ("s32", [-7])], [-7]),
    "toward zero": ("div.s32", "s32", [("s32", [-7, 7, -8]), ("s32", [2, -2, 2])], [-3, -3, -4]),
    "counts beyond the width": ("shl.b32", "b32", [("b32", [3] * 3), ("u32", [31, 32, 2**31])], [2**31, 0, 0]),
    "signs from the left": ("shr.s32", "s32", [("s32", [-8] * 2), ("u32", [1, 99])], [-4, -1]),
    "zeros from the left": ("shr.u64", "u64", [("u64", [2**63] * 2), ("u32", [63, 64])], [1, 0]),
    "field": ("bfe.u32", "u32", [("u32", [0xABCD1234] * 3), ("u32", [8, 28, 40]), ("u32", [8, 9, 4])], [0x12, 0xA, 0]),
    "larger, or the number": ("max.f32", "f32", [("f32", [NAN, 1.0, -0.0, -INF]), ("f32", [2.0, NAN, 0.0, -1.0])], [2.0, 1.0, 0.0, -1.0]),
    "two NaNs": ("max.f32", "b32", [("f32", f32(0x7FC12345)), ("f32", f32(0xFFC00000))], [0x7FFFFFFF]),
    "NaN wins": ("max.NaN.f32", "b32", [("f32", [NAN]), ("f32", [1.0])], [0x7FFFFFFF]),
    "smaller zero": ("min.f32", "b32", [("f32", [-0.0, 0.0]), ("f32", [0.0, -0.0])], [0x80000000, 0x80000000]),
    "2^x": ("ex2.approx.f32", "f32", [("f32", [0.0, 3.0, -140.0, -INF, INF, -160.0])], [1.0, 8.0, 2.0**-140, 0.0, INF, 0.0]),
    "2^x, flushed": ("ex2.approx.ftz.f32", "f32", [("f32", [-140.0, -126.0, 130.0])], [0.0, 2.0**-126, INF]),
    "sum, flushed": ("add.ftz.f32", "b32", [("f32", [TINY, -TINY, 2.0**-126]), ("f32", [0.0, -0.0, -(2.0**-127)])],
                     [0, 0x80000000, 0x00800000]),
    "sum, cut": ("add.rz.f32", "f32", [("f32", [1.0, -1.0]), ("f32", [2.0**-24 * 3, -(2.0**-24) * 3])],
                 [1 + 2.0**-23, -1 - 2.0**-23]),
    "product once rounded": ("fma.rn.f32", "f32", [("f32", [1 + 2.0**-12]), ("f32", [1 - 2.0**-12]), ("f32", [-1.0])], [-(2.0**-24)]),
    # 2^-64 below the middle of two floats; rounded to float64 first it would be the middle, and go to the even one above.
    "just below the middle": ("fma.rn.f32", "f32", [("f32", [2.0**-12 * (1 + 2.0**-20)]), ("f32", [2.0**-12 * (1 - 2.0**-20)]),
                              ("f32", [1 + 2.0**-23])], [1 + 2.0**-23]),
    "down": ("fma.rm.f32", "f32", [("f32", [1.0, 1.0]), ("f32", [1.0, -1.0]), ("f32", [2.0**-30, -(2.0**-30)])], [1.0, -1 - 2.0**-23]),
    "double, once rounded": ("fma.rn.f64", "f64", [("f64", [1 + 2.0**-27]), ("f64", [1 - 2.0**-27]), ("f64", [-1.0])], [-(2.0**-54)]),
    "sign and size": ("copysign.f32", "f32", [("f32", [-0.0, 3.0]), ("f32", [2.0, -NAN])], [-2.0, NAN]),
    "chosen": ("selp.b32", "b32", [("b32", [1]), ("b32", [2])], [2], "!%p0"),
    "reciprocal": ("rcp.rn.f32", "f32", [("f32", [3.0, -0.0])], [float(np.float32(1) / np.float32(3)), -INF]),
}  # fmt: skip


@pytest.mark.parametrize("case", EXACT)
def test_against_known_values(case):
    name, result, sources, wanted, *immediate = EXACT[case]
    found = one(name, result, *sources, immediate=immediate[0] if immediate else "")
    wanted = np.array(wanted, TYPES[result])
    np.testing.assert_array_equal(found, wanted)
    if TYPES[result].kind == "f":
        assert (np.signbit(found) == np.signbit(wanted))[~np.isnan(wanted)].all()


COMPARED = {  # of 1 < 2, 2 < 1, 1 = 1, NaN
    "eq": (0, 0, 1, 0), "ne": (1, 1, 0, 0), "lt": (1, 0, 0, 0), "le": (1, 0, 1, 0), "gt": (0, 1, 0, 0), "ge": (0, 1, 1, 0),
    "equ": (0, 0, 1, 1), "neu": (1, 1, 0, 1), "ltu": (1, 0, 0, 1), "leu": (1, 0, 1, 1), "gtu": (0, 1, 0, 1), "geu": (0, 1, 1, 1),
    "num": (1, 1, 1, 0), "nan": (0, 0, 0, 1),
}  # fmt: skip


def comparison(name: str, kind: str, a: list, b: list, more: str = "") -> list[int]:
    memory = Memory(GLOBAL, 1 << 14)
    addresses = [memory.place("a", np.resize(np.array(a, TYPES[kind]), 32).view("u4"))]
    addresses += [memory.place("b", np.resize(np.array(b, TYPES[kind]), 32).view("u4")), memory.place("out", 128)]
    body = "".join(f"add.s64 %rd15, %rd{i}, %rd8;\nld.global.b32 %r{i + 1}, [%rd15];\n" for i in range(2)) + (
        f"setp.eq.u32 %p3, %r0, 0;\n{name}.{kind} %p1|%p2, %r1, %r2{more};\nselp.b32 %r3, 1, 0, %p1;\n"
        "@%p2 or.b32 %r3, %r3, 2;\nadd.s64 %rd15, %rd2, %rd8;\nst.global.b32 [%rd15], %r3;"
    )
    run_program(program(body, 3), memory, [struct.pack("<Q", address) for address in addresses], 1, 32, seed=0)
    return memory.content("out").view("i4")[: len(a)].tolist()


@pytest.mark.parametrize("name", COMPARED)
def test_comparisons_of_floats(name):
    """The second predicate is the opposite."""
    found = comparison(f"setp.{name}", "f32", [1.0, 2.0, 1.0, NAN], [2.0, 1.0, 1.0, 1.0])
    assert found == [1 if holds else 2 for holds in COMPARED[name]]


def test_other_comparisons():
    assert comparison("setp.lt", "s32", [-1, 1], [1, -1]) == [1, 2]
    assert comparison("setp.lt", "u32", [2**32 - 1, 1], [1, 2**32 - 1]) == [2, 1]
    assert comparison("setp.eq.ftz", "f32", [TINY], [-TINY]) == [1]
    assert comparison("setp.eq.and", "b32", [5, 5], [5, 5], ", %p3") == [1, 0]  # %p3: the first lane
    assert comparison("setp.ne.or", "b32", [5, 5], [5, 5], ", !%p3") == [2, 3]


SHUFFLES = {  # mode, b, c -> lane that each lane reads, and whether it was in range
    ("down", 1, 31): ([*range(1, 32), 31], [True] * 31 + [False]),
    ("down", 2, 0x181F): ([2, 3, 4, 5, 6, 7, 6, 7], [True] * 6 + [False] * 2),  # parts of 8 lanes
    ("down", 2, 0x1C03): (
        [2, 3, 2, 3, 6, 7, 6, 7],
        [True, True, False, False] * 2,
    ),  # parts of 4: the clamp's 2 low bits
    ("up", 1, 0): ([0, *range(31)], [False] + [True] * 31),
    ("up", 3, 0x1800): ([0, 1, 2, 0, 1, 2, 3, 4, 8], [False] * 3 + [True] * 5 + [False]),
    ("bfly", 16, 31): ([*range(16, 32), *range(16)], [True] * 32),
    ("bfly", 4, 0x1C03): ([0, 1, 2, 3, 0, 1, 2, 3], [False] * 4 + [True] * 4),
    ("idx", 5, 31): ([5] * 32, [True] * 32),
    ("idx", 5, 0x1C03): ([1, 1, 1, 1, 5, 5, 5, 5], [True] * 8),
}


@pytest.mark.parametrize(("mode", "by", "limit"), SHUFFLES)
def test_shuffles(mode, by, limit):
    memory = Memory(GLOBAL, 1 << 14)
    out = memory.place("out", 256)
    body = f"""shfl.sync.{mode}.b32 %r1|%p1, %r0, {by}, {limit}, -1;
selp.b32 %r2, 1, 0, %p1;
add.s64 %rd15, %rd0, %rd9;
st.global.v2.b32 [%rd15], {{%r1, %r2}};"""
    run_program(program(body, 1), memory, [struct.pack("<Q", out)], 1, 32, seed=0)
    lanes, inside = SHUFFLES[mode, by, limit]
    found = memory.content("out").view("i4").reshape(32, 2)[: len(lanes)]
    assert found[:, 0].tolist() == lanes
    assert found[:, 1].astype(bool).tolist() == inside


def test_what_is_approximate_may_be_off_within_its_bound():
    memory = Memory(GLOBAL, 1 << 14)
    x = np.linspace(-20, 20, 32).astype("f4")
    x[:2] = 0.0, -0.0
    addresses = [memory.place("x", x), memory.place("out", 128)]
    body = "add.s64 %rd15, %rd0, %rd8;\nld.global.f32 %f1, [%rd15];\nex2.approx.f32 %f2, %f1;\n"
    body += "add.s64 %rd15, %rd1, %rd8;\nst.global.f32 [%rd15], %f2;"
    found = []
    for salt in (None, 1, 2):
        arguments = [struct.pack("<Q", address) for address in addresses]
        run_program(program(body), memory, arguments, 1, 32, seed=0, inexact=salt)
        found.append(memory.content("out").view("f4"))
        exact = np.exp2(x.astype("f8"))
        assert (np.abs(found[-1] / exact - 1) <= 2.0**-22 + 2.0**-24).all()
        assert found[-1][:2].tolist() == [1, 1]
    assert (found[0] != found[1]).sum() > 10
    assert (found[1] != found[2]).sum() > 10


def test_packs_and_unpacks():
    memory = Memory(GLOBAL, 1 << 12)
    out = memory.place("out", 8)
    body = """mov.b16 %h1, 0x1111; mov.b16 %h2, 0x2222;
mov.b32 %r1, {%h1, %h2}; mov.b64 %rd14, {%r1, %r1}; mov.b64 {%r2, %r3}, %rd14; mov.b32 {%h3, %h4}, %r3;
setp.eq.s32 %p1, %r0, 0; mov.b32 %r4, {%h4, %h3};
@%p1 st.global.b32 [%rd0], %r2; @%p1 st.global.b32 [%rd0+4], %r4;"""
    run_program(program(body, 1), memory, [struct.pack("<Q", out)], 1, 32, seed=0)
    assert memory.content("out").view("u4").tolist() == [0x22221111, 0x11112222]


def test_entries_of_a_file():
    assert entries(f"{HEADER}.visible .entry a(\n)\n{{\n}}\n.entry b_c(\n)\n{{\n}}\n") == ["a", "b_c"]
