"""Every decoder family against transformers, with tiny random models: logits, greedy text, round trips."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from jax.sharding import Mesh
from parity import (
    TOLERANCE,
    assert_equal_greedy_ids,
    assert_equal_logits,
    ids_of,
    randomise,
    their_logits,
    transformers_or_skip,
)

from mora_jax.errors import MoraError
from mora_jax.models import hf
from mora_jax.models.families import FAMILIES, from_hf

SIZES = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
LLAMA3 = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}


def rope(kind: str, theta: float = 1e4, **numbers: float) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **numbers}}


ALL_AT_ONCE = {
    "num_key_value_heads": 1,
    "head_dim": 8,
    "num_hidden_layers": 5,
    "tie_word_embeddings": True,
    "attention_bias": True,
    "mlp_bias": True,
    "hidden_act": "gelu_pytorch_tanh",
}
WINDOW = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1, "num_hidden_layers": 3}
# name -> (model_type, keys of its config.json beside SIZES). Windows are shorter than the texts.
VARIANTS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "llama": ("llama", {}),
    "llama_mha": ("llama", {"num_key_value_heads": 4}),
    "llama_mqa": ("llama", {"num_key_value_heads": 1}),
    "llama_tied": ("llama", {"tie_word_embeddings": True}),
    "llama_attention_bias": ("llama", {"attention_bias": True}),
    "llama_mlp_bias": ("llama", {"mlp_bias": True}),
    "llama_wide_heads": ("llama", {"head_dim": 10}),  # heads * head_dim is not hidden_size
    "llama_gelu_tanh": ("llama", {"hidden_act": "gelu_pytorch_tanh"}),
    "llama_gelu": ("llama", {"hidden_act": "gelu"}),
    "llama_long_rope": ("llama", {"rms_norm_eps": 1e-3, **rope("default", 1e6)}),
    "llama_linear_rope": ("llama", rope("linear", factor=3.0)),
    "llama3_rope": ("llama", {"head_dim": 16, **rope("llama3", 500.0, **LLAMA3)}),
    "llama_all_at_once": ("llama", ALL_AT_ONCE),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral_window": ("mistral", {"sliding_window": 7}),
    "qwen2": ("qwen2", {}),
    "qwen2_window": ("qwen2", WINDOW),
    "qwen3": ("qwen3", {"head_dim": 8}),
    "qwen3_window": ("qwen3", {"head_dim": 8, "attention_bias": True, **WINDOW}),
    "gemma": ("gemma", {"head_dim": 8}),
    "gemma2": ("gemma2", {"head_dim": 8, "sliding_window": 7, "query_pre_attn_scalar": 5, "num_hidden_layers": 3}),
    "gemma2_strong_caps": ("gemma2", {"head_dim": 8, "attn_logit_softcapping": 0.5, "final_logit_softcapping": 1.5}),
    "gemma3": ("gemma3_text", {"head_dim": 8, "sliding_window": 7, "num_hidden_layers": 7}),
    "gemma3_linear_rope": (
        "gemma3_text",
        {
            "head_dim": 8,
            "sliding_window": 7,
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1e3, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10.0},
            },
        },
    ),
    "smollm3": ("smollm3", {"num_hidden_layers": 5}),
    "smollm3_untied": ("smollm3", {"tie_word_embeddings": False, "no_rope_layers": [0, 1]}),
}


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """One variant: the torch model, and the folder that it saved."""
    torch, transformers = transformers_or_skip()
    model_type, keys = VARIANTS[request.param]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **{**SIZES, **keys})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    assert type(model).__name__ == FAMILIES[model_type].architecture
    folder = tmp_path_factory.mktemp(request.param)
    randomise(torch, model).save_pretrained(folder)
    return SimpleNamespace(torch=torch, transformers=transformers, model=model, folder=folder)


def test_logits_equal_transformers(pair: SimpleNamespace) -> None:
    assert_equal_logits(pair.torch, pair.model, pair.folder)


def test_greedy_ids_equal_transformers(pair: SimpleNamespace, one_device: Mesh) -> None:
    assert_equal_greedy_ids(pair.torch, pair.model, pair.folder, one_device)


def test_what_we_save_loads_in_transformers(pair: SimpleNamespace, tmp_path: Path) -> None:
    config = hf.load_config(pair.folder)
    hf.save_params(hf.load_params(pair.folder, config, np.float32), config, tmp_path)
    assert hf.load_config(tmp_path) == config
    again = pair.transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert type(again) is type(pair.model)
    tokens = ids_of((33, 33), config.vocab_size)
    theirs, ours = (their_logits(pair.torch, model, tokens) for model in (pair.model, again))
    np.testing.assert_allclose(ours, theirs, atol=TOLERANCE, rtol=0)


def test_every_family_has_a_variant() -> None:
    assert {model_type for model_type, _ in VARIANTS.values()} == set(FAMILIES)


# --- config.json as the hub has it ------------------------------------------------------------------------------------

PUBLISHED = {
    "vocab_size": 8,
    "hidden_size": 16,
    "intermediate_size": 8,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    ("model_type", "keys", "fields"),
    [
        (  # transformers 4 wrote these keys
            "llama",
            {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
            {"rope_theta": 5e5, "tie_embeddings": False, "head_dim": 4},
        ),
        ("mistral", {"sliding_window": 4096}, {"windows": (4096,) * 6, "attention_bias": False}),
        ("mistral", {"sliding_window": None}, {"windows": ()}),
        (
            "qwen2",
            {"use_sliding_window": False, "sliding_window": 32768, "max_window_layers": 2},
            {"windows": (), "attention_bias": True, "output_bias": False},
        ),
        ("gemma", {"hidden_act": "gelu", "hidden_activation": None}, {"activation": "gelu_tanh", "head_dim": 256}),
        (
            "gemma2",
            {"sliding_window": 4096},
            {"windows": (4096, 0) * 3, "attention_softcap": 50.0, "final_softcap": 30.0, "tie_embeddings": True},
        ),
        (
            "gemma3_text",
            {"sliding_window": 512, "sliding_window_pattern": 6, "rope_local_base_freq": 1e4, "rope_theta": 1e6},
            {"windows": (512,) * 5 + (0,), "local_rope_theta": 1e4, "rope_theta": 1e6, "attention_softcap": 0.0},
        ),
        ("smollm3", {}, {"no_rope": (False, False, False, True, False, False), "rope_theta": 2e6}),
    ],
)
def test_keys_and_defaults_of_published_configs(model_type: str, keys: dict, fields: dict) -> None:
    config = from_hf({"model_type": model_type, **PUBLISHED, **keys}, "config.json")
    assert {name: getattr(config, name) for name in fields} == fields


@pytest.mark.parametrize(
    ("model_type", "keys", "message"),
    [
        ("llama", rope("yarn", factor=4.0), "unknown RoPE scaling 'yarn'; known: default, linear, llama3"),
        ("llama", rope("llama3", factor=4.0), "key low_freq_factor is missing"),
        (
            "gemma2",
            {"layer_types": ["full_attention", "chunked"], "sliding_window": 7},
            "unknown layer_types entry",
        ),
        ("gemma2", {"layer_types": ["sliding_attention"], "sliding_window": 7}, "windows has 1 entries for 6 layers"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention is not supported"),
        ("smollm3", {"use_sliding_window": True, "sliding_window": 7}, "use_sliding_window is not supported"),
        ("gemma", {"hidden_act": "silu"}, "unknown hidden_act 'silu'; known: gelu"),
        ("qwen2", {"architectures": ["LlamaForCausalLM"]}, "LlamaForCausalLM contradicts model_type qwen2"),
        ("phi3", {}, "unknown model_type 'phi3'; known: gemma"),
    ],
)
def test_configs_that_are_refused(model_type: str, keys: dict, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, **PUBLISHED, **keys}))
    with pytest.raises(MoraError, match=f"config.json.*{message}"):
        hf.load_config(tmp_path)
