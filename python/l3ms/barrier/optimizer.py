"""`L3MOptimizer`: any torch optimizer, and constraints.

One iteration is a task half-step and a constraint half-step, each a backward and an ordinary `step()` with its own clipping, on one shared
optimizer state. Multipliers reach 1e17 when mu is small: squared in a gradient norm they overflow fp32, the norm is inf, and clipping by
max_norm / norm would multiply the step by 0 exactly when it matters. So losses carry lambda / S with S = max(1, sum lambda) in float64, and
`step()` clips by min(S, max_norm / ||g'||), see `clipping`. Whether a step was applied is known on the device alone: what follows from it
(estimates, mu, counters) stays there.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from l3m_kernels import LogLikelihood, weighted_log_likelihood
from l3ms.barrier import packed_state, shifts
from l3ms.barrier.choices import check_choices, check_limits
from l3ms.barrier.clipping import apply, clip, gradients
from l3ms.barrier.conflicts import ConflictWatch
from l3ms.barrier.estimates import Estimates
from l3ms.barrier.leaving_out import LeavingOut
from l3ms.barrier.ranks import gathered, group_of
from l3ms.barrier.reward_tables import Lengths, Values
from l3ms.barrier.schedules import MuSchedule, NoiseFloorDecay, as_schedule, check_resolution, noise_floor
from l3ms.barrier.solvers import Solver, as_solver
from l3ms.barrier.step_reports import Progress, StepNumbers, StepReports
from l3ms.barrier.wrapped import Wrapping, as_one, call_once, changed, first_parameter
from l3ms.constraints.constraint import Constraint, check_constraints
from l3ms.model.losses import scored_lengths, shift

# Attributes that a copy gets. The others are torch's, made anew or shared with `base`.
_KEPT = (
    *("base", "constraints", "schedule", "smoothing", "max_grad_norm", "clipping", "length_norm"),
    *("estimates", "_progress", "_one", "_norms", "_reports"),
)


class ConstraintLoss(NamedTuple):
    loss: Tensor  # (), its gradient is that of the barrier divided by S
    log_likelihood: LogLikelihood  # detached
    seq_weight: Tensor  # (N,) fp32


class L3MOptimizer(Wrapping, LeavingOut, torch.optim.Optimizer):
    """Adds constraints to an optimizer: `observe`, `constraint_loss` or `barrier_loss`, then backward and `step()` as usual.

    A `step()` after one of these is the constraint half-step, any other the task half-step. Shares `param_groups` and `state`
    with `base`, so learning-rate schedulers, GradScaler and accelerate see one optimizer.

    Args:
        base: the wrapped optimizer, or a list of them that are stepped as one: `[Muon(matrices), AdamW(rest)]`.
        constraints: what must hold, see `Constraint`.
        mu: "auto" (a decay to the noise floor of the estimates), "paper", or a schedule.
        smoothing: of the estimates. "trend": a filter of level and trend that keeps up with a policy that moves and knows its drift, see
            `l3m_kernels.trend`; a number: the weight of a new batch in a moving average; "ema": 0.1, as in the paper.
        max_grad_norm: of each half-step, see `clipping`; None does not clip.
        solver: "barrier", or what it is compared with, see `solvers`: "dual_ascent", "augmented_lagrangian", "penalty", or an object
            such as `DualAscent(rate=0.1)`. mu is the barrier's alone.
        clipping: of the two half-steps. "separate": each on its own, as in the paper; a multiplier beyond max_grad_norm / ||grad C|| then
            has no further effect, and a bound that needs a larger one is missed. "adaptive": with mu="auto" the task's step moreover
            shrinks where that is seen to happen, see `shifts`; the default of the trainer and of the command line.
        length_norm: what divides a response's weight where lengths are known: "mean", the batch's mean length; "sequence", its own length
            as in the paper, which follows the wrong gradient where a reward depends on length (`(|y| - max) / |y|` is driven by E[1/|y|]: a
            bound of at most 10 tokens ended with a median response of 1 token); or "none".
        baseline: "leave_one_out", the mean of the other responses; or "estimate", the running estimate.
        nonfinite: a NaN or inf reward is an error ("raise"), or left out and counted ("drop").
        process_group: ranks that share one batch, each with rows of its own; default: all, where torch.distributed is initialised.
        max_skipped: after this many steps in a row with a gradient that is not finite, raise.
        backend: of the kernels, see `l3m_kernels.backends`.

    Raises:
        ValueError: an argument is wrong (named), all constraints are monitors, or mu ends so low that mu^2 is below 4 ulp of a bound.
    """

    # GradScaler hands grad_scale and found_inf to step() instead of silently not calling it
    _step_supports_amp_scaling = True

    def __init__(
        self,
        base: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        constraints: Sequence[Constraint],
        mu: str | MuSchedule = "auto",
        smoothing: float | Literal["trend", "ema"] = "trend",
        max_grad_norm: float | None = 1.0,
        *,
        solver: str | Solver = "barrier",
        clipping: Literal["adaptive", "separate"] = "separate",
        length_norm: Literal["mean", "sequence", "none"] = "mean",
        baseline: Literal["leave_one_out", "estimate"] = "leave_one_out",
        nonfinite: Literal["raise", "drop"] = "raise",
        process_group: Any = None,
        max_skipped: int = 5,
        backend: str | None = None,
    ):
        base = as_one(base)
        smoothing = 0.1 if smoothing == "ema" else smoothing
        check_limits(max_grad_norm, max_skipped)
        check_choices(clipping=clipping, length_norm=length_norm, baseline=baseline, nonfinite=nonfinite)
        self.base = base
        super().__init__(base.param_groups, base.defaults)
        packed_state.reserve(self.param_groups)
        self.constraints = check_constraints(constraints)
        if self.constraints and all(constraint.monitor for constraint in self.constraints):
            raise ValueError("constraints: all are monitors, which bound nothing")
        self.schedule = as_schedule(mu)
        check_resolution(self.schedule, self.constraints)
        self.smoothing, self.max_grad_norm, self.length_norm = smoothing, max_grad_norm, length_norm
        self.clipping = clipping
        device = first_parameter(base).device
        process_group = group_of([p for group in base.param_groups for p in group["params"]], process_group)
        self.estimates = Estimates(
            self.constraints,
            device=device,
            smoothing=smoothing,
            leave_one_out=baseline == "leave_one_out",
            drop_nonfinite=nonfinite == "drop",
            process_group=process_group,
            backend=backend,
            solver=as_solver(solver),
        )
        self._progress = Progress.at(torch.tensor(self.schedule.start, dtype=torch.float64, device=device))
        self._one = torch.ones_like(self.mu)  # S where nothing is constrained
        self._norms: dict[str, Tensor] = {}
        names = [constraint.name for constraint in self.constraints]
        self._reports = StepReports(names, self.estimates.owner, self.schedule, max_skipped)

    @property
    def mu(self) -> Tensor:
        """() float64, on the device."""
        return self._progress.mu

    @property
    def task_share(self) -> Tensor:
        """() float64 in [0.1, 1], what multiplies the clipped steps of the task: see `clipping`."""
        return shifts.task_share(self.estimates.integral.shift) if self.clipping == "adaptive" else self._one

    def __getstate__(self) -> dict[str, Any]:
        """For copy.deepcopy and pickle: torch's own would keep the parameters and leave out the barrier. Hooks go, as there."""
        self._reports.wait()
        return {name: value for name, value in vars(self).items() if name in _KEPT}

    # ---- the constraint half-step ----

    def observe(
        self, rewards: Values, lengths: Lengths = None, *, importance: Tensor | None = None, fresh: bool = True
    ) -> Tensor:
        """Rewards of n responses -> (n,) fp32 weights on the model's device, for a loss -sum_n weight_n log pi(y_n).

        The next `step()` is the constraint half-step. Give the whole batch of the half-step at once and slice the weights for its
        micro-batches: the multipliers are then those of the whole batch. Several calls before one step add up to one estimate, each
        call's weights being a mean over its own responses.

        Args:
            rewards: by constraint name, n values each in native units (of a share 0 or 1): a list (None: excluded) or an (n,) tensor.
            lengths: (n,) response tokens, a list or a tensor, for `length_norm`; without them weights are not normalised.
            importance: (n,) probability of each response under the policy over the one it was drawn with, see `importance`.
            fresh: False for responses that were observed before, which the estimates are not told again; needs smoothing="trend".

        Raises:
            ValueError: an unknown name, unequal numbers of values, NaN or inf, a single response under the leave-one-out baseline, or
                raw values of a share, which takes those of `constraint.indicator` and `rollout.rewards`.
            RuntimeError: the optimizer was made before torch.distributed was initialised.
        """
        return self.estimates.observe(rewards, lengths, self.length_norm, self.mu, importance, fresh)

    def constraint_loss(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        rewards: Values | None = None,
        *,
        seq_weight: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        ignore_index: int = -100,
        **options: Any,
    ) -> ConstraintLoss:
        """`observe` and the fused head in one: backpropagate `.loss`, then `step()`.

        Args:
            hidden: (N, L, D), or packed (T, D) with `cu_seqlens`: hidden states of prompts and responses.
            weight: (V, D), the head's matrix; what fully_shard has split is gathered.
            labels: (N, L) or (T,), Hugging Face convention (not shifted), `ignore_index` on prompts and padding.
            rewards: as in `observe`.
            seq_weight: instead of `rewards`, a slice of what `observe` returned for the whole batch.
            options: bias, softcap, temperature, scored, backend of `l3m_kernels.weighted_log_likelihood`. `scored=rollout.scored` spares a
                GPU the wait for the count.

        Raises:
            ValueError: as `observe` and the op; both or neither of `rewards` and `seq_weight`.
        """
        if (rewards is None) == (seq_weight is None):
            raise ValueError("constraint_loss: give either rewards or seq_weight")
        targets = shift(labels, cu_seqlens, ignore_index)
        if seq_weight is None:
            assert rewards is not None
            seq_weight = self.observe(rewards, scored_lengths(targets, cu_seqlens, ignore_index))
        options["ignore_index"] = ignore_index
        weight = gathered(weight, self.estimates.process_group)
        loss, log_likelihood = weighted_log_likelihood(hidden, weight, targets, seq_weight, cu_seqlens, **options)
        return ConstraintLoss(loss, log_likelihood, seq_weight)

    def barrier_loss(self, values: Mapping[str, Tensor | float]) -> Tensor:
        """Differentiable values in native units, by constraint name -> sum_i (lambda_i / S) C_i, () float64, the multipliers detached.

        For constraints that need no sampling: the mean loss on a second data set, a regulariser. A value is () or (n,); the mean is
        what is constrained, and with n > 1 its standard error is that of the batch.

        Raises:
            ValueError: an unknown name, NaN or inf.
        """
        return self.estimates.barrier_loss(values, self.mu)

    @property
    def task_weight(self) -> Tensor:
        """() float64, 1 / S of what has been observed since the last step: the weight of the task's loss in a joint step.

        `(opt.task_weight * task_loss + constraint_loss).backward(); opt.step()` is one step on the gradient of the whole barrier problem,
        clipped as a whole: the task keeps exactly the share of the step that the multipliers leave it.
        """
        return 1.0 / (self._one if self.estimates.total is None else self.estimates.total)

    # ---- the step ----

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Clip and apply the gradients: of the task, or of the constraints where something was observed since the last step.

        A gradient whose norm is not finite is not applied: the step is counted as skipped, and neither mu nor the estimates advance.

        Where `base` is one of torch's Adam, AdamW, SGD (without dampening) or Adagrad with `fused=True` and no gradient is float64, the
        clipping is part of its kernel and the host waits for nothing; `.grad` holds the clipped gradient afterwards. Other optimizers
        cost a multiplication of the gradients where they are clipped, and on a GPU one wait.
        `closure` is called once, before all else, and its value returned: Lightning's manual optimization hands over one that does nothing.

        Raises:
            ValueError: the closure is that of Lightning's automatic optimization, which makes one step of each batch, and no constraint's.
            RuntimeError: `max_skipped` steps in a row were skipped; names the constraint with the largest multiplier. On a GPU the
                host learns of it later, as a rule in the next step; those in between are skipped or applied each on its own.
        """
        loss = call_once(closure)
        constrained = self.estimates.pending is not None
        grads, total = gradients(self), self.estimates.total
        share, total = (self.task_share, self._one) if total is None else (self._one, total)
        clipped = clip(grads, total, self.max_grad_norm, getattr(self, "grad_scale", None), share)
        self._norms["constraint" if constrained else "task"] = clipped.norm
        skipped: Tensor = ~clipped.finite
        counted: Tensor | int = 1
        if (found_inf := getattr(self, "found_inf", None)) is not None:
            overflow = found_inf.to(self.mu.device) > 0  # GradScaler's own business: it lowers its scale and goes on
            skipped, counted = skipped | overflow, ~overflow
        self._progress.in_a_row = (self._progress.in_a_row + counted) * skipped
        self._progress.skipped = self._progress.skipped + skipped
        # An exactly zero gradient of the constraints says nothing; stepping on it would only replay the task's momentum.
        apply(self.base, grads, clipped.factor, skipped | (clipped.norm == 0) if constrained else skipped)
        self._reports.send(self._advance(~skipped) if constrained else StepNumbers(self._progress.in_a_row))
        self.estimates.total = None  # also that of `step_again`, which is for one step
        if self._reports.failure is not None:
            raise RuntimeError(self._reports.failure)
        return loss

    def _advance(self, applied: Tensor) -> StepNumbers:
        """After a constraint step: the estimates, then mu, where it was `applied` () bool."""
        pending = self.estimates.pending
        assert pending is not None
        self.estimates.commit(applied)
        noise = self.estimates.noise(pending)
        advanced = torch.as_tensor(self.schedule(self.passed, self.mu, noise.max())).to(self.mu)
        self._progress.mu = torch.where(applied, advanced, self.mu)
        if isinstance(self.schedule, NoiseFloorDecay) and self.estimates.solver is None:
            self.estimates.integrate(pending, applied)
        return StepNumbers(self._progress.in_a_row, applied, self.mu, pending.multiplier, pending.violation, noise)

    # ---- reading and keeping: all of this waits for the device ----

    @property
    def constraint_steps(self) -> int:
        """Those that were applied."""
        return int(self.estimates.steps)

    @property
    def skipped_steps(self) -> int:
        return int(self._progress.skipped)

    @property
    def conflicts(self) -> ConflictWatch:
        self._reports.wait()
        return self._reports.conflicts

    def metrics(self) -> dict[str, float]:
        """Of the last applied constraint step, or foretold since (`leave_out`), as floats: for each constraint `constraints/<name>/`

        * `estimate`, `stderr`, and `batch_mean`, of this step's values alone, over all ranks (none: no such key): native units;
        * `slack`: -C, dimensionless, margin included; of the nearer bound where there are two. Negative is violated;
        * `lambda`: the multiplier, of both bounds together (a monitor has neither);
        * `missing`: steps without a sample, `dropped`: values not finite;

        and `l3m/mu` (of the barrier), `l3m/skipped_steps`, `l3m/grad_norm/task` and `/constraint` before clipping, the latter
        divided by S; `l3m/task_share` under adaptive clipping, `l3m/noise_floor` with mu="auto".
        """
        values = {"l3m/skipped_steps": float(self.skipped_steps)}
        if self.estimates.solver is None:
            values["l3m/mu"] = float(self.mu)
            if isinstance(self.schedule, NoiseFloorDecay) and (last := self.estimates.last) is not None:
                values["l3m/noise_floor"] = float(noise_floor(self.estimates.noise(last).max()))
        if self.clipping == "adaptive":
            values["l3m/task_share"] = float(self.task_share)
        values.update({f"l3m/grad_norm/{name}": float(norm) for name, norm in self._norms.items()})
        return {**values, **self.estimates.metrics()}

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.base.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:  # type: ignore[override]
        """The wrapped optimizer's, and the barrier's as `"l3m"`: mu, averages, counters (see `packed_state`), not what is observed."""
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        ours = {
            "constraints": [constraint.name for constraint in self.constraints],
            "mu": self.mu.clone(),
            **self.estimates.state_dict(),
            "skipped_steps": self.skipped_steps,
            "skipped_in_a_row": int(self._progress.in_a_row),
            **self._reports.state_dict(),
        }
        return changed(self, packed_state.joined(self.base.state_dict(), ours), self._optimizer_state_dict_post_hooks)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:  # type: ignore[override]
        """Raises ValueError where the state has no `"l3m"`, or that of other constraints, or of other sides of them."""
        base, ours = packed_state.split(changed(self, dict(state_dict), self._optimizer_load_state_dict_pre_hooks))
        if ours is None:
            raise ValueError('load_state_dict: the state has no "l3m"; it is not that of an L3MOptimizer')
        names = [constraint.name for constraint in self.constraints]
        if ours["constraints"] != names:
            raise ValueError(
                f"load_state_dict: the state is that of constraints {ours['constraints']}, this optimizer has {names}"
            )
        self.estimates.check_sides(ours)
        self.base.load_state_dict(base)
        packed_state.reserve(self.param_groups)
        self._progress = Progress.at(ours["mu"].to(self.mu).clone(), ours["skipped_steps"], ours["skipped_in_a_row"])
        self.estimates.load(ours)
        self._reports.load_state_dict(ours)
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)
