"""`python -m l3ms`, and the command `l3ms`."""

import sys

from l3ms.extras import missing


def main(arguments: list[str] | None = None) -> int:
    """Run a command and return its exit code: 5, and one line, where what it needs is not installed."""
    try:
        from l3ms.commands.command_line import main as run
    except ModuleNotFoundError as error:
        line = missing("the command l3ms", error)
        if line is None:
            raise
        print(f"l3ms: {line}", file=sys.stderr)
        return 5
    return run(arguments)


if __name__ == "__main__":
    sys.exit(main())
