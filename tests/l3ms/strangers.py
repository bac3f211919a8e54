"""The project of `stranger_projects` made once in a process, and cases tried in it one after the other: seed n is case n."""

import functools
import io
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import refused
import torch


class Strangers:
    def __init__(self, template: Path):
        self.template = template

    @staticmethod
    @functools.cache
    def here() -> "Strangers":
        import atexit
        import contextlib

        import stranger_projects
        import tiny_models
        from transformers import LlamaConfig, LlamaForCausalLM

        place = Path(tempfile.mkdtemp()).resolve()
        atexit.register(shutil.rmtree, place, ignore_errors=True)
        torch.manual_seed(0)
        sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
                                 "num_key_value_heads": 1, "max_position_embeddings": 64, "vocab_size": 17}  # fmt: skip
        model = LlamaForCausalLM(LlamaConfig(**sizes, pad_token_id=0, eos_token_id=1, bos_token_id=None))
        with (
            pytest.MonkeyPatch.context() as patch,
            contextlib.redirect_stdout(io.StringIO()),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            return Strangers(stranger_projects.write(place, tiny_models.tokenizer(), model, patch))

    def all_of(self, seeds: range, cases: Sequence[tuple]) -> Any:
        """What came of the cases with these numbers."""
        from parts import Found

        found = Found()
        for seed in seeds:
            name, make, *codes = cases[seed % len(cases)]
            found.cases += 1
            if wrong := self.wrong(make, *codes):
                found.fail(f"seed {seed}, {name}: {wrong}")
        return found

    def wrong(self, make: Any, *codes: Any) -> str | None:
        """What does not hold of a case; the project's folder is on Python's path, as with `python -m`."""
        project = self.template.parent / "project"
        with (
            pytest.MonkeyPatch.context() as patch,
            refused.in_project(self.template, project) as folder,
            warnings.catch_warnings(),
        ):
            # A name that is no folder is not asked for, again and again
            patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
            warnings.simplefilter("ignore")  # of torch, peft and datasets, on their way to an error
            known = set(sys.modules)
            sys.path.insert(0, str(folder))
            before, environment = self.outside(), dict(os.environ)
            try:
                found = refused.wrong(make, folder, *codes)
            finally:
                sys.path.remove(str(folder))
                os.environ.clear()
                os.environ.update(environment)
                for name in set(sys.modules) - known:
                    if str(getattr(sys.modules[name], "__file__", None) or "").startswith(str(folder)):
                        del sys.modules[name]
            return found or (None if self.outside() == before else "something was written outside the project")

    def outside(self) -> dict[str, tuple]:
        """What is beside the project: nothing is written there."""
        found = {}
        for path in (self.template.parent, self.template):
            found |= {
                str(item): (item.lstat().st_size, item.lstat().st_mtime_ns)
                for item in path.iterdir()
                if item.name != "project"
            }
        return found
