"""The machine of the PTX interpreter: lanes that part and meet, warps and blocks that wait and race, memory, what is refused."""

import struct

import numpy as np
import pytest
from ptx.memory import Memory
from ptx.running import GLOBAL
from ptx.running import run as run_program
from ptx.text import Fault
from ptx_programs import program


def run(
    body: str, threads: int = 64, size: int = 256, seed: int = 0, watch: bool = True, before: str = ""
) -> np.ndarray:
    memory = Memory(GLOBAL, 1 << 14)
    out = memory.place("out", np.zeros(size, "u1"))
    run_program(program(body, 1, before, dynamic=1024), memory, [struct.pack("<Q", out)], 1, threads, seed, watch=watch)
    return memory.content("out").view("i4")


DIVERGED = """setp.lt.u32 %p1, %r0, 7; setp.eq.u32 %p2, %r0, 9; mov.b32 %r1, 5; add.s64 %rd15, %rd0, %rd8; mov.b32 %r3, 0;
@%p1 bra $L_few;
$L_more: add.s32 %r3, %r3, 1; setp.lt.u32 %p3, %r3, %r0; @%p3 bra $L_more;
add.s32 %r1, %r3, 100;
@%p2 ret;
bra.uni $L_together;
$L_few: mov.b32 %r1, %r0;
$L_together: shfl.sync.idx.b32 %r2, %r1, 0, 31, 0xFFFFFDFF;
add.s32 %r1, %r1, %r2;
st.global.b32 [%rd15], %r1;"""


@pytest.mark.parametrize("seed", range(8))
def test_lanes_part_and_meet(seed):
    """A loop of as many rounds as the lane's number, a lane that ends, and a shuffle of all the others."""
    found = run(DIVERGED, threads=32, size=128, seed=seed)
    assert found.tolist() == [*range(7), *(0 if lane == 9 else lane + 100 for lane in range(7, 32))]


SHARED = ".extern .shared .align 16 .b8 s[];"
HANDED = """mov.b32 %r1, s; shl.b32 %r2, %r0, 2; add.s32 %r3, %r1, %r2; st.shared.b32 [%r3], %r0;
BARRIER
xor.b32 %r4, %r2, 252; add.s32 %r4, %r1, %r4; ld.shared.b32 %r5, [%r4];
add.s64 %rd15, %rd0, %rd8; st.global.b32 [%rd15], %r5;"""


def test_a_barrier_orders_two_warps_and_without_it_they_race():
    for seed in range(8):
        found = run(HANDED.replace("BARRIER", "bar.sync 0;"), seed=seed, before=SHARED)
        assert found.tolist() == list(range(63, -1, -1))
        with pytest.raises(Fault, match=r"`ld\.shared\.b32 .*race: thread|`st\.shared\.b32 .*race: thread"):
            run(HANDED.replace("BARRIER", ""), seed=seed, before=SHARED)
    wrong = [run(HANDED.replace("BARRIER", ""), seed=seed, before=SHARED, watch=False).tolist() for seed in range(8)]
    assert any(values != list(range(63, -1, -1)) for values in wrong)


# Each thread puts its number and its block's into shared memory, and reads those of the same thread in the next block.
CLUSTER = """mov.u32 %r1, s; shl.b32 %r2, %r0, 2; add.s32 %r3, %r1, %r2; mov.u32 %r4, %cluster_ctarank; mov.u32 %r5, %cluster_nctarank;
mad.lo.s32 %r6, %r4, 100, %r0; st.shared.b32 [%r3], %r6;
barrier.cluster.arrive; barrier.cluster.wait;
add.s32 %r7, %r4, 1; setp.eq.u32 %p1, %r7, %r5; selp.b32 %r7, 0, %r7, %p1;
READ
barrier.cluster.arrive.aligned;
mov.u32 %r9, %ctaid.x; mov.u32 %r10, %ntid.x; mad.lo.s32 %r9, %r9, %r10, %r0; mul.wide.u32 %rd14, %r9, 4; add.s64 %rd15, %rd0, %rd14;
st.global.b32 [%rd15], %r8;
barrier.cluster.wait.aligned;
st.shared.b32 [%r3], %r0;"""
READS = {
    "generic": "cvt.u64.u32 %rd1, %r3; cvta.shared.u64 %rd2, %rd1; mapa.u64 %rd3, %rd2, %r7; ld.b32 %r8, [%rd3];",
    "of the cluster": "mapa.shared::cluster.u32 %r11, %r3, %r7; ld.shared::cluster.b32 %r8, [%r11];",
}


def clustered(body: str, seed: int, watch: bool = True) -> list[int]:
    memory = Memory(GLOBAL, 1 << 14)
    out = memory.place("out", np.zeros(4 * 256, "u1"))
    threads = program(body, 1, SHARED, dynamic=256)
    run_program(threads, memory, [struct.pack("<Q", out)], 4, 64, seed, cluster=2, watch=watch)
    return memory.content("out").view("i4").tolist()


NEXT = [(1 - block % 2) * 100 + thread for block in range(4) for thread in range(64)]


@pytest.mark.parametrize("read", READS)
def test_blocks_of_a_cluster_read_each_other_s_memory(read):
    body = CLUSTER.replace("READ", READS[read])
    for seed in range(4):
        assert clustered(body, seed) == NEXT


@pytest.mark.parametrize(
    ("text", "instead", "message"),
    [
        ("barrier.cluster.arrive; barrier.cluster.wait;", "", "race: thread .* of s of block"),
        ("barrier.cluster.arrive; barrier.cluster.wait;", "bar.sync 0;", "race: thread .* of s of block"),
        ("barrier.cluster.arrive;", "barrier.cluster.arrive.relaxed;", "race: thread .* of s of block"),
        ("barrier.cluster.wait.aligned;", "", "race: thread .* of s of block"),
        ("barrier.cluster.wait;", "", "arrives twice|race: "),
        ("barrier.cluster.arrive;", "", "has not arrived"),
        (
            "barrier.cluster.arrive; ",
            "setp.eq.u32 %p2, %r6, 105;\n@%p2 bra $L_last; barrier.cluster.arrive; ",
            "waits for ever",
        ),
        ("mov.u32 %r5, %cluster_nctarank;", "mov.u32 %r5, 9;", "a cluster of 2 has no block 2"),
    ],
)
def test_what_goes_wrong_in_a_cluster(text, instead, message):
    """The block's own barrier, or one that orders nothing, is not enough."""
    body = CLUSTER.replace("READ", READS["generic"])
    assert text in body
    body = body.replace(text, instead, 1)
    if "$L_last" in body:
        body += " bra.uni $L_end; $L_last: bar.sync 0; $L_end: mov.u32 %r0, 0;"
    for seed in range(3):
        with pytest.raises(Fault, match=message):
            clustered(body, seed)


@pytest.mark.parametrize("seed", range(4))
def test_the_memory_of_a_block_ends_with_it(seed):
    """A block that reads another's has to be waited for."""
    body = CLUSTER.replace("READ", READS["generic"]).removesuffix("st.shared.b32 [%r3], %r0;")
    assert clustered(body, seed) == NEXT
    body = body.replace("barrier.cluster.arrive.aligned;", "").replace("barrier.cluster.wait.aligned;", "")
    with pytest.raises(Fault, match=r"the block may have ended|bytes at byte .* of s of block"):
        clustered(body, seed)


def test_without_the_cluster_s_barrier_blocks_read_too_early():
    body = CLUSTER.replace("READ", READS["generic"]).replace(
        "barrier.cluster.arrive; barrier.cluster.wait;", "bar.sync 0;", 1
    )
    assert any(clustered(body, seed, watch=False) != NEXT for seed in range(8))


WRONG = {
    "frob.b32 %r1, %r2;": "`frob.b32 %r1, %r2`: the instruction is not known",
    "add.frob.f32 %f1, %f2, %f2;": r"of its name \.frob is not known",
    "mul.s32 %r1, %r2, %r2;": "lo, hi or wide",
    "add.f32 %rd1, %f1, %f1;": "%rd1 has 64 bits",
    "add.f32 %f1, %f9, %f1;": "not declared|not understood|not known",
    "add.f32 %f1, %f2, 1;": "1 is not written as bits of a float",
    "bra $L_nowhere;": "the label is not known",
    "mov.u32 %r1, %pm0;": "not understood|not known",
    "st.global.b32 [%rd0+256], %r1;": "4 bytes at byte 256 of out, which has 256",
    "st.global.b64 [%rd0+252], %rd1;": "8 bytes at byte 252 of out|8 bytes at an address that is no multiple",
    "ld.global.b32 %r1, [%rd0+2];": "no multiple: byte 2 of out",
    "mov.b64 %rd1, 0; ld.global.b32 %r1, [%rd1];": "byte .* of out",
    "setp.lt.u32 %p1, %r0, 9;\n@%p1 bra $L_a; bar.sync 0; $L_a: bar.sync 0;": "wait for each other at different instructions, PTX lines",
    "setp.lt.u32 %p1, %r0, 32;\n@%p1 bra $L_a; bar.sync 0; $L_a: ret;": "waits for ever: 32 of 64 threads came",
    "setp.lt.u32 %p1, %r0, 9;\n@%p1 ret; shfl.sync.idx.b32 %r1, %r0, 0, 31, 15;": "lanes come here that do not take part",
    "st.global.b32 [%rd0], %r0;": "race: two lanes write at once byte 0 of out",
}


@pytest.mark.parametrize("body", WRONG)
def test_what_is_not_known_or_not_allowed_is_an_error_that_names_its_line(body):
    with pytest.raises(Fault, match=WRONG[body]) as caught:
        run(body)
    assert "PTX line" in str(caught.value)


def test_what_is_only_read():
    memory = Memory(GLOBAL, 1 << 12)
    out = memory.place("targets", np.zeros(1, "i4"), writable=False)
    stores = program("setp.eq.u32 %p1, %r0, 0; @%p1 st.global.b32 [%rd0], %r0;", 1)
    with pytest.raises(Fault, match="into what is only read: byte 0 of targets"):
        run_program(stores, memory, [struct.pack("<Q", out)], 1, 32, seed=0)
