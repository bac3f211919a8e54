"""Asynchronous reward functions, called from code that is not: one event loop, in a thread of its own.

One loop for the whole process, because clients (HTTP sessions) belong to the loop that they were opened in; a thread, because the caller
may itself be inside a running loop, as in a notebook.
"""

import asyncio
import functools
import inspect
import os
import threading
from collections.abc import Awaitable
from concurrent.futures import Future
from typing import Any


def begin(answer: Any) -> Any:
    """Start what is awaitable in the background, and return its future; anything else comes back as it is."""
    return (
        asyncio.run_coroutine_threadsafe(_awaited(answer), _loop(os.getpid()))
        if inspect.isawaitable(answer)
        else answer
    )


def wait(answer: Any) -> Any:
    """The result of what `begin` returned. What was raised in the background is raised here."""
    return answer.result() if isinstance(answer, Future) else answer


def cancel(answer: Any) -> None:
    """End what is still running of what `begin` returned."""
    if isinstance(answer, Future):
        answer.cancel()


async def _awaited(answer: Awaitable[Any]) -> Any:
    return await answer


@functools.cache
def _loop(process: int) -> asyncio.AbstractEventLoop:
    """Of this process: a forked one has none of its parent's threads."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="l3ms rewards", daemon=True).start()
    return loop
