"""The best model at the end is all of it, whatever its kind's files call its weights, and whatever its adapter is called."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from l3ms.training.checkpoint_contents import CheckpointError

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*gradient_checkpointing.*:FutureWarning"
)  # peft, with transformers 5.23


def saved(train, model):
    """-> the trainer after a checkpoint, its folder, and the weights in it; it has others by now."""
    trainer, _ = train(model, solver="none", constraints=(), max_steps=1, save_strategy="steps", save_steps=1)
    weights = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)
    folder = trainer.args.output_dir + "/checkpoint-1"
    trainer.state.best_model_checkpoint = folder
    return trainer, folder, weights


def assert_loaded(trainer, weights):
    trainer._load_best_model()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-1")
    assert all(torch.equal(value, weights[name]) for name, value in trainer.model.state_dict().items())


def test_experts_have_other_names_in_their_files(make_model, train, tmp_path):
    trainer, folder, weights = saved(train, make_model("Mixtral"))
    assert trainer._wrong(Path(folder)) is None  # a run can be gone on with
    assert_loaded(trainer, weights)
    read = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert all(torch.equal(read[name], value) for name, value in weights.items())
    trainer.save_model(str(tmp_path / "model"))
    assert any("block_sparse_moe" in name for name in load_file(tmp_path / "model" / "model.safetensors"))
    path = folder + "/model.safetensors"
    save_file({name: value for name, value in load_file(path).items() if "gate_up" not in name}, path)
    with pytest.raises(
        CheckpointError, match=r"load_best_model_at_end: .*has no model.layers.0.mlp.experts.gate_up_proj"
    ):
        trainer._load_best_model()


def test_weights_in_several_files_are_all_there(make_model, train):
    trainer, folder, weights = saved(train, make_model())
    (Path(folder) / "model.safetensors").unlink()
    trainer.model.save_pretrained(folder, state_dict=dict(weights), max_shard_size="2KB")
    assert len(list(Path(folder).glob("model-*-of-*.safetensors"))) > 1
    assert_loaded(trainer, weights)
    index = Path(folder) / "model.safetensors.index.json"
    path = Path(folder) / json.loads(index.read_text())["weight_map"]["model.norm.weight"]
    kept = {name: value for name, value in load_file(path).items() if name != "model.norm.weight"}
    save_file(kept, path)
    with pytest.raises(CheckpointError, match=r"has no model\.norm\.weight"):
        trainer._load_best_model()


def test_several_active_adapters_are_not_loaded_as_one(make_model, train, tmp_path):
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
    model = peft.get_peft_model(make_model(), config)
    model.add_adapter("second", peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["v_proj"]))
    base: Any = model.base_model
    base.set_adapter(["default", "second"])
    trainer, folder, _ = saved(train, model)
    for loading in ({"resume_from_checkpoint": folder}, {}):
        trainer.args.load_best_model_at_end = not loading
        with pytest.raises(ValueError, match=r"one adapter, and 2 are active \(default, second\): train without"):
            trainer.train(**loading)


@pytest.mark.parametrize("names", [("default",), ("mine",), ("default", "mine")])
def test_an_adapter_of_any_name(make_model, train, names):
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
    model = peft.get_peft_model(make_model(), config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    model.set_adapter(names[-1])
    trainer, folder, weights = saved(train, model)
    assert_loaded(trainer, weights)
    trainer.state.best_model_checkpoint = folder + "/gone"
    with pytest.raises(CheckpointError, match="has no weights of the adapter"):
        trainer._load_best_model()
