"""A process whose every change of a folder is seen before it happens, and there may fail or be the process's last.

Linux asks (seccomp's user notification) before each write, sync, rename, removal: Python's, Rust's and C++'s alike, of all its threads and
children. `act` runs in a fork, so that a parent which has imported torch pays for it once.
"""

import ctypes
import errno
import fcntl
import os
import platform
import select
import signal
import socket
import struct
import sys
import time
from pathlib import Path
from typing import NamedTuple


class Call(NamedTuple):
    what: str
    path: int | None = (
        None  # which argument is the path, in the folder whose descriptor stands before it (`at`), or else in the current one
    )
    at: bool = True
    flags: int | None = None  # of an opening
    descriptor: int = 0  # where there is no path: of the file


class Change(NamedTuple):
    what: str
    path: str
    source: str | None = None  # of a renaming, whose `path` is the new name


CALLS = {  # by number
    "x86_64": {
        1: Call("write"), 18: Call("write"), 20: Call("write"), 296: Call("write"), 74: Call("fsync"), 75: Call("fsync"),
        77: Call("truncate"), 285: Call("allocate"), 326: Call("write", descriptor=2), 40: Call("write"),
        2: Call("open", 0, at=False, flags=1), 85: Call("open", 0, at=False), 257: Call("open", 1, flags=2),
        82: Call("rename", 1, at=False), 264: Call("rename", 3), 316: Call("rename", 3), 76: Call("truncate", 0, at=False),
        83: Call("mkdir", 0, at=False), 258: Call("mkdir", 1),
        84: Call("remove", 0, at=False), 87: Call("remove", 0, at=False), 263: Call("remove", 1),
    },
    "aarch64": {
        64: Call("write"), 68: Call("write"), 66: Call("write"), 70: Call("write"), 82: Call("fsync"), 83: Call("fsync"),
        46: Call("truncate"), 47: Call("allocate"), 285: Call("write", descriptor=2), 71: Call("write"),
        56: Call("open", 1, flags=2), 38: Call("rename", 3), 276: Call("rename", 3), 45: Call("truncate", 0, at=False),
        34: Call("mkdir", 1), 35: Call("remove", 1),
    },
}  # fmt: skip
ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
SECCOMP = {"x86_64": 317, "aarch64": 277}
RECEIVE, SEND = 0xC0502100, 0xC0182101
KILL = -1  # instead of an error
AFTER = -2  # killed while the change is being made, or thereafter


class Unsupported(Exception):
    """The kernel does not ask here."""


def _filter():
    """Instructions that ask for the calls of `CALLS`, and let all others be."""
    machine = platform.machine()
    if sys.platform != "linux" or machine not in CALLS:
        raise Unsupported(f"changes of files are seen on Linux, x86-64 or AArch64, not on {sys.platform} {machine}")
    numbers = sorted(CALLS[machine])
    load = lambda at: struct.pack("HBBI", 0x20, 0, 0, at)  # noqa: E731
    done = lambda value: struct.pack("HBBI", 0x06, 0, 0, value)  # noqa: E731
    jump = lambda value, yes, no: struct.pack("HBBI", 0x15, yes, no, value)  # noqa: E731
    allow, ask = 0x7FFF0000, 0x7FC00000
    code = [load(4), jump(ARCHITECTURES[machine], 1, 0), done(allow), load(0)]
    code += [jump(number, len(numbers) - index, 0) for index, number in enumerate(numbers)]
    return b"".join([*code, done(allow), done(ask)])


def _listen():
    """Of this process and all that it starts. -> the descriptor that is asked"""
    libc = ctypes.CDLL(None, use_errno=True)
    code = _filter()
    buffer = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("HxxxxxxP", len(code) // 8, ctypes.addressof(buffer))
    libc.prctl(1, signal.SIGKILL, 0, 0, 0)  # where the one that answers has ended
    libc.prctl(38, 1, 0, 0, 0)  # no new privileges
    made = libc.syscall(SECCOMP[platform.machine()], 1, 8, ctypes.c_char_p(program))
    if made < 0:
        raise Unsupported(f"seccomp: {os.strerror(ctypes.get_errno())}")
    return made


def run(act, folder, decide, seconds=120, pause=0.0, until=None):
    """`act()` in a process of its own, which exits with what it returns.

    `decide(number, change)` is asked before each change in `folder`, counted from 1: None lets it be, a number of `errno` makes it
    fail, `KILL` ends the process and all that it started before it, `AFTER` while it is made or `pause` seconds later. Where it is still
    running at the time `until` (of `time.monotonic`), it is killed then.
    -> (exit code, negative for a signal; the changes that it went about to make)
    """
    ours, theirs = socket.socketpair()
    process = os.fork()
    if process == 0:
        code = 99
        try:
            ours.close()
            os.setsid()
            socket.send_fds(theirs, [b"x"], [listener := _listen()])
            os.close(listener)
            theirs.close()
            code = act()
        except Unsupported:
            code = 98
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code or 0)
    theirs.close()
    made = []
    try:
        descriptors = socket.recv_fds(ours, 1, 1)[1]
        if descriptors:
            try:
                _answer(process, descriptors[0], str(folder), decide, made, seconds, pause, until)
            finally:
                os.close(descriptors[0])
    finally:
        ours.close()
        status = _end(process) if sys.exc_info()[0] else os.waitpid(process, 0)[1]
    code = os.waitstatus_to_exitcode(status)
    if code == 98:
        raise Unsupported("the kernel does not ask before calls (seccomp's user notification)")
    return code, made


def _answer(process, descriptor, folder, decide, made, seconds, pause, until):
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    deadline = time.monotonic() + seconds
    while True:
        now = time.monotonic()
        ready = poll.poll(1000 * max(0, min(1, deadline - now, deadline if until is None else until - now)))
        if until is not None and time.monotonic() >= until:
            os.killpg(process, signal.SIGKILL)
            until = None
        if not ready and time.monotonic() > deadline:
            raise TimeoutError(f"after {len(made)} changes of {folder}")
        if not ready:
            continue
        if not ready[0][1] & select.POLLIN:  # none is left that could ask
            return
        asked = bytearray(80)
        try:
            fcntl.ioctl(descriptor, RECEIVE, asked)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.EINTR):  # it was ended meanwhile
                continue
            raise
        number, asker, _, call, _, _, *arguments = struct.unpack("QIIiIQ6Q", asked)
        answer = None
        try:
            change = _change(asker, call, arguments, folder)
        except OSError:  # it has ended
            change = None
        if change is not None:
            made.append(change)
            answer = decide(len(made), change)
        if answer == KILL:
            os.killpg(process, signal.SIGKILL)
            continue
        failed = answer if answer is not None and answer > 0 else 0
        try:
            fcntl.ioctl(descriptor, SEND, struct.pack("QqiI", number, 0, -failed, 0 if failed else 1))
        except OSError as error:
            if error.errno != errno.ENOENT:
                raise
        if answer == AFTER:
            time.sleep(pause)
            os.killpg(process, signal.SIGKILL)


def _change(process, number, arguments, folder):
    """What a call changes in the folder, None where it does not."""
    call = CALLS[platform.machine()][number]
    if call.path is None:
        path, source = os.readlink(f"/proc/{process}/fd/{arguments[call.descriptor]}"), None
    else:
        if call.flags is not None and not arguments[call.flags] & (os.O_CREAT | os.O_TRUNC):
            return None
        path = _path(process, call, arguments, call.path)
        source = _path(process, call, arguments, call.path - 1 - call.at) if call.what == "rename" else None
    return Change(call.what, path, source) if path.startswith(folder) else None


def _path(process, call, arguments, index):
    path = _text(process, arguments[index])
    if path.startswith("/"):
        return path
    at = ctypes.c_int(arguments[index - 1] & 0xFFFFFFFF).value if call.at else -100
    return os.path.join(os.readlink(f"/proc/{process}/{'cwd' if at == -100 else f'fd/{at}'}"), path)


def _text(process, address):
    with open(f"/proc/{process}/mem", "rb", buffering=0) as memory:
        memory.seek(address)
        found = b""
        while b"\0" not in found and len(found) < 4096:
            found += memory.read(min(256, 4096 - (address + len(found)) % 4096))  # not beyond what is there
    return os.fsdecode(found.partition(b"\0")[0])


def _end(process):
    os.killpg(process, signal.SIGKILL)
    return os.waitpid(process, 0)[1]


def files(folder):
    """What is in a folder, by relative path."""
    return {path.relative_to(folder).as_posix() for path in Path(folder).rglob("*")}
