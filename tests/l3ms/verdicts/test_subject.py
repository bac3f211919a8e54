"""What is certified is what was trained: adapters in their precision on their base, and contents that have changed are told or refused."""

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from run_folders import write_project

from l3ms.config.run_config import load_config
from l3ms.config.yaml_reader import ConfigError
from l3ms.runs import resuming
from l3ms.runs.executing import inputs_with_base
from l3ms.runs.folder import save_weights, write_config
from l3ms.runs.loading import load_run
from l3ms.verdicts.options import CertifyOptions
from l3ms.verdicts.subject import load_subject

QUIET = Console(quiet=True)
KL = {"type": "kl", "max": 5}


@pytest.fixture
def begin(tmp_path, tokenizer, make_model):
    """begin(**changes) -> a run that was loaded, its folder left as if it had been trained."""

    def run(**changes):
        config = load_config(write_project(tmp_path, tokenizer, make_model(seed=1), rows=40, **changes))
        begun = load_run(config, console=QUIET)
        begun.folder.mkdir()
        write_config(begun.folder, config.model_dump())
        for name, value in begun.model.named_parameters():
            if "lora_B" in name:  # as if it had been trained
                torch.nn.init.normal_(value, std=0.01)
        save_weights(begun.folder, "average", begun.model, tokenizer)
        resuming.write_inputs(begun.folder, inputs_with_base(begun))
        return begun

    return run


def subject(run, **options):
    return load_subject(run.folder, CertifyOptions(**options), QUIET)


def notes(run, **options):
    return subject(run, **options).notes


def append(path: Path, count: int = 20) -> None:
    with path.open("a") as file:
        file.writelines(json.dumps({"prompt": f"f {word} {n * 'e '}", "completion": "a"}) + "\n"
                        for n in range(count // 2) for word in "ab")  # fmt: skip


def test_a_split_of_other_data_is_refused_and_prompts_of_a_file_are_told(begin, tmp_path):
    run = begin()
    assert subject(run).base is None
    assert notes(run) == []
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "f f f"}\n')
    assert notes(run, prompts=prompts) == []
    append(tmp_path / "rows.jsonl")
    with pytest.raises(
        ConfigError, match=r"data.train: is not what .* held out is not known; --prompts FILE gives others"
    ):
        subject(run)
    told = "data.train is not what it was when the run was begun, so whether these prompts were trained on is not known"
    assert notes(run, prompts=prompts) == [told]
    (run.folder / resuming.INPUTS).unlink()  # of a run from before it was kept
    subject(run)


def test_an_evaluation_set_of_its_own_and_what_constraints_read_are_told(begin, tmp_path, tokenizer, make_model):
    append(tmp_path / "held.jsonl")
    data = {"train": "rows.jsonl", "evaluation": "held.jsonl", "chat_template": False}
    run = begin(data=data, constraints=[KL])
    assert notes(run) == []
    append(tmp_path / "held.jsonl", 2)
    make_model(seed=7).save_pretrained(tmp_path / "base")
    changed = " is not what it was when the run was begun"
    assert notes(run) == [f"data.evaluation{changed}", f"constraints.0.reference{changed}"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_are_in_the_precision_they_were_trained_in_and_on_their_base(begin, tmp_path, make_model, dtype):
    run = begin(train={"lora": {"r": 2}, "dtype": dtype, "batch_size": 4, "max_new_tokens": 16, "device": "cpu"})
    state = torch.get_rng_state()
    found = subject(run)
    assert torch.equal(torch.get_rng_state(), state)
    assert found.base is not None
    expected = dict(run.model.named_parameters())
    for name, value in found.model.named_parameters():
        assert value.dtype == (torch.float32 if "lora_" in name else getattr(torch, dtype))
        assert torch.equal(value, expected[name]), name
    make_model(seed=7).save_pretrained(tmp_path / "base")
    with pytest.raises(ConfigError, match=r"model: .*base is not what the adapters of .* its weights have changed"):
        subject(run)


def test_adapters_of_other_settings_and_inputs_that_cannot_be_read_are_refused(begin):
    run = begin(train={"lora": {"r": 2}, "batch_size": 4, "max_new_tokens": 16, "device": "cpu"})
    text = (run.folder / "config.yaml").read_text()
    (run.folder / "config.yaml").write_text(text.replace("r: 2", "r: 3"))
    with pytest.raises(ConfigError, match="cannot load the adapters in"):
        subject(run)
    (run.folder / "config.yaml").write_text(text)
    (run.folder / resuming.INPUTS).write_text("{}")
    with pytest.raises(ConfigError, match=r"inputs.json: cannot be read"):
        subject(run)
