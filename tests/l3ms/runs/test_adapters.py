"""What is trained is a whole model: the adapters of an earlier run are refused, and read where nothing is trained."""

import peft
import pytest
from cli_projects import l3ms, one_line
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from l3ms.runs.models import load_model

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")  # of peft


@pytest.fixture
def adapters(tmp_path, checkpoint):
    folder = tmp_path / "adapters"
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(folder)
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("lora", [(), ("--train.lora.r", 2)])
def test_adapters_are_no_model_to_train(project, adapters, capsys, lora):
    assert l3ms(project / "run.yaml", "--model", adapters, *lora) == 2
    assert one_line(capsys).startswith("l3ms: model: holds adapters of ")
    assert not (project / "out").exists()


def test_adapters_are_loaded_where_nothing_is_trained(adapters):
    _, model = load_model(str(adapters), dtype="float32", console=Console(quiet=True))
    assert any("lora_A" in name for name, _ in model.named_parameters())
