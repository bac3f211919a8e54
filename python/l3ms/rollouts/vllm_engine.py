"""A vLLM in this process: it shares the device with the training, and sleeps between samplings where the device lets it.

It takes and gives tokens alone, draws each response from a seed of its own, with every filter off and the model's own generation settings
ignored, and says how likely each drawn token was: at the temperature, in the numbers of its own kernels. The policy's weights reach it by
its own `reload_weights`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from l3ms.model.random_numbers import undrawn
from l3ms.rollouts.engines import Response
from l3ms.rollouts.vllm_weights import (
    PROVEN,
    UNFILTERED,
    check_temperature,
    prove,
    save_policy,
    scratch_folder,
    seeds,
    tied,
)

# What makes it sample the policy, and is no option.
FIXED: dict[str, Any] = {
    "generation_config": "vllm",
    "logprobs_mode": "processed_logprobs",  # at the temperature
    "skip_tokenizer_init": True,
    "enable_prefix_caching": False,  # what is kept of a prompt is of the weights of then
    "seed": 0,
}
TAKEN = {**FIXED, "model": None, "tokenizer": None, "quantization": None, "load_format": None, "hf_overrides": None}


class VllmEngine:
    """`Engine` of `vllm.LLM`. It starts at the first `update`, from that policy.

    Args:
        options: of `vllm.LLM`: gpu_memory_utilization (by default 0.3: the training needs the rest), max_model_len, enforce_eager,
            tensor_parallel_size, ...; dtype is that of the policy's weights unless given.

    Raises:
        ValueError: several ranks, each of which would start one; an option that would make it sample something else.
    """

    name = "vllm"

    def __init__(self, **options: Any):
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError(
                "vllm: one in this process is for one rank; for several start a server, `vllm serve`, and give its address"
            )
        for option in options:
            if option in TAKEN:
                raise ValueError(f"vllm: {option} is not an option: it would not be the policy that is sampled")
        self.options = {"gpu_memory_utilization": 0.3, **options}
        self.llm: Any = None
        self.sleeps = False
        self._updates = 0

    def update(self, model: Any) -> None:
        """Start it with the policy's weights, or give them to it; adapters are merged into a copy.

        Raises:
            ValueError: vLLM is not installed, has no way to take weights, or computes another model.
        """
        with scratch_folder() as folder:
            save_policy(self, model, folder)
            with _aside(model.device):
                if self.llm is None:
                    self._start(folder, model)
                else:
                    self._awake()
                    self._reload(folder)
                    if model.device.type == "cpu" and tied(model):
                        self.llm.apply_model(_pack_heads)
        self._updates += 1
        if self._updates <= PROVEN:
            prove(self, model)

    def _start(self, folder: str, model: Any) -> None:
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # in this process
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # it warns of a tokenizer that it does not need
        try:
            import vllm  # pyright: ignore[reportMissingImports]
        except ModuleNotFoundError as error:
            raise ValueError(
                f"vllm: {error.name} is not installed; docs/engines.md says how, or use the engine transformers"
            ) from error
        self.sleeps = self.options.get("enable_sleep_mode", model.device.type == "cuda")
        dtype = str(model.dtype).removeprefix("torch.")
        options = {"dtype": dtype, "use_tqdm_on_load": False, **self.options, "enable_sleep_mode": self.sleeps, **FIXED}
        self.llm = vllm.LLM(model=folder, **options)

    def _reload(self, folder: str) -> None:
        try:
            self.llm.collective_rpc("reload_weights", kwargs={"weights_path": folder})
        except (TypeError, AttributeError, NotImplementedError) as error:
            import vllm  # pyright: ignore[reportMissingImports]

            raise ValueError(
                f"vllm: {vllm.__version__} cannot take new weights (reload_weights with weights_path: {error}); install a newer one"
            ) from error

    def _awake(self) -> None:
        if self.sleeps:
            self.llm.wake_up()

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        temperature: float,
        end: Sequence[int],
        generator: torch.Generator,
    ) -> list[Response]:
        """As `Engine.sample`. It sleeps again when it is done."""
        check_temperature(self, temperature)
        if self.llm is None:
            raise ValueError("vllm: update(model) gives it its weights, and has not been called")
        own = seeds(len(prompts), generator)
        with _aside(torch.device("cuda" if torch.cuda.is_available() else "cpu")):
            import vllm  # pyright: ignore[reportMissingImports]

            asked = {"max_tokens": max_new_tokens, "temperature": temperature, "stop_token_ids": list(end)}
            parameters = [
                vllm.SamplingParams(**UNFILTERED, **asked, seed=seed, logprobs=0, detokenize=False) for seed in own
            ]
            self._awake()
            inputs = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
            outputs = self.llm.generate(inputs, parameters, use_tqdm=False)
            if self.sleeps:
                self.llm.sleep(level=1)  # its weights go to the host: the next sampling may be of the same
        closing = frozenset(end)
        return [_response(output.outputs[0], closing) for output in outputs]


def _pack_heads(model: Any) -> None:
    """On a CPU the head multiplies by a packed copy of its weights. Where they are the embeddings' no checkpoint has them, and vLLM 0.32's
    reload leaves the copy as it was: on SmolLM2 the log-likelihoods were 0.11 nats off."""
    for module in model.modules():
        if type(module).__name__ == "ParallelLMHead":
            module.quant_method.process_weights_after_loading(module)


def _response(answer: Any, closing: frozenset[int]) -> Response:
    tokens = list(answer.token_ids)
    likely = [float(step[token].logprob) for token, step in zip(tokens, answer.logprobs, strict=True)]
    return Response(tokens, bool(tokens) and tokens[-1] in closing, likely)


@contextmanager
def _aside(device: torch.device) -> Iterator[None]:
    """What vLLM sets for the process that it is in, for itself only: seeds of the global generators, torch's dtype, threads (and that they
    can be set) and precision of products; the cores that may be used."""
    precision = torch.get_float32_matmul_precision()
    set_threads, threads, dtype = torch.set_num_threads, torch.get_num_threads(), torch.get_default_dtype()
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    try:
        with undrawn(device):
            yield
    finally:
        torch.set_num_threads = set_threads
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)
        if torch.get_float32_matmul_precision() != precision:
            torch.set_float32_matmul_precision(precision)
        if cores is not None and os.sched_getaffinity(0) != cores:
            os.sched_setaffinity(0, cores)
