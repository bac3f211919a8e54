"""Products of fp32 are exact whatever the program allows its own, and nothing of the program's settings is changed."""

import threading
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from head_cases import Case
from test_row_chunks import KERNELS, run
from torch import Tensor

from l3m_kernels import products
from l3m_kernels.products import guarded, matmul, plain, tf32_allowed, where_tf32_is_allowed

SETTINGS = torch.backends.cuda.matmul


@contextmanager
def settings(**values):
    before = {name: getattr(SETTINGS, name) for name in values}
    try:
        for name, value in values.items():
            setattr(SETTINGS, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(SETTINGS, name, value)


def operands(dtype=torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(5, 7, generator=generator).to(dtype), torch.randn(7, 3, generator=generator).to(dtype)
    return a, b, torch.full((5, 3), torch.nan)


def test_tf32_is_what_the_program_has_set_in_any_of_torchs_ways():
    assert not tf32_allowed()
    with settings(allow_tf32=True):
        assert tf32_allowed()
    torch.set_float32_matmul_precision("high")
    try:
        assert tf32_allowed()
    finally:
        torch.set_float32_matmul_precision("highest")
    assert not tf32_allowed()


@pytest.mark.parametrize(("allowed", "wanted"), [(False, []), (True, ["kernel"])])
def test_the_kernel_is_for_programs_that_allow_tf32(allowed, wanted):
    ran = []

    def kernel(a, b, out, accumulate):
        ran.append("kernel")
        plain(a, b, out, accumulate)

    a, b, out = operands()
    with settings(allow_tf32=allowed):
        where_tf32_is_allowed(kernel)(a, b, out, False)
    assert ran == wanted
    assert torch.equal(out, a @ b)


def test_what_torchs_guard_does_not_reach_is_refused(monkeypatch):
    a, b, out = operands()
    monkeypatch.setattr(torch.backends.cuda, "preferred_blas_library", lambda: "_BlasBackend.Cublaslt")
    guarded(plain)(a, b, out, False)  # TF32 is not allowed
    assert torch.equal(out, a @ b)
    with settings(allow_tf32=True):
        with pytest.raises(RuntimeError, match=r"cublaslt.* prefer 'cublas', forbid TF32, or take backend='triton'"):
            guarded(plain)(a, b, out, False)
        monkeypatch.setattr(torch.backends.cuda, "preferred_blas_library", lambda: "_BlasBackend.Cublas")
        guarded(plain)(a, b, out, True)
    torch.testing.assert_close(out, 2 * (a @ b))


def test_sums_of_float16_in_float16_are_refused():
    """The operands are played: torch would be asked for such a sum on a GPU alone."""
    operand = SimpleNamespace(dtype=torch.float16, is_cuda=True)
    with (
        settings(allow_fp16_accumulation=True),
        pytest.raises(RuntimeError, match=r"allow_fp16_accumulation is on.*turn it off, or use bfloat16"),
    ):
        matmul(operand, operand, operand, None)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_rounded_once(dtype):
    """Into fp32 not at all, into 16 bits from the fp32 sum."""
    a, b, out = operands(dtype)
    matmul(a, b, out, None)
    assert torch.equal(out, a.float() @ b.float())
    rounded = out.to(dtype).fill_(torch.nan)
    matmul(a, b, rounded, None)
    assert torch.equal(rounded, out.to(dtype))
    matmul(a, b, out, None, accumulate=True)
    torch.testing.assert_close(out, 2 * (a.float() @ b.float()))


class Watched:
    """Products of the driver, each with the settings that the program would see while it runs."""

    def __init__(self, fails: bool = False):
        self.seen, self.fails = [], fails

    def __call__(self, a, b, out, accumulate):
        self.seen.append((SETTINGS.allow_tf32, torch.get_float32_matmul_precision()))
        if self.fails:
            raise RuntimeError("out of memory")
        plain(a, b, out, accumulate)


def call(product) -> None:
    case = Case.plain(dtype=torch.float32, lengths=(9, 4))
    run(case, case.build(), True, 5000, False, kernels=KERNELS._replace(product=product))


@pytest.mark.parametrize("allowed", [False, True])
def test_all_products_of_fp32_are_the_backends_and_no_setting_changes(allowed):
    """Not even while one runs, where another thread would see it; nor after one that fails."""
    with settings(allow_tf32=allowed):
        precision = torch.get_float32_matmul_precision()
        watched = Watched()
        call(watched)
        assert len(watched.seen) >= 3
        assert set(watched.seen) == {(allowed, precision)}
        with pytest.raises(RuntimeError, match="out of memory"):
            call(Watched(fails=True))
        assert (SETTINGS.allow_tf32, torch.get_float32_matmul_precision()) == (allowed, precision)


def test_calls_of_two_threads_leave_each_others_settings_alone():
    """One call ends while the other is in a product: it used to put back what it had found, with the other's change in it."""
    entered, ended = threading.Event(), threading.Event()

    class Waiting(Watched):
        def __call__(self, *arguments):
            entered.set()
            assert ended.wait(30)
            super().__call__(*arguments)

    with settings(allow_tf32=True):
        slow = Waiting()
        thread = threading.Thread(target=call, args=(slow,))
        thread.start()
        assert entered.wait(30)
        call(Watched())
        ended.set()
        thread.join()
        assert {seen[0] for seen in slow.seen} == {True}
        assert SETTINGS.allow_tf32


def test_nothing_in_the_package_sets_a_precision():
    """Its text is looked through, since what a test sees on a CPU would not include what runs on a GPU alone."""
    for path in Path(products.__file__).parent.rglob("*.py"):
        text = path.read_text()
        for setter in ("set_float32_matmul_precision(", "allow_tf32 =", "fp32_precision =", "setattr(settings"):
            assert setter not in text, (path, setter)
