"""The decoder against transformers, token by token; its dtypes; and that depth costs no compile time."""

from __future__ import annotations

import copy
import dataclasses
import re
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from parity import TOLERANCE, Numbers, ids_of, their_greedy, their_logits, transformers_or_skip
from tiny_decoder import TINY, our_logits, random_params

from mora_jax.benchmarks import stream
from mora_jax.data import packages
from mora_jax.data.text import encode_prompts
from mora_jax.models import gguf
from mora_jax.models.decoder import Cache, Decoder
from mora_jax.models.families import to_hf
from mora_jax.models.registry import SMOLLM2
from mora_jax.models.tokenizer import Tokenizer
from mora_jax.runtime.generate import Generator
from mora_jax.runtime.language import answer_loss

# --- the real SmolLM2 -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2() -> SimpleNamespace:
    """The packaged SmolLM2 on our side: float32 weights of the Q4_1 file, and real task texts."""
    file = gguf.open_gguf(packages.extract(*SMOLLM2))
    config = gguf.load_config(file)
    tasks = stream.load("packaged_text", "", (), metrics={}, split_seed=0)
    return SimpleNamespace(
        path=file.path,
        config=config,
        params=jax.device_put(gguf.load_params(file, config, np.float32), jax.devices()[0]),
        tokenizer=Tokenizer.from_gguf(file),
        examples=[task.split("test")[0] for task in tasks],
    )


@pytest.fixture(scope="module")
def smollm2_torch(smollm2: SimpleNamespace) -> SimpleNamespace:
    """The same file in transformers.

    Not from_pretrained(gguf_file=...), which is this function and a dependency on accelerate.
    """
    torch, transformers = transformers_or_skip()
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    # Parsing takes ten seconds and wants a model for its tensor names; the sizes in it are then the file's own.
    with torch.device("meta"):
        names = transformers.LlamaForCausalLM(transformers.LlamaConfig(**to_hf(smollm2.config)))
    parsed = load_gguf_checkpoint(smollm2.path, return_tensors=True, model_to_load=names)
    state = parsed["tensors"]
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**parsed["config"])).eval()
    result = model.load_state_dict({name: tensor.float() for name, tensor in state.items()}, strict=False)
    assert result.missing_keys in ([], ["lm_head.weight"])
    assert not result.unexpected_keys
    model.tie_weights()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    return SimpleNamespace(torch=torch, model=model)


def test_smollm2_logits_equal_transformers(smollm2: SimpleNamespace, smollm2_torch: SimpleNamespace) -> None:
    """Prompt and answer of one record of each task, right-padded to one batch; real positions are compared."""
    texts = [example.prompt + example.answer for example in smollm2.examples]
    rows, cut = encode_prompts(texts, smollm2.tokenizer, 128)
    assert (len(rows), cut) == (4, 0)
    padded = np.full((4, max(map(len, rows))), smollm2.tokenizer.pad_id)
    for target, row in zip(padded, rows, strict=True):
        target[: len(row)] = row
    ours = our_logits(Decoder(smollm2.config), smollm2.params, padded)
    for i, row in enumerate(rows):
        theirs = their_logits(smollm2_torch.torch, smollm2_torch.model, [row])[0]
        np.testing.assert_allclose(ours[i, : len(row)], theirs, atol=TOLERANCE, rtol=0)


def test_smollm2_greedy_text_equals_transformers(
    smollm2: SimpleNamespace, smollm2_torch: SimpleNamespace, one_device: Mesh
) -> None:
    prompts = [smollm2.examples[1].prompt, smollm2.examples[3].prompt, "The capital of France is"]
    tokenizer = smollm2.tokenizer
    rows, _ = encode_prompts(prompts, tokenizer, 128)
    assert len({len(row) for row in rows}) == 3
    expected = their_greedy(smollm2_torch.torch, smollm2_torch.model, rows, 20, tokenizer.eos_id, tokenizer.pad_id)
    assert max(map(len, expected)) == 20
    decoded: list[list[int]] = []
    recording = copy.copy(tokenizer)
    recording.decode = lambda ids: decoded.append(list(ids)) or tokenizer.decode(ids)
    generate = Generator(Decoder(smollm2.config), recording, one_device)
    options = {"max_prompt_tokens": 128, "max_new_tokens": 20, "batch_size": 3, "after_batch": lambda n: None}
    ours = generate({"params": smollm2.params}, prompts, **options)
    assert ours.texts == [tokenizer.decode(ids) for ids in expected]
    assert sorted(decoded) == sorted(expected)  # a text could be equal by chance of spelling


# --- dtypes, depth, recomputation -------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_bfloat16_is_close_to_float32(tied: bool) -> None:
    config = dataclasses.replace(TINY, tie_embeddings=tied, attention_bias=True, output_bias=True, mlp_bias=True)
    # Both run on weights that bfloat16 holds exactly, so only the arithmetic differs.
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), random_params(config, scale=0.15))
    params = jax.tree.map(lambda leaf: leaf.astype(np.float32), half)
    tokens = ids_of((40, 40), config.vocab_size)
    full_logits = our_logits(Decoder(config), params, tokens)
    half_logits = our_logits(Decoder(config, dtype=jnp.bfloat16), half, tokens)
    assert full_logits.dtype == half_logits.dtype == np.float32
    error = np.abs(half_logits - full_logits) / full_logits.std()
    assert 0 < error.mean() < 0.015
    assert error.max() < 0.12


@pytest.mark.parametrize(("dtype", "mean"), [(jnp.float32, 1e-4), (jnp.bfloat16, 0.015)])
def test_only_relative_positions_matter(dtype: Any, mean: float) -> None:
    """Rotary positions far out, where angles in less than float32 would be off by whole turns."""
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), random_params(TINY, scale=0.15))
    near, far = (our_logits(Decoder(TINY, dtype=dtype), params, ids_of((40,), 61), start) for start in (0, 3000))
    assert 0 < np.abs(near - far).mean() < mean * near.std()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_dtypes_of_parameters_hidden_states_cache_and_logits(dtype: Any) -> None:
    config = dataclasses.replace(TINY, attention_bias=True, output_bias=True, mlp_bias=True)
    decoder = Decoder(config, dtype=dtype)
    tokens = jnp.zeros((2, 7), jnp.int32)
    positions, mask = jnp.zeros((2, 7), jnp.int32), jnp.ones((2, 7, 9), bool)

    def everything(key: jax.Array) -> Any:
        variables = decoder.init(key, tokens, method=Decoder.initialise)
        hidden, cache = decoder.apply(variables, tokens, positions, mask, Cache.empty(config, 2, 9, dtype))
        return variables, hidden, cache, decoder.apply(variables, hidden, method=Decoder.logits)

    variables, hidden, cache, logits = jax.eval_shape(everything, jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(dtype)}
    assert (hidden.shape, hidden.dtype) == ((2, 7, 24), dtype)
    assert cache.keys.shape == cache.values.shape == (2, 2, 2, 9, 6)
    assert (cache.keys.dtype, cache.values.dtype, cache.end.dtype) == (dtype, dtype, jnp.int32)
    assert (logits.shape, logits.dtype) == ((2, 7, 61), jnp.float32)


def equations(jaxpr: Any) -> int:
    """Equations in a jaxpr and in all that it calls."""
    return sum(1 + sum(map(equations, jax.core.jaxprs_in_params(eqn.params))) for eqn in jaxpr.eqns)


@pytest.mark.parametrize("what", ["logits", "gradient", "generate"])
def test_depth_costs_no_compile_time(what: str, one_device: Mesh) -> None:
    """2 and 6 layers give the same program but for the sizes in it: as many lines, and as many loops."""

    def program(layers: int) -> str:
        config = dataclasses.replace(TINY, layers=layers)
        decoder = Decoder(config, remat="dots")
        params = jax.tree.map(jnp.asarray, random_params(config))
        batch = {
            "tokens": jnp.ones((2, 16), jnp.int32),
            "prompt": jnp.array([3, 4]),
            "length": jnp.array([9, 16]),
            "answers": jnp.arange(4)[None],
        }
        if what == "generate":
            generate = Generator(decoder, Numbers(), one_device)
            return generate._run.lower({"params": params}, batch, jnp.int32(8), capacity=32).as_text()
        if what == "gradient":
            return jax.jit(jax.grad(lambda p: answer_loss(decoder, {"params": p}, batch))).lower(params).as_text()
        return (
            jax.jit(lambda p: decoder.apply({"params": p}, batch["tokens"], method="initialise"))
            .lower(params)
            .as_text()
        )

    shallow, deep = program(2), program(6)
    assert shallow.count("stablehlo.while") == deep.count("stablehlo.while")
    # forward; forward and backward; prefill, and a step inside the loop over tokens
    assert shallow.count("stablehlo.while") == {"logits": 1, "gradient": 2, "generate": 3}[what]
    assert shallow.count("\n") == deep.count("\n")
    # line for line the same, once the number of layers is taken out
    assert re.sub(r"\d+", "", shallow) == re.sub(r"\d+", "", deep)


def test_unread_slots_and_padding_tokens_are_never_seen() -> None:
    """A query sees what its mask shows and nothing else: other tokens and other cache contents change no bit."""
    decoder, params = Decoder(TINY), random_params(TINY)
    tokens = np.array(ids_of((12,), TINY.vocab_size))
    mask = np.zeros((1, 12, 20), bool)
    for query in range(12):
        mask[0, query, 4 : query + 1] = True
    positions = np.maximum(np.arange(12) - 4, 0)[None]

    @jax.jit
    def run(tokens: jax.Array, cache: Cache) -> jax.Array:
        return decoder.apply({"params": params}, tokens, positions, mask, cache)[0]

    clean = run(tokens, Cache.empty(TINY, 1, 20, jnp.float32))
    other = tokens.copy()
    other[0, :4] = 60
    dirty = Cache.empty(TINY, 1, 20, jnp.float32)
    dirty = dirty._replace(keys=dirty.keys + 1e3, values=dirty.values - 1e3)
    np.testing.assert_array_equal(run(other, dirty)[0, 4:], clean[0, 4:])
    assert np.isfinite(clean).all()
