"""A vLLM as a server of its own, on other devices: tokens in and out by its OpenAI-compatible HTTP, weights by a folder that both see.

    VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --generation-config vllm --logprobs-mode processed_logprobs

The routes that change a running server (`/collective_rpc`, `/reset_prefix_cache`) are there in that mode only: it is for a network whose
every user may change the model.
"""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from l3ms.model.sharding import several_ranks
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

AT_ONCE = 64  # requests
WARMER = 2.0  # a temperature at which log-likelihoods are others
TRIED = 4  # prompts
SURE, SAME = -0.01, 1e-4  # a likelihood of which nothing can be seen; a difference that is rounding
COMMAND = "VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --generation-config vllm --logprobs-mode processed_logprobs"


class VllmServerEngine:
    """`Engine` of a `vllm serve` that was started with the policy's model, by the command above.

    Args:
        url: `http://host:8000`.
        folder: that this process writes and the server reads, for the weights; by default a temporary one of this machine.
        timeout: seconds for an answer.
    """

    def __init__(self, url: str, *, folder: str | Path | None = None, timeout: float = 600.0):
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"vllm server: url must begin with http:// or https://, got {url!r:.100}")
        self.url, self.folder, self.timeout = url.rstrip("/"), folder, timeout
        self.name = f"vllm at {self.url}"
        self._served: str | None = None
        self._updates = 0
        self._at_temperature: bool | None = None  # whether its log-likelihoods are

    def update(self, model: Any) -> None:
        """Give the server the policy's weights; of several ranks the first does, and the others wait.

        Raises:
            ValueError: it cannot be reached, was started otherwise, or computes another model.
        """
        several = several_ranks()
        error: Exception | None = None
        if several:
            dist.barrier()  # nobody samples of the old weights any more
        if not several or dist.get_rank() == 0:
            try:
                self._give(model)
            except Exception as found:  # the other ranks wait for the word
                if not several:
                    raise
                error = found
        if several:
            failed: list[Any] = [error]
            dist.broadcast_object_list(failed, 0, device=model.device)
            if failed[0] is not None:
                raise failed[0]

    def _give(self, model: Any) -> None:
        if self.folder is None:
            with scratch_folder() as folder:
                self._load(model, folder)
        else:
            self._load(model, str(self.folder))
        self._updates += 1
        if self._updates <= PROVEN:
            prove(self, model)

    def _load(self, model: Any, folder: str) -> None:
        if model.device.type == "cpu" and tied(model):
            raise ValueError(
                f"{self.name}: the model's head is its embeddings, of which a vLLM server on a CPU keeps an old copy; leave the server "
                "out: a vLLM in this process is given both"
            )
        save_policy(self, model, folder)
        self._post("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": folder}})
        self._post("/reset_prefix_cache", None)  # what is kept of a prompt is of the weights of then

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        temperature: float,
        end: Sequence[int],
        generator: torch.Generator,
    ) -> list[Response]:
        """As `Engine.sample`, a request for each prompt."""
        check_temperature(self, temperature)
        if temperature != 1.0:
            self._check_log_likelihoods(prompts)
        asked = {"max_tokens": max_new_tokens, "temperature": temperature, "stop_token_ids": list(end)}
        own = seeds(len(prompts), generator)
        with ThreadPoolExecutor(min(AT_ONCE, len(prompts))) as pool:
            choices = pool.map(self._choice, prompts, [{**asked, "seed": seed, "logprobs": 0} for seed in own])
            return [self._response(choice, frozenset(end)) for choice in choices]

    def _choice(self, prompt: Sequence[int], asked: Mapping[str, Any]) -> Mapping[str, Any]:
        body = {"model": self._model(), "prompt": list(prompt), "n": 1, "return_token_ids": True, **UNFILTERED, **asked}
        return self._post("/v1/completions", body)["choices"][0]

    def _response(self, choice: Mapping[str, Any], closing: frozenset[int]) -> Response:
        tokens = choice.get("token_ids")
        if tokens is None:
            raise ValueError(f"{self.name}: its answers have no token_ids (return_token_ids): a newer vLLM has them")
        ended = bool(tokens) and tokens[-1] in closing
        if choice.get("finish_reason") == "stop" and not ended:
            raise ValueError(
                f"{self.name}: it ended a response at a token that is no end token ({tokens[-1:]}): start it with --generation-config vllm"
            )
        return Response(tokens, ended, choice["logprobs"]["token_logprobs"])

    def _check_log_likelihoods(self, prompts: Sequence[Sequence[int]]) -> None:
        """Whether they are at the temperature: of a token that is not sure the likelihood is another where it is warmer."""
        if self._at_temperature is None:
            tops = [[self._top(prompt, temperature) for prompt in prompts[:TRIED]] for temperature in (1.0, WARMER)]
            least = min(range(len(tops[0])), key=lambda row: tops[0][row])
            if tops[0][least] > SURE:
                return  # of these prompts it cannot be seen, and is the same
            self._at_temperature = abs(tops[0][least] - tops[1][least]) > SAME
        if not self._at_temperature:
            raise ValueError(
                f"{self.name}: its log-likelihoods are not those at the temperature: start it with --logprobs-mode processed_logprobs"
            )

    def _top(self, prompt: Sequence[int], temperature: float) -> float:
        choice = self._choice(prompt, {"max_tokens": 1, "temperature": temperature, "seed": 0, "logprobs": 1})
        return max(choice["logprobs"]["top_logprobs"][0].values())

    def _model(self) -> str:
        if self._served is None:
            self._served = self._ask(urllib.request.Request(f"{self.url}/v1/models"))["data"][0]["id"]
        assert self._served is not None
        return self._served

    def _post(self, route: str, body: Any) -> Any:
        data = b"" if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        return self._ask(urllib.request.Request(f"{self.url}{route}", data, headers, method="POST"))

    def _ask(self, request: urllib.request.Request) -> Any:
        route = request.full_url.removeprefix(self.url)
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                text = answer.read()
        except urllib.error.HTTPError as error:
            said = " ".join(error.read().decode("utf-8", "replace").split())[:200]
            if error.code == 404 and not route.startswith("/v1"):
                raise ValueError(f"{self.name}: it has no {route}: start it with {COMMAND}") from error
            raise ValueError(f"{self.name}: {route} answered {error.code}: {said}") from error
        except (OSError, urllib.error.URLError) as error:
            reason = getattr(error, "reason", None) or error
            raise ValueError(f"{self.name}: cannot be reached ({reason}); start it with {COMMAND}") from error
        except (http.client.HTTPException, ValueError) as error:
            raise ValueError(
                f"{self.name}: is no address of a server, or what answers speaks no HTTP ({error!r:.200})"
            ) from error
        try:
            return json.loads(text) if text.strip() else None
        except ValueError as error:
            said = " ".join(text.decode("utf-8", "replace").split())[:100]
            raise ValueError(f"{self.name}: {route} answered no JSON, so it is no vLLM: {said}") from error
