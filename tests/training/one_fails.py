"""`sparse-ft` in two processes, of which process 1 fails or is killed: `torchrun … one_fails.py HOW STEP WORDS…`."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from sparse_ft.cli.main import main
from sparse_ft.training import MaskCallback


class Failing(MaskCallback):
    """Fails in process 1 after a step."""

    how, step = sys.argv[1], int(sys.argv[2])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_step_end(args, state, control, **kwargs)
        if os.environ["RANK"] == "1" and state.global_step == self.step:
            if self.how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError("the second process has lost its disk")


if __name__ == "__main__":
    import sparse_ft.cli.retrain as retrain

    retrain.MaskCallback = Failing  # type: ignore[misc]
    sys.exit(main(sys.argv[3:]))
