"""`rollout:`, what samples the responses."""

from __future__ import annotations

from pydantic import Field, model_validator

from l3ms.config.sections import Section, Text


class RolloutConfig(Section):
    """Who samples responses: the model itself (transformers), a vLLM in this process or on a server, or your own code.

    docs/engines.md says how they are started.
    """

    engine: Text = "transformers"  # vllm; "file.py:name" or "module:name", imported only with --allow-code
    server: Text | None = None  # of vllm: http://host:8000 of a `vllm serve`; default: in this process
    folder: Text | None = (
        None  # of a server: where it reads the weights, a folder that both see; default: a temporary one
    )
    options: dict[Text, bool | int | float | str | None] = Field(
        default={}
    )  # of vllm.LLM: max_model_len, enforce_eager, ...

    @property
    def code(self) -> str | None:
        """What of it is somebody's code."""
        return None if self.engine in ("transformers", "vllm") else self.engine

    @model_validator(mode="after")
    def _check_engine(self) -> RolloutConfig:
        source, _, name = self.engine.rpartition(":")
        if self.code is not None and not (source and name.isidentifier()):
            raise ValueError(
                f'engine must be transformers, vllm, "file.py:name" or "module:name", got {self.engine!r:.80}'
            )
        if self.server is not None and self.engine != "vllm":
            raise ValueError(f"server is of the engine vllm, and engine is {self.engine!r:.80}: leave it out")
        if self.server is not None and not self.server.startswith(("http://", "https://")):
            raise ValueError(f"server must begin with http:// or https://, got {self.server!r:.80}")
        if self.folder is not None and self.server is None:
            raise ValueError("folder is of a server, and there is none: leave it out")
        if self.options and (self.engine != "vllm" or self.server is not None):
            where = "a server has its own" if self.server is not None else f"engine is {self.engine!r:.80}"
            raise ValueError(f"options are of a vLLM in this process, and {where}: leave them out")
        return self
