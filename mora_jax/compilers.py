"""The compilers of accelerators that are not there: where they lie, and the environment of a process that uses them.

libtpu, the CUDA plugin and ptxas are development extras that `bash launch.sh test` puts in .venv/compilers, apart from
the packages of a run, for their presence alone would make JAX look for a TPU and a GPU.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from mora_jax.errors import MoraError

FOLDER = Path(sys.prefix) / "compilers"
# libtpu asks these of the machine it thinks it runs on; which values are given makes no difference to a named topology.
SETTINGS = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


def environment() -> dict[str, str]:
    """The environment of a process that compiles ahead of time. Raises MoraError where the compilers are missing."""
    if not FOLDER.is_dir():
        raise MoraError(f"{FOLDER} is missing; `bash launch.sh test` installs the compilers into it")
    path = os.pathsep.join(filter(None, (str(FOLDER), os.environ.get("PYTHONPATH"))))
    return dict(os.environ) | SETTINGS | {"PYTHONPATH": path}
