"""The program `qlora`; `python -m qlora_cli` is the same."""

import sys

from qlora_cli.process import settle


def run() -> int:
    """Runs the command line of this process; returns its exit code."""
    settle(sys.argv[1:])
    from qlora_cli.cli.app import main  # only now: it may be another process that needs it

    return main()


if __name__ == "__main__":
    sys.exit(run())
