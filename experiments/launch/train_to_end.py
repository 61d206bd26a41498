"""The train binary for schedulers that start a job again: AGAIN (75) too where the run was stopped before its end.

    python experiments/launch/train_to_end.py --config=... --workdir=...

`python -m mora_jax.train` ends with 0 once it has saved after a SIGTERM, which a scheduler takes for a finished job.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from mora_jax import errors, train
from mora_jax.runtime import hosts
from mora_jax.runtime.progress import Stopped


def main() -> int:
    """0 at the end of the stream, AGAIN after a stop with the state saved, else as the train binary."""
    stopped = False

    def run(argv: Sequence[str]) -> None:
        nonlocal stopped
        try:
            train.teach(argv)
        except Stopped:
            stopped = True

    return hosts.exit_code(run, sys.argv[1:]) or (errors.AGAIN if stopped else 0)


if __name__ == "__main__":
    sys.exit(main())
