"""Pickles of others: arrays of numbers are read, everything else is refused before it runs."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mora_jax.data.pickles import read_array
from mora_jax.errors import MoraError


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("kind", ["u1", "<i8", "<f4", "?"])
def test_arrays(protocol: int, kind: str) -> None:
    array = np.arange(12).reshape(3, 4).astype(kind)
    data = pickle.dumps(array, protocol)
    if b"_frombuffer" in data or b"encode" in data:  # numpy's other ways, which the packages here do not use
        with pytest.raises(MoraError, match=r"not a pickled array \(it asks for "):
            read_array(data, "x")
        return
    found = read_array(data, "x")
    assert found.dtype == array.dtype
    np.testing.assert_array_equal(found, array)


def test_an_array_as_numpy_1_wrote_it() -> None:
    data = pickle.dumps(np.arange(3, dtype=np.uint8), 4).replace(
        b"\x16numpy._core.multiarray", b"\x15numpy.core.multiarray"
    )
    assert b"numpy.core.multiarray" in data
    frame = (len(data) - 11).to_bytes(8, "little")  # behind the two bytes of the protocol and the frame's own nine
    np.testing.assert_array_equal(read_array(data[:3] + frame + data[11:], "x"), [0, 1, 2])


class Harm:
    """What a hostile pickle holds: a call."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.file}",)


def test_nothing_is_called(tmp_path: Path) -> None:
    harm = Harm(tmp_path / "made")
    pickle.loads(pickle.dumps(harm))
    assert harm.file.exists()
    harm.file.unlink()
    with pytest.raises(
        MoraError, match=r"some\.pkl: not a pickled array \(it asks for posix\.system, only plain arrays"
    ):
        read_array(pickle.dumps(harm), "some.pkl")
    assert not harm.file.exists()


@pytest.mark.parametrize("content", [b"", b"\x80", pickle.dumps([1]), pickle.dumps(np.array([None], object), 4)])
def test_no_array(content: bytes) -> None:
    with pytest.raises(MoraError, match="x: not a pickled array"):
        read_array(content, "x")
