"""Plans: what is compiled, and what is said about a config that does not fit."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from conftest import ROOT
from launching import CONFIG, Ended, assert_refused

from mora_jax import compilers, plan
from mora_jax import config as configs
from mora_jax.benchmarks import folder, standard_cl, stream, trace
from mora_jax.errors import MoraError
from mora_jax.models import registry
from mora_jax.planning import topologies
from mora_jax.planning.abstract import Work, bytes_of
from mora_jax.planning.advice import advice
from mora_jax.planning.compiled import examine
from mora_jax.planning.report import count_tasks, make_plan
from mora_jax.planning.sizes import SIZES, decoder_config
from mora_jax.planning.tasks import of_stream
from mora_jax.runtime.distributed import make_mesh
from mora_jax.runtime.language import LanguageFamily
from mora_jax.runtime.state import count_parameters

COMMAND = (sys.executable, "-m", "mora_jax.plan")
SMOKE = f"--config={CONFIG}:smoke"
SHARDED = ("--config.mesh.data=1", "--config.mesh.fsdp=-1", "--config.model.dtype=bfloat16")
LLAMA = (f"--config={CONFIG}:benchmark=trace,model=llama2-7b", *SHARDED, "--config.model.remat=full")
LENGTHS = ("--config.train.max_prompt_tokens=1024", "--config.train.max_answer_tokens=512")  # of TRACE but MeetingBank
needs_compilers = pytest.mark.skipif(
    not compilers.FOLDER.is_dir(), reason="`bash launch.sh test` installs the compilers"
)
MIB = 1 << 20


# ---------------------------------------------------------------- sizes and shapes


# Parameters as published on each model's page, or by keras-hub's presets, tied embeddings counted once.
PARAMETERS = {
    "llama2-7b": 6_738_415_616,
    "llama3.1-8b": 8_030_261_248,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
    "mistral-7b": 7_248_023_552,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
    "gemma-2b": 2_506_172_416,
    "gemma2-2b": 2_614_341_888,
    "gemma3-1b": 999_885_952,
    "smollm3-3b": 3_075_098_624,
    "llama3-70b": 70_553_706_496,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
}


def work_of(*overrides: str, config: str = f"{CONFIG}:smoke", tasks: int = 4) -> Work:
    found = configs.load(config, dict(pair.split("=") for pair in overrides))
    return Work(found, make_mesh(found.mesh), tasks)


@pytest.mark.parametrize("name", sorted(SIZES.keys() - {"tiny"}))
def test_the_table_of_sizes_gives_the_published_numbers_of_parameters(name):
    work = work_of(f"model.name={name}", "mesh.data=1", "mesh.fsdp=-1", "train.batch_size=8")
    assert count_parameters(work.family.params) == PARAMETERS[name]


def test_planned_shapes_are_those_of_a_real_run():
    work = work_of("mesh.data=2", "mesh.fsdp=4", "train.batch_size=8")
    tiny = registry.load_model(work.config.model, 0)
    real = LanguageFamily(tiny, work.method, work.config, work.mesh)
    assert work.sizes == tiny.config
    planned = jax.tree.map(lambda a: (a.shape, a.dtype, a.sharding), work.family.params)
    assert planned == jax.tree.map(lambda a: (a.shape, a.dtype, a.sharding), real.params)
    held = sum(a.addressable_shards[0].data.nbytes for a in jax.tree.leaves(real.params))
    assert bytes_of(work.family.params) == (held, sum(a.nbytes for a in jax.tree.leaves(real.params)))


def test_the_bank_is_that_of_the_last_task_and_only_fresh_experts_have_optimiser_state():
    work = work_of("method.capacity_bucket=8", "mesh.data=4", "mesh.model=2", tasks=5)
    assert work.capacity == 5 * work.method.rank
    groups = work.steps()["train"].groups
    fresh = count_parameters(groups["fresh_and_optimizer"].fresh)
    assert fresh == sum(s.layers * work.method.rank * (s.d_in + s.d_out) for s in work.sites.values())
    assert count_parameters(groups["fresh_and_optimizer"].opt_state) == 2 * fresh  # the two moments of Adam


def test_a_method_that_learns_nothing_has_no_train_step():
    assert list(work_of(config=f"{CONFIG}:smoke,method=zero_shot").steps()) == ["decode"]


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (("mesh.data=3", "mesh.fsdp=1"), ("does not multiply to the 8 devices",)),
        (("mesh.data=8", "train.batch_size=12"), ("mesh.data x mesh.fsdp = 8", "train.batch_size=12")),
        (("mesh.data=1", "mesh.model=8"), ("mesh.model=8", "4 heads", "legal: 1, 2, 4")),
        (("mesh.data=2", "mesh.model=4"), ("mesh.model=4", "2 key and value heads")),
        (("model.name=custom",), ("model.weights",)),
        (("kernel=pallas",), ("there is no kernel for platform 'cpu'",)),
    ],
)
def test_what_cannot_be_planned_is_refused(overrides, parts):
    with pytest.raises(MoraError) as error:
        work_of(*overrides)
    assert all(part in str(error.value) for part in parts), error.value


@pytest.mark.parametrize("weights", ["meta-llama/Llama-2-13b-chat-hf", "no/such/folder"])
@pytest.mark.parametrize("name", ["llama2-7b", "custom"])
def test_weights_that_are_not_here_are_refused_instead_of_planned_as_what_the_name_says(name, weights):
    with pytest.raises(MoraError, match=r"config\.json, a \.gguf file, or empty") as error:
        decoder_config({"name": name, "weights": weights})
    assert f"model.weights={weights!r}" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_name_without_sizes_is_refused_with_the_known_ones():
    with pytest.raises(MoraError, match=r"size of model 'llama3\.3-70b'.*qwen3-8b"):
        decoder_config({"name": "llama3.3-70b", "weights": ""})


def test_every_named_model_of_the_hub_can_be_planned():
    assert registry.HUB.keys() <= SIZES.keys()


def test_local_weights_are_planned_without_being_read(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(dict(SIZES["smollm2-135m"])))
    model = {"name": "custom", "weights": str(tmp_path), "dtype": "float32"}
    assert decoder_config(model) == decoder_config(model | {"name": "smollm2-135m", "weights": ""})


@pytest.mark.parametrize(
    ("arg", "tasks", "count"),
    [("trace", "", 8), ("trace", "C-STANCE,FOMC", 2), ("standard_cl", "order4", 15), ("packaged_text", "", 4)],
)
def test_tasks_are_counted_without_their_data(arg, tasks, count):
    assert count_tasks(configs.load(f"{CONFIG}:benchmark={arg}", {"benchmark.tasks": tasks})) == count


# ---------------------------------------------------------------- the longest batch


def longest(config: str, *overrides: str) -> list[tuple[Any, ...]]:
    work = work_of("mesh.data=1", "mesh.fsdp=-1", *overrides, config=f"{CONFIG}:{config}")
    return [tuple(work.longest[step]) for step in ("train", "decode")]


def test_the_longest_task_of_the_stream_is_planned():
    assert longest("benchmark=trace,model=llama3.2-1b") == [(4096, 512, "MeetingBank")] * 2
    fomc, scored = "benchmark.tasks=FOMC,C-STANCE", [(1024, 512, "every task"), (1024, 16, "every task")]
    assert longest("benchmark=trace,model=llama3.2-1b", fomc) == scored
    assert longest("benchmark=standard_cl,model=qwen2.5-0.5b") == [(512, 50, "every task")] * 2
    smoked = [(48, 16, "every task"), (48, 4, "every task")]
    assert longest("benchmark=trace,smoke", "train.batch_size=8") == smoked
    packaged = [(72, 24, "every task"), (72, 24, "python_completion")]
    assert longest("model=smollm2-135m", "train.batch_size=8") == packaged


def test_the_longest_batch_is_what_the_steps_are_compiled_for():
    work = work_of("mesh.data=1", "mesh.fsdp=8", config=f"{CONFIG}:benchmark=trace,model=llama3.2-1b")
    program = work.train().lower().as_text()
    assert "tensor<32x4608xi32>" in program
    assert "tensor<1x1152xi32>" in program  # a quarter holds the 512 tokens of every answer


def test_a_task_gives_way_to_the_positions_of_the_model_as_in_a_run(capsys: pytest.CaptureFixture[str]):
    assert longest("benchmark=trace,model=llama2-7b") == [(3584, 512, "MeetingBank")] * 2
    assert "cut to 3584 tokens instead of 4096" in capsys.readouterr().err
    with pytest.raises(MoraError, match="more than the 4096 positions"):
        longest("benchmark=trace,model=llama2-7b", "train.max_prompt_tokens=4096")


def test_the_limits_of_a_folder_come_with_its_data(tmp_path: Path):
    for name, limits in (("short", {}), ("long", {"max_prompt_tokens": 3000, "max_new_tokens": 40})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.json").write_text('[{"prompt": "p", "answer": "a"}]')
        (tmp_path / name / "task.json").write_text(json.dumps(limits))
    own = [(3000, 512, "long"), (3000, 40, "long")]
    assert longest("benchmark=folder,model=smollm2-135m", f"benchmark.root={tmp_path}") == own
    defaults = [(1024, 512, None)] * 2
    assert longest("benchmark=folder,model=smollm2-135m", "benchmark.tasks=short,long") == defaults


def test_limits_without_data_are_those_of_a_loaded_task(tmp_path: Path):
    for name in (*trace.TASKS, *standard_cl.KINDS):
        (tmp_path / name).mkdir()
        (tmp_path / name / "test.json").write_text('[{"prompt": "p", "answer": "a"}]')
    for benchmark in ("trace", "standard_cl"):
        config = configs.load(f"{CONFIG}:benchmark={benchmark}", {"benchmark.tasks": ""})
        loaded = stream.load(benchmark, str(tmp_path), (), metrics={}, split_seed=0)
        known = of_stream(config)
        assert [[getattr(t, key) for key in ("name", *folder.LIMITS)] for t in known] == [
            [getattr(t, key) for key in ("name", *folder.LIMITS)] for t in loaded
        ]


def test_a_task_that_the_benchmark_does_not_have_is_not_planned():
    with pytest.raises(MoraError, match=r"task of benchmark 'trace' 'FOCM'.*FOMC"):
        longest("benchmark=trace,smoke", "train.batch_size=8", "benchmark.tasks=FOCM")


# ---------------------------------------------------------------- names of topologies


@pytest.mark.parametrize(
    ("name", "devices", "per_host"),
    [("v5e:4x4", 16, 16), ("v5p:8x8x8", 512, 512), ("v5e:1x1", 1, 1), ("h100:8", 8, 8), ("h100:4x8", 32, 8)],
)
def test_a_name_says_how_many_devices(name, devices, per_host):
    aim = topologies.target(name)
    assert (aim.devices, aim.per_host, aim.chip.name) == (devices, per_host, name.partition(":")[0])


@pytest.mark.parametrize(
    "name", ["", "v5e", "v5e:3x3", "v5e:4x4x4", "v9:2x2", "h100:9", "h100:0", "h100:2x2x2", "h100:x"]
)
def test_an_unknown_topology_is_refused_with_the_known_ones(name, main: Callable[..., Ended]):
    run = main(SMOKE, f"--topology={name}", of=plan)
    if name:
        assert_refused(run, f"--topology={name} is unknown", "v5e:4x4", "v5p:8x8x16", "v6e:16x16", "h100:HOSTSxGPUS")
    else:
        assert_refused(run, "--topology is missing")


@pytest.mark.parametrize("words", [("--tasks=0",), ("--tasks=many",), ("--workdir=w",), ("--config.mesh.fsdp=x",)])
def test_a_bad_command_line_is_refused(words, main: Callable[..., Ended]):
    assert_refused(main(SMOKE, "--topology=v5e:2x2", *words, of=plan), words[0].partition("=")[0])


def test_without_the_compilers_it_says_where_they_come_from(main: Callable[..., Ended], monkeypatch, tmp_path: Path):
    monkeypatch.setattr(compilers, "FOLDER", tmp_path / "none")
    assert_refused(main(SMOKE, "--topology=v5e:2x2", of=plan), "launch.sh test")


# ---------------------------------------------------------------- the machine that it runs on


def test_a_dry_run_compiles_for_the_devices_here_and_writes_nothing(main: Callable[..., Ended], tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = ("--config.train.batch_size=8", "--config.eval.batch_size=8", "--config.method.targets=attn/q")
    run = main(f"{SMOKE},method=inc_lora", *small, "--dry_run")
    assert run.code == 0, run
    for part in ("8 x cpu", "fits", "no times", "train step", "batch of answers", "all-reduce"):
        assert part in run.out
    assert not list(tmp_path.iterdir())


@dataclasses.dataclass
class Device:
    """What `here` asks of a device."""

    device_kind: str
    platform: str
    limit: int | None
    process_index: int = 0

    def memory_stats(self) -> dict[str, int] | None:
        return None if self.limit is None else {"bytes_limit": self.limit}


def test_a_device_here_says_itself_how_much_a_program_may_fill():
    rtx, h100, tpu = (("NVIDIA GeForce RTX 4090", "gpu"), ("NVIDIA H100 80GB HBM3", "gpu"), ("TPU v3", "tpu"))
    assert topologies.here([Device(*rtx, 18_000)] * 2).available == 18_000
    assert topologies.here([Device(*rtx, None)]).available is None
    assert topologies.here([Device(*h100, 70_000)]).available == 70_000  # XLA_PYTHON_CLIENT_MEM_FRACTION
    assert topologies.here([Device(*h100, None)]).available == topologies.target("h100:1").available
    assert topologies.here([Device(*tpu, 16_000)]).available == 16_000
    one, eight = (topologies.here(jax.devices()[:n]).available for n in (1, 8))
    assert one == 8 * eight > 1 << 28


def test_advice_is_given_on_a_machine_that_is_in_no_table():
    work = work_of("mesh.data=1", "mesh.fsdp=8", "train.batch_size=16", "model.remat=none")
    aim = topologies.here([Device("NVIDIA L4", "gpu", 1 << 20)] * 8)
    step = examine(work.train(), aim)
    assert step["fits"] is False
    assert any("model.remat=full" in line for line in advice("train", step, work, aim))


def test_a_program_of_a_mesh_here_costs_what_its_shapes_say():
    """Products of the frozen model: 2 per weight and token forward, as many backward to the input of each layer."""
    small = ("train.batch_size=8", "method.targets=attn/q")
    work = work_of(*small, config=f"{CONFIG}:smoke,method=inc_lora")
    planned = make_plan(work.config, topologies.here(jax.devices()), jax.devices(), tasks=1)
    assert planned["frozen_over_share"] == 8.0  # the mesh of the config holds eight copies
    assert (planned["fits"], planned["steps"]["train"]["seconds"]) == (True, None)
    kernels = sum(a.size for a in jax.tree.leaves(work.family.params["layers"]) if a.ndim == 3)
    logits = work.sizes.vocab_size * work.sizes.d_model
    least = 2 * 2 * (kernels * 64 + logits * 16)  # one row of 64 tokens each, with 16 places for an answer
    assert least < planned["steps"]["train"]["flops"] < 2 * least  # work that is not shared would be 8 times as much


# ---------------------------------------------------------------- other machines


@pytest.fixture(scope="module")
def planned() -> dict[str, Any]:
    """Plans of a tiny model for a TPU and a GPU target, with the kernel of each, compiled side by side."""
    options = (SMOKE, *SHARDED[:2], "--config.method.targets=attn/q,mlp/down", "--json")
    names = ("v5e:2x2", "h100:4")
    runs = [
        subprocess.Popen([*COMMAND, *options, f"--topology={name}"], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for name in names
    ]
    found = {name: json.loads(run.communicate()[0]) for name, run in zip(names, runs, strict=True)}
    assert [run.returncode for run in runs] == [0, 0]
    return found


@needs_compilers
@pytest.mark.parametrize("name", ["v5e:2x2", "h100:4"])
def test_a_tiny_model_is_planned_for_an_accelerator(name, planned):
    found, work = planned[name], work_of("mesh.data=2", "mesh.fsdp=4", "train.batch_size=8")
    assert (found["fits"], found["devices"], found["mesh"]["fsdp"]) == (True, 4, 4)
    assert found["frozen_over_share"] < 1.1
    assert found["steps"]["train"]["bytes"]["frozen"] == bytes_of(work.family.params)[0]
    for step in found["steps"].values():
        memory = step["bytes"]
        parts = sum(size for group, size in memory.items() if group not in ("total", "available"))
        assert parts == memory["total"] < memory["available"]
        assert step["collectives"]
        assert step["bound"] == max(step["seconds"], key=step["seconds"].get)
        assert step["seconds"]["compute"] == pytest.approx(step["flops"] / found["chip"]["flops"])


@needs_compilers
def test_a_plan_compiles_the_kernel_that_the_target_would_choose(planned):
    """It trains; single tokens on several devices are left to XLA (`decoder.Layer`)."""
    kernels = [{name: step["kernel"] for name, step in found["steps"].items()} for found in planned.values()]
    assert kernels == [{"train": name, "decode": "xla"} for name in ("pallas_tpu", "pallas_gpu")]


@needs_compilers
def test_two_compilers_agree_on_the_products_of_a_step(planned):
    """Their programs differ in every other way. Not of the train step: on a model this small kernels mostly pad."""
    tpu, gpu = (found["steps"]["decode"]["flops"] for found in planned.values())
    np.testing.assert_allclose(tpu, gpu, rtol=0.25)


# ---------------------------------------------------------------- Llama-2-7B


def plan_of(topology: str, *options: str) -> dict[str, Any]:
    run = subprocess.run(
        [*COMMAND, *LLAMA, *options, f"--topology={topology}", "--json"],
        cwd=ROOT, capture_output=True, text=True, timeout=550, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.slow
@needs_compilers
@pytest.mark.parametrize("topology", ["v5e:4x4", "v5p:2x2x2", "h100:8"])
def test_llama_2_7b_with_64_experts_per_site_fits(topology):
    found = plan_of(topology, *LENGTHS)
    assert found["experts_per_site"] == 64
    assert found["batch_size"]["train"] == 32
    assert {(t["prompt"], t["answer"]) for t in found["tokens"].values()} == {(1024, 512)}
    assert found["fits"] is True, found["steps"]
    assert found["frozen_over_share"] < 1.1


def commands_of_the_readme() -> list[list[str]]:
    """The arguments of every `python -m mora_jax.plan` that README shows."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    return [shlex.split(found) for found in re.findall(r"^    python -m mora_jax\.plan (.*)$", text, re.MULTILINE)]


def test_the_plans_that_the_readme_shows_are_of_configs_that_exist():
    asked = [plan.understand(words) for words in commands_of_the_readme()]
    assert [(one.config.model.name, one.aim.name) for one in asked] == [
        ("llama3.2-1b", "v5e:2x4"),
        ("llama2-7b", "v5e:1x1"),
    ]


@pytest.mark.slow
@needs_compilers
def test_the_command_of_the_readme_fits_llama_2_7b_on_one_16_gb_chip():
    words = next(words for words in commands_of_the_readme() if "--topology=v5e:1x1" in words)
    run = subprocess.run([*COMMAND, *words, "--json"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert (found["fits"], found["experts_per_site"], found["devices"]) == (True, 64, 1)
    assert {(t["prompt"], t["answer"]) for t in found["tokens"].values()} == {(1024, 512)}
    assert all(step["kernel"] == "pallas_tpu" for step in found["steps"].values())


@pytest.mark.slow
@needs_compilers
def test_mora_gathers_no_more_often_than_plain_lora():
    mora, lora = (plan_of("h100:8", *LENGTHS, f"--config.method.name={name}") for name in ("mora", "inc_lora"))
    counts = [found["steps"]["train"]["collectives"]["all-gather"]["count"] for found in (mora, lora)]
    assert counts[0] <= counts[1]


@pytest.mark.slow
@needs_compilers
def test_a_large_pod_compiles_in_under_three_minutes():
    found = plan_of(
        "v5p:8x8x8",
        *LENGTHS,
        "--config.mesh.data=8",
        "--config.train.batch_size=512",
        "--config.eval.batch_size=512",
    )
    assert found["fits"] is True
    assert found["steps"]["train"]["compile_seconds"] < 180
