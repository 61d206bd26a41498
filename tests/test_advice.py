"""What is said about a config that does not fit: only what can be turned, with the bytes that it leaves."""

from __future__ import annotations

import re
from typing import Any

import jax
import pytest
from launching import CONFIG
from test_plan import MIB, PARAMETERS, work_of

from mora_jax import config as configs
from mora_jax.planning import compiled, topologies
from mora_jax.planning.abstract import Work, bytes_of
from mora_jax.planning.advice import advice
from mora_jax.runtime.distributed import make_mesh


def too_large(work: Work, message: str) -> dict[str, Any]:
    aim = topologies.target("v5e:2x4")
    step = {"fits": False, "bytes": compiled._too_large(message, work.steps()["train"], aim)}
    return step | {"advice": advice("train", step, work, aim)}


REFUSED = "RESOURCE_EXHAUSTED: the total memory required for HLO temporaries (18.80G) exceeds available HBM (15.75G)."


def test_copies_of_frozen_weights_are_named_with_the_mesh_that_cuts_them():
    config = f"{CONFIG}:benchmark=trace,model=llama2-7b"
    found = too_large(work_of("model.dtype=float32", config=config, tasks=8), REFUSED)
    assert found["bytes"]["frozen"] == 4 * PARAMETERS["llama2-7b"]
    text = " ".join(found["advice"])
    for part in (
        "model.dtype=bfloat16",
        "mesh.fsdp=8",
        "3.14 GiB",
        "model.remat=full",
        "train.batch_size",
        "mesh.model",
    ):
        assert part in text


def test_what_is_done_already_is_not_advised():
    config = f"{CONFIG}:benchmark=trace,model=llama2-7b"
    cut = ("mesh.data=1", "mesh.fsdp=8", "model.dtype=bfloat16", "model.remat=full", "train.batch_size=8")
    text = " ".join(too_large(work_of(*cut, config=config, tasks=8), REFUSED)["advice"])
    assert "max_prompt_tokens" in text
    assert not any(part in text for part in ("bfloat16", "remat", "train.batch_size", "copies"))


def told(work: Work, *large: str) -> list[str]:
    """What is said of a train step where activations and these groups take more than there is, the others nothing."""
    held = {"frozen": bytes_of(work.family.params)[0], "bank": bytes_of(work.bank)[0]}
    sizes = {name: size if name in large else 0 for name, size in held.items()} | {compiled.ACTIVATIONS: None}
    step = {"fits": False, "bytes": sizes | {"available": 1}}
    return advice("train", step, work, topologies.here(jax.devices()))


TURNED = re.compile(r"((?:mesh|model|train|method)\.\w+)=(\w+)")


@pytest.mark.parametrize(
    ("model", "overrides"),
    [
        ("gemma-2b", ()),
        ("smollm2-135m", ("train.accumulate=2",)),
        ("qwen2.5-7b", ("mesh.fsdp=2", "mesh.model=2", "mesh.data=2")),
        ("llama3-70b", ("mesh.fsdp=8", "mesh.data=1", "method.capacity_bucket=128", "method.rank=16")),
    ],
)
def test_all_that_is_advised_can_be_turned_and_leaves_what_is_said(model, overrides):
    config = f"{CONFIG}:benchmark=trace,model={model}"
    work = work_of(*overrides, config=config)
    lines = told(work, "frozen", "bank")
    assert all(key in " ".join(lines) for key in ("model.dtype", "model.quantise=int8", "model.quantise=nf4", "mesh."))
    for line in lines:
        turned = [f"{key}={value}" for key, value in TURNED.findall(line)]
        changed = work_of(*overrides, *turned, config=config)  # would refuse what cannot be
        if left := re.search(r"(?:leaves|:) ([\d.]+) GiB of (frozen|the bank)|are ([\d.]+) GiB", line):
            group = changed.family.params if left[2] == "frozen" else changed.bank
            assert bytes_of(group)[0] / (1 << 30) == pytest.approx(float(left[1] or left[3]), abs=0.006)


def test_heads_are_cut_only_where_a_mesh_can():
    def meshes(model: str, devices: int = 8) -> str:
        found = configs.load(f"{CONFIG}:benchmark=trace,model={model}", {"mesh.data": "1", "mesh.fsdp": "-1"})
        return " ".join(told(Work(found, make_mesh(found.mesh, jax.devices()[:devices]), 8)))

    assert "mesh.data=1, mesh.fsdp=4, mesh.model=2 cuts heads" in meshes("llama2-7b")
    assert "mesh." not in meshes("gemma-2b") + meshes("smollm2-135m") + meshes("llama2-7b", devices=1)


def test_after_int8_comes_nf4_and_a_type_only_where_it_changes_much():
    config = f"{CONFIG}:benchmark=trace,model=llama3-70b"
    text = " ".join(told(work_of("mesh.data=1", "mesh.fsdp=8", "model.quantise=int8", config=config), "frozen"))
    assert "model.quantise=nf4 leaves" in text
    assert "model.quantise=int8" not in text
    last = ("mesh.data=1", "mesh.fsdp=8", "model.quantise=nf4", "model.dtype=bfloat16")
    text = " ".join(told(work_of(*last, config=config), "frozen"))
    assert "more than 8 devices" in text
    assert not re.search(r"model\.(quantise|dtype)", text)


def test_a_bank_is_cut_by_mesh_model_and_a_small_bucket():
    config = f"{CONFIG}:benchmark=trace,model=llama2-7b"
    cut = ("mesh.data=1", "mesh.fsdp=8", "method.rank=16", "method.capacity_bucket=1024")
    text = " ".join(told(work_of(*cut, config=config, tasks=100), "bank"))
    assert "method.capacity_bucket=16: 1600 rows of the bank instead of 2048" in text
    assert re.search(r"mesh\.model=[248]+: [\d.]+ GiB of the bank", text)
    assert "a larger mesh.fsdp" not in text


@pytest.mark.parametrize(
    ("message", "temporaries"),
    [
        (REFUSED, 18.8 * 1024 * MIB),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm.", None),
        ("RESOURCE_EXHAUSTED: something new", ...),
    ],
)
def test_what_the_compiler_tells_of_memory_is_read(message, temporaries):
    work = work_of("mesh.data=4", "mesh.fsdp=2", "train.batch_size=8")
    found = too_large(work, message)["bytes"]
    held = found["frozen"] + found["bank"] + found["fresh_and_optimizer"]
    if temporaries is ...:
        assert found["total"] is None
    else:
        assert found["total"] == pytest.approx(held + temporaries if temporaries else 20.5 * 1024 * MIB)
    assert found["available"] == 15.75 * 1024 * MIB
