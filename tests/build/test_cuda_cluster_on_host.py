"""The kernel that reads a row once, with its cluster on the host: all sizes of a cluster, bits, what it refuses, how it is asked for."""

import ctypes
import mmap
import subprocess
import sys

import pytest
import torch
from rows_on_host import COMPILER, DTYPES, Tolerance, build, pointer, problem, softmax_gradient

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler here")

GRADIENTS = (torch.bfloat16, torch.float32, None, torch.float16)
# Columns: the last of a warp, of a block, of 2, 4 and 8 blocks with 8, 10 and 16 vectors a thread, and the next one.
EDGES = (1024, 1025, 16384, 16385, 32768, 32769, 65537, 131072, 131073, 163840, 163841, 262143, 262144)
REAL = (32000, 50257, 128256, 151936)
QUICK = {
    1024,
    1025,
    16385,
    32769,
    65537,
    131073,
    163841,
    262144,
    50257,
}  # the first of each size, the last, and one of a model
SIZES = [size if size in QUICK else pytest.param(size, marks=pytest.mark.slow) for size in (*EDGES, *REAL)]


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 12))])
@pytest.mark.parametrize("vocabulary", SIZES)
def test_rows_of_every_size_of_a_cluster(kernels, vocabulary, seed):
    """Against float64, in guarded buffers whose rest is NaN-poisoned shared memory; with bias and softcap, and without."""
    rows = 2
    arguments, draw = problem(seed + vocabulary, vocabulary, rows)
    gradient = GRADIENTS[(seed + vocabulary) % 4]
    stride = -(-vocabulary // 4) * 4 + draw.choice((0, 4, 28))
    plain = (*arguments[:3], None, None, arguments[5])
    for case in (arguments, plain):
        right = Tolerance(*case)
        found = softmax_gradient(kernels, *case, gradient, stride=stride, order=seed, cluster=True)
        assert found[2] == 0
        right.statistics(*found[:2])
        if gradient is not None:
            right.gradient(found[3], known=False)
            options = {"stride": stride, "order": seed + 1, "cluster": True, "apart": stride + draw.choice((0, 4))}
            assert torch.equal(softmax_gradient(kernels, *case, gradient, **options)[3], found[3])


@pytest.mark.parametrize("vocabulary", [3, 1000, 20001, 131076])
def test_the_bits_depend_on_the_row_alone(kernels, vocabulary):
    """Not on the order of threads and blocks, the other rows, the stride, nor on whether a gradient is wanted and of what dtype."""
    (logits, targets, upstream, *_), _ = problem(3, vocabulary, rows=3)
    stride = -(-vocabulary // 4) * 4
    options = {"cluster": True, "stride": stride}
    first = softmax_gradient(kernels, logits, targets, upstream, None, None, 0.7, torch.float32, order=1, **options)
    again = softmax_gradient(kernels, logits, targets, upstream, None, None, 0.7, None, order=5, **options)
    last = (logits[2:].contiguous(), targets[2:].contiguous(), upstream[2:].contiguous(), None, None, 0.7)
    alone = softmax_gradient(kernels, *last, torch.float32, order=9, cluster=True, stride=stride + 64)
    short = softmax_gradient(kernels, *last, torch.bfloat16, order=10, cluster=True, stride=stride)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    for found in (alone, short):
        assert torch.equal(first[0][2:], found[0])
        assert torch.equal(first[1][2:], found[1])
    assert torch.equal(first[3][2:], alone[3])
    assert torch.equal(first[3][2:].bfloat16(), short[3])


@pytest.mark.parametrize("vocabulary", [40, 20000])
def test_a_likelihood_near_1_is_not_a_difference(kernels, vocabulary):
    """1 - p = 1e-12, which fp32 has no number for between 1 - 6e-8 and 1."""
    logits, target = torch.zeros(1, vocabulary), vocabulary - 7
    logits[0, target] = torch.tensor(vocabulary - 1.0).log() + 12 * torch.tensor(10.0).log()
    arguments = (logits, torch.tensor([target]), torch.ones(1), None, None, 1.0)
    token, _, _, gradient = softmax_gradient(kernels, *arguments, torch.float32, cluster=True)
    assert gradient[0, target].item() == pytest.approx(1e-12, rel=1e-5, abs=0)
    assert gradient[0, 4].item() == pytest.approx(-1e-12 / (vocabulary - 1), rel=1e-5, abs=0)
    assert token.item() == pytest.approx(-1e-12, rel=1e-5, abs=0)


@pytest.mark.parametrize("value", [float("inf"), float("nan"), float("-inf")])
def test_what_one_block_sees_is_in_the_whole_row(kernels, value):
    """An element of one block of four decides the row: +inf and NaN make all of it NaN, -inf is a p of 0."""
    vocabulary = 40000
    (logits, targets, *_), _ = problem(8, vocabulary, rows=2)
    logits[0, 39999] = value
    upstream = torch.ones(2)
    arguments = (logits, targets, upstream, None, None, 1.0)
    token, lse, _, gradient = softmax_gradient(kernels, *arguments, torch.bfloat16, cluster=True)
    if value == float("-inf"):
        assert gradient[0, 39999] == 0
        assert bool(gradient.isfinite().all())
    else:
        assert token.isnan().tolist() == lse.isnan().tolist() == [True, False]
        assert gradient.isnan().all(1).tolist() == [True, False]
        assert not gradient[1].isnan().any()


def test_with_lse_known_it_is_the_one_pass_of_the_other_kernel(kernels):
    """That reads once already: the same bits, and rows that are not aligned go too."""
    (logits, targets, upstream, *_), _ = problem(4, 1001)
    _, lse, *_ = softmax_gradient(kernels, logits, targets, upstream, None, None, 1.0, None)
    found = [
        softmax_gradient(kernels, logits, targets, upstream, None, None, 1.0, torch.bfloat16, lse=lse, cluster=cluster)
        for cluster in (False, True)
    ]
    assert torch.equal(found[0][3], found[1][3])


MISTAKES = {
    "no barrier of the cluster": (("  cluster.sync();\n", "  __syncthreads();\n"),),
    "no barrier at the end": (("  cluster.barrier_arrive();\n", ""), ("  cluster.barrier_wait();\n", "")),
    "no barrier after the statistics": (("  __syncthreads();\n  const Statistics", "  const Statistics"),),
    "a read after the barrier": (
        ("    const float factor =", "    load(logits + first, held, x);\n    const float factor ="),
    ),
    "offsets of 32 bits": (("r * a.stride", "static_cast<int>(r) * static_cast<int>(a.stride)"),),
}


@pytest.mark.slow
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_shows(mistake, tmp_path):
    """That this file can fail: what it says of a kernel with one thing missing, in a process of its own, which may end in a crash."""
    build(tmp_path, MISTAKES[mistake])
    done = subprocess.run([sys.executable, __file__, str(tmp_path / "kernels.so")], capture_output=True, text=True)
    assert done.returncode != 0
    assert "AssertionError" in done.stderr or "shared memory of a block that has" in done.stderr


@pytest.fixture
def device(kernels):
    """Makes the host a device that does or does not have clusters, and code for them."""
    yield kernels.set_device
    kernels.set_device(1, 90)


OBSTACLES = {
    "no clusters": ((0, 90), {}, "this GPU has no thread block clusters, which came with compute capability 9.0"),
    "no code": ((1, 80), {}, "l3m_kernels was built without an architecture of 9.0 or above (TORCH_CUDA_ARCH_LIST)"),
    "vocabulary": (
        (1, 90),
        {"vocabulary": 262148},
        "a row has more columns than the 262144 that a cluster's registers",
    ),
    "stride": ((1, 90), {"stride": 66}, "rows of logits do not begin at multiples of 16 bytes"),
    "address": ((1, 90), {"shift": 1}, "rows of logits do not begin at multiples of 16 bytes"),
    "rows": ((1, 90), {"rows": (1 << 28) + 1}, "there are more than 268435455 rows"),
}


@pytest.mark.parametrize("obstacle", OBSTACLES)
def test_where_it_cannot_run_it_says_why_and_runs_nothing(kernels, device, obstacle):
    machine, changes, message = OBSTACLES[obstacle]
    case = {"vocabulary": 64, "rows": 2, "shift": 0, "stride": None} | changes
    device(*machine)
    stride = case["stride"] or case["vocabulary"]
    logits = torch.full((2 * stride + 4,), 3.0)
    body = ctypes.c_void_p(logits.data_ptr() + 4 * case["shift"])
    sizes = [ctypes.c_int64(size) for size in (stride, case["rows"], case["vocabulary"])]
    kernels.cluster_obstacle.restype = ctypes.c_char_p
    assert kernels.cluster_obstacle(body, *sizes).decode().startswith(message)
    numbers = torch.zeros(2), torch.zeros(2), torch.zeros(1, dtype=torch.int32)
    rest = (
        0,
        DTYPES[torch.float32],
        ctypes.c_float(0),
        ctypes.c_float(1),
        0,
        *map(pointer, numbers),
        1,
        None,
        ctypes.c_int64(0),
    )
    targets, upstream = torch.zeros(2, dtype=torch.int64), torch.ones(2)
    status = kernels.softmax_gradient(body, *sizes, pointer(targets), pointer(upstream), pointer(None), *rest)
    assert status == 801  # cudaErrorNotSupported
    assert bool((logits == 3).all())
    device(1, 90)
    assert kernels.cluster_obstacle(pointer(logits), *map(ctypes.c_int64, (64, 2, 64))) is None


def test_the_names_of_the_kernels(kernels):
    names = {b"auto": 2, b"two_pass": 0, b"cluster": 1, None: 2, b"": -1, b"Cluster": -1, b"clusters": -1, b"1": -1}
    assert {name: kernels.row_kernel(name) for name in names} == names


@pytest.mark.parametrize("cluster", [False, True], ids=["two_pass", "cluster"])
@pytest.mark.parametrize("gradient", [torch.float32, torch.bfloat16])
def test_rows_beyond_2_to_the_31_elements(kernels, gradient, cluster):
    """Rows that are 2^30 + 4 elements apart, the last beyond 2^32 of them: addresses of 64 bits, in memory that is only reserved.

    Before the first row as much is reserved: an offset of 32 bits, which has a sign, would be read and written there or in another row.
    """
    rows, vocabulary, stride = 6, 1500, (1 << 30) + 4
    half = 4 * rows * stride
    # What is never touched takes no memory: of each row the pages of its columns.
    with mmap.mmap(-1, 2 * half, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000) as memory:  # MAP_NORESERVE
        whole = torch.frombuffer(memory, dtype=torch.float32)
        body = whole[half // 4 :].view(rows, stride)[:, :vocabulary]
        (logits, targets, upstream, *_), _ = problem(6, vocabulary, rows)
        body.copy_(logits)
        token, lse, flag = torch.zeros(rows), torch.zeros(rows), torch.zeros(1, dtype=torch.int32)
        sizes = map(ctypes.c_int64, (stride, rows, vocabulary))
        kernels.set_order(1)
        status = kernels.softmax_gradient(
            pointer(body), *sizes, pointer(targets), pointer(upstream), pointer(None), 0, DTYPES[gradient],
            ctypes.c_float(0), ctypes.c_float(1), 0, *map(pointer, (token, lse, flag)), int(cluster), None, ctypes.c_int64(0),
        )  # fmt: skip
        assert status == 0
        found = whole[half // 4 :].view(rows, stride).view(gradient)[:, :vocabulary].clone()
        del whole, body
    right = Tolerance(logits, targets, upstream, None, None, 1.0)
    right.statistics(token, lse)
    right.gradient(found, known=False)
    assert not flag.any()


if __name__ == "__main__":
    library = ctypes.CDLL(sys.argv[1])
    test_rows_beyond_2_to_the_31_elements(library, torch.bfloat16, cluster=True)
    for seed in range(20):
        test_rows_of_every_size_of_a_cluster(library, (20001, 40000, 70000)[seed % 3], seed)
