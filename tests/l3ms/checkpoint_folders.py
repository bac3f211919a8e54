"""Checkpoints as the trainer writes them, of files that tell which one it is."""

from pathlib import Path

from l3ms.training import checkpoints

FILES = {"model.safetensors": b"w" * 9000, "trainer_state.json": b'{"global_step": 2}', "deep/part.bin": b"", "a": b"1"}


def write(place: Path, step: int, files=None) -> Path:
    """As the trainer does."""
    folder = checkpoints.begin(place)
    for name, contents in (FILES if files is None else files).items():
        path = folder / f"checkpoint-{step}" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(contents)
    return checkpoints.seal(folder, f"checkpoint-{step}")
