"""What TensorBoard shows of a run, in its event files. They are written by a thread of its own."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from transformers.integrations.integration_utils import TensorBoardCallback


class EventFiles(TensorBoardCallback):
    """In `folder`, from the beginning of the training until `close`. Of a run that goes on, what came after its checkpoint is not shown."""

    def __init__(self, folder: Path):
        super().__init__()
        self.folder = folder
        self._hook = threading.excepthook

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()  # of an attempt with another checkpoint
        threading.excepthook = self._quiet
        purge = state.global_step + 1 if state.global_step else None
        self.tb_writer = SummaryWriter(log_dir=str(self.folder), purge_step=purge)
        super().on_train_begin(args, state, control, **kwargs)

    def close(self) -> None:
        """Safe to call twice, and after a full disk."""
        if self.tb_writer is not None:
            with contextlib.suppress(OSError):
                self.tb_writer.close()
            self.tb_writer = None
        threading.excepthook = self._hook

    def _quiet(self, failure: threading.ExceptHookArgs) -> None:
        """A full disk is raised in the next line that is logged: the thread that met it need not say it too, with its traceback."""
        if not (type(failure.thread).__module__.startswith("tensorboard") and isinstance(failure.exc_value, OSError)):
            self._hook(failure)
