"""The arguments of an `L3MOptimizer` that are one of a few words."""

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
