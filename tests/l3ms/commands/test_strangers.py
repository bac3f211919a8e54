"""Bad input and hostile artefacts, all kinds: one line and an exit code that says so, nothing written, nothing run, nothing waited on.

`make test` runs a slice of them, `make test-full` all; a case that does not hold is named.
"""

from typing import Any

import bad_inputs
import hostile_artefacts
import hostile_runs
import pytest
import refused
import stranger_projects
import torch
from transformers import LlamaConfig, LlamaForCausalLM

SIZES: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}  # fmt: skip
SLICE = 50  # every so many cases


@pytest.fixture(scope="module")
def template(tmp_path_factory, tokenizer):
    torch.manual_seed(0)
    special = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=17, **SIZES, **special))
    with pytest.MonkeyPatch.context() as patch:
        yield stranger_projects.write(tmp_path_factory.mktemp("strangers"), tokenizer, model, patch)


def holds(template, cases):
    """-> how many were run."""
    found = {}
    for name, make, *codes in cases:
        with refused.in_project(template, template.parent / "project") as folder:
            wrong = refused.wrong(make, folder, *codes)
        if wrong is not None:
            found[name] = wrong
    assert found == {}, f"{len(found)} of {len(cases)} cases"
    return len(cases)


KINDS = {
    "bad_inputs": bad_inputs.cases,
    "hostile_artefacts": hostile_artefacts.cases,
    "hostile_runs": hostile_runs.cases,
}


@pytest.mark.filterwarnings("ignore")  # of torch, peft and datasets, on their way to an error
@pytest.mark.parametrize("kind", KINDS)
def test_a_slice_is_refused(template, kind):
    assert holds(template, KINDS[kind]()[::SLICE]) >= 5


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_all_are_refused(template, kind):
    assert holds(template, KINDS[kind]()) > 250


def test_there_are_as_many_kinds_as_were_promised():
    counts = {kind: len({name for name, *_ in cases()}) for kind, cases in KINDS.items()}
    assert counts["bad_inputs"] >= 449
    assert counts["hostile_artefacts"] + counts["hostile_runs"] >= 227


def test_a_case_that_is_not_refused_is_found(template):
    with refused.in_project(template, template.parent / "project") as folder:
        assert refused.wrong(lambda _: ["plot", "finished"], folder) == "exit 0: "
