"""``python -m lightning_quantdebug``: see :mod:`lightning_quantdebug.cli`."""

import sys

from lightning_quantdebug.cli import main

if __name__ == "__main__":
    sys.exit(main())
