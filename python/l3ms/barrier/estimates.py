"""From rewards to multipliers: the running estimates of the constraints and what one constraint step adds to them.

Sums of rewards are combined over micro-batches and ranks in float64 before the moving average and the multipliers, so that every rank
and every split of a batch finds the same multipliers. Nothing here is committed until the optimizer has applied the step.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from l3m_kernels import (
    BarrierWeights,
    Bounds,
    barrier_weights,
    initial_state,
    multiplier_weights,
    reward_sums,
)
from l3ms.barrier import shifts
from l3ms.barrier.importance import check_importance, counted_sums
from l3ms.barrier.leaving_out import Foretelling
from l3ms.barrier.rank_sums import RankSums
from l3ms.barrier.reward_tables import Lengths, RewardTables, Values, check_lengths
from l3ms.barrier.solvers import Solver
from l3ms.constraints.constraint import Constraint

# A later part of a half-step is weighted by lambda / S with the S of the first. Past this ratio it drowns the first, and fp32 overflows.
LARGEST_RATIO = 1e8


class Estimates(RewardTables, Foretelling, RankSums):
    """Running estimates of R rewards, K one-sided bounds on them, and the half-step that is being prepared."""

    def __init__(
        self,
        constraints: Sequence[Constraint],
        *,
        device: torch.device,
        smoothing: float | Literal["trend"],
        leave_one_out: bool,
        drop_nonfinite: bool,
        process_group: Any = None,
        backend: str | None = None,
        solver: Solver | None = None,
    ):
        self.solver = solver  # None: the barrier
        self.constraints = tuple(constraints)
        self.device, self.smoothing, self.leave_one_out = device, smoothing, leave_one_out
        self.drop_nonfinite, self.process_group, self.backend = drop_nonfinite, process_group, backend
        self.index = {constraint.name: i for i, constraint in enumerate(self.constraints)}
        rows = [row for i, constraint in enumerate(self.constraints) for row in constraint.rows(i)]
        self.owner = [row[0] for row in rows]  # constraint of each one-sided bound
        self.bounds = Bounds.of(rows, device)
        # A range is narrow as a rule: then its two slopes add up, and so does what noise does to the multipliers.
        per_unit = [len(constraint.rows(0)) / constraint.unit for constraint in self.constraints]
        self._per_unit = torch.tensor(per_unit, dtype=torch.float64, device=device)
        widths = [self.constraints[owner].width for owner in self.owner]
        self._widths = torch.tensor(widths, dtype=torch.float64, device=device)  # of each bound's range, native units
        self.state = initial_state(len(self.constraints), device, smoothing)
        self.integral = shifts.Integral.start(len(rows), device)  # of the violations, what shifts the bounds
        self.memory = torch.zeros(len(rows), dtype=torch.float64, device=device)  # the solver's, of each bound
        self.missing = torch.zeros(len(self.constraints), dtype=torch.int64, device=device)  # steps without a sample
        self.dropped = torch.zeros_like(self.missing)  # values that were not finite
        self.steps = torch.zeros((), dtype=torch.int64, device=device)  # applied constraint steps
        self.left_out = torch.zeros_like(self.steps)  # iterations without a constraint step
        self.batch_mean = torch.full_like(self._per_unit, math.nan)  # (R,) of the last applied step, over all ranks
        self.counts = torch.zeros_like(self._per_unit)  # (R,) values in the last step that had some, over all ranks
        self._last: BarrierWeights | None = None
        self.discard()

    def __getstate__(self) -> dict[str, Any]:
        """For copy.deepcopy and pickle, which cannot follow a group of processes: that of all is found again."""
        kept = vars(self).copy()
        if self.process_group is not None:
            if self.process_group is not dist.group.WORLD:
                raise TypeError("an L3MOptimizer with a process_group of its own is not copied; keep its state_dict()")
            kept["process_group"] = "world"
        return kept

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if self.process_group == "world":
            self.process_group = dist.group.WORLD

    # ---- the half-step that is being prepared ----

    def discard(self) -> None:
        """Forget what was observed since the last applied step."""
        self.pending: BarrierWeights | None = None
        self.total: Tensor | None = None  # S of this half-step, fixed by its first part
        self._responses = 0
        self._begun: Tensor | None = None  # the state that it goes on from, where that is not `state`
        # Over all ranks and parts: what the estimates see, and what the responses' own values are. Row R: responses, their tokens.
        self._sums = torch.zeros(len(self.constraints) + 1, 3, dtype=torch.float64, device=self.device)
        self._drawn = self._sums
        self._apart = False  # whether these differ

    def commit(self, applied: Tensor) -> None:
        """The step was `applied` () bool: the estimates advance, once. Or it was not, and what was observed is forgotten."""
        assert self.pending is not None
        new = self.pending._replace(seq_weight=self.pending.seq_weight.new_empty(0))
        old = new if self._last is None else self._last
        self._last = BarrierWeights(
            *(torch.where(applied, after, before) for after, before in zip(new, old, strict=True))
        )
        self.state = torch.where(applied, new.state, self.state)
        count, total, _ = self._sums[:-1].unbind(1)
        self.batch_mean = torch.where(applied, total / count, self.batch_mean)
        self.counts = torch.where(applied & (count > 0), count, self.counts)
        if self.solver is not None:
            advanced = self.solver.advance(self._batch_violation(), self.memory)
            self.memory = torch.where(applied, advanced, self.memory)
        self.steps = self.steps + applied
        self.missing += (self._drawn[:-1, 0] == 0) & applied
        self.discard()

    def observe(
        self,
        values: Values,
        lengths: Lengths,
        normalisation: str,
        mu: Tensor,
        importance: Tensor | None = None,
        fresh: bool = True,
    ) -> Tensor:
        """Rewards of n responses -> (n,) fp32 weights; `lengths` (n,) are the responses' tokens, for the normalisation.

        `importance` (n,) are ratios of probabilities, see `importance`; of responses that are not `fresh` the estimates know already.
        """
        with self.errors_on_all_ranks():
            self._check_ranks("observe")
            dropped = self.dropped.clone()
            rewards = self._table(values)
            if not fresh:  # those were counted when they were
                self.dropped.copy_(dropped)
            count = len(rewards)
            lengths = None if lengths is None else torch.as_tensor(lengths)
            if lengths is not None:
                check_lengths(lengths, count)
            if importance is not None:
                importance = check_importance(importance, count, self.device)
            if not self.leave_one_out and not (fresh and importance is None):
                raise ValueError('observe: importance and fresh=False need baseline="leave_one_out"')
            if self.leave_one_out and (self._responses + count) * self._world == 1:
                raise ValueError(
                    "observe: the leave-one-out baseline needs at least 2 responses in a batch, got 1; "
                    'give more, or use L3MOptimizer(baseline="estimate")'
                )
        bounded = self._bounded(values)
        tokens = torch.ones(count, dtype=torch.float64, device=self.device)
        if lengths is not None:
            tokens = lengths.to(self.device, torch.float64)
        responses = torch.stack([tokens.new_tensor(count), tokens.sum(), tokens.new_zeros(())])
        local = torch.cat([reward_sums(rewards), (responses * bool(bounded))[None]])  # nothing is weighed for monitors
        part = counted = self._of_all_ranks(local)
        self._apart |= not fresh or importance is not None
        if not fresh:
            counted = torch.zeros_like(part)
            self._pass_time(list(values))
        elif importance is not None:
            sums = counted_sums(rewards, importance, part[:-1])
            counted = self._of_all_ranks(torch.cat([sums, torch.zeros_like(local[-1:])]))
        self._sums, self._drawn = self._sums + counted, self._drawn + part
        drawn = self._drawn
        self._responses += count * bool(bounded)
        norm = torch.ones_like(tokens)
        if lengths is not None and normalisation == "mean":
            norm = norm * (drawn[-1, 1] / drawn[-1, 0].clamp(min=1)).clamp(min=1)
        elif lengths is not None and normalisation == "sequence":
            norm = tokens.clamp(min=1)
        whole = self.total is None and not self._apart  # so far this part is the half-step
        weights = self._weights(rewards, norm, self._sums, mu, bool(bounded))
        if not bounded:
            return weights.seq_weight.float()  # 0
        seq_weight = weights.seq_weight if whole else self._weights_of_part(rewards, norm, weights, part[:-1, 0])
        if importance is not None:
            seq_weight = seq_weight * importance
        return (seq_weight * (self._ratio(weights) * self._world)).float()

    def barrier_loss(self, values: Mapping[str, Tensor | float], mu: Tensor) -> Tensor:
        """Differentiable values in native units -> sum_k (lambda_k / S) C_k, the multipliers detached."""
        local = torch.zeros(len(self.constraints) + 1, 3, dtype=torch.float64, device=self.device)
        tensors = {name: torch.as_tensor(value) for name, value in values.items()}
        with self.errors_on_all_ranks():
            self._check_ranks("barrier_loss")
            self._check_names(tensors)
            for name, value in tensors.items():
                column = self._finite(name, value.detach().reshape(-1))
                local[self.index[name]] = reward_sums(column[:, None])[0]
        part = self._of_all_ranks(local)
        self._sums, self._drawn = self._sums + part, self._drawn + part
        empty = torch.empty(0, len(self.constraints), dtype=torch.float64, device=self.device)
        weights = self._weights(empty, empty[:, 0], self._sums, mu, bool(self._bounded(tensors)))
        share = weights.multiplier / weights.total * self._ratio(weights)
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        for k, (owner, row) in enumerate(zip(self.owner, self.bounds.table, strict=True)):
            name = self.constraints[owner].name
            if name in tensors:
                sign, _, scale = row[:3]
                of_all = self._world / part[owner, 0].clamp(min=1)  # ranks average gradients: undo it
                value = tensors[name].double()  # what is not finite is dropped, or was refused
                value = value.where(value.isfinite(), 0.0).sum() * of_all
                # C_k of this batch's value: that of the estimate, moved
                loss = loss + share[k] * (weights.violation[k] + sign * (value - weights.estimate[owner]) / scale)
        return loss

    @property
    def last(self) -> BarrierWeights | None:
        """Of the last applied step, without the weights of its responses; None before the first. Waits for the device."""
        return self._last if self.steps > 0 else None

    def metrics(self) -> dict[str, float]:
        """`constraints/<name>/...` of the last applied step, see `L3MOptimizer.metrics`."""
        values: dict[str, float] = {}
        last = self.last
        for i, constraint in enumerate(self.constraints):
            prefix = f"constraints/{constraint.name}"
            for counter, counts in (("missing", self.missing), ("dropped", self.dropped)):
                if counts[i]:
                    values[f"{prefix}/{counter}"] = float(counts[i])
            if last is not None:
                sides = [k for k, owner in enumerate(self.owner) if owner == i]
                values[f"{prefix}/estimate"] = float(last.estimate[i])
                values[f"{prefix}/stderr"] = float(last.stderr[i])
                if not math.isnan(mean := float(self.batch_mean[i])):
                    values[f"{prefix}/batch_mean"] = mean
                if sides:
                    values[f"{prefix}/lambda"] = float(last.multiplier[sides].sum())
                    values[f"{prefix}/slack"] = float(-last.violation[sides].max())
        return values

    def noise(self, weights: BarrierWeights) -> Tensor:
        """(R,) float64 standard errors of the dimensionless constraints, twice those of ranges; 0 where nothing was observed, and of
        monitors."""
        return (weights.stderr * self._per_unit).where((weights.state[:, 0] > 0) & (self._per_unit > 0), 0.0)

    def state_dict(self) -> dict[str, Any]:
        """What `load` takes: moving averages, what the solver and the shifts remember, counters, the last step's numbers."""
        return {
            "sides": self.sides,
            "estimates": self.state.clone(),
            "memory": self.memory.clone(),
            "integral": [tensor.clone() for tensor in self.integral],
            "missing": self.missing.clone(),
            "dropped": self.dropped.clone(),
            "batch_mean": self.batch_mean.clone(),
            "counts": self.counts.clone(),
            "left_out": int(self.left_out),
            "last": [tensor.clone() for tensor in self.last or ()],
            "constraint_steps": int(self.steps),
        }

    @property
    def sides(self) -> list[list[Any]]:
        """Of each one-sided bound its constraint and which side it is."""
        signs = self.bounds.table[:, 0].tolist()
        return [[self.constraints[i].name, "max" if s > 0 else "min"] for i, s in zip(self.owner, signs, strict=True)]

    def check_sides(self, kept: Mapping[str, Any]) -> None:
        """ValueError where the state is that of other bounds: multipliers and shifts are of each side of each constraint."""
        found = kept.get("sides")  # 0.1.0 did not keep them
        if (found is not None and found != self.sides) or len(kept["memory"]) != len(self.memory):
            of, here = (
                "other bounds" if sides is None else ", ".join(" ".join(side) for side in sides)
                for sides in (found, self.sides)
            )
            raise ValueError(f"load_state_dict: the state is that of the bounds {of}, this optimizer has {here}")

    def load(self, kept: Mapping[str, Any]) -> None:
        """What `L3MOptimizer.state_dict` kept of this object."""
        if kept["estimates"].shape != self.state.shape:
            kind = "an average" if self.smoothing == "trend" else '"trend"'
            raise ValueError(
                f"load_state_dict: smoothing is {self.smoothing!r}, but the state is that of {kind}; give what it was made with"
                + (' (of 0.1.0: "ema", unless told)' if self.smoothing == "trend" else "")
            )
        self.state = kept["estimates"].to(self.state)
        self.memory = kept["memory"].to(self.memory)
        self.integral = shifts.Integral(*(tensor.to(self.state) for tensor in kept["integral"]))
        self.missing, self.dropped = kept["missing"].to(self.missing).clone(), kept["dropped"].to(self.dropped).clone()
        unknown = torch.full_like(self.batch_mean, math.nan)  # 0.1.0 did not keep it
        self.batch_mean = kept.get("batch_mean", unknown).to(self.state).clone()
        self.counts = kept.get("counts", torch.zeros_like(self.counts)).to(self.state).clone()
        self.steps = torch.full_like(self.steps, kept["constraint_steps"])
        self.left_out = torch.full_like(self.steps, kept.get("left_out", 0))
        self._last = BarrierWeights(*(tensor.to(self.device) for tensor in kept["last"])) if kept["last"] else None
        self.discard()

    # ---- parts ----

    def _bounded(self, names: Iterable[str]) -> list[int]:
        """The numbers of those that are no monitors."""
        return [self.index[name] for name in names if not self.constraints[self.index[name]].monitor]

    def _weights(self, rewards: Tensor, norm: Tensor, sums: Tensor, mu: Tensor, bounded: bool) -> BarrierWeights:
        """`bounded`: this part is of constraints, and the first of those fixes S; monitors do not."""
        state = self.state if self._begun is None else self._begun
        options = {"smoothing": self.smoothing, "leave_one_out": self.leave_one_out, "norm": norm}
        options["sums"] = sums[:-1].contiguous()
        if self.solver is None:
            moved = self.bounds._replace(table=shifts.shifted(self.bounds.table, self.integral.shift))
            weights = barrier_weights(rewards, state, moved, mu, backend=self.backend, **options)
            weights = weights._replace(violation=weights.violation - self.integral.shift)
        else:
            rule = partial(self.solver.multipliers, memory=self.memory)
            weights = multiplier_weights(rewards, state, self.bounds, rule, **options)
        self.pending = weights
        self.total = weights.total if self.total is None and bounded else self.total
        return weights

    def _weights_of_part(self, rewards: Tensor, norm: Tensor, weights: BarrierWeights, own: Tensor) -> Tensor:
        """(n,) weights of one part of a half-step by the multipliers of `weights`; the baselines are of all that was drawn so far.

        The op divides by the values of the whole half-step so far; a part is the mean over its own, as every loss of a micro-batch is:
        (R,) `own` of each reward, which differ where some are missing.
        """
        options = {"smoothing": self.smoothing, "leave_one_out": self.leave_one_out, "norm": norm}
        sums = self._drawn[:-1].contiguous()
        own_mean = sums[:, 0] / own.clamp(min=1)
        multiplier = weights.multiplier * own_mean[self.bounds.reward_index]
        found = multiplier_weights(rewards, weights.state, self.bounds, lambda _: multiplier, sums=sums, **options)
        return found.seq_weight * (found.total / weights.total)

    def integrate(self, weights: BarrierWeights, applied: Tensor) -> None:
        """The shifts of the bounds after a step that was `applied` () bool, see `shifts`."""
        scale = self.bounds.table[:, 2]
        noise = weights.stderr[self.bounds.reward_index] / scale
        advanced = shifts.advance(self.integral, weights.violation, noise, self._widths / scale)
        kept = zip(advanced, self.integral, strict=True)
        self.integral = shifts.Integral(*(torch.where(applied, new, old) for new, old in kept))

    def _batch_violation(self) -> Tensor:
        """(K,) C by this half-step's samples alone, with the margin of the moving averages; NaN where there are none."""
        assert self.pending is not None
        index, (sign, _, scale) = self.bounds.reward_index, self.bounds.table[:, :3].unbind(1)
        mean = self._sums[:-1, 1] / self._sums[:-1, 0]
        return self.pending.violation + sign * (mean - self.pending.estimate)[index] / scale

    def _ratio(self, weights: BarrierWeights) -> Tensor:
        """Turns lambda / S of this part into lambda / S of the half-step."""
        total = weights.total if self.total is None else self.total
        return (weights.total / total).clamp(max=LARGEST_RATIO)
