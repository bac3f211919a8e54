"""Regular expressions under a time limit.

`re` takes exponential time for some patterns (nested repetitions) and cannot be stopped while it looks. So it looks in a process of its
own, which can be; another engine with a limit would give some patterns another meaning.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence

SECONDS = 10.0  # for a call, or a second per text where those are more

SEARCH = """
import json, re, sys
pattern, full, texts = json.load(sys.stdin)
compiled = re.compile(pattern)
find = compiled.fullmatch if full else compiled.search
for text in texts:
    print(int(find(text) is not None), end="", flush=True)
"""


def found(pattern: str, texts: Sequence[str], *, full: bool) -> list[bool]:
    """Of each text, whether the pattern is found in it (`full`: is all of it), as by `re`.

    Raises:
        ValueError: it took too long: names the text by its row, and the pattern.
    """
    if not texts:
        return []
    limit = max(SECONDS, float(len(texts)))
    command = [sys.executable, "-I", "-S", "-W", "ignore", "-c", SEARCH]
    try:
        done = subprocess.run(
            command, input=json.dumps([pattern, full, texts]), capture_output=True, text=True, timeout=limit
        )
    except subprocess.TimeoutExpired as error:
        row = len(error.stdout or "")
        raise ValueError(
            f"row {row}: the regular expression {pattern!r} took more than {limit:g} s (this text has {len(texts[row])} "
            "characters); nested or adjoining repetitions, as in (a+)+, can take forever: write each part one way only"
        ) from None
    if done.returncode or len(done.stdout) != len(texts):
        row, reason = len(done.stdout), (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise ValueError(f"row {row}: the regular expression {pattern!r} could not be tried: {reason}")
    return [answer == "1" for answer in done.stdout]
