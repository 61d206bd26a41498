"""Which implementation computes the op: the platform's kernel where it can, xla with a stated reason where not."""

from __future__ import annotations

import logging

import jax
import numpy as np
import pytest

from mora_jax.ops.gated_projection import api, compiling_for, gated_projection, kernels

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
