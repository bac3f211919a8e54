"""More of models of somebody else: templates that want out of their sandbox, adapters and tokenizers that name modules, methods overwritten
by a config.json; and what a terminal would obey, wherever it is said. `evil.py` in the project makes the canary."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hostile_artefacts import CODE, REFUSED, TRAIN, Case, change, pickled
from hostile_runs import ANY, RESUME

QUICK = ("--iterations", "1", "--output", "new")
CLASSIFIER = ["--constraints.0", "{type: reward_model, name: m, model: classifier, min: 0.1}"]
ESCAPES = {"colour": "\x1b[31m", "clear": "\x1b[2J", "title": "\x1b]0;owned\x07", "CSI": "\x9b2J", "back": "\x08" * 9,
"return": "\rl3ms: fine",
           "turned": "\u202e", "line": "\nl3ms: fine", "link": "\x1b]8;;http://x\x07", "null": "\x00"}  # fmt: skip
MKDIR = "os.mkdir('canary')"
TEMPLATES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ cycler.__init__.__globals__.%s }}",
    "{{ lipsum.__globals__['os'].mkdir('canary') }}",
    "{{ self.__init__.__globals__ }}", "{{ messages.__class__ }}", "{{ ''|attr('__class__') }}",
    "{{ '%%c'|format(0)|attr('__class__') }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(cycler) }}", "{{ ('{0.__class__}'|attr('format'))(0) }}",
    "{{ [0]|map(attribute='__class__')|list }}",
    "{{ raise_exception.__globals__['os'].mkdir('canary') }}", "{{ raise_exception.__builtins__ }}", "{{ tojson.__globals__ }}",
    "{{ strftime_now.__globals__['os'].mkdir('canary') }}", "{{ joiner.__init__.__globals__ }}", "{{ namespace.__init__.__globals__ }}",
    "{%% set x = namespace(a=1) %%}{{ x.__class__ }}", "{{ dict.__base__ }}", "{{ range.__class__ }}", "{{ (1).__class__.__base__ }}",
    "{{ messages.append(1) }}", "{{ messages.clear() }}", "{%% include '/etc/passwd' %%}", "{%% import 'evil.py' as e %%}",
    "{%% from 'evil' import f %%}",
    "{%% extends '../victim' %%}", "{{ ''.join.__self__.__class__ }}", "{{ url_for.__globals__ }}", "{{ request.application }}",
    "{{ config.items() }}",
    "{{ g.pop.__globals__ }}", "{{ ''['__cla' + 'ss__'] }}", "{{ (''|attr)('__class__') }}", "{{ range(10 ** 9)|list }}",
    "{{ 'x' * 10 ** 18 }}",
    "{%% macro m() %%}{{ caller.__globals__ }}{%% endmacro %%}{%% call m() %%}{%% endcall %%}", "{%% do messages.append(1) %%}",
    "{%% debug %%}",
    "{{ messages|pprint|attr('__doc__') }}", "{{ messages[0].update({'a': 1}) }}",
]  # fmt: skip


def plant(folder: Path) -> None:
    """Modules that sing, wherever an import could look."""
    for place in (folder, folder / "base", folder / "finished" / "average", folder / "classifier"):
        (place / "evil.py").write_text(CODE + "class C: pass\ndef f(*a, **k): return []\n")
    package = folder / "megatron" / "core"
    package.mkdir(parents=True)
    for path in (package.parent, package):
        (path / "__init__.py").write_text(CODE)


def of_templates() -> Iterator[Case]:
    for template in TEMPLATES:
        text = template % MKDIR if "%s" in template else template % ()

        def make(folder: Path, text: str = text) -> list[str]:
            plant(folder)
            (folder / "base" / "chat_template.jinja").write_text(text)
            return [*TRAIN, *QUICK, "--data.chat-template", "true"]

        yield f"chat template {text[:60]}", make, ANY


def of_named_code() -> Iterator[Case]:
    """Files of a model that name code: never imported."""

    def case(name: str, write: Callable[[Path], Any], arguments: list[str], codes: tuple[int, ...] = ANY) -> Case:
        def make(folder: Path) -> list[str]:
            plant(folder)
            write(folder)
            return arguments

        return name, make, codes

    train = [*TRAIN, *QUICK]
    tokenizer: dict[str, Any] = {
        "auto_map": {"AutoTokenizer": ["evil.C", None]}, "tokenizer_class": "evil", "processor_class": "evil.C",
        "tokenizer_file": "../victim", "vocab_file": "../victim", "special_tokens_map_file": "../victim", "name_or_path": "../precious",
        "chat_template": {"default": "{{ cycler.__init__.__globals__ }}"}, "from_slow": True, "gguf_file": "../victim",
        "extra_special_tokens": {"a": 1},
        "added_tokens_decoder": {"0": {"content": {"__class__": "evil.C"}}}, "backend": "evil", "init_inputs": [["../victim"]],
        "model_max_length": "x",
    }  # fmt: skip
    for key, value in tokenizer.items():
        yield case(
            f"tokenizer_config.json: {key}",
            lambda f, k=key, v=value: change(f / "base" / "tokenizer_config.json", **{k: v}),
            train,
        )
    for name in (
        "tokenizer.model",
        "vocab.json",
        "merges.txt",
        "vocab.txt",
        "added_tokens.json",
        "special_tokens_map.json",
        "tiktoken.model",
    ):
        yield case(f"a pickle as {name}", lambda f, n=name: (f / "base" / n).write_bytes(pickled()), train)
        yield case(
            f"a pickle as {name} alone",
            lambda f, n=name: ((f / "base" / "tokenizer.json").unlink(), (f / "base" / n).write_bytes(pickled())),
            train,
        )
    generation: dict[str, Any] = {
        "custom_generate": "./evil.py", "assistant_model": "evil", "cache_implementation": "evil",
        "compile_config": {"backend": "evil"}, "watermarking_config": "x",
        "validate": 1, "to_dict": "x", "save_pretrained": "x", "update": 3, "_from_model_config": "x", "eos_token_id": "evil",
        "max_new_tokens": -5,
        "generation_config": "../victim", "stop_strings": ["x"], "tokenizer": "evil", "guidance_scale": "x",
        "auto_map": {"C": "evil.C"}, "__class__": "evil.C",
    }  # fmt: skip
    for key, value in generation.items():
        yield case(
            f"generation_config.json: {key}",
            lambda f, k=key, v=value: (f / "base" / "generation_config.json").write_text(json.dumps({k: v})),
            train,
        )
    methods = ("to_dict", "to_json_string", "to_diff_dict", "save_pretrained", "get_text_config", "__class__", "__dict__",
    "_attn_implementation_internal",
               "from_dict", "name_or_path", "_name_or_path", "base_config_key", "attribute_map", "tie_word_embeddings", "loss_type",
               "use_kernels",
               "quantization_config", "base_model_tp_plan", "transformers_version", "architectures", "is_encoder_decoder",
               "torch_dtype", "chunk_size_feed_forward")  # fmt: skip
    for key in methods:
        for value in ("evil.C", 3, {"a": "evil.C"}):
            yield case(
                f"config.json: {key} is {value}",
                lambda f, k=key, v=value: change(f / "base" / "config.json", **{k: v}),
                train,
            )
    adapter: dict[str, Any] = {
        "a base elsewhere": {"base_model_name_or_path": "../precious"}, "a base of pickles": {"base_model_name_or_path": "pickles"},
        "a base of itself": {"base_model_name_or_path": "base"}, "a device as its base": {"base_model_name_or_path": "/dev/zero"},
        "a victim as its base": {"base_model_name_or_path": "victim"}, "a name of a hub": {"base_model_name_or_path": "someone/evil"},
        "megatron": {"megatron_config": {"a": 1}, "megatron_core": "megatron.core"}, "a module": {"megatron_config": {"a": 1},
        "megatron_core": "evil"},
        "auto_mapping": {"auto_mapping": {"base_model_class": "C", "parent_library": "evil"}}, "no kind": {"peft_type": "EVIL"},
        "a kind of code": {"peft_type": "evil.C"}, "targets of code": {"target_modules": "(?P<evil>.*)"},
        "runtime": {"runtime_config": {"ephemeral_gpu_offload": "x"}},
        "eva": {"init_lora_weights": "eva"}, "corda": {"init_lora_weights": "corda", "corda_config": {"cache_file": "victim"}},
        "r": {"r": "x"},
        "loftq": {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}, "layers": {"layer_replication": [[0, 10**9]]},
    }  # fmt: skip
    for kind, values in adapter.items():

        def adapted(folder: Path, values: dict[str, Any] = values) -> None:
            (folder / "adapted").mkdir()
            (folder / "pickles").mkdir()
            (folder / "pickles" / "pytorch_model.bin").write_bytes(pickled())
            shutil.copy(folder / "base" / "config.json", folder / "pickles" / "config.json")
            basic = {
                "peft_type": "LORA",
                "base_model_name_or_path": str(folder / "base"),
                "r": 2,
                "target_modules": ["q_proj"],
                "task_type": "CAUSAL_LM",
            }
            (folder / "adapted" / "adapter_config.json").write_text(json.dumps(basic | values))
            for path in (folder / "base").glob("tokenizer*"):
                shutil.copy(path, folder / "adapted" / path.name)

        yield case(f"an adapter with {kind}", adapted, [*train, "--model", "adapted"])
    for file in ("config.json", "tokenizer.json", "model.safetensors"):
        for target in ("/etc/passwd", "../victim", "../../../../../../etc/passwd"):
            yield case(
                f"base/{file} leads to {target}",
                lambda f, n=file, t=target: ((f / "base" / n).unlink(), (f / "base" / n).symlink_to(t)),
                train,
                REFUSED,
            )
    yield case(
        "a classifier with code",
        lambda f: change(f / "classifier" / "config.json", auto_map={"AutoModelForSequenceClassification": "evil.C"}),
        [*train, *CLASSIFIER],
    )


def of_escapes() -> Iterator[Case]:
    """What a terminal obeys, wherever a line or a table says what a stranger wrote."""

    def case(name: str, make: Callable[[Path, str], list[str]], escape: str) -> Case:
        return f"{escape} in {name}", lambda folder: make(folder, ESCAPES[escape]), ANY

    def key(folder: Path, text: str) -> list[str]:
        with (folder / "run.yaml").open("a") as file:
            file.write(f'"{text.encode("unicode_escape").decode()}": 1\n')
        return TRAIN

    def column(folder: Path, text: str) -> list[str]:
        (folder / "rows.jsonl").write_text(
            "".join(
                json.dumps({"prompt": f"a b {i} {text}", "completion": text, f"c{text}": [text]}) + "\n"
                for i in range(20)
            )
        )
        return [*TRAIN, *QUICK]

    def field(folder: Path, text: str) -> list[str]:
        (folder / "rows.jsonl").write_text(json.dumps({text: 1, "prompt": text, "completion": [text]}))
        return TRAIN

    def token(folder: Path, text: str) -> list[str]:
        values = json.loads((folder / "base" / "tokenizer_config.json").read_text())
        values.pop("pad_token", None)
        (folder / "base" / "tokenizer_config.json").write_text(
            json.dumps(values | {"unk_token": text, "model_max_length": 9})
        )
        return [*TRAIN, *QUICK]

    def report(folder: Path, text: str) -> list[str]:
        change(folder / "finished" / "report.json", constraints=[{"name": text, "type": text}], solver=text)
        return ["plot", "finished"]

    def architecture(folder: Path, text: str) -> list[str]:
        change(folder / "base" / "config.json", model_type=text, architectures=[text])
        return TRAIN

    def checkpoint(folder: Path, text: str) -> list[str]:
        (folder / "begun" / "checkpoints" / "checkpoint-3" / "manifest.json").write_text(
            json.dumps({"files": {text: {"bytes": 1, "sha256": text}}})
        )
        return RESUME

    def template(folder: Path, text: str) -> list[str]:
        (folder / "base" / "chat_template.jinja").write_text("{{ raise_exception(" + json.dumps(text) + ") }}")
        return [*TRAIN, "--data.chat-template", "true"]

    places = {"a key": key, "rows": column, "a field of rows": field, "a token": token, "a report": report,
    "a kind of model": architecture,
              "a checkpoint's manifest": checkpoint, "a template's refusal": template}  # fmt: skip
    for name, make in places.items():
        for escape in ESCAPES:
            yield case(name, make, escape)


def cases() -> list[Case]:
    return [*of_templates(), *of_named_code(), *of_escapes()]
