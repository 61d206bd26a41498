"""The command line: what is understood, and what is refused in one clear line before any work."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from launching import CONFIG, Ended, results

from mora_jax import config as configs
from mora_jax.errors import MoraError
from mora_jax.methods.method import from_config
from mora_jax.methods.presets import PRESETS
from mora_jax.metrics.text import METRICS
from mora_jax.models.registry import MODELS

KEYS = sorted(configs.flatten(configs.load(CONFIG, {})))


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
        (
            ["--confg=x"],
            ["--confg", "legal: --config, --config.KEY, --workdir, --coordinator", "--list, --dry_run, --help"],
        ),
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
