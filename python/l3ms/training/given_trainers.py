"""A trainer of somebody else with constraints: its own task half-steps, and constraint half-steps on fresh samples in between.

The task's loss, data, evaluation, checkpoints and logs stay the trainer's own. A checkpoint has more in it: the barrier's state, as a part
of the optimizer's, and `l3m.json`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from l3ms.constraints.constraint import Constraint, check_constraints
from l3ms.training.constraining import Constraining
from l3ms.training.honoured import check_arguments, check_functions, check_given, check_parallelism, check_rollout
from l3ms.training.own_forward import share_forward
from l3ms.training.phases import Phases
from l3ms.training.settings import L3MSettings
from l3ms.training.trl_options import (
    check_arguments_of,
    check_settings,
    check_tokenizer,
    prompt_rows,
)


class GivenTrainer(Constraining):
    """Mixed in before the class of a trainer, `given_name`; takes three arguments more, see `constrained`."""

    given_name = ""
    half_steps = "alternating"

    def __init__(
        self,
        *args: Any,
        constraints: Sequence[Constraint] = (),
        prompts: Any = None,
        l3m: L3MSettings | None = None,
        **kwargs: Any,
    ):
        given = _by_name(type(self), args, kwargs)
        where = self.given_name
        l3m = L3MSettings() if l3m is None else l3m
        check_settings(l3m, where)
        check_arguments_of(where, given.get("args"))
        self.constraints, self.engine = check_constraints(constraints), None
        check_functions(l3m, self.constraints)
        check_given(given, l3m.solver)
        self.l3m = replace(l3m, half_steps=l3m.half_steps or self.half_steps)
        rows = self._rows(given, prompts)
        super().__init__(*args, **kwargs)
        check_arguments(self.args)
        check_parallelism(self)
        self._check_samples(rows)
        self.phases = Phases(self.args.device)  # not begun: nothing is timed
        self._fused = self.l3m.solver != "none" and self._calls_head()
        share_forward(self.model, fuse=self._fused)
        self.set_up(rows, "train_dataset" if prompts is None else "prompts")

    def _rows(self, given: dict[str, Any], prompts: Any) -> Any:
        """To be answered, None where no constraint samples; checked before the trainer is made."""
        if self.l3m.solver == "none":
            return None
        check_rollout(self.l3m, self.constraints)
        return prompt_rows(self.given_name, prompts, given.get("train_dataset"), self.constraints)

    def prompts_of(self, rows: Any) -> Any:
        return self._rows({"train_dataset": rows}, None)

    def _check_samples(self, rows: Any) -> None:
        if rows is not None:
            check_tokenizer(self.processing_class)

    def _calls_head(self) -> bool:
        """Whether anything goes through the fused head."""
        return True

    def begin_watching(self) -> None:
        if self.watches and not self._fused:
            raise ValueError(
                "Watch: give it as callbacks=[...] when the trainer is made, which prepares the model for it"
            )
        super().begin_watching()

    @contextmanager
    def reading(self) -> Iterator[None]:
        yield

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self.load_constraints(Path(checkpoint))


def _by_name(kind: type, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What a trainer is given, by the names of its arguments: also of those that a derived class hands on as *args and **kwargs."""
    given: dict[str, Any] = {}
    left, named = list(args), dict(kwargs)
    for cls in kind.__mro__[kind.__mro__.index(GivenTrainer) + 1 :]:
        if "__init__" not in vars(cls):
            continue
        parameters = list(inspect.signature(vars(cls)["__init__"]).parameters.values())[1:]
        open_ends = {p.kind for p in parameters} & {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}
        for p in parameters:
            if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and left and p.name not in given:
                given[p.name] = left.pop(0)
            elif p.name in named and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY):
                given[p.name] = named.pop(p.name)
        if not open_ends:
            break
    return given
