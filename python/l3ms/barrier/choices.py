"""The arguments of an `L3MOptimizer` that are one of a few words, or a limit."""

from typing import Any

CHOICES = {
    "clipping": ("adaptive", "separate"),
    "length_norm": ("mean", "sequence", "none"),
    "baseline": ("leave_one_out", "estimate"),
    "nonfinite": ("raise", "drop"),
}


def check_choices(**given: str) -> None:
    """ValueError naming the first that is none of its words."""
    for name, value in given.items():
        if value not in CHOICES[name]:
            raise ValueError(f"{name} must be one of {', '.join(CHOICES[name])}, got {value!r}")


def check_limits(max_grad_norm: Any, max_skipped: Any) -> None:
    """ValueError naming the one that is none."""
    number = isinstance(max_grad_norm, (int, float)) and not isinstance(max_grad_norm, bool)
    if max_grad_norm is not None and not (number and max_grad_norm > 0):
        raise ValueError(f"max_grad_norm must be positive or None, got {max_grad_norm!r}")
    if not isinstance(max_skipped, int) or max_skipped < 1:
        raise ValueError(f"max_skipped must be a whole number of at least 1, got {max_skipped!r}")
