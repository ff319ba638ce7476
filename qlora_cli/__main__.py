"""`python -m qlora_cli` is the same program as `qlora`."""

import sys

from qlora_cli.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
