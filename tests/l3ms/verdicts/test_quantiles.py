"""Quantiles against printed tables and against 30-digit arithmetic."""

import math

import mpmath
import pytest

from l3ms.verdicts.quantiles import beta_cdf, beta_quantile, normal_cdf, student_t_quantile

# Of any printed table of the t distribution: (one-sided level, degrees of freedom, quantile)
T_TABLE = [
    (0.95, 1, 6.314), (0.975, 1, 12.706), (0.99, 2, 6.965), (0.975, 5, 2.571), (0.95, 10, 1.812), (0.995, 10, 3.169),
    (0.975, 30, 2.042), (0.9995, 30, 3.646), (0.975, 120, 1.980), (0.9, 4, 1.533),
]  # fmt: skip


@pytest.mark.parametrize(("level", "degrees", "expected"), T_TABLE)
def test_student_t_as_tabulated(level, degrees, expected):
    assert student_t_quantile(level, degrees) == pytest.approx(expected, abs=5.1e-4)
    assert student_t_quantile(1 - level, degrees) == pytest.approx(-expected, abs=5.1e-4)


def test_student_t_ends():
    assert student_t_quantile(0.5, 7) == 0
    assert student_t_quantile(0.975, 1e7) == pytest.approx(1.959964, abs=1e-5)
    assert student_t_quantile(0.999, 1) == pytest.approx(math.tan(math.pi * 0.499), rel=1e-9)  # Cauchy


@pytest.mark.parametrize("a", [0.5, 1, 3.5, 40, 900])
@pytest.mark.parametrize("b", [0.5, 2, 17, 700])
def test_beta_against_more_digits(a, b):
    with mpmath.workdps(30):
        for x in (1e-6, 0.01, 0.3, a / (a + b), 0.77, 0.999):
            expected = mpmath.betainc(a, b, 0, x, regularized=True)
            assert beta_cdf(x, a, b) == pytest.approx(float(expected), rel=1e-10, abs=1e-300)
        for p in (1e-5, 0.025, 0.5, 0.975):
            back = mpmath.betainc(a, b, 0, beta_quantile(p, a, b), regularized=True)
            assert float(back) == pytest.approx(p, rel=1e-8)


def test_beta_closed_forms():
    assert beta_quantile(0.3, 1, 1) == pytest.approx(0.3, rel=1e-14)
    assert beta_quantile(0.05, 1, 59) == pytest.approx(1 - 0.95 ** (1 / 59), rel=1e-12)
    assert beta_cdf(0.25, 0.5, 0.5) == pytest.approx(2 / math.pi * math.asin(0.5), rel=1e-13)  # arcsine law
    assert (beta_cdf(0.0, 2, 3), beta_cdf(1.0, 2, 3), beta_quantile(0.0, 2, 3), beta_quantile(1.0, 2, 3)) == (
        0,
        1,
        0,
        1,
    )


def test_normal():
    assert normal_cdf(0.0) == 0.5
    assert normal_cdf(1.959964) == pytest.approx(0.975, abs=1e-7)
    assert normal_cdf(-40.0) == 0.0


@pytest.mark.parametrize(
    "call",
    [
        lambda: beta_cdf(0.5, 0, 1), lambda: beta_cdf(1.5, 1, 1), lambda: beta_quantile(-0.1, 1, 1),
        lambda: student_t_quantile(1.0, 3), lambda: student_t_quantile(0.5, 0),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(call):
    with pytest.raises(ValueError, match="wanted"):
        call()
