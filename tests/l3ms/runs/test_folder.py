"""What may be removed where a run is replaced."""

import os
import socket

import pytest

from l3ms.config.run_config import ConfigError
from l3ms.runs import folder
from l3ms.runs.whole_files import remove


def test_a_folder_is_of_one_process_at_a_time(tmp_path):
    place = tmp_path / "new" / "out"
    with folder.alone_in(place):
        for going_on in (False, True):
            with pytest.raises(ConfigError, match=r"^output: a run in .*out is going on in another process$"):
                folder.check_output(place, overwrite=not going_on, going_on=going_on)
    folder.check_output(place, overwrite=False)
    assert not list(place.iterdir())


def test_a_forked_process_does_not_keep_the_folder(tmp_path):
    here, there = socket.socketpair()
    with folder.alone_in(tmp_path):
        child = os.fork()
        if child == 0:
            here.close()
            there.send(b"begun")
            there.recv(1)  # until the other end is closed
            os._exit(0)
        there.close()
        here.recv(5)
    try:
        with folder.alone_in(tmp_path):
            assert os.waitpid(child, os.WNOHANG) == (0, 0)  # it is still there
    finally:
        here.close()
        os.waitpid(child, 0)


def test_what_no_run_has_made_is_not_overwritten(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "config.yaml").touch()
    for going_on in (False, True):
        with pytest.raises(
            ConfigError, match=r"^(output|resume): .*model in .* would be removed, and nothing there says"
        ):
            folder.check_output(tmp_path, overwrite=not going_on, going_on=going_on)
    (tmp_path / "metrics.jsonl").touch()
    folder.check_output(tmp_path, overwrite=True)
    code = {"constraints.0.function": str(tmp_path / "model/rewards.py")}
    with pytest.raises(ConfigError, match=r"^output: .*constraints\.0\.function is read from it"):
        folder.check_output(tmp_path, overwrite=True, inputs=code)
    for name in ("metrics.jsonl", "model"):
        remove(tmp_path / name)
    folder.check_output(tmp_path, overwrite=False, going_on=True)  # a run that was ended as it began
    with pytest.raises(ConfigError, match=r"^output: config\.yaml in "):
        folder.check_output(tmp_path, overwrite=True)
