"""Files named by somebody else: only regular ones are opened, and nothing is waited on."""

import os
import socket

import pytest

from l3ms.regular_files import check_folder, is_regular, open_regular, read_regular


def special(folder):
    """Kind -> a path of that kind."""
    os.mkfifo(folder / "fifo")
    (folder / "folder").mkdir()
    server = socket.socket(socket.AF_UNIX)
    here = os.getcwd()
    os.chdir(folder)  # the name of a socket is short
    server.bind("socket")
    os.chdir(here)
    server.close()
    (folder / "link").symlink_to("fifo")
    return {
        "a FIFO": folder / "fifo",
        "a folder": folder / "folder",
        "a socket": folder / "socket",
        "a device": "/dev/zero",
        "a (FIFO)": folder / "link",
    }


def test_what_is_no_regular_file_is_refused_in_words_at_once(tmp_path):
    for kind, path in special(tmp_path).items():
        with pytest.raises(OSError, match=f"is {kind}, not a regular file"):
            open_regular(path)
        assert not is_regular(path)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("no\0where", "holds a NUL character"),
        ("half\ud800", "holds a character that no name can have"),
        ("x" * 300, "name too long"),
        ("loop", "levels of symbolic links"),
        ("missing", "No such file"),
    ],
)
def test_names_that_no_file_can_have_are_os_errors(tmp_path, name, reason):
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OSError, match=f"(?i){reason}"):
        read_regular(tmp_path / name)
    assert not is_regular(tmp_path / name)


def test_a_regular_file_is_read_also_through_a_link(tmp_path):
    (tmp_path / "file").write_bytes(b"12345")
    (tmp_path / "link").symlink_to("file")
    assert read_regular(tmp_path / "link") == b"12345"
    assert read_regular(tmp_path / "file", most=5) == b"12345"
    with pytest.raises(OSError, match="larger than 4 bytes"):
        read_regular(tmp_path / "file", most=4)


def test_a_folder_is_refused_for_what_is_in_it(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file").touch()
    (tmp_path / "a" / "dangling").symlink_to("nowhere")
    check_folder(tmp_path)
    os.mkfifo(tmp_path / "a" / "fifo")
    with pytest.raises(OSError, match="is a FIFO, not a regular file"):
        check_folder(tmp_path)
