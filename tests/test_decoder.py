"""The decoder against transformers, token by token; its loss against NumPy; and that depth costs no compile time."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Sequence
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from mora_jax.benchmarks import stream
from mora_jax.data import packages
from mora_jax.data.text import Limits as TextLimits
from mora_jax.data.text import Record, encode_prompts, plan_batches
from mora_jax.models import gguf, hf
from mora_jax.models.decoder import REMAT, Cache, Decoder, causal_mask
from mora_jax.models.decoder_config import DecoderConfig
from mora_jax.models.registry import SMOLLM2
from mora_jax.models.tokenizer import Tokenizer
from mora_jax.runtime.distributed import AXES, make_mesh, place, place_batch
from mora_jax.runtime.generate import Generator
from mora_jax.runtime.language import answer_loss

TOLERANCE = 2e-4  # of a logit, float32, absolute

TINY = DecoderConfig(
    vocab_size=61,
    d_model=24,
    d_ff=40,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=6,
    rope_theta=5000.0,
    norm_eps=1e-5,
    tie_embeddings=False,
    max_positions=256,
)
VARIANTS = {
    "gqa": {},
    "mha": {"kv_heads": 4},
    "mqa": {"kv_heads": 1},
    "tied": {"tie_embeddings": True},
    "attention_bias": {"attention_bias": True, "output_bias": True},
    "mlp_bias": {"mlp_bias": True},
    "wide_heads": {"head_dim": 10},  # heads * head_dim is not d_model
    "gelu_tanh": {"activation": "gelu_tanh"},
    "gelu": {"activation": "gelu"},
    "long_rope": {"rope_theta": 1e6, "norm_eps": 1e-3},
    "all_at_once": {
        "kv_heads": 1,
        "head_dim": 8,
        "layers": 5,
        "tie_embeddings": True,
        "attention_bias": True,
        "output_bias": True,
        "mlp_bias": True,
        "activation": "gelu_tanh",
    },
}
PROMPT_LENGTHS = (5, 1, 23, 12, 70, 2)  # 70 is past the smallest prompt bucket, so the rows are padded a lot
NEW_TOKENS = 12


class Numbers:
    """Texts are numbers in words, and every number is a token; nothing added but BOS, nothing lost in decoding."""

    def __init__(self, bos_id: int | None = None, eos_id: int = 0, pad_id: int = 0):
        self.bos_id, self.eos_id, self.pad_id = bos_id, eos_id, pad_id

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [[int(word) for word in text.split()] for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))


def spelled(rows: Sequence[Sequence[int]]) -> list[str]:
    return [" ".join(map(str, row)) for row in rows]


@pytest.fixture(scope="module")
def one() -> Mesh:
    """A mesh of one device: what 8 fake ones on the same cores do with these models is in test_generate.py."""
    return Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), AXES)


def transformers_or_skip() -> tuple[Any, Any]:
    torch = pytest.importorskip("torch", reason="torch is the other side of the comparison")
    return torch, pytest.importorskip("transformers", reason="transformers is the other side of the comparison")


def ids_of(lengths: Sequence[int], vocab: int) -> list[list[int]]:
    rng = np.random.default_rng(1)
    return [rng.integers(1, vocab, length).tolist() for length in lengths]


@partial(jax.jit, static_argnums=0)
def forward(decoder: Decoder, params: Any, tokens: jax.Array, start: jax.Array) -> jax.Array:
    positions = jnp.broadcast_to(start + jnp.arange(tokens.shape[1])[None], tokens.shape)
    hidden, _ = decoder.apply({"params": params}, tokens, positions, causal_mask(tokens.shape[1]))
    return decoder.apply({"params": params}, hidden, method=Decoder.logits)


def our_logits(decoder: Decoder, params: Any, tokens: Any, start: int = 0) -> np.ndarray:
    """[b t vocab]; `start` is the position of the first token."""
    return np.asarray(forward(decoder, params, np.asarray(tokens, np.int32), np.int32(start)))


def their_logits(torch: Any, model: Any, tokens: Any) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.numpy()


def their_greedy(
    torch: Any, model: Any, rows: Sequence[Sequence[int]], new: int, eos: int, pad: int
) -> list[list[int]]:
    """generate(do_sample=False) over one left-padded batch; each answer up to its EOS."""
    width = max(map(len, rows))
    tokens = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    with torch.no_grad():
        out = model.generate(
            tokens, attention_mask=mask, do_sample=False, max_new_tokens=new, eos_token_id=eos, pad_token_id=pad
        )
    answers = out[:, width:].tolist()
    return [answer[: answer.index(eos)] if eos in answer else answer for answer in answers]


# --- tiny random models of transformers -------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=VARIANTS)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """One variant: the torch model, and what we read back from the safetensors that it saved."""
    torch, transformers = transformers_or_skip()
    config = dataclasses.replace(TINY, **VARIANTS[request.param])
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config.to_hf())).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # biases start at 0 and norms at 1, where errors hide
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.3)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    loaded = hf.load_config(folder)
    return SimpleNamespace(torch=torch, model=model, config=loaded, params=hf.load_params(folder, loaded, np.float32))


def test_logits_equal_transformers(tiny: SimpleNamespace) -> None:
    tokens = ids_of((33, 33, 33), tiny.config.vocab_size)
    theirs = their_logits(tiny.torch, tiny.model, tokens)
    assert theirs.std() > 0.3  # else nothing is compared
    np.testing.assert_allclose(our_logits(Decoder(tiny.config), tiny.params, tokens), theirs, atol=TOLERANCE, rtol=0)


def test_greedy_ids_equal_transformers(tiny: SimpleNamespace, one: Mesh) -> None:
    """With an EOS that stops some rows early and others not at all."""
    rows = ids_of(PROMPT_LENGTHS, tiny.config.vocab_size)
    vocab = tiny.config.vocab_size
    whole = their_greedy(tiny.torch, tiny.model, rows, NEW_TOKENS, eos=vocab, pad=0)  # an EOS that never comes
    assert {len(answer) for answer in whole} == {NEW_TOKENS}
    stops = [sum(token in answer for answer in whole) for token in range(vocab)]
    early = next(token for token in range(vocab) if 0 < stops[token] < len(rows))
    stopped = their_greedy(tiny.torch, tiny.model, rows, NEW_TOKENS, eos=early, pad=0)
    assert min(map(len, stopped)) < NEW_TOKENS == max(map(len, stopped))
    ours = Generator(Decoder(tiny.config), Numbers(eos_id=early), one)(
        {"params": tiny.params},
        spelled(rows),
        max_prompt_tokens=128,
        max_new_tokens=NEW_TOKENS,
        batch_size=len(rows),
        after_batch=lambda n: None,
    )
    assert ours.texts == spelled(stopped)


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
        names = transformers.LlamaForCausalLM(transformers.LlamaConfig(**smollm2.config.to_hf()))
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
    smollm2: SimpleNamespace, smollm2_torch: SimpleNamespace, one: Mesh
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
    generate = Generator(Decoder(smollm2.config), recording, one)
    options = {"max_prompt_tokens": 128, "max_new_tokens": 20, "batch_size": 3, "after_batch": lambda n: None}
    ours = generate({"params": smollm2.params}, prompts, **options)
    assert ours.texts == [tokenizer.decode(ids) for ids in expected]
    assert sorted(decoded) == sorted(expected)  # a text could be equal by chance of spelling


# --- dtypes, depth, recomputation -------------------------------------------------------------------------------------


@cache
def random_params(config: DecoderConfig, scale: float = 0.3) -> Any:
    """Random float32 parameters away from what initialisers give: no zero bias, no unit norm."""
    shapes = jax.eval_shape(
        lambda key: Decoder(config).init(key, jnp.zeros((1, 2), jnp.int32), method=Decoder.initialise),
        jax.random.key(0),
    )["params"]
    rng = np.random.default_rng(0)

    def draw(path: Any, leaf: Any) -> np.ndarray:
        mean = 1.0 if "norm" in jax.tree_util.keystr(path) else 0.0
        return rng.normal(mean, scale, leaf.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


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
def test_depth_costs_no_compile_time(what: str, one: Mesh) -> None:
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
            generate = Generator(decoder, Numbers(), one)
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


def test_recomputation_changes_neither_loss_nor_gradient() -> None:
    params, batch = random_params(TINY), a_batch(ROWS)

    def both(name: str) -> Any:
        decoder = Decoder(TINY, remat=name)
        return jax.jit(jax.value_and_grad(lambda p: answer_loss(decoder, {"params": p}, batch)))(params)

    expected = both("none")
    for name in REMAT.keys() - {"none"}:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-5), both(name), expected)


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


# --- the loss over answers --------------------------------------------------------------------------------------------

EOS = 2
# (length of the prompt with BOS, length of the row): a usual row, a long answer, EOS only, a one-token prompt.
ROWS = ((5, 9), (3, 14), (7, 8), (1, 6))


def a_batch(
    rows: Sequence[tuple[int, int]], width: int = 16, pad: int = EOS, answers: int | None = None
) -> dict[str, Any]:
    """Right-padded rows that end with EOS; the ids of a row do not depend on the width or the padding."""
    rng = np.random.default_rng(5)
    tokens = np.full((len(rows), width), pad, np.int32)
    for target, (_, length) in zip(tokens, rows, strict=True):
        target[:length] = rng.integers(3, TINY.vocab_size, 64)[:length]
        target[length - 1] = EOS
    return {
        "tokens": tokens,
        "prompt": np.array([prompt for prompt, _ in rows], np.int32),
        "length": np.array([length for _, length in rows], np.int32),
        "answers": np.arange(answers or width, dtype=np.int32)[None],
    }


jit_loss = jax.jit(answer_loss, static_argnums=0)


def loss_of(batch: dict[str, Any], config: DecoderConfig = TINY, dtype: Any = jnp.float32) -> float:
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), random_params(config))
    value = jit_loss(Decoder(config, dtype=dtype), {"params": params}, batch)
    assert (value.shape, value.dtype) == ((), jnp.float32)
    return float(value)


def by_hand(batch: dict[str, Any], config: DecoderConfig = TINY) -> float:
    """Row by row and token by token in float64: position i is predicted from the hidden state at i - 1."""
    losses = []
    for tokens, prompt, length in zip(batch["tokens"], batch["prompt"], batch["length"], strict=True):
        alone = np.zeros((1, 64), np.int32)  # one shape for all rows; what stands behind a row is never seen
        alone[0, :length] = tokens[:length]
        logits = our_logits(Decoder(config), random_params(config), alone)[0].astype(np.float64)
        for i in range(prompt, length):
            row = logits[i - 1] - logits[i - 1].max()
            losses.append(np.log(np.exp(row).sum()) - row[tokens[i]])
    return float(np.mean(losses)) if losses else 0.0


@pytest.mark.parametrize("tied", [False, True])
def test_the_loss_by_hand(tied: bool) -> None:
    config = dataclasses.replace(TINY, tie_embeddings=tied)
    batch = a_batch(ROWS)
    assert loss_of(batch, config) == pytest.approx(by_hand(batch, config), rel=1e-5)
    assert by_hand(batch, config) > 1.0


def test_the_loss_is_a_mean_over_tokens_not_over_rows() -> None:
    each = [loss_of({k: v if k == "answers" else v[i : i + 1] for k, v in a_batch(ROWS).items()}) for i in range(4)]
    counts = [length - prompt for prompt, length in ROWS]
    assert loss_of(a_batch(ROWS)) == pytest.approx(np.average(each, weights=counts), rel=1e-5)


def test_a_row_without_an_answer_counts_nothing() -> None:
    # Rows of one length, one of which is all prompt.
    batch = a_batch(((5, 9), (9, 9), (3, 14)))
    assert loss_of(batch) == pytest.approx(by_hand(batch), rel=1e-5)
    without = {k: v if k == "answers" else v[[0, 2]] for k, v in batch.items()}
    assert loss_of(batch) == pytest.approx(loss_of(without), rel=1e-5)


def test_a_batch_without_any_answer_is_zero_with_zero_gradient() -> None:
    batch = a_batch(((9, 9), (16, 16)))
    value, gradient = jax.jit(
        jax.value_and_grad(lambda p: answer_loss(Decoder(TINY), {"params": p}, batch))
    )(random_params(TINY))  # fmt: skip
    assert value == 0.0
    assert all(not leaf.any() for leaf in jax.tree.leaves(gradient))


def test_the_padding_token_does_not_matter_not_even_as_eos() -> None:
    """EOS inside an answer and at its end counts as a target, EOS behind it does not."""
    batch, other = a_batch(ROWS, pad=EOS), a_batch(ROWS, pad=7)
    for tokens in (batch["tokens"], other["tokens"]):
        tokens[1, 8] = EOS  # in the middle of the answer
    assert loss_of(batch) == loss_of(other)
    assert loss_of(batch) == pytest.approx(by_hand(batch), rel=1e-5)


@pytest.mark.parametrize("width", [14, 24, 40])
def test_right_padding_does_not_change_the_loss(width: int) -> None:
    assert loss_of(a_batch(ROWS, width=width)) == pytest.approx(loss_of(a_batch(ROWS)), rel=1e-6)


@pytest.mark.parametrize("answers", [11, 12, 16, 64])
def test_offsets_past_the_length_count_nothing(answers: int) -> None:
    """11 is the longest answer; 64 offsets reach far behind the last column."""
    assert loss_of(a_batch(ROWS, answers=answers)) == pytest.approx(by_hand(a_batch(ROWS)), rel=1e-5)


def test_offsets_that_are_missing_count_nothing_either() -> None:
    """With 4 offsets the answers end after 4 tokens: what the quarter rule must never do to an answer."""
    batch = a_batch(ROWS, answers=4)
    cut = batch | {"length": np.minimum(batch["length"], batch["prompt"] + 4)}
    assert loss_of(batch) == pytest.approx(by_hand(cut), rel=1e-5)


def test_a_row_without_prompt_does_not_learn_its_first_token() -> None:
    """No BOS and an empty prompt: nothing precedes the first token, so nothing can predict it."""
    batch = a_batch(((0, 6), (3, 9)))
    expected = by_hand(batch | {"prompt": np.array([1, 3], np.int32)})
    assert loss_of(batch) == pytest.approx(expected, rel=1e-5)


def test_the_loss_in_bfloat16_is_close() -> None:
    assert loss_of(a_batch(ROWS), dtype=jnp.bfloat16) == pytest.approx(loss_of(a_batch(ROWS)), rel=0.03)


def test_the_loss_of_planned_batches_by_hand() -> None:
    """From records to the loss: whatever widths the plan chooses, every answer token of every record counts once."""
    rng = np.random.default_rng(3)
    records = [
        Record((*rng.integers(3, 61, n).tolist(), EOS), p) for n, p in ((6, 5), (7, 2), (20, 17), (29, 3), (9, 9))
    ]
    limits = TextLimits(prompt=20, answer=30, bucket=8)
    plan = plan_batches(records, limits=limits, batch_size=1, steps=0, epochs=1, seed=0, pad_id=EOS)
    assert {b[2] == b[1] // 4 for b in plan.batches} == {True, False}
    for step in range(len(plan)):
        assert loss_of(plan[step]) == pytest.approx(by_hand(plan[step]), rel=1e-5)


def test_the_loss_does_not_depend_on_how_a_batch_is_placed() -> None:
    batch = a_batch((*ROWS, *ROWS))
    expected, params = loss_of(batch), random_params(TINY)
    for axes in ({"data": 8, "fsdp": 1, "model": 1}, {"data": 2, "fsdp": 2, "model": 2}):
        mesh = make_mesh(axes)
        value = jit_loss(Decoder(TINY), {"params": place(mesh, params)}, place_batch(mesh, batch))
        assert float(value) == pytest.approx(expected, rel=1e-5)
