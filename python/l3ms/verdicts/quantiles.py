"""Quantiles of the beta and of Student's t distribution, in float64, by the regularised incomplete beta function.

`beta_cdf` is the continued fraction of Numerical Recipes 6.4 (modified Lentz), a quantile is a bisection on it: slow (milliseconds) and
as exact as the function itself.
"""

import functools
import math

_TINY = 1e-300
_EPSILON = 2.0**-52


def beta_cdf(x: float, a: float, b: float) -> float:
    """I_x(a, b) = P(X <= x) of a beta(a, b) variable.

    Raises:
        ValueError: a or b not positive, x outside [0, 1].
    """
    if not (a > 0 and b > 0 and 0 <= x <= 1):
        raise ValueError(f"beta_cdf: wanted a, b > 0 and x in [0, 1], got a={a}, b={b}, x={x}")
    if x in (0.0, 1.0):
        return x
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x))
    if x < (a + 1) / (a + b + 2):  # where the continued fraction converges fast; the other tail otherwise
        return front * _continued_fraction(x, a, b) / a
    return 1.0 - front * _continued_fraction(1.0 - x, b, a) / b


def _continued_fraction(x: float, a: float, b: float) -> float:
    c = 1.0
    d = 1.0 / _away_from_zero(1.0 - (a + b) * x / (a + 1))
    value = d
    for m in range(1, 100_000):
        for numerator in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1.0 / _away_from_zero(1.0 + numerator * d)
            c = _away_from_zero(1.0 + numerator / c)
            value *= c * d
        if abs(c * d - 1.0) <= _EPSILON:
            break
    return value


def _away_from_zero(value: float) -> float:
    return value if abs(value) > _TINY else _TINY


@functools.lru_cache(4096)
def beta_quantile(p: float, a: float, b: float) -> float:
    """x with I_x(a, b) = p.

    Raises:
        ValueError: a or b not positive, p outside [0, 1].
    """
    if not 0 <= p <= 1:
        raise ValueError(f"beta_quantile: wanted p in [0, 1], got {p}")
    low, high = 0.0, 1.0
    if p in (0.0, 1.0):
        return p
    while True:
        middle = (low + high) / 2
        if middle in (low, high) or high - low <= 4 * _EPSILON * low:
            return middle
        if beta_cdf(middle, a, b) < p:
            low = middle
        else:
            high = middle


@functools.lru_cache(4096)
def student_t_quantile(p: float, degrees: float) -> float:
    """t with P(T <= t) = p, for `degrees` of freedom.

    Raises:
        ValueError: p outside (0, 1), degrees not positive.
    """
    if not (0 < p < 1 and degrees > 0):
        raise ValueError(f"student_t_quantile: wanted p in (0, 1) and degrees > 0, got p={p}, degrees={degrees}")
    if p < 0.5:
        return -student_t_quantile(1 - p, degrees)
    # T^2 / (degrees + T^2) is beta(1/2, degrees/2)
    share = beta_quantile(2 * p - 1, 0.5, degrees / 2)
    return math.sqrt(degrees * share / (1 - share)) if share < 1 else math.inf


def normal_cdf(z: float) -> float:
    """P(Z <= z) of a standard normal variable."""
    return 0.5 * math.erfc(-z / math.sqrt(2))
