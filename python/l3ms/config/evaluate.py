"""`evaluate:` and `logging:`, what is measured and written beside the training."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from l3ms.config.sections import Batch, Section


class EvaluateConfig(Section):
    """Fresh samples on held-out prompts, after training (and before, with `initial`)."""

    samples: Annotated[int, Field(ge=2, le=1 << 24)] = 512
    batch_size: Batch = 64
    initial: bool = True


class LoggingConfig(Section):
    tensorboard: bool = True
