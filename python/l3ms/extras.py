"""What `pip install .` leaves out: a name or a command that needs more says in one line which extra brings it."""

from __future__ import annotations

# Top-level modules of the packages of the extra `train`, as pyproject.toml lists them.
TRAIN = {
    *("accelerate", "datasets", "matplotlib", "numpy", "peft", "psutil", "pydantic", "rich", "safetensors"),
    *("tensorboard", "tokenizers", "transformers", "typer", "yaml"),
}


# Of the extra `real`, beyond these.
REAL = {"gguf"}


def missing(what: str, error: BaseException | None) -> str | None:
    """The line for an import that failed, or for one that it was raised from; None where that is no package of an extra."""
    while error is not None:
        package = (getattr(error, "name", None) or "").partition(".")[0]
        extra = "train" if package in TRAIN else "real" if package in REAL else None
        if isinstance(error, ModuleNotFoundError) and extra is not None:
            return (
                f'{what} needs {package}, which is not installed: pip install ".[{extra}]" in the source tree brings it'
            )
        error = error.__cause__
    return None
