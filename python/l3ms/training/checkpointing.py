"""transformers' Trainer with checkpoints that are whole or not there, and hold no pickles.

The files are transformers' own (weights and tokenizer as `from_pretrained` reads them, `trainer_state.json`), but for the state of
optimizer, scheduler, gradient scaler and random numbers, which it would pickle: here they are JSON and safetensors. With FSDP and
DeepSpeed optimizer and weights are in their formats, and whole or not there as well.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, Trainer

from l3ms.model.random_numbers import random_state, set_random_state
from l3ms.ranks import lookout
from l3ms.ranks.group import gather
from l3ms.training import checkpoints
from l3ms.training.checkpoint_contents import CheckpointError, misfit, misfit_of_optimizer, unlike, unreadable
from l3ms.training.state_trees import load_tree, save_tree

logger = logging.getLogger(__name__)


class CheckpointingTrainer(Trainer):
    """`train(resume_from_checkpoint=True)` goes on from the newest valid checkpoint in `args.output_dir`, and says which are not valid.

    A path is refused where its manifest does not fit; without a manifest (another trainer's) it is taken as it is.
    """

    _partial: Path | None = None  # where a checkpoint is being written
    _sealed: Path | None = None  # one that was, before the callbacks have seen it

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        if resume_from_checkpoint or self.args.load_best_model_at_end:
            self._check_adapters()
        if resume_from_checkpoint is True:
            place = Path(self._get_output_dir(None))
            for folder in checkpoints.checkpoints(place):
                wrong = self._wrong(folder)
                try:
                    if wrong is None:
                        return super().train(str(folder), *args, **kwargs)
                except CheckpointError as error:
                    wrong = str(error)
                logger.warning("%s is not used: %s", folder, wrong)
            raise ValueError(f"no valid checkpoint in {place}")
        if resume_from_checkpoint:
            folder = Path(resume_from_checkpoint)
            if (folder / checkpoints.MANIFEST).exists():
                wrong = self._wrong(folder)
                if wrong is not None:
                    raise CheckpointError(f"{folder} is damaged: {wrong}")
            else:
                logger.warning("%s has no %s: it cannot be verified", folder, checkpoints.MANIFEST)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _check_adapters(self) -> None:
        """The Trainer loads a checkpoint into the first active adapter, and leaves others as they are."""
        active: Any = self.model.active_adapters if hasattr(self.model, "disable_adapter") else ()  # type: ignore[union-attr]
        if len(active) > 1:
            raise ValueError(
                f"a checkpoint is loaded into one adapter, and {len(active)} are active ({', '.join(active)}): train without "
                "resume_from_checkpoint and load_best_model_at_end, or with one adapter"
            )

    @property
    def taken_at_once(self) -> int:
        """Rows that an iteration takes, besides the task's, at most."""
        return 1

    def _wrong(self, folder: Path) -> str | None:
        """Why a checkpoint of ours cannot be gone on with."""
        wrong = checkpoints.problem(folder) or unreadable(folder, self.taken_at_once)
        return wrong or (None if self._sharded else misfit(folder, self.model))

    @contextmanager
    def reading(self) -> Iterator[None]:
        """What goes wrong within is the checkpoint's: contents that only who takes them can judge. All ranks take it, or none."""
        failed: CheckpointError | None = None
        try:
            yield
        except CheckpointError as error:
            failed = error
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            text = " ".join(str(error).split())[:200]
            failed = CheckpointError(f"its contents are refused: {type(error).__name__}: {text}")
            failed.__cause__ = error
        found = gather(None if failed is None else str(failed))
        if failed is not None:
            raise failed
        for rank, wrong in enumerate(found):
            if wrong is not None:
                raise CheckpointError(f"rank {rank}: {wrong}")

    # ---- saving ----

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._partial is None else str(self._partial)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        place = Path(self._get_output_dir(trial))
        name, state = f"checkpoint-{self.state.global_step}", self.state
        best = None if state.best_global_step is None else place / f"checkpoint-{state.best_global_step}"
        if self.args.should_save:
            checkpoints.begin(place)
        self.accelerator.wait_for_everyone()
        self._partial = place / checkpoints.PARTIAL

        def discard() -> None:
            if self.args.should_save:
                checkpoints.discard(place)

        try:
            with lookout.clearing(discard):
                super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()
            if self.args.should_save:
                written = self._partial / name
                (written / "training_args.bin").unlink(missing_ok=True)  # a pickle that nothing reads
                (written / "training_args.json").write_text(self.args.to_json_string(), encoding="utf-8")
                if best is not None and (best.exists() or best.name == name):
                    state.best_model_checkpoint = str(best)
                    state.save_to_json(str(written / "trainer_state.json"))
                self._sealed = checkpoints.seal(self._partial, name)
                checkpoints.rotate(place, self.args.save_total_limit, keep=best, newest=self._sealed)
        except BaseException as error:
            reason = checkpoints.unwritable(self._partial) if isinstance(error, RuntimeError) else None
            discard()
            if reason is not None:
                raise reason from error
            raise
        finally:
            self._partial = None
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            super()._push_from_checkpoint(str(place / name))

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """What callbacks write into a checkpoint in `on_save` is a part of it."""
        super()._maybe_log_save_evaluate(*args, **kwargs)
        sealed, self._sealed = self._sealed, None
        if sealed is not None and (sealed / checkpoints.MANIFEST).is_file():
            checkpoints.seal_again(sealed)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Not while it is being written: `_save_checkpoint` does it afterwards."""

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self._sharded:
            super()._save_optimizer_and_scheduler(output_dir)
        elif self.args.should_save:
            for name, part in self._stateful.items():
                save_tree(Path(output_dir), name, part.state_dict())

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Whole, as `from_pretrained` reads it, also where checkpoints hold a model's parts each on its own; ranks call it together."""
        plugin: Any = getattr(self.accelerator.state, "fsdp_plugin", None)
        if not self.is_fsdp_enabled or _internal_call or "FULL" in str(plugin.state_dict_type):
            super().save_model(output_dir, _internal_call)
            return
        self._save(output_dir, state_dict=self.accelerator.get_state_dict(self.model))
        if self.args.push_to_hub:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """In a checkpoint weights have the model's own names, under which they are loaded into it. A saved model has those of its kind's
        files, which `from_pretrained` turns into the model's."""
        own = self._partial is not None and isinstance(self.model, PreTrainedModel)
        model: Any = self.model
        if own:
            model.save_pretrained = functools.partial(model.save_pretrained, save_original_format=False)
        try:
            super()._save(output_dir, state_dict)
        finally:
            if own:
                del model.save_pretrained

    def _save_scaler(self, output_dir: str) -> None:
        scaler: Any = self.accelerator.scaler
        if scaler is not None and self.args.should_save:
            save_tree(Path(output_dir), "scaler", scaler.state_dict())

    def _save_rng_state(self, output_dir: str) -> None:
        save_tree(Path(output_dir), f"random{checkpoints.rank_suffix(self.args)}", random_state(self.args.device))

    # ---- loading ----

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with self.reading():
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        """All of it, or an error: transformers' own keeps weights of the last step that the checkpoint lacks, with a warning."""
        best = self.state.best_model_checkpoint
        if not self._sharded:
            folder = Path(str(best))
            if adapted := hasattr(self.model, "disable_adapter"):
                name = str(self.model.active_adapters[0])  # type: ignore[union-attr]
                folder = folder if name == "default" else folder / name
            kinds = ("adapter_model",) if adapted else ("model", "pytorch_model")
            ends = (".safetensors", ".bin", ".safetensors.index.json", ".bin.index.json")
            if not any((folder / f"{kind}{end}").is_file() for kind in kinds for end in ends):
                raise CheckpointError(
                    f"load_best_model_at_end: {folder} has no weights of the {'adapter' if adapted else 'model'}"
                )
            wrong = misfit(folder, self.model)
            if wrong is not None:
                raise CheckpointError(f"load_best_model_at_end: {folder}: {wrong}")
            self.state.best_model_checkpoint = str(folder)
        try:
            super()._load_best_model()
        finally:
            self.state.best_model_checkpoint = best

    def _load_callback_state(self) -> None:
        with self.reading():
            super()._load_callback_state()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with self.reading():
            self._load_states(checkpoint)

    def _load_states(self, checkpoint: str | None) -> None:
        if checkpoint is None or self._sharded:
            super()._load_optimizer_and_scheduler(checkpoint)
        elif (Path(checkpoint) / "optimizer.json").exists():
            for name, part in self._stateful.items():
                state = load_tree(Path(checkpoint), name)
                check = (
                    misfit_of_optimizer(part, state) if name == "optimizer" else unlike(part.state_dict(), state, name)
                )
                if check is not None:
                    raise CheckpointError(check)
                part.load_state_dict(state)
        else:
            logger.warning("%s has no state of the optimizer: it begins anew", checkpoint)

    def _load_scaler(self, checkpoint: str | None) -> None:
        scaler: Any = self.accelerator.scaler
        if scaler is not None and checkpoint is not None and (Path(checkpoint) / "scaler.json").exists():
            with self.reading():
                scaler.load_state_dict(load_tree(Path(checkpoint), "scaler"))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        name = f"random{checkpoints.rank_suffix(self.args)}"
        with self.reading():
            if (Path(checkpoint) / f"{name}.json").exists():
                set_random_state(load_tree(Path(checkpoint), name), self.args.device)
            else:
                rank = self.args.process_index
                logger.warning("%s has no random state of rank %d: what follows is another run", checkpoint, rank)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if (
            self.state.global_step >= self.state.max_steps
        ):  # of a run that had ended; the Trainer would take one step more
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    @property
    def _stateful(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer, "scheduler": self.lr_scheduler}

    @property
    def _sharded(self) -> bool:
        return self.is_fsdp_enabled or self.is_deepspeed_enabled
