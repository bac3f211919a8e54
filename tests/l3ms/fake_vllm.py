"""A vLLM as far as our engines ask it for anything, strict about how: the module, and the server's HTTP.

It samples a model that it loads from the checkpoint that it is given, one prompt at a time, from that prompt's seed.
"""

import contextlib
import json
import threading
import types
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from l3ms.rollouts.engines import Response
from l3ms.rollouts.transformers_engine import TransformersEngine
from l3ms.rollouts.vllm_weights import gaps

NEUTRAL = {
    "top_p": 1.0,
    "top_k": -1,
    "min_p": 0.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "ignore_eos": True,
}


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def answer(model, tokenizer, prompt, asked, at_temperature=True):
    """Tokens, and the log-likelihood of each: at the temperature, or not."""
    assert {name: asked[name] for name in NEUTRAL} == NEUTRAL
    generator = torch.Generator().manual_seed(asked["seed"])
    stop = {"max_new_tokens": asked["max_tokens"], "temperature": asked["temperature"], "end": asked["stop_token_ids"]}
    (found,) = TransformersEngine(model, tokenizer).sample([prompt], **stop, generator=generator)
    nothing = Response(found.tokens, found.ended, [0.0] * len(found.tokens))
    (likely,) = gaps(model, [prompt], [nothing], asked["temperature"] if at_temperature else 1.0)
    return found.tokens, (-likely).tolist()


# ---- the module ----


def module(tokenizer, *, old=False, deaf=False):
    """`deaf`: it says that it has taken new weights, and keeps the old ones; `old`: it has no way to take them."""
    made: list = []

    class SamplingParams:
        def __init__(self, **asked):
            assert asked["logprobs"] == 0
            assert asked["detokenize"] is False
            self.asked = {**asked}

    class LLM:
        def __init__(self, model, **options):
            assert options.pop("generation_config") == "vllm"
            assert options.pop("logprobs_mode") == "processed_logprobs"
            assert options.pop("skip_tokenizer_init") is True
            assert options.pop("enable_prefix_caching") is False
            torch.manual_seed(options.pop("seed"))  # as vLLM does: of the process
            torch.set_num_threads = lambda count: None
            torch.set_default_dtype(torch.float16)
            self.options, self.model, self.calls = options, load(model), []
            self.asleep = False
            made.append(self)

        def collective_rpc(self, method, kwargs):
            assert method == "reload_weights"
            if old:
                raise TypeError("reload_weights() got an unexpected keyword argument 'weights_path'")
            self.calls.append("reload")
            assert not self.asleep
            if not deaf:
                self.model = load(kwargs["weights_path"])

        def apply_model(self, function):
            function(self.model)
            self.calls.append("packed")

        def sleep(self, level):
            assert not self.asleep
            self.asleep = True
            self.calls.append(f"sleep {level}")

        def wake_up(self):
            self.asleep = False

        def generate(self, prompts, parameters, use_tqdm):
            assert not self.asleep
            assert len({own.asked["seed"] for own in parameters}) == len(parameters)
            self.calls.append("generate")
            torch.manual_seed(3)
            return [
                self._one(prompt["prompt_token_ids"], own.asked)
                for prompt, own in zip(prompts, parameters, strict=True)
            ]

        def _one(self, prompt, asked):
            tokens, likely = answer(self.model, tokenizer, prompt, asked)
            steps = [{t: types.SimpleNamespace(logprob=x)} for t, x in zip(tokens, likely, strict=True)]
            return types.SimpleNamespace(outputs=[types.SimpleNamespace(token_ids=tuple(tokens), logprobs=steps)])

    found = types.ModuleType("vllm")
    found.LLM, found.SamplingParams, found.__version__, found.made = LLM, SamplingParams, "0.0.fake", made  # type: ignore[attr-defined]
    return found


# ---- the server ----


@contextlib.contextmanager
def server(tokenizer, model, *, dev=True, at_temperature=True, ends_at=None, deaf=False, token_ids=True):
    """-> (url, the routes that were asked for)"""
    state, asked_for = {"model": model}, []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format, *args):
            pass

        def _send(self, value, code=200):
            data = json.dumps(value).encode() if value is not None else b""
            self.send_response(code)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self):
            assert self.path == "/v1/models"
            self._send({"data": [{"id": "policy"}]})

        def do_POST(self):
            text = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            body: Any = json.loads(text) if text else None
            asked_for.append(self.path)
            if self.path == "/v1/completions":
                self._send({"choices": [self._choice(body)]})
            elif not dev:
                self._send({"detail": "Not Found"}, 404)
            elif self.path == "/collective_rpc":
                if body["method"] != "reload_weights":
                    return self._send({"detail": "unknown"}, 500)
                if not deaf:
                    state["model"] = load(body["kwargs"]["weights_path"])
                self._send({"results": [None]})
            elif self.path == "/reset_prefix_cache":
                self._send(None)
            else:
                self._send({"detail": "Not Found"}, 404)
            return None

        def _choice(self, body):
            assert body["model"] == "policy"
            assert body["n"] == 1
            assert body["return_token_ids"] is True
            assert all(type(token) is int for token in body["prompt"])
            asked = {"stop_token_ids": [], **body}
            if body["logprobs"]:
                logits = state["model"](torch.tensor([body["prompt"]])).logits[0, -1]
                top = (logits / (body["temperature"] if at_temperature else 1.0)).log_softmax(-1).max().item()
                return {"token_ids": [0], "logprobs": {"token_logprobs": [top], "top_logprobs": [{"x": top}]}}
            with LOCK:
                tokens, likely = answer(state["model"], tokenizer, body["prompt"], asked, at_temperature)
            ended = tokens[-1] in asked["stop_token_ids"]
            if ends_at is not None:
                tokens, likely, ended = [ends_at], likely[:1], True
            return {
                "finish_reason": "stop" if ended else "length",
                "logprobs": {"token_logprobs": likely, "top_logprobs": []},
                **({"token_ids": tokens} if token_ids else {}),
            }

    made = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=made.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{made.server_address[1]}", asked_for
    finally:
        made.shutdown()
        made.server_close()


LOCK = threading.Lock()  # the global generator is drawn from
