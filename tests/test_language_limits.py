"""Token limits of tasks against the context that a model was trained with."""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from launching import CONFIG

from mora_jax import config as configs
from mora_jax.benchmarks.stream import Task
from mora_jax.errors import MoraError
from mora_jax.methods.method import from_config
from mora_jax.models.registry import LanguageModel, load_model
from mora_jax.runtime.distributed import AXES
from mora_jax.runtime.language import LanguageFamily

MEETINGS = Task("meetings", "rouge_l", {}, max_prompt_tokens=4096, max_answer_tokens=512, max_new_tokens=600)


@functools.cache
def tiny() -> LanguageModel:
    return load_model({"name": "tiny", "weights": "", "dtype": "float32"}, 0)


def family(positions: int, *tasks: Task, **options: int) -> LanguageFamily:
    """The tiny model as if it had been trained with so many positions; `a__b=c` is config.a.b=c."""
    values = {key.replace("__", "."): str(value) for key, value in options.items()}
    config = configs.load(f"{CONFIG}:benchmark=trace,model=tiny", values)
    model = dataclasses.replace(tiny(), config=dataclasses.replace(tiny().config, max_positions=positions))
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), AXES)
    return LanguageFamily(model, from_config(config.method, config.kernel), config, mesh, tasks)


def test_what_fits_is_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    limits = family(4096 + 600, MEETINGS).limits(MEETINGS)
    assert (limits.prompt, limits.answer) == (4096, 512)
    limits = family(128, MEETINGS, train__max_prompt_tokens=96, train__max_answer_tokens=20, eval__max_new_tokens=32)
    assert (limits.limits(MEETINGS).prompt, limits.limits(MEETINGS).answer) == (96, 20)
    assert capsys.readouterr().err == ""


def test_a_limit_of_the_task_gives_way_and_is_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    """As for MeetingBank on Llama 2."""
    short = family(4096, MEETINGS)
    assert [short.limits(MEETINGS).prompt for _ in range(2)] == [4096 - 600] * 2
    assert short.limits(MEETINGS).answer == 512
    assert short.prompt_tokens(MEETINGS) == 4096 - 600, "what results.json says"
    assert capsys.readouterr().err == (
        "task 'meetings': prompts are cut to 3496 tokens instead of 4096, because the model has 4096 positions and "
        "answers may take 600\n"
    )


@pytest.mark.parametrize(
    "options",
    [
        {"train__max_prompt_tokens": 97, "train__max_answer_tokens": 20, "eval__max_new_tokens": 32},
        {"train__max_prompt_tokens": 97, "train__max_answer_tokens": 32, "eval__max_new_tokens": 20},
        {"eval__max_new_tokens": 127, "train__max_answer_tokens": 20},
    ],
)
def test_limits_of_the_config_that_do_not_fit_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(MoraError) as caught:
        family(128, MEETINGS, **options)
    said = str(caught.value)
    for part in (
        "'meetings'",
        "train.max_prompt_tokens",
        "train.max_answer_tokens",
        "eval.max_new_tokens",
        "at most 128",
    ):
        assert part in said
    assert "\n" not in said
