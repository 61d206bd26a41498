"""Pictures as batches: order, what takes the place of a broken picture, when there are too many, where to resume."""

from __future__ import annotations

import dataclasses
import io
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from mora_jax.benchmarks.pictures import Picture
from mora_jax.data.pictures import AHEAD, Reader, ReadPlan, TrainPlan, pipeline, plan_batches
from mora_jax.errors import MoraError

SIZE = 4


def encoded(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (5, SIZE), (value, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def records(count: int, broken: tuple[int, ...] = ()) -> list[Picture]:
    """Pictures that can be told apart by their red; the broken ones are cut short."""

    def picture(i: int) -> Picture:
        data = encoded(i)[: -30 if i in broken else None]
        return Picture(f"{i}.png", str(i), lambda: data)

    return [picture(i) for i in range(count)]


def train_plan(reader: Reader, **options: int) -> TrainPlan:
    options = {"batch_size": 4, "steps": 0, "epochs": 2, "seed": 7} | options
    n = len(reader.records)
    return TrainPlan(reader, np.arange(n, dtype=np.int32), plan_batches(n, **options), {"texts": np.ones((2, 3))})


# --- order ------------------------------------------------------------------------------------------------------------


def test_every_record_is_seen_once_an_epoch() -> None:
    order = plan_batches(10, batch_size=4, steps=0, epochs=2, seed=0)
    assert order.shape == (5, 4)
    assert sorted(order.reshape(-1)[:10]) == sorted(order.reshape(-1)[10:]) == list(range(10))
    assert list(order.reshape(-1)[:10]) != list(range(10))


def test_a_batch_that_an_epoch_leaves_open_is_filled_from_the_next() -> None:
    order = plan_batches(10, batch_size=4, steps=0, epochs=1, seed=0)
    assert order.shape == (3, 4)
    assert sorted(Counter(order.reshape(-1).tolist()).values()) == [1] * 8 + [2] * 2


def test_steps_go_through_as_many_epochs_as_they_need() -> None:
    order = plan_batches(3, batch_size=2, steps=6, epochs=0, seed=0)
    assert Counter(order.reshape(-1).tolist()) == {0: 4, 1: 4, 2: 4}


def test_the_order_depends_on_the_seed_alone() -> None:
    one, same, other = (plan_batches(20, batch_size=5, steps=4, epochs=0, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, other)


# --- batches ----------------------------------------------------------------------------------------------------------


def test_a_batch_has_the_pictures_of_its_labels() -> None:
    batches = list(pipeline(train_plan(Reader(records(9), SIZE, "train"))))
    assert len(batches) == 5
    for batch in batches:
        assert (batch["pictures"].shape, batch["pictures"].dtype) == ((4, SIZE, SIZE, 3), np.uint8)
        assert batch["labels"].dtype == np.int32
        np.testing.assert_array_equal(batch["pictures"][:, 0, 0, 0], batch["labels"])
        np.testing.assert_array_equal(batch["texts"], np.ones((2, 3)))


@pytest.mark.parametrize("done", [1, AHEAD + 1])
def test_the_position_is_all_that_a_resume_needs(done: int) -> None:
    plan = train_plan(Reader(records(9), SIZE, "train"), epochs=0, steps=8)
    whole = [batch["labels"] for batch in pipeline(plan)]
    first = pipeline(plan)
    for _ in range(done):
        next(first)
    again = pipeline(plan)
    again.set_state(first.get_state())
    np.testing.assert_array_equal([batch["labels"] for batch in again], whole[done:])


def test_reading_in_order_fills_up_the_last_batch() -> None:
    batches = list(pipeline(ReadPlan(Reader(records(5), SIZE, "test"), 3)))
    reds = [batch["pictures"][:, 0, 0, 0].tolist() for batch in batches]
    assert reds == [[0, 1, 2], [3, 4, 0]]
    assert [batch["real"].tolist() for batch in batches] == [[True] * 3, [True, True, False]]


# --- broken pictures --------------------------------------------------------------------------------------------------


def test_the_next_picture_takes_the_place_of_a_broken_one(capsys: pytest.CaptureFixture[str]) -> None:
    reader = Reader(records(200, broken=(7, 199)), SIZE, "task a")
    labels = [int(label) for batch in pipeline(train_plan(reader, epochs=1)) for label in batch["labels"]]
    assert Counter(labels) == Counter(set(range(200)) - {7, 199}) + Counter([8, 0])
    assert reader.skipped == {"7.png", "199.png"}
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2, "each is named once"
    assert {line.split(":")[1] for line in told} == {" skipped 7.png", " skipped 199.png"}


def test_a_broken_picture_is_no_row_to_answer(capsys: pytest.CaptureFixture[str]) -> None:
    reader = Reader(records(100, broken=(42,)), SIZE, "task a")
    real = np.concatenate([batch["real"] for batch in pipeline(ReadPlan(reader, 8))])
    assert np.flatnonzero(~real[:100]).tolist() == [42]
    assert reader.skipped == {"42.png"}
    assert "warning: skipped 42.png" in capsys.readouterr().err


def test_a_picture_that_is_gone_is_a_broken_one(capsys: pytest.CaptureFixture[str]) -> None:
    def gone() -> bytes:
        raise FileNotFoundError(2, "No such file or directory", "/data/3.png")

    good = records(100)
    good[3] = dataclasses.replace(good[3], read=gone)
    reader = Reader(good, SIZE, "task a")
    assert reader(3) is None
    assert reader(4) is not None
    assert "warning: skipped 3.png: [Errno 2] No such file" in capsys.readouterr().err


def test_more_than_one_in_a_hundred_stops(capsys: pytest.CaptureFixture[str]) -> None:
    reader = Reader(records(100, broken=(20, 60)), SIZE, "task a")
    with pytest.raises(
        MoraError, match=r"[26]0.png.*; 2 of the 100 pictures of task a cannot be read, more than the 1%"
    ):
        list(pipeline(ReadPlan(reader, 10)))
    assert "0.png" in capsys.readouterr().err  # of the other: threads read both


def test_one_of_few_is_too_many() -> None:
    with pytest.raises(MoraError, match=r"2.png: .*; 1 of the 10 pictures of task a"):
        list(pipeline(train_plan(Reader(records(10, broken=(2,)), SIZE, "task a"))))
