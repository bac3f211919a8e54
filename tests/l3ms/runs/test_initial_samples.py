"""A run that goes on does not sample its first model again."""

import pytest
from resumed_runs import interrupted, project, report, train

from l3ms.runs import evaluating


@pytest.fixture
def measured(monkeypatch):
    """The models that responses were sampled of, by their order."""
    calls, real = [], evaluating.evaluate

    def evaluate(model, *arguments, **options):
        calls.append(model)
        return real(model, *arguments, **options)

    monkeypatch.setattr(evaluating, "evaluate", evaluate)
    return calls


def test_the_first_samples_are_kept_with_the_checkpoints(tmp_path, tokenizer, make_model, measured):
    whole, stopped = (
        project(tmp_path / part, tokenizer, make_model(), evaluate={"samples": 8, "initial": True})
        for part in ("whole", "stopped")
    )
    assert train(whole) == 0
    assert len(measured) == 3
    interrupted(stopped, 8)
    assert len(measured) == 4
    place = stopped.parent / "out" / "checkpoints" / "initial.json"
    assert place.is_file()
    assert train(stopped, "--resume") == 0
    assert len(measured) == 6, "the first model was sampled again"
    assert report(stopped.parent / "out") == report(whole.parent / "out")


@pytest.mark.parametrize(
    "damage",
    [
        *("", '{"wanted": {"samples": 8, "batch_size": 64}}'),
        *(pytest.param(text, marks=pytest.mark.slow) for text in ("{}", "[]")),
    ],
)
def test_samples_that_are_not_whole_are_measured_again(tmp_path, tokenizer, make_model, measured, damage):
    config = project(tmp_path / "project", tokenizer, make_model(), evaluate={"samples": 8, "initial": True})
    interrupted(config, 8)
    (config.parent / "out" / "checkpoints" / "initial.json").write_text(damage)
    assert train(config, "--resume") == 0
    assert len(measured) == 4
    assert report(config.parent / "out")["initial"]["samples"] == 8
