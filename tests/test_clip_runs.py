"""Whole runs of a CLIP over folders of pictures: taught, killed and resumed, evaluated, exported, and refused."""

from __future__ import annotations

import dataclasses
import json
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT
from interruptions import STEPS, World, assert_same_end, ended, rows, wait_for
from launching import BINARY, SECONDS, Ended, assert_refused, results
from PIL import Image
from small_pictures import TASKS, write_pictures
from tiny_clip import TINY, random_params

from mora_jax import evaluate, export, generate
from mora_jax.models import clip_weights

CONFIG = f"{ROOT}/configs/clip_cl.py"
SOURCE = f"{CONFIG}:smoke,benchmark=image_folder"
# Fewer sites and ranks compile faster, and unoptimised code twice as fast.
FAST = {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
SMALL = {"method.rank": 4, "method.top_k": 4, "method.targets": "vision/attn/o,.*/mlp/up"}


def options(**values: object) -> list[str]:
    given = SMALL | {key.replace("__", "."): value for key, value in values.items()}
    return [f"--config.{key}={value}" for key, value in given.items()]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tasks."""
    tasks = dict(TASKS) | {"stripes": {"narrow": (90, 90, 90), "wide": (160, 160, 160)}}
    return write_pictures(tmp_path_factory.mktemp("pictures"), tasks)


@pytest.fixture(scope="module")
def taught(pictures: Path, environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workdir of a finished run over two tasks; large steps, so that it learns something."""
    workdir = tmp_path_factory.mktemp("runs") / "taught"
    values = {"benchmark__root": pictures, "benchmark__tasks": "colours,shades", "benchmark__eval_limit": 0}
    # Six pictures of shades are fewer than a batch.
    values |= {"benchmark__shots": 3, "train__steps_per_task": 40, "train__learning_rate": 0.02, "train__batch_size": 8}
    values |= {"train__class_bucket": 2, "method__capacity_bucket": 8}
    command = [*BINARY, f"--config={SOURCE}", f"--workdir={workdir}", *options(**values)]
    subprocess.run(command, cwd=ROOT, env=environment | FAST, capture_output=True, timeout=SECONDS, check=True)
    return workdir


# --- what a run leaves ------------------------------------------------------------------------------------------------


def test_a_run_learns_and_tells(taught: Path) -> None:
    found = results(taught)
    assert found["complete"] is True
    assert (found["tasks"], found["metric"]) == (["colours", "shades"], ["accuracy"] * 2)
    assert found["variant"] == ["3 shots drawn with seed 0"] * 2
    assert found["eval_examples"] == [9, 6]
    assert None not in found["R"][0], "transfer needs tasks that are not taught yet"
    assert found["R"][0][0] > 60
    assert found["train_traces"] == 2, "one for each class-count bucket"
    assert found["tokens_per_second"] is None
    assert found["examples_per_second"] > 0
    assert (found["prompts_truncated"], found["records_skipped"]) == (0, 0)
    assert found["baselines"]["zero_shot_lenient"] == found["zero_shot"]
    assert found["sites"] == 6
    assert [row["task"] for row in found["gates"]] == ["colours", "shades"]
    assert set(found["gates"][1]["on"]["colours"]["mass"]) == {"colours", "shades"}
    assert {"examples", "examples_per_second", "loss"} <= rows_of(taught)[0].keys()
    assert "tokens" not in rows_of(taught)[0]
    assert (taught / "report.html").exists()


def test_the_pictures_that_were_drawn_are_recorded(taught: Path) -> None:
    rows = [json.loads(line) for line in (taught / "shots" / "shades.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["answer"] for row in rows] == ["black"] * 3 + ["white"] * 3
    assert len({row["prompt"] for row in rows}) == 6
    assert rows[0]["prompt"].startswith("shades/train/black/")


def test_tasks_are_not_added_where_all_classes_are_told_apart(
    taught: Path, pictures: Path, main: Callable[..., Ended], tmp_path: Path
) -> None:
    workdir = shutil.copytree(taught, tmp_path / "w")
    command = shlex.split(results(taught)["command"])[3:]
    words = [word for word in command if not word.startswith(("--workdir", "--config.benchmark.tasks"))]
    run = main(*words, f"--workdir={workdir}", "--config.benchmark.tasks=colours,shades,stripes")
    assert_refused(run, "classes that eval.label_space=joint tells apart", "5 -> 7")
    assert (workdir / "results.json").read_bytes() == (taught / "results.json").read_bytes()


def test_weights_of_another_clip_are_not_the_named_one(
    pictures: Path, main: Callable[..., Ended], tmp_path: Path
) -> None:
    clip_weights.save_params(random_params(TINY), TINY, tmp_path / "weights")
    given = {"benchmark__root": pictures, "model__name": "clip-vit-b16", "model__weights": tmp_path / "weights"}
    refuse(main, SOURCE, tmp_path, "vision d_model is 24", "clip-vit-b16", "768", "model.name=custom", **given)


def rows_of(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def test_predictions_are_names_of_classes(taught: Path) -> None:
    lines = (taught / "predictions" / "01_colours" / "shades.jsonl").read_text(encoding="utf-8").splitlines()
    told = [json.loads(line) for line in lines]
    assert [row["prompt"] for row in told[:4]] == [
        *(f"shades/test/black/{i}.png" for i in range(3)),
        "shades/test/white/0.png",
    ]
    names = {"black", "white", "colours: dark blue", "colours: green", "colours: red"}
    assert {row["prediction"] for row in told} <= names
    assert all(row["score"] == (row["prediction"] == row["answer"]) for row in told)


def test_gate_maps_are_of_patches(taught: Path) -> None:
    lines = (taught / "gates" / "02_shades.jsonl").read_text(encoding="utf-8").splitlines()
    told = [json.loads(line) for line in lines]
    assert [row["task"] for row in told] == ["colours", "shades"]
    assert told[0]["tokens"] == ["class", *(f"row {i}, column {j}" for i in (1, 2) for j in (1, 2))]
    assert set(told[0]["sites"]) == {"vision/attn/o", "vision/mlp/up"}


# --- the other binaries -----------------------------------------------------------------------------------------------


def test_every_row_is_reproduced_from_the_workdir(taught: Path, main: Callable[..., Ended], tmp_path: Path) -> None:
    run = main(f"--workdir={taught}", "--task=all", f"--output={tmp_path / 'e.json'}", of=evaluate)
    assert (run.code, run.err) == (0, "")
    told, found = json.loads((tmp_path / "e.json").read_text(encoding="utf-8")), results(taught)
    assert [row["scores"] for row in told["rows"]] == [found["zero_shot"], *found["R"]]
    assert told["rows"][-1]["active_experts_mean"] == pytest.approx(found["active_experts_mean"], abs=1e-3)


def test_another_label_space_is_asked_for_in_evaluation(
    taught: Path, main: Callable[..., Ended], tmp_path: Path
) -> None:
    out = tmp_path / "e.json"
    assert main(f"--workdir={taught}", f"--output={out}", "--config.eval.label_space=own", of=evaluate).code == 0
    (row,) = json.loads(out.read_text(encoding="utf-8"))["rows"]
    assert all(own >= joint for own, joint in zip(row["scores"], results(taught)["R"][1], strict=True))
    assert row["scores"][1] > 60


def test_a_named_task_is_compared_with_the_classes_of_the_whole_stream(
    taught: Path, main: Callable[..., Ended], tmp_path: Path
) -> None:
    out = tmp_path / "e.json"
    named = "--config.benchmark.tasks=shades"
    assert main(f"--workdir={taught}", "--task=0", f"--output={out}", named, of=evaluate).code == 0
    told = json.loads(out.read_text(encoding="utf-8"))
    assert told["rows"][0]["scores"] == results(taught)["R"][0][1:]
    assert (told["tasks"], told["label_space"], told["chance"]) == (["shades"], 5, [20.0])


def test_an_export_scores_the_same(taught: Path, main: Callable[..., Ended], tmp_path: Path) -> None:
    run = main(f"--workdir={taught}", f"--to={tmp_path / 'adapter'}", of=export)
    assert (run.code, run.err) == (0, "")
    out = tmp_path / "e.json"
    assert main(f"--adapter={tmp_path / 'adapter'}", f"--output={out}", of=evaluate).code == 0
    (row,) = json.loads(out.read_text(encoding="utf-8"))["rows"]
    assert row["scores"] == results(taught)["R"][1]


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        ("authors", "this layout has no name for the site text/layers/mlp/up; use --layout=mora"),
        ("peft", "layout peft cannot be exact"),
    ],
)
def test_layouts_of_decoders_refuse_a_clip(
    layout: str, said: str, taught: Path, main: Callable[..., Ended], tmp_path: Path
) -> None:
    run = main(f"--workdir={taught}", f"--to={tmp_path / 'adapter'}", f"--layout={layout}", of=export)
    assert_refused(run, said)


def test_a_clip_generates_no_text(taught: Path, main: Callable[..., Ended]) -> None:
    run = main(f"--workdir={taught}", "--prompt=a photo", of=generate)
    assert_refused(run, "model.name='tiny_clip' is a CLIP model, which takes pictures", "'prompts' has text")


# --- killed and resumed -----------------------------------------------------------------------------------------------


def test_a_killed_run_ends_like_one_that_was_not(world: World, pictures: Path) -> None:
    """Killed in training and again in evaluation; `world` gives the number of steps and the places of checkpoints."""
    here = dataclasses.replace(world, data=pictures, config=SOURCE, environment=world.environment | FAST)
    small = {key.replace(".", "__"): value for key, value in SMALL.items()}
    small |= {"method__capacity_bucket": 12, "method__targets": "vision/mlp/up"}
    reference, workdir = world.folder / "clip_reference", world.folder / "clip"
    assert here.run(reference, **small).code == 0
    for happened in (
        lambda: len(rows(workdir)) >= STEPS + 4,
        (workdir / "predictions" / "02_shades" / "colours.jsonl").exists,
    ):
        process = here.start(workdir, **small)
        wait_for(process, happened)
        process.send_signal(signal.SIGKILL)
        assert ended(process).code == -signal.SIGKILL
    assert here.run(workdir, **small).code == 0
    assert_same_end(workdir, reference)
    assert results(workdir)["train_traces"] == 1


# --- what is refused --------------------------------------------------------------------------------------------------


def refuse(main: Callable[..., Ended], config: str, tmp_path: Path, *parts: str, **values: object) -> None:
    assert_refused(main(f"--config={config}", f"--workdir={tmp_path / 'w'}", *options(**values)), *parts)


def test_a_language_model_takes_no_pictures(pictures: Path, main: Callable[..., Ended], tmp_path: Path) -> None:
    config = f"{CONFIG}:benchmark=image_folder,model=tiny"
    said = "model.name='tiny' is a language model, which takes text; task 'colours' has pictures"
    refuse(main, config, tmp_path, said, benchmark__root=pictures, train__batch_size=4)


def test_a_clip_takes_no_text(data: Path, main: Callable[..., Ended], tmp_path: Path) -> None:
    config = f"{ROOT}/configs/llm_cl.py:smoke,benchmark=folder"
    said = "model.name='clip-vit-b16' is a CLIP model, which takes pictures; task 'colours' has text"
    refuse(main, config, tmp_path, said, benchmark__root=data, model__name="clip-vit-b16")


def test_a_label_space_that_there_is_not(pictures: Path, main: Callable[..., Ended], tmp_path: Path) -> None:
    refuse(main, SOURCE, tmp_path, "eval.label_space='task'", "joint, own", eval__label_space="task")


def test_a_decoders_site_names_are_not_a_clips(pictures: Path, main: Callable[..., Ended], tmp_path: Path) -> None:
    given = {"benchmark__root": pictures, "method__targets": "attn/q"}
    refuse(main, SOURCE, tmp_path, "method.targets=attn/q matches no site", "vision/attn/q", **given)


def test_too_many_broken_pictures_stop_a_run(pictures: Path, main: Callable[..., Ended], tmp_path: Path) -> None:
    root = Path(shutil.copytree(pictures, tmp_path / "broken"))
    (root / "shades" / "test" / "white" / "1.png").write_bytes(b"no picture")
    said = "shades/test/white/1.png: not a picture"
    refuse(main, SOURCE, tmp_path, said, "1 of the 6 pictures", benchmark__root=root, benchmark__eval_limit=0)


def test_a_few_broken_pictures_are_skipped_and_counted(binary: Callable[..., Ended], tmp_path: Path) -> None:
    root = write_pictures(tmp_path / "data", {"shades": TASKS["shades"]}, {"train": 60, "test": 60})
    for split in ("train", "test"):
        (root / "shades" / split / "black" / "7.png").write_bytes(b"no picture")
    Image.new("I;16", (20, 20), 60000).save(root / "shades" / "test" / "white" / "0.png")
    given = {"benchmark__root": root, "benchmark__train_limit": 0, "benchmark__eval_limit": 0, "train__batch_size": 40}
    given |= {"eval__batch_size": 60, "method__targets": "vision/mlp/up"}
    run = binary(f"--config={SOURCE}", f"--workdir={tmp_path / 'w'}", *options(**given), variables=FAST)
    assert run.code == 0
    told = [line for line in run.err.splitlines() if line.startswith("warning: skipped")]
    assert {line.split(":")[1] for line in told} == {f" skipped shades/{s}/black/7.png" for s in ("train", "test")}
    assert results(tmp_path / "w")["records_skipped"] == 2
    answered = (tmp_path / "w" / "predictions" / "01_shades" / "shades.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(answered) == 119


def test_weights_of_another_size_name_the_tensor(pictures: Path, main: Callable[..., Ended], tmp_path: Path) -> None:
    """A folder whose config.json says more than its weights have."""
    clip_weights.save_params(random_params(TINY), TINY, tmp_path / "weights")
    path = tmp_path / "weights" / "config.json"
    said = json.loads(path.read_text(encoding="utf-8"))
    said["vision_config"]["hidden_size"] *= 2
    path.write_text(json.dumps(said), encoding="utf-8")
    given = {"benchmark__root": pictures, "model__name": "custom", "model__weights": tmp_path / "weights"}
    refuse(main, SOURCE, tmp_path, "vision_model.", "[24", "[48", **given)


def test_list_knows_the_benchmarks_and_models(binary: Callable[..., Ended]) -> None:
    run = binary("--list", command=(sys.executable, "-m", "mora_jax.train"))
    for name in ("image_folder", "xtail", "mtil", "packaged_images", "clip-vit-b16", "tiny_clip", "accuracy"):
        assert name in run.out


def test_a_dry_run_says_that_it_is_for_language_models(pictures: Path, main: Callable[..., Ended]) -> None:
    run = main(f"--config={SOURCE}", f"--config.benchmark.root={pictures}", "--dry_run")
    assert_refused(run, "model.name='tiny_clip' is a CLIP model; plans are made for language models only so far")
