"""The head's native ops by the signatures of `chunked`, for the table of backends.

A torch schema has no tuples, so `head` and `needs` are spread out; rows are counted, so `scored_rows`, the last argument, is dropped.
"""

from collections.abc import Callable

from torch import ops


def _spread(op: Callable) -> Callable:
    def run(*arguments):
        spread = []
        for argument in arguments[:-1]:
            spread += argument if isinstance(argument, tuple) else (argument,)
        return op(*spread)

    return run


def head_ops() -> dict[str, Callable]:
    names = ("log_likelihood", "log_likelihood_backward", "part_backward", "weighted_log_likelihood")
    # What was compiled before an op was added lacks it.
    found = {name: getattr(ops.l3m_kernels, f"cpp_{name}", None) for name in names}
    return {name: _spread(op) for name, op in found.items() if op is not None}
