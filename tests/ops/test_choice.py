"""What the op refuses, and who computes it: the platform's kernel where it can, xla with a stated reason where not."""

from __future__ import annotations

import logging

import jax
import numpy as np
import pytest

from mora_jax.ops.gated_projection import api, compiling_for, gated_projection, gates, kernels

HOW = {"top_k": 2, "temperature": 0.1}


def rows(dtype="float32", width=128):
    x, keys, values = (np.ones(shape, np.float32) for shape in ((16, width), (8, width), (8, width)))
    return x.astype(dtype), keys, values


def program(*arguments, **options) -> str:
    return str(jax.make_jaxpr(lambda *a: gated_projection(*a, **HOW, **options))(*arguments))


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_the_best_implementation_is_the_kernel_of_the_platform(platform):
    with compiling_for(platform):
        assert "pallas_call" in program(*rows())
        assert "pallas_call" not in program(*rows(), implementation="xla")
    assert "pallas_call" not in program(*rows())


@pytest.mark.parametrize(("platform", "name"), sorted(kernels().items()))
def test_a_kernel_of_another_platform_is_refused(platform, name):
    with pytest.raises(ValueError, match=rf"'{name}' is not available on platform 'cpu'; known: reference, xla$"):
        gated_projection(*rows(), **HOW, implementation=name)
    with compiling_for(platform):
        assert "pallas_call" in program(*rows(), implementation=name)


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_what_a_kernel_cannot_is_computed_by_xla_and_said_once(platform, caplog):
    api._say_once.cache_clear()
    with compiling_for(platform), caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert "pallas_call" not in program(*rows("float16"))
    (said,) = caplog.messages
    assert said.startswith(f"gated_projection: pallas_{platform} cannot run here (")
    assert "float16" in said
    assert said.endswith("xla computes it instead")


def test_the_target_ends_with_its_block():
    with compiling_for("tpu"):
        assert api.platform() == "tpu"
    assert api.platform() == "cpu"


def _ones(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


@pytest.mark.parametrize("function", [gated_projection, gates])
@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"top_k": 0}, "top_k must be at least 1; got 0"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"temperature": float("nan")}, "temperature must be positive"),
        ({"threshold_mode": "soft"}, "'soft' is none of absolute, relative"),
        ({"implementation": "cuda"}, "'cuda' is not available on platform 'cpu'; known: reference, xla"),
        ({"live": 7}, r"live must lie in 0\.\.6"),
        ({"live": np.int32(-1)}, r"live must lie in 0\.\.6"),
        ({"fresh_keys": _ones(2, 4)}, "come together"),
        ({"fresh_values": _ones(2, 3)}, "come together"),
        ({"fresh_keys": _ones(2, 4), "fresh_values": _ones(3, 3)}, "must continue keys"),
        ({"fresh_keys": _ones(2, 5), "fresh_values": _ones(2, 3)}, "must continue keys"),
        ({"fresh_keys": _ones(2, 4), "fresh_values": _ones(2, 2)}, "must continue keys"),
        ({"x": np.ones((2, 4), int)}, "x must be of a float dtype; got int64"),
        ({"values": np.ones((6, 3), bool)}, "values must be of a float dtype; got bool"),
        ({"x": _ones(2, 5)}, "must end in the d_in"),
        ({"x": np.float32(1.0)}, "must end in the d_in"),
        ({"keys": _ones(5, 4)}, "need equal n"),
        ({"values": _ones(6)}, "need equal n"),
    ],
)
def test_what_makes_no_sense_is_refused(function, change, says):
    arguments = {"x": _ones(2, 4), "keys": _ones(6, 4), "values": _ones(6, 3), "top_k": 2, "temperature": 0.1}
    with pytest.raises(ValueError, match=says):
        function(**arguments | change)
