"""Hugging Face folders: what transformers writes we read, what we write transformers reads, and what is refused."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import huggingface_hub
import huggingface_hub.errors
import huggingface_hub.utils
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict
from parity import transformers_or_skip

from mora_jax.errors import MoraError
from mora_jax.models import hf
from mora_jax.models.decoder_config import DecoderConfig
from mora_jax.models.families import from_hf, to_hf
from mora_jax.models.keytable import param_shape, rows

TINY = DecoderConfig(
    vocab_size=40,
    d_model=24,
    d_ff=56,
    layers=3,
    heads=4,
    kv_heads=2,
    head_dim=10,  # heads * head_dim differs from d_model, so that a confusion of the two shows
    rope_theta=5000.0,
    norm_eps=1e-5,
    tie_embeddings=False,
    max_positions=64,
)
TIED = DecoderConfig(**(vars(TINY) | {"tie_embeddings": True}))
BIASED = DecoderConfig(**(vars(TINY) | {"attention_bias": True, "output_bias": True, "mlp_bias": True}))
VARIANTS = pytest.mark.parametrize("config", [TINY, TIED, BIASED], ids=["untied", "tied", "biased"])


def random_params(config: DecoderConfig, dtype: Any = np.float32) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    flat = {row.ours: rng.standard_normal(param_shape(row, config)).astype(dtype) for row in rows(config)}
    return unflatten_dict(flat, sep="/")


def assert_trees_equal(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    ours, theirs = flatten_dict(ours, sep="/"), flatten_dict(theirs, sep="/")
    assert ours.keys() == theirs.keys()
    for path in ours:
        np.testing.assert_array_equal(ours[path], theirs[path], err_msg=path)


def torch_model(config: DecoderConfig) -> Any:
    """A random LlamaForCausalLM of transformers; biases and norms are made random too, they start at 0 and 1."""
    torch, transformers = transformers_or_skip()
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**to_hf(config)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def expected(state: dict[str, Any], config: DecoderConfig) -> dict[str, Any]:
    """Our layout spelt out by hand from a torch state dict, independent of the key table."""

    def stack(name: str, transpose: bool = False) -> np.ndarray:
        tensors = [state[f"model.layers.{layer}.{name}"].numpy() for layer in range(config.layers)]
        return np.stack([tensor.T if transpose else tensor for tensor in tensors])

    def dense(name: str, bias: bool) -> dict[str, np.ndarray]:
        kernel = {"kernel": stack(f"{name}.weight", transpose=True)}
        return kernel | ({"bias": stack(f"{name}.bias")} if bias else {})

    params = {
        "embed": {"embedding": state["model.embed_tokens.weight"].numpy()},
        "layers": {
            "attn_norm": {"scale": stack("input_layernorm.weight")},
            "attn": {name: dense(f"self_attn.{name}_proj", config.attention_bias) for name in "qkvo"},
            "mlp_norm": {"scale": stack("post_attention_layernorm.weight")},
            "mlp": {name: dense(f"mlp.{name}_proj", config.mlp_bias) for name in ("gate", "up", "down")},
        },
        "final_norm": {"scale": state["model.norm.weight"].numpy()},
    }
    return params if config.tie_embeddings else params | {"lm_head": {"kernel": state["lm_head.weight"].numpy().T}}


@VARIANTS
@pytest.mark.parametrize("shard_size", ["5GB", "10KB"])
def test_what_transformers_saves_is_read(config: DecoderConfig, shard_size: str, tmp_path: Path) -> None:
    model = torch_model(config)
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard_size == "10KB")
    assert hf.load_config(tmp_path) == config
    assert_trees_equal(hf.load_params(tmp_path, config, np.float32), expected(model.state_dict(), config))


@VARIANTS
def test_what_we_save_transformers_reads(config: DecoderConfig, tmp_path: Path) -> None:
    model, transformers = torch_model(config), transformers_or_skip()[1]
    hf.save_params(jax.tree.map(jnp.asarray, expected(model.state_dict(), config)), config, tmp_path)
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.rope_parameters["rope_theta"] == config.rope_theta
    state, reloaded = model.state_dict(), loaded.state_dict()
    assert state.keys() == reloaded.keys()
    for name, tensor in state.items():
        np.testing.assert_array_equal(reloaded[name].numpy(), tensor.numpy(), err_msg=name)


@VARIANTS
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_round_trip_keeps_every_bit_and_dtype(config: DecoderConfig, dtype: str, tmp_path: Path) -> None:
    params = random_params(config, jnp.dtype(dtype))
    hf.save_params(params, config, tmp_path / "new" / "folder")
    loaded = hf.load_params(tmp_path / "new" / "folder", config, jnp.dtype(dtype))
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded)} == {jnp.dtype(dtype)}
    assert_trees_equal(loaded, params)
    assert hf.load_config(tmp_path / "new" / "folder") == config


def test_loading_casts_to_the_asked_dtype(tmp_path: Path) -> None:
    params = random_params(TINY)
    hf.save_params(params, TINY, tmp_path)
    loaded = hf.load_params(tmp_path, TINY, jnp.bfloat16)
    assert_trees_equal(loaded, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params))


def test_the_library_reads_the_streamed_file(tmp_path: Path) -> None:
    """Mixed dtypes and odd sizes, which is where offsets and alignment could go wrong."""
    config = DecoderConfig(**(vars(TINY) | {"vocab_size": 41, "d_model": 25}))
    params = random_params(config, jnp.bfloat16)
    params["final_norm"]["scale"] = params["final_norm"]["scale"].astype(np.float32)
    hf.save_params(params, config, tmp_path)
    content = (tmp_path / "model.safetensors").read_bytes()
    size = int.from_bytes(content[:8], "little")
    assert size % 8 == 0
    assert json.loads(content[8 : 8 + size])["model.norm.weight"]["data_offsets"][0] % 4 == 0
    tensors = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    assert tensors["model.norm.weight"].dtype == np.float32
    np.testing.assert_array_equal(tensors["lm_head.weight"], params["lm_head"]["kernel"].T)
    key = tensors["model.layers.2.self_attn.k_proj.weight"]
    np.testing.assert_array_equal(key, params["layers"]["attn"]["k"]["kernel"][2].T)


@pytest.mark.parametrize("operation", ["load", "save"])
def test_the_host_holds_the_model_once(operation: str, tmp_path: Path) -> None:
    config = DecoderConfig(**(vars(TINY) | {"d_model": 256, "d_ff": 512, "layers": 8, "tie_embeddings": True}))
    params = random_params(config)
    hf.save_params(params, config, tmp_path)
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    largest = 256 * 512 * 4
    tracemalloc.start()
    if operation == "load":
        hf.load_params(tmp_path, config, np.float32)
    else:
        hf.save_params(params, config, tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < (total if operation == "load" else 0) + 4 * largest


def saved(tmp_path: Path, config: DecoderConfig = TINY) -> dict[str, np.ndarray]:
    """Write a good folder and return its tensors, for a test to spoil and write back."""
    hf.save_params(random_params(config), config, tmp_path)
    return safetensors.numpy.load_file(tmp_path / "model.safetensors")


def respoil(tensors: dict[str, np.ndarray], tmp_path: Path) -> None:
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")


def test_frequency_buffers_and_a_tied_copy_are_skipped(tmp_path: Path) -> None:
    tensors = saved(tmp_path, TIED)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(5, np.float32)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    respoil(tensors, tmp_path)
    assert_trees_equal(hf.load_params(tmp_path, TIED, np.float32), random_params(TIED))


def test_missing_tensor(tmp_path: Path) -> None:
    tensors = saved(tmp_path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    respoil(tensors, tmp_path)
    with pytest.raises(MoraError, match=r"missing tensor 'model.layers.1.mlp.up_proj.weight'.*\[56, 24\]"):
        hf.load_params(tmp_path, TINY, np.float32)


def test_unexpected_tensor(tmp_path: Path) -> None:
    tensors = saved(tmp_path)
    tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(40, np.float32)
    respoil(tensors, tmp_path)
    with pytest.raises(MoraError, match=r"unexpected tensor .*q_proj.bias' of shape \[40\].*attention_bias=False"):
        hf.load_params(tmp_path, TINY, np.float32)


def test_wrong_shape(tmp_path: Path) -> None:
    tensors = saved(tmp_path)
    tensors["model.layers.0.self_attn.o_proj.weight"] = np.zeros((40, 24), np.float32)
    respoil(tensors, tmp_path)
    with pytest.raises(MoraError, match=r"o_proj.weight' has shape \[40, 24\], the config says \[24, 40\]"):
        hf.load_params(tmp_path, TINY, np.float32)


def test_integer_weights_are_refused(tmp_path: Path) -> None:
    tensors = saved(tmp_path)
    tensors["model.norm.weight"] = np.ones(24, np.int32)
    respoil(tensors, tmp_path)
    with pytest.raises(MoraError, match=r"'model.norm.weight' has dtype I32; known: F64, F32, F16, BF16"):
        hf.load_params(tmp_path, TINY, np.float32)


def test_pickles_are_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"never opened")
    with pytest.raises(MoraError, match=r"only pickled weights \(pytorch_model.bin\)"):
        hf.load_params(tmp_path, TINY, np.float32)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MoraError, match=r"no weights; known: model.safetensors"):
        hf.load_params(tmp_path, TINY, np.float32)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(MoraError, match=r"model.safetensors: not a readable safetensors file"):
        hf.load_params(tmp_path, TINY, np.float32)


def test_an_index_with_an_absent_shard_is_refused(tmp_path: Path) -> None:
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(MoraError, match=r"model-00001-of-00002.safetensors: not a readable"):
        hf.load_params(tmp_path, TINY, np.float32)


@pytest.mark.parametrize("content", ["[]", "{", '{"weight_map": {"a": "../a.safetensors"}}', '{"weight_map": 1}'])
def test_a_bad_index_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content, encoding="utf-8")
    with pytest.raises(MoraError, match=r"index.json"):
        hf.load_params(tmp_path, TINY, np.float32)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda p: p["final_norm"].pop("scale"), "missing parameter 'final_norm/scale'"),
        (lambda p: p["layers"]["attn"]["q"].update(bias=np.zeros((3, 40), np.float32)), "unexpected parameter"),
        (lambda p: p["final_norm"].update(scale=np.zeros(23, np.float32)), r"shape \[23\], the config says \[24\]"),
        (lambda p: p["final_norm"].update(scale=np.zeros(24, np.int8)), "dtype int8; known: float64, float32"),
    ],
)
def test_parameters_that_do_not_fit_the_config_are_not_saved(spoil: Any, message: str, tmp_path: Path) -> None:
    params = random_params(TINY)
    spoil(params)
    with pytest.raises(MoraError, match=message):
        hf.save_params(params, TINY, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"architectures": ["PhiForCausalLM"]},
            "unknown architecture 'PhiForCausalLM'; known: Gemma2ForCausalLM, Gemma3ForCausalLM",
        ),
        ({"architectures": None, "model_type": "gpt2"}, "unknown model_type 'gpt2'; known: gemma, gemma2"),
        ({"architectures": None, "model_type": None}, "unknown model_type None"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
        ({"hidden_size": None}, "key hidden_size is missing"),
        ({"num_hidden_layers": "3"}, "key num_hidden_layers is '3'; it must be one integer"),
        ({"rms_norm_eps": "small"}, "key rms_norm_eps is 'small'; it must be one number"),
        ({"num_key_value_heads": 3}, "heads 4 is not a multiple of kv_heads 3"),
        ({"head_dim": 5}, "head_dim 5 is odd"),
        ({"vocab_size": 0}, "vocab_size is 0; it must be at least 1"),
        ({"hidden_act": "relu"}, "unknown hidden_act 'relu'; known: gelu, gelu_new"),
    ],
)
def test_configs_that_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(to_hf(TINY) | change), encoding="utf-8")
    with pytest.raises(MoraError, match=f"config.json: {message}"):
        hf.load_config(tmp_path)


def test_the_old_rope_theta_key_and_the_defaults_are_read() -> None:
    old = {"model_type": "llama", "vocab_size": 8, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1}
    config = from_hf(old | {"num_attention_heads": 4, "rope_theta": 123.0, "rope_scaling": None}, "old")
    assert (config.rope_theta, config.kv_heads, config.head_dim, config.norm_eps) == (123.0, 4, 4, 1e-6)
    assert not config.tie_embeddings


def test_a_bias_pattern_llama_lacks_is_not_written() -> None:
    config = DecoderConfig(**(vars(TINY) | {"attention_bias": True}))
    with pytest.raises(MoraError, match=r"output_bias=False cannot be written as a LlamaForCausalLM config.json"):
        to_hf(config)


def test_unknown_activation() -> None:
    with pytest.raises(MoraError, match="unknown activation 'relu'; known: gelu, gelu_tanh, silu"):
        DecoderConfig(**(vars(TINY) | {"activation": "relu"}))


def test_resolve_returns_a_folder_as_it_is(tmp_path: Path) -> None:
    assert hf.resolve(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("name", ["./absent", "/absent/model", "a/b/c"])
def test_resolve_refuses_a_path_that_is_no_folder(name: str) -> None:
    with pytest.raises(MoraError, match="is not a folder"):
        hf.resolve(name)


def test_resolve_asks_the_hub_for_safe_files_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: dict[str, Any] = {}

    def snapshot(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert hf.resolve("org/model") == tmp_path
    assert asked["name"] == "org/model"
    names = ["model-00001-of-00002.safetensors", "config.json", "tokenizer.model", "pytorch_model.bin", "modeling.py"]
    kept = huggingface_hub.utils.filter_repo_objects(
        [*names, "original/config.json", "consolidated.safetensors", "consolidated.00.safetensors"],
        allow_patterns=asked["allow_patterns"],
        ignore_patterns=asked["ignore_patterns"],
    )
    assert list(kept) == names[:3]


@pytest.mark.parametrize(
    "failure", [huggingface_hub.errors.LocalEntryNotFoundError("no network"), ValueError("bad id"), OSError("offline")]
)
def test_a_hub_failure_is_one_line(failure: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot(*_: Any, **__: Any) -> str:
        raise failure

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    with pytest.raises(MoraError, match=r"hub id 'org/model' not reachable \(.*local folder") as caught:
        hf.resolve("org/model")
    assert "\n" not in str(caught.value)
