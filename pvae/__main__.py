"""``python -m pvae``: the command line."""

import sys

from pvae.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
