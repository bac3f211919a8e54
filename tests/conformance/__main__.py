"""`make conformance`: every architecture and adapter, one after the other, each with a time limit; the page is written from what came out.

python tests/conformance                     # all, and docs/conformance.md
python tests/conformance llama LORA --dry    # some, and no page
"""

import argparse
import contextlib
import io
import logging
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parent))

import torch
import transformers
from adapters import ADAPTERS, adapted
from architectures import ARCHITECTURES, NotBuilt, build
from comparison import COMPARISONS, Refused, Wrong, runs_by_itself
from page import Result, written

PAGE = Path(__file__).resolve().parents[2] / "docs" / "conformance.md"


class TooSlow(BaseException):
    """Not an Exception, which the code that is tried may catch."""


def judged(name: str, group: str, make: Callable[[], Any]) -> Result:
    """What comes of one model."""
    passed: list[str] = []
    try:
        model = make()
        runs_by_itself(model)
        for what, compare in COMPARISONS.items():
            compare(model)
            passed.append(what)
    except NotBuilt as error:
        return Result(name, group, "not built", str(error))
    except Refused as error:
        return Result(name, group, "refused", str(error))
    except Wrong as error:
        return Result(name, group, "wrong", str(error))
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        line = (
            f"{type(error).__name__}: {' '.join(str(error).split())[:200]} ({Path(where.filename).name}:{where.lineno})"
        )
        return Result(name, group, "crash", line)
    return Result(name, group, "right", "")


@contextlib.contextmanager
def limited(seconds: int) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TooSlow(f"more than {seconds} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument(
        "names", nargs="*", help="model types of transformers, adapter types of peft; all where none is given"
    )
    options.add_argument("--limit", type=int, default=90, help="seconds for each")
    options.add_argument("--dry", action="store_true", help="write no page")
    given = options.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    everything: dict[str, tuple[str, Callable[[], Any]]] = {}
    everything |= {kind: ("architecture", lambda kind=kind: build(kind)) for kind in ARCHITECTURES}
    everything |= {kind: ("adapter", lambda kind=kind: adapted(kind)) for kind in ADAPTERS}
    unknown = set(given.names) - everything.keys()
    if unknown:
        options.error(f"no such architecture or adapter: {', '.join(sorted(unknown))}")
    results = []
    for name in given.names or everything:
        group, make = everything[name]
        began = time.perf_counter()
        try:
            with (
                limited(given.limit),
                contextlib.redirect_stdout(io.StringIO()),
                contextlib.redirect_stderr(io.StringIO()),
            ):
                result = judged(name, group, make)
        except TooSlow as error:
            result = Result(name, group, "crash", str(error))
        results.append(result)
        print(f"{name:32} {result.verdict:10} {time.perf_counter() - began:5.1f} s  {result.why}", flush=True)
    if not given.dry and not given.names:
        PAGE.write_text(written(results))
        print(f"written to {PAGE}")
    return any(result.verdict in ("wrong", "crash") for result in results)


if __name__ == "__main__":
    sys.exit(main())
