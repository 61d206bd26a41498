"""Arrays out of pickles that others made. A pickle may call anything; here it may build arrays and nothing else."""

from __future__ import annotations

import io
import pickle
from typing import Any

import numpy as np
from numpy._core import multiarray

from mora_jax.errors import MoraError

# What numpy's own pickles of arrays name; numpy.core is what numpy 1 called numpy._core.
_ALLOWED = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("numpy.core.multiarray", "_reconstruct"): multiarray._reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): multiarray._reconstruct,
}


class _ArraysOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, only plain arrays are read")
        return _ALLOWED[module, name]


def read_array(data: bytes, source: object) -> np.ndarray:
    """The array of numbers in a pickle; MoraError, naming `source`, for anything else and for a broken pickle."""
    try:
        array = _ArraysOnly(io.BytesIO(data)).load()
    # Unpickling damaged data may raise anything.
    except Exception as error:
        raise MoraError(f"{source}: not a pickled array ({error})") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "biuf":
        raise MoraError(f"{source}: not a pickled array of numbers ({getattr(array, 'dtype', type(array).__name__)})")
    return array
