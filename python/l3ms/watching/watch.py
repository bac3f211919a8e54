"""`Watch`: a callback of the trainer that looks for reward hacking and for constraints that pull against each other, and acts.

After every iteration it looks at the responses of the constraint half-step (EOS and truncation rates, lengths, distinct-n, duplicates), now
and then at rewards on held-out prompts and at the gradient of each constraint on its own. It is all logged as `watch/...`. A rule that
trips warns, ends the run, or takes it back to a snapshot; see `WatchConfig` for the rules and their limits.

Watching changes nothing: the run is the same, bit for bit, until a rule trips under `stop` or `rollback`.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pydantic import ValidationError
from transformers import TrainerCallback

from l3ms.config.errors import explain
from l3ms.config.watch import WatchConfig
from l3ms.constraints.constraint import Constraint
from l3ms.constraints.single_answers import is_mean_length, short_below
from l3ms.constraints.trl_arguments import trl_arguments
from l3ms.measuring.evaluation import evaluate
from l3ms.model.columns import check_names
from l3ms.watching.gradient_cosines import PairCosines, gram, reward_gradients
from l3ms.watching.held_out import gap, violation
from l3ms.watching.response_statistics import response_statistics, response_tokens
from l3ms.watching.rules import HeldOutWatch, RuleWatch, Trip
from l3ms.watching.snapshots import Snapshots, halve_learning_rate
from l3ms.watching.watched import Watched

logger = logging.getLogger(__name__)

HELD_OUT_BATCHES = 4  # training batches beside the held-out responses
EVALUATIONS = 2  # of the gradients, before a pair is named
SIGNIFICANT = 3  # standard errors of a cosine below 0
VIOLATED = 2  # standard errors of an estimate beyond its bound, without the margin


class Watch(TrainerCallback):
    """Give it to the trainer: `L3MTrainer(..., callbacks=[l3ms.Watch(on_trip="stop")])`. Without constraints it does nothing.

    Args:
        config: a `WatchConfig` or a dict of its fields, or these as `options`: `on_trip` ("warn", "stop", "rollback"), `window`, limits.
        held_out: rows as an L3MTrainer's (prompt, input_ids, labels), of prompts it does not train on; without them rewards are not
            compared.

    Attributes:
        tripped: [{"rule", "iteration", "value", "limit", "action"}], with "restored", the iteration gone back to, after a rollback.
        conflicts: [{"pair", "iteration", "cosine", "stderr"}], each pair once.
        rollbacks: how many there have been.

    Raises:
        ValueError: an unknown option or a value out of range; where the training begins, held-out rows that are none.
    """

    def __init__(
        self,
        config: WatchConfig | Mapping[str, Any] | None = None,
        *,
        held_out: Sequence[dict[str, Any]] | None = None,
        **options: Any,
    ):
        given = config.model_dump() if isinstance(config, WatchConfig) else dict(config or {})
        try:
            self.config = WatchConfig(**{**given, **options})
        except ValidationError as error:
            raise explain(error, WatchConfig) from None
        self.held_out = held_out
        self.tripped: list[dict[str, Any]] = []
        self.conflicts: list[dict[str, Any]] = []
        self.rollbacks = 0
        self.trainer: Watched | None = None

    def begin(self, trainer: Watched) -> None:
        """The trainer calls it where training begins; in one that is resumed it calls `restore` next."""
        self.trainer = trainer
        self._rules = RuleWatch(self.config)
        self._held_out = HeldOutWatch(self.config.held_out_gap)
        self._snapshots = Snapshots()
        self._window: deque[int] = deque(maxlen=self.config.window)  # iterations whose responses the rules look at
        self._since: int | None = None  # the first look at held-out prompts of those in a row that found a gap
        self._batches: deque[dict[str, list[float | None]]] = deque(maxlen=HELD_OUT_BATCHES)
        self._warned: set[str] = set()
        self._cosines: PairCosines | None = None
        self._looked = 0  # at the gradients, in units of `every`; where an iteration has not sampled it is later
        self._ranks = trainer.args.world_size
        self._sharded = trainer.sharded
        self._rows = self._held_out_rows()
        self._floor = short_floor(trainer.constraints, self.config.short_below)
        if trainer.l3m_optimizer is None:
            return
        check_rows(self.held_out or [])
        if self.config.on_trip == "rollback":
            self._snapshots.take(trainer, trainer.state.global_step)

    def state(self) -> dict[str, Any]:
        """What it knows, for a checkpoint, without the weights to go back to; the batches are this rank's."""
        return {
            "tripped": list(self.tripped),
            "conflicts": list(self.conflicts),
            "rollbacks": self.rollbacks,
            "warned": sorted(self._warned),
            "rules": self._rules.state(),
            "held_out": self._held_out.state(),
            "batches": list(self._batches),
            "looked": self._looked,
            "cosines": [] if self._cosines is None else self._cosines.grams,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """After `begin`: it goes on as the one whose `state` this is; the first weights to go back to are those of now."""
        self.tripped, self.conflicts = state["tripped"], state["conflicts"]
        self.rollbacks, self._warned = state["rollbacks"], set(state["warned"])
        iteration = 0 if self.trainer is None else self.trainer.state.global_step
        self._looked = state.get("looked", iteration // max(self.config.every, 1))
        self._rules.restore(state["rules"])
        self._held_out.restore(state["held_out"])
        self._batches.extend(state["batches"])
        for grams in state["cosines"]:
            self._cosines = self._cosines or PairCosines(grams.shape[1])
            self._cosines.add_grams(grams.unbind())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        if trainer is None or trainer.l3m_optimizer is None or not any(c.samples for c in trainer.constraints):
            return
        config, iteration, seen = self.config, state.global_step, trainer.watched
        trips: list[Trip] = []
        if trainer.sampled and trainer.last_rollout is not None:
            responses = self._of_all_ranks(response_tokens(trainer.last_rollout))
            values = response_statistics(responses, self._floor)
            self._batches.append(trainer.last_rewards)
            self._window.append(iteration)
            trips = self._rules.update(values)
            seen.update({f"watch/{name}": value for name, value in values.items() if name != "length/spread"})
        if config.held_out_every and self._rows and iteration % config.held_out_every == 0:
            trips += self._look_at_held_out(trainer, seen)
            self._since = (self._since or iteration) if self._held_out.beyond else None
        if config.every and iteration // config.every > self._looked and trainer.sampled and not self._sharded:
            self._looked = iteration // config.every
            self._look_at_gradients(trainer, seen)
        if trips:
            self._act(trainer, trips, control)
        elif config.on_trip == "rollback" and iteration % config.snapshot_every == 0:
            self._snapshots.take(trainer, self._before)
        if config.on_trip == "rollback":
            seen["watch/rollbacks"] = float(self.rollbacks)

    # ---- what is looked at ----

    def _of_all_ranks(self, local: list[Any]) -> list[Any]:
        """So that all ranks see the same and act alike."""
        if self._ranks == 1:
            return local
        from accelerate.utils import gather_object

        return gather_object(local)

    def _held_out_rows(self) -> list[dict[str, Any]]:
        """The same ones every time, in an order of the seed; this rank's share."""
        assert self.trainer is not None
        rows, args = self.held_out or [], self.trainer.args
        if min(len(rows), self.config.held_out_samples) < self._ranks:  # on all ranks alike: they wait for each other
            return []
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(args.seed)).tolist()
        chosen = [rows[index] for index in order[: self.config.held_out_samples]]
        return chosen[args.process_index :: args.world_size]

    def _look_at_held_out(self, trainer: Watched, seen: dict[str, float]) -> list[Trip]:
        args: Any = trainer.args
        found = evaluate(
            trainer.policy, trainer.processing_class, self._rows,
            max_new_tokens=trainer.l3m.max_new_tokens, temperature=trainer.l3m.temperature, seed=args.seed + trainer.state.global_step,
            constraints=trainer.constraints, training={**trl_arguments(), "trainer_state": trainer.state},
        )  # fmt: skip
        gaps: dict[str, float] = {}
        for constraint in trainer.constraints:
            values = _numbers(self._of_all_ranks(list(found.rewards.get(constraint.name, []))))
            own = [_numbers(self._of_all_ranks(list(batch.get(constraint.name, [])))) for batch in self._batches]
            if values:
                seen[f"watch/held_out/{constraint.name}"] = math.fsum(values) / len(values)
            found_gap = None if constraint.monitor else gap(constraint, values, own)
            if found_gap is not None:
                gaps[constraint.name] = seen[f"watch/held_out_gap/{constraint.name}"] = found_gap
        return self._held_out.update(gaps)

    def _look_at_gradients(self, trainer: Watched, seen: dict[str, float]) -> None:
        args: Any = trainer.args
        by_name = {constraint.name: constraint for constraint in trainer.constraints if not constraint.monitor}
        rollout = trainer.last_rollout
        rewards = {name: values for name, values in trainer.last_rewards.items() if name in by_name}
        if len(rewards) < 2:
            return
        assert rollout is not None
        assert trainer.l3m_optimizer is not None
        names = list(rewards)
        gradients = reward_gradients(
            trainer.policy, rollout, list(rewards.values()),
            temperature=trainer.l3m.temperature, batch_size=args.per_device_train_batch_size,
        )  # fmt: skip
        if gradients is None:
            return
        if self._cosines is None or self._cosines.count != len(names):
            self._cosines = PairCosines(len(names))
        self._cosines.add_grams(self._of_all_ranks([gram(gradients)]))
        metrics = trainer.l3m_optimizer.metrics()
        sides = {name: active_side(by_name[name], metrics) for name in names}
        for (i, a), (j, b) in itertools.combinations(enumerate(names), 2):
            found, one, other = self._cosines.cosine(i, j), sides[a], sides[b]
            if found is None or one is None or other is None:
                continue
            # C = (r - max) / scale or (min - r) / scale, of the side that is nearer to its bound
            value, stderr = found.value * one[0] * other[0], found.stderr
            seen[f"watch/cosine/{a}/{b}"], seen[f"watch/cosine_stderr/{a}/{b}"] = value, stderr
            against = value + SIGNIFICANT * stderr < 0 and self._cosines.evaluations >= EVALUATIONS
            if against and one[1] and other[1]:
                self._name(trainer.state.global_step, a, b, value, stderr)

    def _name(self, iteration: int, a: str, b: str, value: float, stderr: float) -> None:
        if any(found["pair"] == [a, b] for found in self.conflicts):
            return
        self.conflicts.append({"pair": [a, b], "iteration": iteration, "cosine": value, "stderr": stderr})
        logger.warning(
            "iteration %d: constraints %r and %r pull against each other (cosine %.2f +- %.2f) and both are violated",
            iteration, a, b, value, stderr,
        )  # fmt: skip

    # ---- what follows ----

    @property
    def _before(self) -> int:
        """The last iteration of which nothing that a rule looks at now is."""
        assert self.trainer is not None
        found = [*self._window, *(() if self._since is None else (self._since,))]
        return min(found, default=self.trainer.state.global_step + 1) - 1

    def _act(self, trainer: Watched, trips: list[Trip], control: Any) -> None:
        config, iteration = self.config, trainer.state.global_step
        assert trainer.l3m_optimizer is not None
        action = config.on_trip
        trips = [trip for trip in trips if action != "warn" or trip.rule not in self._warned]
        if not trips:
            return
        self._warned |= {trip.rule for trip in trips}
        restored: dict[str, int] = {}
        what = {"warn": "training goes on", "stop": "training stops"}.get(action, "")
        if action == "rollback":
            trainer.watched.update(
                trainer.l3m_optimizer.metrics()
            )  # the log is of the iteration that was, not of the snapshot
            restored["restored"] = self._snapshots.restore(trainer, self._before)
            what = f"back to iteration {restored['restored']}"
            self._rules.forget()
            self._held_out.forget()
            self._batches.clear()
            self._window.clear()
            self._since = None
            if self.rollbacks == config.max_rollbacks:
                action, what = "stop", f"{what}, and training stops after {self.rollbacks} rollbacks"
            else:
                self.rollbacks += 1
                halve_learning_rate(trainer)
                what = f"{what}, with half the learning rate"
        if action == "stop":
            control.should_training_stop = True
        for rule, value, limit in trips:
            self.tripped.append(
                {"rule": rule, "iteration": iteration, "value": value, "limit": limit, "action": action, **restored}
            )
            logger.warning("iteration %d: %s is %.3g, beyond %.3g: %s", iteration, rule, value, limit, what)


def check_rows(rows: Sequence[Any]) -> None:
    """ValueError where held-out rows are not as an L3MTrainer's, which is not seen before they are looked at."""
    for number, row in enumerate(rows):
        missing = [
            name for name in ("prompt", "input_ids", "labels") if not isinstance(row, Mapping) or name not in row
        ]
        if missing:
            raise ValueError(
                f"Watch: held_out[{number}] must be a row as an L3MTrainer's, with prompt, input_ids and labels; it has no {missing[0]}"
            )
    if len(rows):
        check_names("Watch: held_out", rows[0])


def short_floor(constraints: Sequence[Constraint], share: float) -> float | None:
    """Tokens below which a response is short: `share` of the bound of a mean length; None where none is bounded."""
    return next((short_below(item, share) for item in constraints if is_mean_length(item)), None)


def active_side(constraint: Any, metrics: dict[str, float]) -> tuple[float, bool] | None:
    """(sign of the reward in C, whether the bound is violated by the estimate) of the bound that is nearer; None before an estimate."""
    estimate = metrics.get(f"constraints/{constraint.name}/estimate")
    if estimate is None or not math.isfinite(estimate):
        return None
    below = -math.inf if constraint.low is None else constraint.low - estimate
    above = -math.inf if constraint.high is None else estimate - constraint.high
    noise = VIOLATED * metrics.get(f"constraints/{constraint.name}/stderr", 0.0)
    return (1.0 if above > below else -1.0), violation(constraint, estimate) > noise


def _numbers(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None and math.isfinite(value)]
