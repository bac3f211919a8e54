"""The `watch:` of a configuration, and the options of `l3ms.Watch`: what is looked at while training, and what follows."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from l3ms.config.sections import MOST, Count, NonNegative, Positive, Section, Share, check_used

Limit = Annotated[float, Field(ge=0, le=1)]


class WatchConfig(Section):
    """Signs of reward hacking, with their limits (null: that rule is off), and of constraints that pull against each other.

    A rule looks at the mean of the last `window` iterations, and only once that mean has been within its limit; "start" is the mean of the
    first `window` iterations.
    """

    on_trip: Literal["warn", "stop", "rollback"] = "warn"  # when a rule trips: one line; end the run; go back and on
    window: Annotated[int, Field(ge=2, le=MOST)] = 10  # iterations whose mean is compared with a limit
    ended_fall: Share | None = 0.5  # share of the start's EOS rate that may be lost
    ended_min: Limit | None = 0.1  # EOS rate
    truncated_max: Limit | None = 0.5  # share of responses cut at max_new_tokens
    median_length_min: NonNegative | None = 2  # tokens; a median of so many or fewer trips
    length_spread_min: NonNegative | None = 0  # tokens from the 5th to the 95th percentile; so many or fewer trip
    short_below: Share = 0.2  # share of a length's bound (min, else max) below which a response is short
    short_max: Limit | None = 0.35  # share of short responses: a mean may be met by very short and very long ones
    humps_max: Limit | None = (
        0.9  # share of the lengths' variance that is between two groups, see response_statistics.humps
    )
    distinct_2_fall: Share | None = 0.5  # share of the start's distinct-2 that may be lost
    held_out_gap: Positive | None = 4  # standard errors by which a reward is worse on held-out prompts, twice in a row
    held_out_every: Annotated[int, Field(ge=0, le=MOST)] = 50  # iterations; 0: never
    held_out_samples: Annotated[int, Field(ge=2, le=1 << 24)] = 64  # responses each time
    every: Annotated[int, Field(ge=0, le=MOST)] = (
        25  # iterations between gradients of each constraint, for cosines; 0: never
    )
    snapshot_every: Count = 10  # iterations, for rollback; two snapshots are kept, in memory
    max_rollbacks: Count = 2  # the trip after so many ends the run

    @model_validator(mode="after")
    def _check_snapshots(self) -> WatchConfig:
        check_used(self, ((field, "on_trip", ("rollback",)) for field in ("snapshot_every", "max_rollbacks")))
        if self.on_trip == "rollback" and self.snapshot_every < self.window:
            raise ValueError(
                f"snapshot_every must be at least window ({self.window}): of two snapshots one must be older than the "
                f"iterations that a rule looks at, got {self.snapshot_every}"
            )
        return self
