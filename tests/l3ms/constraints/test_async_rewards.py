"""Asynchronous reward functions: all at the same time, also inside a running event loop, and what one of them raises."""

import asyncio
import threading
import time
import warnings

import pytest
import torch

import l3ms


def responses(count=3):
    ids = torch.ones(count, 2, dtype=torch.int64)
    ended = torch.tensor([row % 2 == 0 for row in range(count)])
    return l3ms.Rollout(
        prompts=["p"] * count,
        completions=[f"text {row}" for row in range(count)],
        input_ids=ids,
        attention_mask=ids,
        labels=ids,
        lengths=torch.full((count,), 2),
        ended=ended,
        columns={"number": list(range(count))},
    )


async def judged(prompts, completions, number, **columns):
    await asyncio.sleep(0)
    return [float(n) for n in number]


def returns_an_awaitable(prompts, completions, **columns):
    return judged(prompts, completions, **columns)


@pytest.mark.parametrize("function", [judged, returns_an_awaitable])
def test_an_asynchronous_function_is_a_reward(function):
    constraint = l3ms.Constraint("judge", function, max=1.0)
    assert responses().rewards([constraint]) == {"judge": [0.0, 1.0, 2.0]}
    assert constraint.measure(responses()) == [0.0, 1.0, 2.0]
    assert constraint.values(["p"], ["x"], [1], number=[4]) == [4.0]
    chance = l3ms.Constraint("judge", function, max=0.5, threshold=1.0)
    assert responses().rewards([chance]) == {"judge": [0.0, 1.0, 1.0]}


def test_several_run_at_the_same_time():
    """Each waits for the other: one after the other, the first would wait forever."""
    arrived = {name: threading.Event() for name in ("a", "b", "plain")}

    def meets(own, others):
        async def reward(prompts, completions, **columns):
            arrived[own].set()
            end = time.monotonic() + 10
            while not all(arrived[other].is_set() for other in others):
                assert time.monotonic() < end, "the others did not run meanwhile"
                await asyncio.sleep(0.001)
            return [1.0] * len(completions)

        return reward

    def plain(prompts, completions, **columns):
        arrived["plain"].set()
        return [2.0] * len(completions)

    constraints = [
        l3ms.Constraint("a", meets("a", ["b", "plain"]), min=0.5),
        l3ms.Constraint("b", meets("b", ["a", "plain"]), min=0.5),
        l3ms.Constraint("plain", plain, min=0.5),
    ]
    assert responses(1).rewards(constraints) == {"a": [1.0], "b": [1.0], "plain": [2.0]}


def test_inside_a_running_loop_as_in_a_notebook():
    async def cell():
        return responses().rewards([l3ms.Constraint("judge", judged, max=1.0)])

    assert asyncio.run(cell()) == {"judge": [0.0, 1.0, 2.0]}


def test_the_loop_is_the_same_from_call_to_call():
    """Clients belong to the loop in which they were opened."""
    seen = []

    async def where(prompts, completions, **columns):
        seen.append(asyncio.get_running_loop())
        return [0.0] * len(completions)

    for _ in range(2):
        responses().rewards([l3ms.Constraint("where", where, max=1.0)])
    assert seen[0] is seen[1]


@pytest.mark.parametrize("broken", ["raises", "short", "late"])
def test_what_goes_wrong_comes_out_and_the_others_are_ended(broken):
    ended = threading.Event()

    async def endless(prompts, completions, **columns):
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()

    async def bad(prompts, completions, **columns):
        if broken == "raises":
            raise ConnectionError("no server")
        return [1.0]

    def fails(prompts, completions, **columns):
        time.sleep(0.05)
        raise RuntimeError("no luck")

    first = l3ms.Constraint("bad", fails if broken == "late" else bad, max=1.0)
    constraints = [first, l3ms.Constraint("endless", endless, max=1.0)]  # pyright: ignore[reportArgumentType]
    kinds = {"raises": (ConnectionError, "no server"), "late": (RuntimeError, "no luck")}
    kind, words = kinds.get(
        broken, (ValueError, "constraint 'bad': bad must return one number per response, wanted 3, got 1")
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(kind, match=words):
            responses().rewards(constraints if broken != "late" else constraints[::-1])
    assert ended.wait(10)


def test_columns_go_to_functions_that_name_them():
    seen = {}

    def strict(prompts, completions, ended, number):
        seen.update(ended=ended, number=number)
        return [0.0] * 3

    responses().rewards([l3ms.Constraint("strict", strict, max=1.0)])
    assert seen == {"ended": [True, False, True], "number": [0, 1, 2]}
