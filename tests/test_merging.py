"""Experts with constant gates merged into the weights: the folder answers as the adapted model does, elsewhere too."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from launching import Ended, assert_refused
from random_adapters import base, drawn, forward, logits, text

from mora_jax import export, layouts, merging
from mora_jax.data.text import encode_prompts
from mora_jax.errors import MoraError
from mora_jax.models import hf, quantised
from mora_jax.models.registry import load_model
from mora_jax.models.unread import load


def logits_of_folder(folder: Path) -> np.ndarray:
    model = load_model({"name": "custom", "weights": str(folder), "dtype": "float32"}, 0)
    variables = {"params": jax.tree.map(jnp.asarray, load(model.params))}
    return np.asarray(forward(base()[1].decoder.clone(method=None), variables, text()))


@pytest.mark.parametrize("method", ["inc_lora", "seq_lora"])
def test_a_merged_folder_is_the_adapted_model(method: str, tmp_path: Path) -> None:
    adapter = drawn(method, scale="0.7")
    assert layouts.save(adapter, tmp_path / "a", "merged") == "all weights in float32"
    expected = logits(adapter)
    np.testing.assert_allclose(logits_of_folder(tmp_path / "a"), expected, rtol=1e-3, atol=2e-3)
    assert np.abs(expected - logits(adapter.after(-1))).max() > 0.1
    torch = pytest.importorskip("torch", reason="transformers is the other side of the comparison")
    transformers = pytest.importorskip("transformers", reason="transformers is the other side of the comparison")
    merged = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "a", attn_implementation="eager")
    with torch.no_grad():
        np.testing.assert_allclose(
            merged.eval()(torch.from_numpy(text()).long()).logits.numpy(), expected, rtol=1e-3, atol=2e-3
        )
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "a")
    asked = tokenizer("digits 2 ->", return_tensors="pt")
    ours, _ = encode_prompts(["digits 2 ->"], load_model(adapter.config.model, 0).tokenizer, 99)
    assert asked.input_ids.tolist() == ours
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (256, 257)
    merged.lm_head = torch.nn.Linear(merged.config.hidden_size, 258)
    torch.nn.init.zeros_(merged.lm_head.weight)
    merged.lm_head.bias.data = torch.eye(258)[257]  # a model that ends at once
    assert merged.generate(**asked, max_new_tokens=5).tolist() == [[*ours[0], 257]]


def test_a_small_update_of_bfloat16_weights_is_not_lost(tmp_path: Path) -> None:
    """Of the size that a short training gives: in bfloat16 nine tenths of the weights would stay as they were."""
    adapter = drawn("inc_lora")
    rows = {path: {"keys": site["keys"] * 1e-3, "values": site["values"] * 1e-3} for path, site in adapter.rows.items()}
    adapter = dataclasses.replace(adapter, rows=rows, identity="")
    with adapter.config.unlocked():
        adapter.config.model.dtype = "bfloat16"
    said = layouts.save(adapter, tmp_path / "a", "merged")
    assert said == "adapted weights in float32, others in bfloat16"
    base_params = jax.tree.map(np.asarray, load_model(adapter.config.model, 0).params)
    with safetensors.safe_open(tmp_path / "a" / hf.WEIGHTS_FILE, framework="numpy") as file:
        written = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no mapping
    q, site = base_params["layers"]["attn"]["q"]["kernel"][1], rows["layers", "attn", "q"]
    update = written["model.layers.1.self_attn.q_proj.weight"].T - q.astype(np.float32)
    np.testing.assert_allclose(update, 2.0 * site["keys"][1].T @ site["values"][1], rtol=1e-3, atol=1e-7)
    assert written["model.layers.1.mlp.up_proj.weight"].dtype.name == "bfloat16"
    assert hf.read_json(tmp_path / "a" / "config.json")["dtype"] == "float32"
    pytest.importorskip("torch", reason="transformers is the other side of the comparison")
    transformers = pytest.importorskip("transformers", reason="transformers is the other side of the comparison")
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a").state_dict()
    for name, tensor in written.items():
        np.testing.assert_array_equal(read[name].numpy(), tensor.astype(np.float32), err_msg=name)


@pytest.mark.parametrize("quantise", ["int8", "nf4"])
def test_a_quantised_base_is_merged_as_it_was_trained_beside(quantise: str, tmp_path: Path) -> None:
    adapter = drawn("inc_lora")
    with adapter.config.unlocked():
        adapter.config.model.quantise = quantise
    said = layouts.save(adapter, tmp_path / "a", "merged")
    assert said == f"all weights in float32, those of the base dequantised from {quantise} codes of the dense kernels"
    written = safetensors.numpy.load_file(tmp_path / "a" / hf.WEIGHTS_FILE)
    params = jax.tree.map(np.asarray, load_model({"name": "tiny", "weights": "", "dtype": "float32"}, 0).params)
    layer, site = params["layers"], adapter.rows["layers", "attn", "q"]
    up, q = (
        np.asarray(quantised.decode(*quantised.encode(jnp.asarray(kernel), quantise)))[1]
        for kernel in (layer["mlp"]["up"]["kernel"], layer["attn"]["q"]["kernel"])
    )
    np.testing.assert_array_equal(written["model.layers.1.mlp.up_proj.weight"], up.T)
    update = 2.0 * site["keys"][1].T @ site["values"][1]
    np.testing.assert_allclose(written["model.layers.1.self_attn.q_proj.weight"], (q + update).T, rtol=1e-5, atol=1e-5)


def test_experts_are_not_merged_into_another_base(main: Callable[..., Ended], tmp_path: Path) -> None:
    adapter = dataclasses.replace(drawn("inc_lora"), identity="another")
    layouts.save(adapter, tmp_path / "a", "mora")
    merge = [f"--adapter={tmp_path / 'a'}", f"--to={tmp_path / 'b'}", "--layout=merged"]
    assert_refused(main(*merge, of=export), "wrong base model: the experts were trained on the weights 'another'")
    assert not (tmp_path / "b").exists()


def test_a_clip_is_not_merged(tmp_path: Path) -> None:
    adapter = drawn("inc_lora")
    clip = dataclasses.replace(adapter, rows={("vision", *path): site for path, site in adapter.rows.items()})
    with pytest.raises(MoraError, match="this layout has no name for the site vision/layers/attn/k; use --layout=mora"):
        layouts.save(clip, tmp_path / "a", "merged")
    assert not (tmp_path / "a").exists()


def test_a_gguf_base_is_told() -> None:
    model = {"name": "smollm2-135m", "weights": "", "quantise": "none"}
    assert merging._origin(model) == ", those of the base dequantised from a GGUF file"
    assert merging._origin(model | {"weights": "org/model"}) == ""
    assert "GGUF file and nf4" in merging._origin({"name": "custom", "weights": "a.gguf", "quantise": "nf4"})
