"""``python -m sparse_ft``: the ``sparse-ft`` command, in the form that ``accelerate launch -m`` needs."""

from __future__ import annotations

import sys

from sparse_ft.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
