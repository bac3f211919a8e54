"""What a reward function is given, what it may do with it, and what is said when it fails."""

import asyncio
import functools
import sys
from dataclasses import replace

import pytest
import torch

import l3ms
from l3ms.commands.ending import explain
from l3ms.constraints.trl_arguments import RewardLog, trl_arguments


def responses(count=2, **columns):
    ids = torch.ones(count, 2, dtype=torch.int64)
    turns = [[{"role": "user", "content": "hi"}] for _ in range(count)]
    answers = [[{"role": "assistant", "content": f"text {row}"}] for row in range(count)]
    return l3ms.Rollout(
        prompts=turns, completions=answers, input_ids=ids, attention_mask=ids, labels=ids,
        lengths=torch.full((count,), 2), ended=torch.ones(count, dtype=torch.bool), columns=columns,
    )  # fmt: skip


def test_a_function_that_changes_what_it_is_given_changes_nothing_else():
    def vandal(prompts, completions, completion_ids, tags, **columns):
        prompts.clear()
        completions[0][0]["content"] = "gone"
        completions[1].append("more")
        completion_ids[0].clear()
        tags[0]["seen"] = True
        tags.pop()
        return [0.0, 0.0]

    seen = {}

    def reader(prompts, completions, completion_ids, tags, **columns):
        seen.update(prompts=prompts, completions=completions, completion_ids=completion_ids, tags=tags)
        return [1.0, 1.0]

    rollout, untouched = responses(tags=[{"a": [1]}, {}]), responses(tags=[{"a": [1]}, {}])
    constraints = [l3ms.Constraint("vandal", vandal, max=1), l3ms.Constraint("reader", reader, max=1)]
    assert rollout.rewards(constraints) == {"vandal": [0.0, 0.0], "reader": [1.0, 1.0]}
    for name in ("prompts", "completions", "columns"):
        assert getattr(rollout, name) == getattr(untouched, name)
    assert seen["completions"] == untouched.completions
    assert seen["completion_ids"] == [[1, 1], [1, 1]]
    assert seen["tags"] == [{"a": [1]}, {}]


class Odd(Exception):
    """Makes its words of something else than its arguments."""

    def __init__(self, code, path):
        super().__init__(code, path)

    def __str__(self):
        return "odd"


@pytest.mark.parametrize("kind", ["plain", "asynchronous", "generator"])
@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ValueError, ["no luck"]),
        (KeyError, ["tag"]),
        (ConnectionError, ["no server"]),
        (FileNotFoundError, [2, "none"]),
        (AssertionError, []),
        (Odd, [3, 4]),
    ],
)
def test_an_error_names_constraint_and_function_and_stays_of_its_kind(kind, error, words):
    def plain(prompts, completions, **columns):
        raise error(*words)

    async def asynchronous(prompts, completions, **columns):
        await asyncio.sleep(0)
        raise error(*words)

    def generator(prompts, completions, **columns):
        yield 1.0
        raise error(*words)

    constraint = l3ms.Constraint(
        "polite", {"plain": plain, "asynchronous": asynchronous, "generator": generator}[kind], max=1
    )
    texts = replace(responses(), prompts=["p"] * 2, completions=["x"] * 2)
    for call in (lambda: texts.rewards([constraint]), lambda: constraint.rewards(["p"] * 2, ["x"] * 2, [1] * 2)):
        with pytest.raises(error) as caught:
            call()
        line = explain(caught.value)[0]
        assert line.count(f"constraint 'polite': {kind}") == 1


def asks(prompts, completions, trainer_state, log_extra, log_metric):
    log_extra(column="even", values=[row % 2 == 0 for row in range(len(prompts))])
    log_metric(name="count", value=len(prompts))
    return [float(trainer_state.global_step)] * len(prompts)


def asks_softly(prompts, completions, **columns):
    columns["log_metric"]("count", torch.tensor(len(prompts)))
    columns["log_extra"]("even", [True] * len(prompts))
    return [float(columns["trainer_state"].global_step)] * len(prompts)


@pytest.mark.parametrize("function", [asks, asks_softly, functools.partial(asks)])
def test_functions_that_ask_for_a_training_get_one_of_no_steps_outside(function):
    constraint = l3ms.Constraint("asks", function, max=1)
    assert responses().rewards([constraint]) == {"asks": [0.0, 0.0]}
    assert responses().rewards([constraint], training=trl_arguments(iteration=7, iterations=9)) == {"asks": [7.0, 7.0]}
    assert constraint.measure(responses()) == [0.0, 0.0]


def test_a_function_called_by_itself_gets_what_it_names():
    assert l3ms.Constraint("asks", asks, max=1).rewards(["p"], ["x"], [1]) == [0.0]
    seen = {}

    def takes_all(prompts, completions, **columns):
        seen.update(columns)
        return [0.0]

    l3ms.Constraint("all", takes_all, max=1).rewards(["p"], ["x"], [1], topic=[4])
    assert seen == {"topic": [4]}


def test_the_state_needs_no_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert responses().rewards([l3ms.Constraint("asks", asks, max=1)]) == {"asks": [0.0, 0.0]}


def test_what_is_logged_is_the_mean_since_the_last_time():
    log = RewardLog()
    log.log_metric("a", 1)
    log.log_metric("a", torch.tensor(2.0))
    log.log_metric("b", float("inf"))
    log.log_extra("x", [1])
    log.log_extra("x", (2,))
    assert log.means(1) == {"a": 1.5, "b": float("inf")}
    assert log.means(1) == {}
    assert log.columns == {"x": [1, 2]}
    with pytest.raises(ValueError, match=r"log_metric\('a', \.\.\.\): wanted a number, got 'x'"):
        log.log_metric("a", "x")
    with pytest.raises(ValueError, match=r"log_extra\('x', \.\.\.\): wanted a list, one value per response, got 'abc'"):
        log.log_extra("x", "abc")


def test_means_are_over_the_ranks_and_a_metric_may_be_of_one_alone(monkeypatch):
    log = RewardLog()
    log.log_metric("a", 1)
    monkeypatch.setattr("accelerate.utils.gather_object", lambda own: [*own, {"a": [2.0, 6.0], "b": [4.0]}])
    assert log.means(2) == {"a": 3.0, "b": 4.0}
