"""Ends all processes of a run when one of them has failed, is gone or does not move, and says which.

A rank that waits in a collective for one that will not come waits for torch's timeout, and then cannot say for whom. So each rank has a
thread that writes, every second, to the store where the ranks have met that it is alive and what it does. Rank 0 reads what all write, the
others what rank 0 writes: one that is silent for `seconds` (its process is stopped, or its machine gone) ends the run. A rank with an error
writes its line and exit code there; the first to do so is the one whose line is printed, and all others end with its code. A store that
does not answer is that of a rank 0 which is stopped: a second thread, which asks nobody, sees that.

Silence is counted in the looks that this process takes, not by the clock: a process that was itself stopped for an hour blames nobody.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import timedelta
from types import MappingProxyType
from typing import Any, NoReturn

from l3ms.ranks.launched import Launched

START = 300.0  # seconds to meet in, where nothing else is said
BEAT = 1.0  # seconds between two signs of life
ALIKE = 1.5  # seconds in which rank 0 may say what is wrong on all
SUSPECT = 5.0  # seconds of silence after which a rank is suspected when a collective has broken off
ACKNOWLEDGE = 5.0  # seconds that an ending rank waits for the others to have read why
ENVIRONMENT, INTERRUPTED = 5, 130  # exit codes, as `commands.ending` has them


class Lookout:
    """Of this process, from the beginning on.

    Attributes:
        seconds: of silence that end a run.
        doing: says in a few words what this rank does.
        clear: removes what this rank has begun to write and has not finished, where another one ends it.
    """

    def __init__(self, place: Launched, seconds: float = START):
        self.place, self.seconds = place, seconds
        self.doing: Callable[[], str] = lambda: "loading"
        self.clear: Callable[[], Any] = _nothing
        self._served = self._client(serves=place.rank == 0 and not place.agent)
        self.store = self._named(self._served)  # of torch's process group
        self._over = threading.Event()
        self._ending = threading.Lock()
        self._rounds = 0
        self._beats = self._named(self._client())
        for watch in (self._beat, self._judge):
            threading.Thread(target=watch, name=f"l3ms {watch.__name__}", daemon=True).start()

    def _client(self, *, serves: bool = False) -> Any:
        import torch.distributed as dist  # has no stores where torch is built without it

        return dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
            self.place.address,
            self.place.port,
            is_master=serves,
            timeout=timedelta(seconds=self.seconds),
            wait_for_workers=False,
        )

    def _named(self, store: Any) -> Any:
        import torch.distributed as dist

        return dist.PrefixStore(f"l3ms/{self.place.attempt}", store)  # pyright: ignore[reportPrivateImportUsage]

    # ---- the threads ----

    def _beat(self) -> None:
        """Write, read, look."""
        number, last = 0, time.monotonic()
        heard: dict[int, tuple[str | None, float]] = {}
        me = {"pid": os.getpid(), "machine": socket.gethostname()}
        while not self._over.is_set():
            try:
                number += 1
                self._beats.set(f"beat/{self.place.rank}", json.dumps({**me, "number": number, "doing": self.doing()}))
                if (ended := self._ended(self._beats)) is not None and ended["rank"] != self.place.rank:
                    self._follow(ended)
                now = time.monotonic()
                for rank in range(1, self.place.world) if self.place.rank == 0 else (0,):
                    silent = _listen(self._beats, heard, rank, min(now - last, 2 * BEAT))
                    if silent > self.seconds or (silent > SUSPECT and _state(heard[rank][0]) == ENDED):
                        said = f"has not been heard of for {silent:.0f} s (train.timeout: {self.seconds:g})"
                        self._speak(f"{_who(rank, heard)} {said}", ENVIRONMENT, {rank: heard[rank][0]})
                last = now
            except Exception as error:  # a connection that broke, of torch's several kinds
                self._lost(error)
            self._rounds += 1
            self._over.wait(BEAT)

    def _judge(self) -> None:
        """Whether the other thread still gets answers."""
        rounds, waited = self._rounds, 0.0
        while not self._over.wait(BEAT / 2):
            rounds, waited = (self._rounds, 0.0) if self._rounds != rounds else (rounds, waited + BEAT / 2)
            if waited > self.seconds:
                holder = self.place.holder
                self._alone(f"{holder}, where the ranks meet, has not answered for {self.seconds:g} s (train.timeout)")

    def _ended(self, store: Any) -> dict[str, Any] | None:
        return json.loads(store.get("ended")) if store.check(["ended"]) else None

    # ---- how a run ends ----

    def finish(self, code: int) -> int:
        """Wait until all ranks have come here; -> the largest of their codes, on all of them."""
        try:
            mine = self._named(self._client())
            mine.set(f"done/{self.place.rank}", str(code))
            keys = [f"done/{rank}" for rank in range(self.place.world)]
            while not mine.check(keys):
                time.sleep(0.1)
            codes = [int(mine.get(key)) for key in keys]
            self._over.set()
            left, begin = mine.add("left", 1), time.monotonic()
            while self.place.rank == 0 and left < self.place.world and time.monotonic() - begin < ACKNOWLEDGE:
                time.sleep(0.05)  # the store may be of this process
                left = mine.add("left", 0)
        except Exception as error:
            self._lost(error)
            return code
        return max(codes)

    def fail(self, line: str, code: int, *, elsewhere: bool = False) -> NoReturn:
        """End all ranks with this one's line and code; or with that of the rank that caused it, where it is `elsewhere`."""
        for number in (signal.SIGINT, signal.SIGTERM):  # the launcher sends them to those that are left
            with contextlib.suppress(ValueError):  # not the main thread
                signal.signal(number, signal.SIG_IGN)
        gone: Mapping[int, str | None] = {}
        if elsewhere:
            (line, gone), code = self._cause(line), ENVIRONMENT
        elif self.place.rank:
            time.sleep(ALIKE)
        self._speak(line, code, gone)

    def _cause(self, line: str) -> tuple[str, dict[int, str | None]]:
        """Of a collective that broke off: another rank says it, and ends this one; or it is silent; or it is not known.
        -> (line, by silent rank what it wrote last)"""
        others = [rank for rank in range(self.place.world) if rank != self.place.rank]
        heard: dict[int, tuple[str | None, float]] = {}
        gone: dict[int, str | None] = {}
        begin = last = time.monotonic()
        try:
            mine = self._named(self._client())
            while not gone and time.monotonic() - begin < SUSPECT + 3 * BEAT:
                time.sleep(BEAT / 2)
                now = time.monotonic()
                for rank in others:
                    silent = _listen(mine, heard, rank, now - last)
                    if silent > SUSPECT or (silent > 2 * BEAT and _state(heard[rank][0])):
                        gone[rank] = heard[rank][0]
                last = now
        except Exception as error:
            self._lost(error)
        if gone:
            verb = "has" if len(gone) == 1 else "have"
            return f"{' and '.join(_who(rank, heard) for rank in gone)} {verb} gone: {line}", gone
        return f"{line} (train.timeout is {self.seconds:g} s; {'; '.join(_who(rank, heard) for rank in others)})", {}

    def _speak(self, line: str, code: int, gone: Mapping[int, str | None] = MappingProxyType({})) -> NoReturn:
        """Say why, if no other rank has, and end; without waiting for those that are `gone`."""
        self._only_one()
        own = {"rank": self.place.rank, "code": code, "line": line, "gone": list(gone)}
        try:
            mine = self._named(self._client())
            ended = json.loads(mine.compare_set("ended", "", json.dumps(own)))
        except Exception:  # the store is gone, with whoever held it
            mine, ended = None, own
        if ended["rank"] == self.place.rank:
            self._print(line)
            for written in gone.values():
                _wake(written)
        self._exit(ended["code"], mine, set(range(self.place.world)) - set(ended["gone"]))

    def _follow(self, ended: dict[str, Any]) -> NoReturn:
        self._only_one()
        self._exit(ended["code"], self._beats, set(range(self.place.world)) - set(ended["gone"]))

    def _lost(self, error: Exception) -> None:
        """The connection to where the ranks meet broke off."""
        if not self._over.is_set():
            self._alone(f"{self.place.holder}, where the ranks meet, has ended ({type(error).__name__})")

    def _alone(self, line: str) -> NoReturn:
        """There is nowhere to say it: one process of each machine prints."""
        self._only_one(ACKNOWLEDGE + BEAT)
        with_rank_0 = self.place.rank == self.place.local_rank and not self.place.agent
        if self.place.local_rank == int(with_rank_0):
            self._print(line)
        self._exit(ENVIRONMENT)

    def _only_one(self, patience: float = -1) -> None:
        """Of the threads that find an end; the others wait for it, or for so many seconds: it may wait for a store that does not answer."""
        if not self._ending.acquire(blocking=False):
            self._ending.acquire(timeout=patience)

    def _print(self, line: str) -> None:
        who = f"rank {self.place.rank}: " if self.place.rank else ""
        print(f"l3ms: {who}{' '.join(line.split())}", file=sys.stderr, flush=True)

    def _exit(self, code: int, store: Any = None, others: Iterable[int] = ()) -> NoReturn:
        """Without waiting for a thread that waits in a collective; but for the `others` to have read why, where this process may be
        what they read it from, or its end would end them otherwise."""
        with contextlib.suppress(Exception):
            self.clear()
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
            if store is not None:
                store.set(f"gone/{self.place.rank}", "")
                keys, begin = [f"gone/{rank}" for rank in others], time.monotonic()
                while not store.check(keys) and time.monotonic() - begin < ACKNOWLEDGE:
                    time.sleep(0.1)
        os._exit(code)


def _nothing() -> None:
    pass


ENDED, STOPPED = ", ended", ", stopped"


def _listen(store: Any, heard: dict[int, tuple[str | None, float]], rank: int, passed: float) -> float:
    """Seconds for which a rank has written nothing new; `heard`: by rank what it wrote last, and these seconds."""
    key = f"beat/{rank}"
    written = store.get(key).decode() if store.check([key]) else None
    before, silent = heard.get(rank, (None, 0.0))
    heard[rank] = (written, silent + passed if written == before else 0.0)
    return heard[rank][1]


def _who(rank: int, heard: dict[int, tuple[str | None, float]]) -> str:
    """With what is known of its process."""
    written = heard[rank][0]
    if written is None:
        return f"rank {rank} (not there yet)"
    beat = json.loads(written)
    return f"rank {rank} (process {beat['pid']} on {beat['machine']}{_state(written)}; {beat['doing']})"


def _wake(written: str | None) -> None:
    """A stopped process of this machine: it finds that the run has ended, and ends; the launcher would wait for it."""
    if _state(written) == STOPPED:
        with contextlib.suppress(OSError):
            os.kill(json.loads(written or "{}")["pid"], signal.SIGCONT)


def _state(written: str | None) -> str:
    """Of the process that has written this: what is to be said of it, where it is known."""
    beat = json.loads(written or "{}")
    if beat.get("machine") != socket.gethostname():
        return ""
    import psutil

    try:
        state = psutil.Process(beat["pid"]).status()
    except psutil.NoSuchProcess:
        return ENDED
    except psutil.Error:  # not ours to look at
        return ""
    return {"stopped": STOPPED, "zombie": ENDED}.get(state, "")


_current: Lookout | None = None


def begin(place: Launched) -> Lookout:
    """The lookout of this process."""
    global _current
    _current = Lookout(place)
    return _current


def current() -> Lookout | None:
    return _current


def doing(say: Callable[[], str]) -> None:
    """What this rank is said to do, from now on."""
    if _current is not None:
        _current.doing = say


@contextlib.contextmanager
def clearing(act: Callable[[], Any]) -> Iterator[None]:
    """Within, `act` is called where another rank ends this one, which then waits for it and is told of nothing."""
    if _current is None:
        yield
        return
    _current.clear = act
    try:
        yield
    finally:
        _current.clear = _nothing
