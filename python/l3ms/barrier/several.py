"""Several optimizers as one: Muon for the matrices and AdamW for the rest, with one clipping and one schedule.

Whoever holds the whole sees one torch optimizer: the groups of all parts one after the other, their states as one mapping, a `state_dict`
in torch's own format. Each part keeps its state, its `step` and its `load_state_dict`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch


class SeveralOptimizers(torch.optim.Optimizer):
    """`parts` as one optimizer, each with its own options; a scheduler has one rate for each of their groups.

    Raises:
        ValueError: a part is no optimizer, or shares a parameter with another.
    """

    def __init__(self, parts: Sequence[torch.optim.Optimizer]):
        for at, part in enumerate(parts):
            if not isinstance(part, torch.optim.Optimizer):
                raise ValueError(f"base[{at}] must be a torch.optim.Optimizer, got {type(part).__name__}")
        if not parts:
            raise ValueError("base must hold an optimizer, got an empty list")
        taken: set[int] = set()
        for at, part in enumerate(parts):
            own = {id(parameter) for group in part.param_groups for parameter in group["params"]}
            if taken & own:
                raise ValueError(
                    f"base[{at}]: {type(part).__name__} has parameters that an optimizer before it has too"
                )
            taken |= own
        self.parts = list(parts)
        super().__init__(self.param_groups, {})
        self.defaults, self.state = _defaults(self.parts), States(self.parts)  # type: ignore[assignment]

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """Those that the parts have now: one that loads a state has others afterwards."""
        return [group for part in self.parts for group in part.param_groups]

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        """torch's own __init__ begins with none."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Raises `ValueError` but while the optimizer is made: nobody says which part would step it."""
        if isinstance(self.state, States):
            raise ValueError("add_param_group: add the group to one of the optimizers before they become one")

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        assert closure is None  # L3MOptimizer has called it
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none)

    def train(self) -> None:
        self._pass_on("train")

    def eval(self) -> None:
        self._pass_on("eval")

    def _pass_on(self, mode: str) -> None:
        for part in self.parts:
            if callable(change := getattr(part, mode, None)):
                change()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:  # type: ignore[override]
        """Each part is given its own groups, and the state of what they name. Raises `ValueError` where there are more or fewer groups."""
        groups, state = list(state_dict["param_groups"]), state_dict["state"]
        wanted = [len(part.param_groups) for part in self.parts]
        if len(groups) != sum(wanted):
            raise ValueError(f"load_state_dict: the state has {len(groups)} groups, the optimizers have {sum(wanted)}")
        for part, count in zip(self.parts, wanted, strict=True):
            own, groups = groups[:count], groups[count:]
            names = {name for group in own for name in group["params"]}
            part.load_state_dict(
                {"state": {key: value for key, value in state.items() if key in names}, "param_groups": own}
            )

    def __getstate__(self) -> dict[str, Any]:
        return {"parts": self.parts}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.parts = state["parts"]
        super().__setstate__({"defaults": _defaults(self.parts), "state": States(self.parts)})


def _defaults(parts: list[torch.optim.Optimizer]) -> dict[str, Any]:
    """The options that all parts share; and the first one's rate, which schedulers ask for (transformers' polynomial one)."""
    first, *others = [part.defaults for part in parts]
    shared = {name: value for name, value in first.items() if all(name in o and o[name] == value for o in others)}
    return shared | {name: first[name] for name in ("lr",) if name in first}


class States(MutableMapping[Any, Any]):
    """The states of all `parts`, each where it is: by parameter, as torch's optimizers keep them."""

    def __init__(self, parts: list[torch.optim.Optimizer]):
        self._parts = parts

    def _of(self, parameter: Any) -> Any:
        for part in self._parts:
            if parameter in part.state or any(p is parameter for group in part.param_groups for p in group["params"]):
                return part.state
        raise KeyError(parameter)

    def __getitem__(self, parameter: Any) -> Any:
        return self._of(parameter)[parameter]

    def __setitem__(self, parameter: Any, value: Any) -> None:
        self._of(parameter)[parameter] = value

    def __delitem__(self, parameter: Any) -> None:
        del self._of(parameter)[parameter]

    def __contains__(self, parameter: object) -> bool:
        return any(parameter in part.state for part in self._parts)

    def __iter__(self) -> Iterator[Any]:
        return (parameter for part in self._parts for parameter in part.state)

    def __len__(self) -> int:
        return sum(len(part.state) for part in self._parts)
