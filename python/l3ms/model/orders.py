"""Which rows or batches of its data a run takes next, and where in that order it is: so a checkpoint can go on there."""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch

logger = logging.getLogger(__name__)


class PromptOrder:
    """Rows in a new random order each time around, from a generator of its own; ranks take turns."""

    def __init__(self, rows: Any, *, seed: int, rank: int, world: int):
        if len(rows) < world:
            raise ValueError(f"{len(rows)} rows cannot be shared by {world} processes: each needs one of its own")
        self.rows, self.seed, self.rank, self.world = rows, seed, rank, world
        self.go_to(0)

    def take(self, count: int) -> list[dict[str, Any]]:
        return [self.rows[index] for index in self._indices(count)]

    def go_to(self, taken: int) -> None:
        """Where the order is after `taken` rows of this rank."""
        self._generator = torch.Generator().manual_seed(self.seed)
        self._left: Sequence[int] = ()
        self.taken = 0
        self._indices(taken)

    def _indices(self, count: int) -> list[int]:
        found: list[int] = []
        while len(found) < count:
            if not self._left:
                self._left = torch.randperm(len(self.rows), generator=self._generator).tolist()[self.rank :: self.world]
            wanted = count - len(found)
            found += self._left[:wanted]
            self._left = self._left[wanted:]
        self.taken += count
        return found

    def state(self) -> dict[str, int]:
        return {"taken": self.taken, "rows": len(self.rows), "seed": self.seed, "world": self.world}

    def restore(self, state: dict[str, int]) -> None:
        """From the beginning where the order is another one: other prompts, another seed or number of ranks."""
        same = state == self.state() | {"taken": state["taken"]}
        if state.get("world", self.world) != self.world:
            logger.warning(
                "the checkpoint is of %d processes, and these are %d: prompts begin in a new order, and each process samples from another "
                "stream than it would have",
                state["world"], self.world,
            )  # fmt: skip
        elif not same:
            logger.warning("the checkpoint's prompts were in another order (%s): beginning a new one", state)
        self.go_to(state["taken"] if same else 0)


class BatchOrder:
    """The batches of an iterable in its own order, again and again."""

    def __init__(self, loader: Iterable[Any]):
        self.loader = loader
        self._left: Iterator[Any] = iter(())
        self.taken = 0

    def take(self) -> Any:
        batch = next(self._left, None)
        if batch is None:
            self._left = iter(self.loader)
            batch = next(self._left, None)
        if batch is None:
            raise ValueError(f"the data of a constraint has no batch: {type(self.loader).__name__} is empty")
        self.taken += 1
        return batch

    def state(self) -> dict[str, int]:
        return {"taken": self.taken}

    def restore(self, state: Mapping[str, int]) -> None:
        """By going through it to where it was: the same batches, where its order is the same each time that a run starts."""
        self._left, self.taken = iter(()), 0
        for _ in range(state["taken"]):
            self.take()


class Order(Protocol):
    """A place in data: `PromptOrder`, `BatchOrder`."""

    def state(self) -> dict[str, int]: ...

    def restore(self, state: dict[str, int]) -> None: ...
