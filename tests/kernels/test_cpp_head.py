"""The native head where it cuts its work: many blocks of rows, panels and slices of the vocabulary, chunks, kept or recomputed
exponentials, each set of instructions; on shapes that are larger than those of `test_ops_oracle`.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from head_cases import HEAD_BACKENDS, Case, grad_of
from head_oracle import multiplies_in
from test_ops_oracle import check

from l3m_kernels import log_likelihood, release_workspace, set_workspace, weighted_log_likelihood
from l3m_kernels.backends import NATIVE

pytestmark = pytest.mark.skipif("cpp" not in HEAD_BACKENDS, reason="backend cpp is not built here")

# rows, D, V: several blocks; more tokens than a panel; fewer rows than threads; an odd size of everything
SHAPES = ((1100, 24, 700), (150, 40, 2600), (3, 16, 3001), (301, 33, 1037))
MEMORY = {"default": (None, False), "low-memory": (None, True), "small": (1 << 20, False), "smallest": (1, False)}


@pytest.fixture(params=[1, 2, 5])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def large_case(shape, dtype, **changes) -> Case:
    rows, width, vocabulary = shape
    lengths = (rows // 3, 0, rows - rows // 3)
    settings = {"lengths": lengths, "width": width, "vocabulary": vocabulary, "dtype": dtype, "logit_size": 3.0}
    return Case.plain(**settings | changes)


@pytest.mark.parametrize("op", ["log_likelihood", "weighted"])
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes_that_are_cut(shape, dtype, memory, op, threads):
    size, low_memory = MEMORY[memory]
    set_workspace(size, low_memory=low_memory)
    check("cpp", large_case(shape, dtype, seed=threads), op)


@pytest.mark.parametrize(
    "options", [{"softcap": None, "temperature": 1.0, "bias": False}, {"view": "strided"}, {"view": "transposed"}]
)
@pytest.mark.parametrize("frozen", [("hidden",), ("weight",), ("hidden", "bias"), ("weight", "bias")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frozen_inputs_and_plain_logits(dtype, frozen, options):
    check("cpp", large_case(SHAPES[1], dtype, frozen=frozen, **options), "weighted")


@pytest.mark.parametrize(("width", "rows"), [(1200, 432), (2880, 176), (4608, 112)])
def test_a_full_block_whose_rows_are_an_even_number_of_lines(width, rows):
    """In pairs (AMX, AVX512_BF16) such rows of exponentials are a line further apart, and the last one is to be in the buffer."""
    check("cpp", large_case((rows, width, 600), torch.bfloat16, frozen=("weight", "bias")), "log_likelihood")


@pytest.mark.parametrize("op", ["log_likelihood", "weighted"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("low_memory", [False, True])
def test_targets_far_below_the_largest_logit(dtype, op, low_memory):
    """exp(z - z_target) would overflow: such rows take the largest logit for a reference, their neighbours keep the target's."""
    set_workspace(None, low_memory=low_memory)
    case = large_case((90, 16, 1200), dtype, logit_size=22.0, softcap=None, temperature=1.0)
    inputs = case.build()
    out = log_likelihood(
        inputs.hidden, inputs.weight, inputs.targets, inputs.cu_seqlens, bias=inputs.bias, backend="cpp"
    )
    assert out.token.min() < -90  # exp(90) is no fp32 number
    assert ((out.token > -36) & (out.token < 0)).any()  # sums below 1e16
    check("cpp", case, op)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_same_bits_for_the_same_threads(dtype, threads):
    case = large_case((1100, 24, 700), dtype)
    results = []
    for _ in range(3):
        inputs = case.build()
        options = {"bias": inputs.bias, "backend": "cpp", **case.options}
        loss, out = weighted_log_likelihood(
            inputs.hidden, inputs.weight, inputs.targets, inputs.seq_weight, inputs.cu_seqlens, **options
        )
        loss.backward()
        results.append((loss.detach(), *out, *(leaf.grad for leaf in inputs.leaves.values())))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("exponent", [-100, -40, 40, 80])
def test_upstream_gradients_of_any_size(exponent):
    """16-bit products flush numbers below 1e-38 to 0; a power of two is taken out of the upstream gradients first."""
    if exponent == -100 and multiplies_in("cpp", torch.bfloat16) != torch.bfloat16:
        pytest.skip("fp32 products have subnormal numbers, and round there")
    inputs = large_case((200, 32, 300), torch.bfloat16, softcap=None).build()
    gradients = []
    for factor in (1.0, 2.0**exponent):
        weights = inputs.seq_weight * factor
        options = {"bias": inputs.bias, "backend": "cpp"}
        loss, _ = weighted_log_likelihood(
            inputs.hidden, inputs.weight, inputs.targets, weights, inputs.cu_seqlens, **options
        )
        gradients.append(torch.autograd.grad(loss, list(inputs.leaves.values())))
    for plain, scaled in zip(*gradients, strict=True):
        assert plain.abs().max() > 0
        assert torch.equal(scaled.double(), plain.double() * 2.0**exponent)


@pytest.mark.parametrize("chunks", [2, 4])
def test_a_weight_gradient_of_several_chunks(chunks):
    """bf16 rows whose exponentials do not fit go through in chunks that keep theirs; the chunks' sums are fp32, in two halves.

    Every chunk adds the same here, so the sum of all has the bits of one, but where fp32 rounds it: once in 2^16 numbers.
    """
    rows, width, vocabulary, dtype, threads = 600, 16, 900, torch.bfloat16, torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        hidden = torch.randn(1, width, generator=torch.Generator().manual_seed(0)).to(dtype)
        weight = torch.randn(vocabulary, width, generator=torch.Generator().manual_seed(1)).to(dtype)
        gradients = []
        for n, size in ((rows, None), (rows * chunks, 1_500_000)):
            set_workspace(size)
            leaf = weight.clone().requires_grad_()
            targets, ends = torch.arange(n) % rows, torch.tensor([0, n])
            upstream = torch.full((1,), rows / n)  # a power of 2: the same sum
            weighted_log_likelihood(hidden.expand(n, -1), leaf, targets, upstream, ends, backend="cpp")[0].backward()
            gradients.append(grad_of(leaf))
    finally:
        torch.set_num_threads(threads)
    one, several = gradients
    assert one.abs().max() > 0
    assert (one != several).float().mean() < 0.001
    assert torch.allclose(one, several, rtol=2**-7, atol=0)


def test_no_weight_gradient_without_rows():
    hidden = torch.randn(4, 8, requires_grad=True)
    weight = torch.full((5, 8), 3.0).requires_grad_()
    arguments = (hidden, weight, torch.tensor([0, 1, 2, 3]), torch.zeros(1), torch.tensor([0, 4]))
    weighted_log_likelihood(*arguments, backend="cpp")[0].backward()
    assert not grad_of(weight).any()
    assert not grad_of(hidden).any()


PATHS = ("generic", "avx2", "avx512", "avx512_bf16", "amx")
RUN = "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))"


def path_of_a_process(wanted: str) -> subprocess.CompletedProcess[str]:
    """Prints what the head runs on where L3M_CPU is `wanted`."""
    probe = [sys.executable, "-c", "from l3m_kernels import _native; print(_native.load().module.cpu_path())"]
    environment = {**os.environ, "L3M_CPU": wanted}
    return subprocess.run(probe, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    "path", [pytest.param(p, marks=pytest.mark.slow) if p in ("avx2", "generic") else p for p in PATHS]
)
def test_oracle_on_every_path_that_this_machine_runs(path):
    """The same cases on slower instructions; the path in use is tested by everything else."""
    found = path_of_a_process(path)
    if found.returncode:
        assert "L3M_CPU must be one of generic" in found.stderr
        pytest.skip(f"this machine does not run {path}: {found.stderr.strip().splitlines()[-1]}")
    assert found.stdout.strip() == path
    if NATIVE.module is not None and NATIVE.module.cpu_path() == path:
        return
    environment = {**os.environ, "L3M_CPU": path, "OMP_NUM_THREADS": "1", "PYTEST_ADDOPTS": ""}
    folder = Path(__file__).parent
    selection = [str(folder / f"test_{name}.py") for name in ("cpp_head", "ops_oracle", "ops_hazards")]
    cases = (
        "(cut and default and (1100 or 3001) and weighted) or far_below or any_size or one_temperature"
        " or (cpp and (test_weighted_log_likelihood or infinite))"
    )
    command = [sys.executable, "-c", RUN, "-q", "-p", "no:xdist", "-p", "no:cacheprovider", "-k", cases, *selection]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, cwd=folder.parents[1])
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc/cpuinfo says what the CPU is")
def test_bf16_without_amx_is_widened_where_its_instruction_is_slow():
    """Intel's since Sapphire Rapids multiply bf16 at half the rate of fp32 without AMX, others at twice: `csrc/cpu/path.cpp`."""
    first = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
    cpu = dict(re.findall(r"^(\w[\w ]*?)\s*: (.*)$", first, re.MULTILINE))
    flags = cpu.get("flags", "").split()
    if "avx512_bf16" not in flags or "amx_bf16" in flags:
        pytest.skip("this machine has AMX, or no AVX512_BF16")
    slow = cpu["vendor_id"] == "GenuineIntel" and cpu["model"] != "85"  # Cooper Lake
    assert path_of_a_process("").stdout.strip() == ("avx512" if slow else "avx512_bf16")
    assert path_of_a_process("avx512_bf16").stdout.strip() == "avx512_bf16"  # where it is wanted


def test_a_path_that_no_machine_has_is_one_line():
    environment = {**os.environ, "L3M_CPU": "abacus"}
    done = subprocess.run(
        [sys.executable, "-c", "import l3m_kernels"], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    assert done.stderr.count("Error: ") == 1
    assert re.match(
        r"ImportError: L3M_CPU must be one of generic.* on this machine, got abacus$", done.stderr.splitlines()[-1]
    )


def gradient_of_a_large_weight(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(8, 64, generator=generator), torch.randn(5000, 64, generator=generator)  # 1.3 MB
    weight.requires_grad_()
    targets, ends = torch.arange(8), torch.tensor([0, 8])
    loss = weighted_log_likelihood(hidden, weight, targets, torch.ones(1), ends, backend="cpp")[0]
    return torch.autograd.grad(loss, weight)[0]


def test_memory_of_a_gradient_is_used_again_once_it_is_freed_and_not_before():
    held = gradient_of_a_large_weight(0)
    before, view = held.clone(), held[17:]
    other = gradient_of_a_large_weight(1)
    assert other.data_ptr() != held.data_ptr()
    place = held.data_ptr()
    del held
    assert gradient_of_a_large_weight(2).data_ptr() != place  # a view is still there
    assert torch.equal(view, before[17:])
    del view
    again = gradient_of_a_large_weight(0)
    assert again.data_ptr() == place
    assert torch.equal(again, before)
    release_workspace()
    assert torch.equal(again, before)


def test_a_gradient_can_be_resized_and_shared():
    gradient = gradient_of_a_large_weight(0)
    before = gradient.clone()
    larger = gradient.resize_(6000, 64)
    assert torch.equal(larger[:5000], before)
    assert torch.equal(larger.share_memory_()[:5000], before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_logits_of_a_wide_model_are_as_precise_as_torch_s(dtype):
    """One chain of 4,096 sums has 6 to 9 times the error of torch's product in fp32 (`python bench/accuracy.py`)."""
    if dtype == torch.bfloat16 and NATIVE.module is not None and NATIVE.module.cpu_path() == "amx":
        pytest.skip("AMX adds up all of D in one chain")
    generator = torch.Generator().manual_seed(0)
    hidden = (30 * torch.randn(96, 4096, generator=generator)).to(dtype).requires_grad_()
    weight = (torch.randn(600, 4096, generator=generator) / 64).to(dtype).requires_grad_()
    targets, ends = torch.randint(0, 600, (96,), generator=generator), torch.tensor([0, 96])

    def unfused(compute):
        leaves = [leaf.detach().to(compute, copy=True).requires_grad_() for leaf in (hidden, weight)]
        token = (leaves[0] @ leaves[1].T).log_softmax(1).gather(1, targets[:, None])[:, 0]
        (-token.sum()).backward()
        return [token.detach().double(), *(grad_of(leaf).double() for leaf in leaves)]

    loss, seen = weighted_log_likelihood(hidden, weight, targets, torch.ones(1), ends, backend="cpp")
    loss.backward()
    found = [seen.token.double(), grad_of(hidden).double(), grad_of(weight).double()]
    for ours, torchs, truth in zip(found, unfused(torch.float32), unfused(torch.float64), strict=True):
        assert (ours - truth).norm() <= 1.5 * (torchs - truth).norm()
        if dtype != torch.float32:
            break  # gradients are rounded to 16 bits


@pytest.mark.parametrize(("temperature", "softcap"), [(0.3, None), (0.7, None), (1.0, 30.0), (0.7, 2.0)])
def test_errors_at_one_temperature_have_no_direction(temperature, softcap):
    """The target's logit is divided in double; a rounded 1 / temperature gave all others an error of one sign: 0.2 to 0.7 of its sd."""
    generator, errors = torch.Generator().manual_seed(0), []
    options = {"temperature": temperature, "softcap": softcap}
    cu_seqlens = torch.tensor([0, 8])
    for _ in range(300):
        hidden, weight = (torch.randn(rows, 16, generator=generator) for rows in (8, 200))
        targets = torch.randint(200, (8,), generator=generator)
        mine = log_likelihood(hidden, weight, targets, cu_seqlens, backend="cpp", **options).token
        right = log_likelihood(
            hidden.double(), weight.double(), targets, cu_seqlens, backend="reference", **options
        ).token
        errors.append(mine.double() - right)
    error = torch.cat(errors)
    assert abs(error.mean()) < 0.1 * error.std()


@pytest.mark.parametrize("temperature", [6e-8, 1.5e-8, 3e-9, 1e-20])
@pytest.mark.parametrize(("softcap", "ruled_out"), [(None, False), (None, True), (2.0, False)])
def test_what_is_left_out_stays_out_at_one_temperature(temperature, softcap, ruled_out):
    """Infinite logits times 1 / temperature, whose low part may be above 1 and of the other sign."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(rows, 8, generator=generator).requires_grad_() for rows in (20, 300))
    targets, options = torch.arange(20), {"temperature": temperature, "softcap": softcap}
    if ruled_out:
        options["bias"] = torch.zeros(300).index_fill(0, torch.tensor([25, 77]), -torch.inf)
    found = []
    for backend in ("cpp", "reference"):
        token = log_likelihood(hidden, weight, targets, torch.tensor([0, 20]), backend=backend, **options).token
        found.append([token.detach(), *torch.autograd.grad(token.sum(), (hidden, weight))])
    assert all(tensor.isfinite().all() for tensor in found[0])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_bias_of_a_token_that_all_rows_have_is_as_precise_as_that_of_one(dtype):
    """Equal terms are rounded alike: one chain of 60,000 sums is 4e-4 off in fp32."""
    rows = 60_000
    hidden, weight = torch.zeros(rows, 1, dtype=dtype), torch.zeros(3, 1, dtype=dtype)
    bias = torch.tensor([0.1, 0.2, 0.4], dtype=dtype, requires_grad=True)
    targets, ends = torch.zeros(rows, dtype=torch.int64), torch.tensor([0, rows])
    loss, _ = weighted_log_likelihood(hidden, weight, targets, torch.ones(1), ends, bias=bias, backend="cpp")
    loss.backward()
    wanted = -rows * (1 - bias.detach().double().softmax(0)[0])
    assert abs(grad_of(bias)[0].double() / wanted - 1) <= 4 * torch.finfo(dtype).eps
