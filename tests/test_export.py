"""Adapters as files: every layout gives back equal logits, other programs agree, and what would be inexact is refused.

Experts are drawn at random here: nothing is taught, and every value and every task's block differs.
"""

from __future__ import annotations

import dataclasses
import json
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from launching import CONFIG, Ended, assert_refused
from random_adapters import TASKS, base, drawn, logits, text

from mora_jax import config as configs
from mora_jax import evaluate, export, layouts
from mora_jax.errors import MoraError
from mora_jax.methods import gates
from mora_jax.models import hf


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file(folder / layouts.TENSORS)


# ---------------------------------------------------------------- round trips


@pytest.mark.parametrize(
    ("method", "layout"),
    [
        ("mora", "mora"),
        ("inc_lora", "mora"),
        ("seq_lora", "mora"),
        ("mora", "authors"),
        ("inc_lora", "peft"),
        ("seq_lora", "peft"),
    ],
)
def test_a_folder_gives_back_equal_logits(method: str, layout: str, tmp_path: Path) -> None:
    adapter = drawn(method)
    layouts.save(adapter, tmp_path / "a", layout)
    back, expected = layouts.load(tmp_path / "a", {}), logits(adapter)
    np.testing.assert_array_equal(logits(back), expected)  # a scale of 2 moves no bit
    assert np.abs(expected - logits(adapter.after(-1))).max() > 0.1
    assert back.tasks == TASKS
    assert back.identity == adapter.identity
    assert back.config.method.scale == (1.0 if layout == "authors" else 2.0)


def test_a_folder_says_what_is_in_it(tmp_path: Path) -> None:
    layouts.save(drawn("mora"), tmp_path, "mora")
    said = json.loads((tmp_path / "adapter_config.json").read_text())
    wanted = {"rank": 8, "top_k": 8, "temperature": 0.03, "threshold": 0.2, "threshold_mode": "absolute", "scale": 2.0}
    assert wanted.items() <= said["method"].items()
    assert said["method"]["targets"] == "attn/q,attn/k,attn/v,attn/o"
    assert said["tasks"] == [{"name": name, "rows": [8 * i, 8 * i + 8]} for i, name in enumerate(TASKS)]
    assert (said["base_model"]["name"], said["base_model"]["identity"]) == ("tiny", "random, seed 0")


def test_an_earlier_task_is_the_first_rows(tmp_path: Path) -> None:
    adapter = drawn("mora")
    layouts.save(adapter.after(1), tmp_path, "mora")
    for name, tensor in tensors_of(tmp_path).items():
        *path, what = name.split("/")
        np.testing.assert_array_equal(tensor, adapter.rows[tuple(path)][what][:, :16])
    with pytest.raises(MoraError, match="boundary='continue' later tasks have changed"):
        drawn("seq_lora").after(1)
    with pytest.raises(MoraError, match=r"--task=3 has not been taught; legal: -1 .* 2 \(shapes\)"):
        adapter.after(3)


# ---------------------------------------------------------------- the published code


def published_update(x: np.ndarray, state: dict[str, np.ndarray], module: str, tau: float, delta: float, k: int):
    """What the published layers add, by the facts known of them: no scale, old rows first, k = max(k, 2)."""
    a = np.concatenate([state[f"{module}.old_lora_A"], state[f"{module}.lora_A"]]).astype(np.float64)
    b = np.concatenate([state[f"{module}.old_lora_B"], state[f"{module}.lora_B"]], axis=1).astype(np.float64)
    z = x @ a.T
    s = z / np.linalg.norm(z, axis=-1, keepdims=True)
    bar = np.sort(s, axis=-1)[:, -max(k, 2)][:, None]
    g = np.where(s >= bar, np.exp((s - s.max(-1, keepdims=True)) / tau), 0.0)
    g /= g.sum(-1, keepdims=True)
    return (g * (s >= delta) * z) @ b.T


@pytest.mark.parametrize("scale", ["2.0", "0.7"])
def test_the_published_code_would_add_the_same(scale: str, tmp_path: Path) -> None:
    adapter = drawn("mora", scale=scale, top_k="3")
    layouts.save(adapter, tmp_path, "authors")
    state, path = tensors_of(tmp_path), ("layers", "attn", "k")
    assert state["model.layers.1.self_attn.k_proj.old_lora_A"].shape == (16, 32)
    assert state["model.layers.1.self_attn.k_proj.lora_B"].shape == (16, 8)
    x = np.random.default_rng(2).normal(size=(40, 32)).astype(np.float32)
    bank = {name: jnp.asarray(rows[1]) for name, rows in adapter.rows[path].items()} | {"live": jnp.int32(24)}
    ours = np.asarray(gates.update(x, bank, None, adapter.method))
    theirs = published_update(x, state, "model.layers.1.self_attn.k_proj", 0.03, 0.2, 3)
    assert np.abs(ours).max() > 1
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def renamed(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Names of the LLM half after its freeze: all rows in `lora_`, fresh ones with random keys and zero values."""
    ends = {"A": ("old_lora_A", "lora_A", 0), "B": ("old_lora_B", "lora_B", 1)}
    found = {}
    for module in sorted({name.rpartition(".")[0] for name in state}):
        for letter, (old, new, axis) in ends.items():
            joined = np.concatenate([state[f"{module}.{old}"], state[f"{module}.{new}"]], axis=axis)
            found[f"base_model.model.{module}.lora_{letter}.weight"] = joined
            begun = np.full_like(state[f"{module}.{new}"], 0.3 if letter == "A" else 0.0)
            found[f"base_model.model.{module}.loranew_{letter}.default.weight"] = begun
    return found | {"base_model.model.model.norm.weight": np.ones(3, np.float32)}


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("change", [dict, renamed])
def test_state_dicts_of_both_halves_are_read(
    change: Callable, suffix: str, main: Callable[..., Ended], tmp_path: Path
) -> None:
    adapter = drawn("mora")
    layouts.save(adapter, tmp_path / "a", "authors")
    state, file = change(tensors_of(tmp_path / "a")), tmp_path / f"state{suffix}"
    if suffix == ".pt":
        torch = pytest.importorskip("torch", reason="only PyTorch writes and reads .pt")
        torch.save({name: torch.from_numpy(array) for name, array in state.items()}, file)
    else:
        safetensors.numpy.save_file(state, file)
    tasks = f"--config.benchmark.tasks={','.join(TASKS)}"
    command = [f"--state_dict={file}", f"--config={CONFIG}:smoke", tasks, f"--to={tmp_path / 'b'}"]
    assert main(*command, of=export)[::2] == (0, "")
    back = layouts.load(tmp_path / "b", {})
    np.testing.assert_array_equal(logits(back), logits(adapter))
    assert back.tasks == TASKS


Q = "model.layers.1.self_attn.q_proj."


def moved(name: str) -> Callable[[dict], None]:
    return lambda state: state.update({name: state.pop(Q + "lora_A")})


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (moved("model.layers.1.self_attn.query.lora_A"), ["query.lora_A", "is of no dense layer", "self_attn.q_proj"]),
        (moved("model.layers.3.self_attn.q_proj.lora_A"), ["layers/attn/q", "[0, 1, 3]", "none left out"]),
        (lambda state: state.update({Q + "lora_A": np.zeros((8, 30), np.float32)}), ["keys of widths [30, 32]"]),
        (lambda state: state.update({Q + "lora_A": np.zeros((8,), np.float32)}), ["shape [8]; legal: 2 axes"]),
        (lambda state: state.pop(Q + "lora_A"), ["A of [16, 24] rows and B of [24] columns"]),
        (dict.clear, ["no tensor whose name ends in one of old_lora_A"]),
    ],
)
def test_a_state_dict_that_does_not_fit_is_named(change: Callable, parts: list[str], tmp_path: Path) -> None:
    layouts.save(drawn("mora"), tmp_path / "a", "authors")
    state, file = tensors_of(tmp_path / "a"), tmp_path / "state.safetensors"
    change(state)
    safetensors.numpy.save_file(state, file)
    with pytest.raises(MoraError) as caught:
        layouts.load_state_dict(file, configs.load(f"{CONFIG}:smoke", {}))
    for part in [str(file), *parts]:
        assert part in str(caught.value)


@pytest.mark.parametrize("layout", ["mora", "authors"])
def test_an_expert_in_a_dtype_that_is_not_read_is_named(layout: str, tmp_path: Path) -> None:
    layouts.save(drawn("mora"), tmp_path / "a", layout)
    tensors, file = tensors_of(tmp_path / "a"), tmp_path / "a" / layouts.TENSORS
    *_, last = sorted(tensors)
    tensors[last] = tensors[last].astype(ml_dtypes.float8_e4m3fn)
    safetensors.numpy.save_file(tensors, file)
    with pytest.raises(MoraError) as caught:
        layouts.load(tmp_path / "a", {})
    assert str(caught.value) == f"{file}: tensor {last!r} has dtype F8_E4M3; known: F64, F32, F16, BF16"


def test_frozen_weights_beside_the_experts_may_have_any_dtype(tmp_path: Path) -> None:
    layouts.save(drawn("mora"), tmp_path / "a", "authors")
    state, file = tensors_of(tmp_path / "a"), tmp_path / "state.safetensors"
    state["model.layers.0.self_attn.q_proj.weight"] = np.zeros((2, 2), ml_dtypes.float8_e4m3fn)
    state |= {"model.position_ids": np.arange(3), "position_ids": np.arange(3)}
    state["logit_scale"] = np.array(4.6, np.float32)
    safetensors.numpy.save_file(state, file)
    adapter = layouts.load_state_dict(file, configs.load(f"{CONFIG}:smoke", {}))
    np.testing.assert_array_equal(
        adapter.rows["layers", "attn", "q"]["keys"], drawn("mora").rows["layers", "attn", "q"]["keys"]
    )


def test_a_tensor_that_is_none_of_ours_is_named(tmp_path: Path) -> None:
    layouts.save(drawn("mora"), tmp_path / "a", "mora")
    file = tmp_path / "a" / layouts.TENSORS
    safetensors.numpy.save_file(tensors_of(tmp_path / "a") | {"logit_scale": np.array(4.6, np.float32)}, file)
    with pytest.raises(MoraError, match="unexpected tensor 'logit_scale'; legal: SITE/keys"):
        layouts.load(tmp_path / "a", {})


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("harm_done"),)


def test_a_pickle_is_never_run(main: Callable[..., Ended], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("state.pt").write_bytes(pickle.dumps({"model.layers.0.self_attn.q_proj.lora_A": Harmful()}))
    command = ["--state_dict=state.pt", f"--config={CONFIG}:smoke", "--to=b"]
    assert_refused(main(*command, of=export), "state.pt", "nothing else is unpickled")
    assert [path.name for path in tmp_path.iterdir()] == ["state.pt"]
    monkeypatch.setitem(sys.modules, "torch", None)
    assert_refused(main(*command, of=export), "state.pt: only PyTorch reads this file")


# ---------------------------------------------------------------- PEFT


# peft 0.21.2 asks transformers 5.23 by a name that the latter has given up.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("method", ["inc_lora", "seq_lora"])
def test_peft_loads_the_folder_with_equal_logits(method: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is the other side of the comparison")
    torch = pytest.importorskip("torch", reason="peft is complete only with torch")
    from transformers import LlamaForCausalLM

    adapter, (_, model, _) = drawn(method), base()
    hf.save_params(jax.tree.map(np.asarray, model.params), model.decoder.config, tmp_path / "base")
    layouts.save(adapter, tmp_path / "a", "peft")
    frozen = LlamaForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="eager")
    with torch.no_grad():
        theirs = peft.PeftModel.from_pretrained(frozen, tmp_path / "a").eval()(torch.from_numpy(text()).long()).logits
    np.testing.assert_allclose(logits(adapter), theirs.numpy(), rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize(
    ("name", "weights", "expected"),
    [
        ("smollm2-135m", "", "HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("gemma-2b", "", "google/gemma-2b-it"),
        ("gemma-2b", "/models/gemma", "/models/gemma"),
        ("custom", "org/model", "org/model"),
    ],
)
def test_peft_is_told_a_base_model_that_it_can_load(name: str, weights: str, expected: str, tmp_path: Path) -> None:
    adapter = drawn("inc_lora")
    with adapter.config.unlocked():
        adapter.config.model.update({"name": name, "weights": weights})
    layouts.save(adapter, tmp_path / "a", "peft")
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["base_model_name_or_path"] == expected


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("options", "layout", "parts"),
    [
        ({}, "peft", ["layout peft cannot be exact", "method.score='self'", "--layout=mora"]),
        ({}, "merged", ["layout merged cannot be exact", "method.score='self'", "the gates depend on the input"]),
        ({"threshold_mode": "relative"}, "authors", ["layout authors cannot be exact", "not 'relative'"]),
        ({"score": "absolute"}, "authors", ["method.score='self' only, not 'absolute'"]),
        ({"top_k": "1"}, "authors", ["max(top_k, 2)"]),
        ({}, "pefft", ["unknown layout 'pefft'; known: authors, merged, mora, peft"]),
    ],
)
def test_what_would_not_be_exact_is_refused(
    options: dict[str, str], layout: str, parts: list[str], tmp_path: Path
) -> None:
    with pytest.raises(MoraError) as caught:
        layouts.save(drawn("mora", **options), tmp_path / "a", layout)
    for part in parts:
        assert part in str(caught.value)
    assert not (tmp_path / "a").exists()


def test_a_full_folder_and_an_empty_adapter_are_refused(tmp_path: Path) -> None:
    layouts.save(drawn("mora"), tmp_path, "mora")
    with pytest.raises(MoraError, match="is there already"):
        layouts.save(drawn("mora"), tmp_path, "mora")
    with pytest.raises(MoraError, match="nothing to export"):
        layouts.save(drawn("mora").after(-1), tmp_path / "a", "mora")


def test_another_base_model_and_another_rank_are_named(tmp_path: Path) -> None:
    adapter, (mesh, model, sites) = drawn("mora"), base()
    with pytest.raises(MoraError, match=r"wrong base model: .*'random, seed 0'.*these are 'another'"):
        adapter.variables(mesh, sites, "another")
    wide = {path: site._replace(d_in=site.d_in + 1) for path, site in sites.items()}
    with pytest.raises(MoraError, match=r"wrong base model: layers/attn/./keys .*\[2, 24, 32\].*\[2, 24, 33\]"):
        dataclasses.replace(adapter, identity="").variables(mesh, wide, "unknown")
    fewer = {path: site for path, site in sites.items() if path[-1] != "o"}
    with pytest.raises(MoraError, match="layers/attn/o is a site of one only"):
        adapter.variables(mesh, fewer, model.identity)
    layouts.save(adapter, tmp_path, "mora")
    file = tmp_path / layouts.DESCRIPTION
    file.write_text(file.read_text().replace('"rank": 8', '"rank": 4'))
    with pytest.raises(MoraError, match=r"wrong rank: .* 24 experts .* 3 task\(s\) with method.rank=4 make 12"):
        layouts.load(tmp_path, {})


def cut_tensors(folder: Path) -> None:
    (folder / layouts.TENSORS).write_bytes(b"cut")


def no_tasks(folder: Path) -> None:
    file = folder / layouts.DESCRIPTION
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tasks": ["colours"]}))


def other_json(folder: Path) -> None:
    (folder / layouts.DESCRIPTION).write_text('{"peft_type": "LORA"}')


@pytest.mark.parametrize(
    ("damage", "part"),
    [
        (lambda folder: shutil.rmtree(folder), "holds no adapter_config.json"),
        (cut_tensors, "not a readable safetensors file"),
        (other_json, "is not of the format"),
        (no_tasks, "is damaged"),
    ],
)
def test_what_is_no_adapter_is_named(
    damage: Callable[[Path], None], part: str, main: Callable[..., Ended], tmp_path: Path
) -> None:
    layouts.save(drawn("mora"), tmp_path / "a", "mora")
    damage(tmp_path / "a")
    assert_refused(main(f"--adapter={tmp_path / 'a'}", of=evaluate), str(tmp_path / "a"), part)


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--workdir=w"], ["--to is missing", "python -m mora_jax.export"]),
        (["--to=x"], ["exactly one of --workdir=DIR and --adapter=FOLDER"]),
        (["--to=x", "--workdir=no/such"], ["--workdir=no/such holds no checkpoint"]),
        (["--to=x", "--workdir=w", "--task=first"], ["--task=first must be a number"]),
        (["--to=x", "--workdir=w", "--config=c"], ["--config is for --state_dict only"]),
        (["--to=x", "--state_dict=s.pt"], ["--config is missing"]),
        (["--to=x", "--form=mora"], ["--form is not understood", "--layout"]),
    ],
)
def test_command_line_mistakes(argv: list[str], parts: list[str], main: Callable[..., Ended]) -> None:
    assert_refused(main(*argv, of=export), *parts)
