"""Checkpoints are whole or not there, whatever ends the process that writes them, and what is damaged later is found out."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from checkpoint_folders import FILES, write
from namespaces import in_a_namespace

from l3ms.training import checkpoints


def names(place):
    return {path.name for path in place.iterdir()}


def test_a_sealed_checkpoint_is_valid_and_nothing_else_is_left(tmp_path):
    folder = write(tmp_path / "run", 2)
    assert folder == tmp_path / "run" / "checkpoint-2"
    assert checkpoints.problem(folder) is None
    assert names(folder.parent) == {"checkpoint-2"}
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*")} == {*FILES, "deep", "manifest.json"}
    assert (folder / "model.safetensors").read_bytes() == FILES["model.safetensors"]


def test_one_of_the_same_name_is_replaced(tmp_path):
    write(tmp_path, 2, {"old": b"1"})
    folder = write(tmp_path, 2)
    assert checkpoints.problem(folder) is None
    assert not (folder / "old").exists()
    assert names(tmp_path) == {"checkpoint-2"}


class Killed(BaseException):
    """In place of a signal, which runs nothing more of what is under way."""


def test_one_that_is_being_replaced_is_found_until_the_new_one_has_its_name(tmp_path, monkeypatch):
    write(tmp_path, 2, {"old": b"1"})
    folder, rename, names_given = checkpoints.begin(tmp_path), Path.rename, []

    def killed(path, target):
        if names_given:
            raise Killed
        names_given.append(target)
        return rename(path, target)

    (folder / "checkpoint-2").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        with pytest.raises(Killed):
            checkpoints.seal(folder, "checkpoint-2")
    found, damaged = checkpoints.newest(tmp_path)
    assert found is not None
    assert (found.name, damaged) == ("checkpoint-2", {})
    assert (found / "old").exists()
    checkpoints.begin(tmp_path)
    assert names(tmp_path) == {"checkpoint-2", checkpoints.PARTIAL}
    assert (tmp_path / "checkpoint-2" / "old").exists()
    assert checkpoints.problem(tmp_path / "checkpoint-2") is None


def test_what_torch_save_does_not_say_is_found_out(tmp_path, monkeypatch, train, make_model):
    """transformers has it write a file of each checkpoint; its error names neither the file nor the reason."""
    import torch

    def full(path):
        return OSError(errno.ENOSPC, "No space left on device")

    def save(*arguments, **options):
        raise RuntimeError("basic_ios::clear: iostream error")

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(RuntimeError, match="iostream"):
        train(make_model(), save_strategy="steps", save_steps=1)
    monkeypatch.setattr(checkpoints, "unwritable", full)
    with pytest.raises(OSError, match="No space left"):
        train(make_model(), save_strategy="steps", save_steps=1)
    assert names(tmp_path) == set()
    monkeypatch.undo()
    assert checkpoints.unwritable(tmp_path) is None
    assert names(tmp_path) == set()
    assert checkpoints.unwritable(tmp_path / "gone").errno == errno.ENOENT  # type: ignore[union-attr]


def flip(path: Path) -> None:
    contents = bytearray(path.read_bytes())
    contents[len(contents) // 2] ^= 1
    path.write_bytes(contents)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: flip(f / "model.safetensors"), "model.safetensors is not what was written"),
        (lambda f: os.truncate(f / "model.safetensors", 8999), "model.safetensors is not what was written"),
        (lambda f: (f / "a").unlink(), "a is missing"),
        (lambda f: (f / "deep" / "more.pt").write_bytes(b"x"), "deep/more.pt is not in its manifest.json"),
        (lambda f: (f / "manifest.json").unlink(), "it has no manifest.json: it was not finished, or is not one of ours"),
        (lambda f: (f / "manifest.json").write_text('{"files":'), "its manifest.json cannot be read"),
        (lambda f: (f / "manifest.json").write_text("[]"), "its manifest.json cannot be read"),
        (lambda f: (f / "manifest.json").write_text('{"files": {"a": 3}}'), "its manifest.json cannot be read"),
        (lambda f: (f / "manifest.json").write_bytes(b"\xff\xfe"), "its manifest.json cannot be read"),
        (lambda f: ((f / "a").unlink(), (f / "a").symlink_to(f / "trainer_state.json")), "a is not what was written"),
        (lambda f: ((f / "a").unlink(), (f / "a").symlink_to(f)), "a is not what was written"),
        (lambda f: ((f / "a").unlink(), (f / "a").symlink_to("gone")), "a is not what was written"),
    ],
)  # fmt: skip
def test_damage_is_found_and_the_one_before_is_taken(tmp_path, damage, message):
    old, new = write(tmp_path, 9), write(tmp_path, 10)
    damage(new)
    assert checkpoints.problem(new) == message
    assert checkpoints.newest(tmp_path) == (old, {new: message})


def test_a_link_with_the_right_contents_is_not_taken(tmp_path):
    folder = write(tmp_path / "run", 1)
    (folder / "a").rename(tmp_path / "elsewhere")
    (folder / "a").symlink_to(tmp_path / "elsewhere")
    assert checkpoints.problem(folder) == "a is not what was written"


def test_a_manifest_that_leads_out_of_the_folder_is_not_followed(tmp_path):
    folder = write(tmp_path / "run", 1)
    (tmp_path / "run" / "secret").write_text("1")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["../secret"] = manifest["files"]["a"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert checkpoints.problem(folder) == "../secret is missing"


def test_the_newest_is_the_one_with_the_most_steps_and_other_names_are_none(tmp_path):
    assert checkpoints.newest(tmp_path / "nowhere") == (None, {})
    for step in (100, 9, 20):
        write(tmp_path, step)
    for name in ("checkpoint-best", "checkpoint-200.old", "xcheckpoint-300"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-400").write_text("a file")
    assert [path.name for path in checkpoints.checkpoints(tmp_path)] == [
        "checkpoint-100",
        "checkpoint-20",
        "checkpoint-9",
    ]
    assert checkpoints.newest(tmp_path) == (tmp_path / "checkpoint-100", {})


ALL = {1, 2, 3, 4}


@pytest.mark.parametrize(
    ("limit", "keep", "left"),
    [
        (2, None, {3, 4}),
        (1, 2, {2, 4}),
        (2, 1, {1, 4}),
        (3, 1, {1, 3, 4}),
        (2, 4, {3, 4}),
        (None, None, ALL),
        (0, 2, ALL),
        (9, 1, ALL),
    ],
)
def test_old_ones_are_removed(tmp_path, limit, keep, left):
    for step in (1, 2, 3, 4):
        write(tmp_path, step, {"a": b"1"})
    checkpoints.rotate(tmp_path, limit, keep=None if keep is None else tmp_path / f"checkpoint-{keep}")
    assert names(tmp_path) == {f"checkpoint-{step}" for step in left}


@pytest.mark.parametrize(
    ("limit", "keep", "left"), [(1, None, {3}), (2, None, {2, 3}), (3, None, {1, 2, 3}), (2, 1, {1, 3})]
)
def test_those_of_a_longer_run_go_first(tmp_path, limit, keep, left):
    for step in (1, 2, 3, 5, 4):
        write(tmp_path, step, {"a": b"1"})
    kept = None if keep is None else tmp_path / f"checkpoint-{keep}"
    checkpoints.rotate(tmp_path, limit, keep=kept, newest=tmp_path / "checkpoint-3")
    assert names(tmp_path) == {f"checkpoint-{step}" for step in left}


# ---- ended while it writes ----

CHILD = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from checkpoint_folders import checkpoints, write
place, at = Path(sys.argv[2]), int(sys.argv[3])
events = 0
def count(event, arguments):
    global events
    if event.startswith(("open", "os.", "shutil.")):
        events += 1
        if events == at:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(count)
write(place, 4)
checkpoints.rotate(place, 2)
print(events)
"""


def child(place: Path, at: int) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", CHILD, str(Path(__file__).parents[1]), str(place), str(at)], capture_output=True, text=True, timeout=60
    )  # fmt: skip


def start(place: Path) -> Path:
    shutil.rmtree(place, ignore_errors=True)
    for step in (2, 3):
        write(place, step)
    return place


def assert_whole(place: Path, wanted=(3, 4)) -> None:
    """What has the name of a checkpoint is one, and the newest is the one before or the new one; the next writer clears the rest away."""
    for folder in checkpoints.checkpoints(place):
        assert checkpoints.problem(folder) is None, folder
    found, damaged = checkpoints.newest(place)
    assert found is not None
    assert int(found.name.partition("-")[2]) in wanted
    assert damaged == {}
    write(place, 5)
    checkpoints.rotate(place, 2)
    assert names(place) == {found.name, "checkpoint-5"}


def test_killed_at_every_step_of_the_writer(tmp_path):
    """Each time that Python opens, renames, makes or removes something, the process is killed."""
    done = child(start(tmp_path / "run"), 0)
    assert done.returncode == 0, done.stderr
    events = int(done.stdout)
    assert events > 20
    for at in range(1, events + 1):
        place = start(tmp_path / "run")
        assert child(place, at).returncode == -signal.SIGKILL
        assert_whole(place)


@pytest.mark.slow
def test_killed_at_a_thousand_random_moments(tmp_path):
    """The writer goes round and round in a process of its own: a new checkpoint every few milliseconds."""
    loop = (
        "import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path\n"
        "from checkpoint_folders import FILES, checkpoints, write\n"
        "step = int(sys.argv[3])\n"
        "while True:\n"
        "    step += 1; write(Path(sys.argv[2]), step, FILES | {'model.safetensors': bytes([step % 256]) * 300_000})\n"
        "    checkpoints.rotate(Path(sys.argv[2]), 2); print(step, flush=True)\n"
    )
    place, picks, newest = start(tmp_path / "run"), random.Random(0), 3
    for _ in range(1000):
        arguments = [sys.executable, "-c", loop, str(Path(__file__).parents[1]), str(place), str(newest)]
        with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            told = int(process.stdout.readline())  # it is at work
            time.sleep(picks.uniform(0, 0.03))
            process.kill()
            told = max([told, *(int(line) for line in process.stdout.read().splitlines() if line)])
        for folder in checkpoints.checkpoints(place):
            assert checkpoints.problem(folder) is None, folder
        found, _ = checkpoints.newest(place)
        assert found is not None
        newest = int(found.name.partition("-")[2])
        assert newest >= told


# ---- no room ----

FULL = """
import errno, os, subprocess, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from checkpoint_folders import FILES, checkpoints, write
place = Path(sys.argv[2])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)], check=True)
write(place, 2)
files = FILES | {"model.safetensors": b"w" * 90_000}
failed = 0
for pages in range(64):
    filler = place / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError as error:
            assert error.errno == errno.ENOSPC
    os.truncate(filler, max(0, filler.stat().st_size - 4096 * pages))
    try:
        write(place, 3, files)
    except OSError as error:
        assert error.errno == errno.ENOSPC, error
        checkpoints.discard(place)
        failed += 1
    else:
        break
    assert checkpoints.newest(place) == (place / "checkpoint-2", {}), pages
    assert {path.name for path in place.iterdir()} == {"checkpoint-2", "filler"}, pages
    filler.unlink()
assert checkpoints.newest(place) == (place / "checkpoint-3", {})
print(failed)
"""


def test_a_disk_that_is_full_at_every_page_leaves_the_old_one_and_no_debris(tmp_path):
    arguments = [sys.executable, "-c", FULL, str(Path(__file__).parents[1]), str(tmp_path)]
    done = subprocess.run(in_a_namespace(*arguments), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 20


def test_every_file_and_the_manifest_are_on_the_disk_before_the_folder_has_its_name(tmp_path, monkeypatch):
    """A crash of the machine may lose what was not flushed: then a folder with its name would not be whole."""
    flushed: list[str] = []
    real_fsync, real_rename = os.fsync, Path.rename

    def fsync(descriptor):
        flushed.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        real_fsync(descriptor)

    def rename(path, target):
        flushed.append(f"rename to {target}")
        return real_rename(path, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", rename)
    folder = write(tmp_path, 2)
    named = flushed.index(f"rename to {folder}")
    begun = tmp_path / checkpoints.PARTIAL / "checkpoint-2"
    wanted = [str(begun / name) for name in FILES]
    manifest = flushed.index(str(begun / checkpoints.MANIFEST))
    assert all(flushed.index(name) < manifest for name in wanted), "the manifest may be there and a file not"
    assert manifest < named
    assert {str(begun), str(begun / "deep")} <= set(flushed[:named]), "the names in the folders"
    assert str(tmp_path) in flushed[named:], "the new name itself"
