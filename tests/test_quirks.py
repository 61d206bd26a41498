"""The parity mode: with a quirk on, our layer and metrics are those of the published code; without it they are not."""

from __future__ import annotations

import functools
import json
import math
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quirks as parity_mode
from conftest import ROOT
from launching import Ended, assert_refused, results
from quirks import DROPOUT, QUIRKS, dropout_keep, quirks, with_next_block

from mora_jax import config as configs
from mora_jax import evaluate, train
from mora_jax.errors import MoraError
from mora_jax.methods import bank as banks
from mora_jax.methods import boundaries, gates
from mora_jax.methods.method import Method, from_config
from mora_jax.methods.presets import preset
from mora_jax.metrics import continual
from mora_jax.runtime import results as results_file
from mora_jax.runtime.language import LanguageFamily
from mora_jax.runtime.optimizer import SCHEDULES

SITE, D_IN, D_OUT, TOKENS = ("layers", "attn", "q"), 12, 10, 24
SITES = {SITE: banks.Site(1, D_IN, D_OUT)}
TASKS, STEPS, RATE, SEED = 2, 3, 0.5, 0
LAYER_QUIRKS = ("scale_lost_at_freeze", "fresh_at_inference", "top_k_at_least_two", "dropout_before_scoring")
FAST = {"xla_backend_optimization_level": "0"}  # unoptimised code compiles twice as fast
Records = dict[str, np.ndarray]


def method_of(**changes: Any) -> Method:
    """MoRA with its published axes, small: scale 2, and a threshold that cuts some of the kept experts."""
    axes = preset("mora") | {"rank": 4, "top_k": 3, "temperature": 0.1, "threshold": 0.3}
    return from_config(axes | {"targets": "attn/q", "capacity_bucket": 16} | changes)


def drawn(task: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Inputs to learn on, what to answer there, and inputs to be asked with."""
    rng = np.random.default_rng(task)
    return tuple(rng.normal(size=(TOKENS, width)).astype(np.float32) for width in (D_IN, D_OUT, D_IN))


# ---------------------------------------------------------------- two tasks through either layer


def at_site(tree: Any) -> dict[str, jax.Array]:
    """The arrays of the one layer of the one site."""
    for part in SITE:
        tree = tree[part]
    return {name: leaf[0] for name, leaf in tree.items()}


def ours(method: Method, names: Iterable[str] = ()) -> tuple[Records, list[np.ndarray], list[np.ndarray]]:
    """What happens at each step and each boundary; the dropout masks; the keys every task begins with (and the next).

    Plain gradient descent: Adam would turn a rounding error near zero into a step.
    """
    records, masks = {}, []

    def loss(rows, bank, x, target):
        y = gates.update(x, bank, rows, method)
        return 0.5 * jnp.sum((y - target) ** 2) / TOKENS, y

    learn = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=FAST)
    answer = jax.jit(lambda x, bank: gates.update(x, bank, None, method), compiler_options=FAST)
    bank = banks.empty(SITES, method.capacity(0))
    for task in range(TASKS):
        x, target, asked = drawn(task)
        bank, fresh = boundaries.append(method, SITES, bank, SEED, task)
        rows = at_site(fresh)
        for step in range(STEPS):
            masks.append(np.asarray(dropout_keep(rows, x.shape)))
            (_, y), slope = learn(rows, at_site(bank), x, target)
            records |= {f"{task}.{step} output": y}
            records |= {f"{task}.{step} slope of {name}": slope[name] for name in rows}
            rows = {name: rows[name] - RATE * slope[name] for name in rows}
        fresh = {SITE[0]: {SITE[1]: {SITE[2]: {name: leaf[None] for name, leaf in rows.items()}}}}
        bank = boundaries.freeze(bank, fresh)
        served = with_next_block(bank, method, SEED) if "fresh_at_inference" in names else bank
        records[f"{task} served"] = answer(asked, at_site(served))
    starts = [banks.new_fresh(SITES, method, SEED, task) for task in range(TASKS + 1)]
    return {k: np.asarray(v) for k, v in records.items()}, masks, [np.asarray(at_site(f)["keys"]) for f in starts]


@functools.cache
def plain_ours(method: Method) -> tuple[Records, list[np.ndarray], list[np.ndarray]]:
    """`ours` without a quirk, run once."""
    return ours(method)


def theirs(method: Method, names: Iterable[str], masks: list[np.ndarray], starts: list[np.ndarray]) -> Records:
    """The same through the layer in PyTorch, in float64."""
    torch = pytest.importorskip("torch", reason="torch is the other side of the comparison")
    from published_layer import PublishedLayer

    def wide(array: np.ndarray) -> Any:
        return torch.tensor(array, dtype=torch.float64)

    records, masks = {}, iter(masks)
    layer = PublishedLayer(wide(starts[0]), D_OUT, method, names)
    for task in range(TASKS):
        x, target, asked = map(wide, drawn(task))
        layer.train()
        for step in range(STEPS):
            layer.zero_grad()
            y = layer(x, wide(next(masks)))
            (0.5 * ((y - target) ** 2).sum() / TOKENS).backward()
            records[f"{task}.{step} output"] = y.detach().numpy()
            for name, parameter in layer.named_parameters():
                records[f"{task}.{step} slope of {name}"] = parameter.grad.numpy().copy()
                parameter.data -= RATE * parameter.grad
        layer.freeze(wide(starts[task + 1]))
        records[f"{task} served"] = layer.eval()(asked).detach().numpy()
    return records


def differing(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> list[str]:
    """Names of what is not equal within 1e-5, in the order in which it happened."""
    assert list(a) == list(b)
    return [name for name in a if not np.allclose(a[name], b[name], rtol=1e-5, atol=1e-5)]


# quirk -> what of the method shows it, and the first thing that it changes
SHOWN = {
    "scale_lost_at_freeze": ({}, "0 served"),
    "fresh_at_inference": ({}, "0 served"),
    "top_k_at_least_two": ({"top_k": 1}, "0.0 slope of values"),
    "dropout_before_scoring": ({}, "0.0 slope of values"),
}


@pytest.mark.parametrize("names", [*((name,) for name in LAYER_QUIRKS), LAYER_QUIRKS], ids="+".join)
def test_a_quirk_of_the_layer_is_the_published_one(names: tuple[str, ...]) -> None:
    changes, first = SHOWN[names[0]] if len(names) == 1 else ({"top_k": 1}, "0.0 slope of values")
    method = method_of(**changes)
    plain, masks, starts = plain_ours(method)
    assert differing(plain, theirs(method, (), masks, starts)) == []
    with quirks(*names):
        changed, masks, starts = ours(method, names)
    assert differing(changed, theirs(method, names, masks, starts)) == []
    found = differing(plain, changed)
    assert found[0] == first
    worst = max(np.abs(plain[name] - changed[name]).max() for name in found)
    assert worst > 0.05  # far from any rounding


def test_the_published_clip_layer_fails_below_rank_two_and_ours_does_not() -> None:
    method = method_of(rank=1)
    plain, masks, starts = plain_ours(method)
    assert np.abs(plain["1 served"]).max() > 0.1
    with pytest.raises(RuntimeError, match="index k out of range"):
        theirs(method, ("rank_below_two_fails",), masks, starts)
    with quirks("rank_below_two_fails"), pytest.raises(MoraError, match=r"method.rank=1: .* finds only one"):
        ours(method)
    with quirks("rank_below_two_fails"):
        assert differing(ours(method_of())[0], plain_ours(method_of())[0]) == []


def test_the_threshold_after_the_softmax_is_no_quirk() -> None:
    """Item 4 is the paper's Eq. 8: both cut gates by their score and leave the others as they are."""
    torch = pytest.importorskip("torch", reason="torch is the other side of the comparison")
    from published_layer import PublishedLayer

    method, (x, _, _) = method_of(threshold=0.5), drawn(7)
    rng = np.random.default_rng(1)
    bank = {
        "keys": jnp.asarray(rng.normal(size=(8, D_IN)), jnp.float32),
        "values": jnp.zeros((8, D_OUT)),
        "live": jnp.int32(8),
    }
    ours = np.asarray(gates.gates(x, bank, None, method))
    z = torch.tensor(x) @ torch.tensor(np.asarray(bank["keys"])).T
    layer = PublishedLayer(torch.zeros(1, D_IN), D_OUT, method).eval()
    np.testing.assert_allclose(ours, layer.gates(z), atol=1e-5)
    uncut = layer.train().gates(z).numpy()
    cut = (uncut > 0) & (ours == 0)
    some = cut.any(axis=-1) & (ours > 0).any(axis=-1)
    assert some.sum() > 3
    np.testing.assert_allclose(ours, np.where(cut, 0, uncut), atol=1e-5)
    assert ours[some].sum(axis=-1).max() < 0.999  # normalised again, it would be 1


def test_dropout_takes_a_tenth_and_another_one_at_every_site_and_step() -> None:
    rng = np.random.default_rng(0)
    fresh = {name: jnp.asarray(rng.normal(size=(4, 16)), jnp.float32) for name in ("keys", "values")}
    moved = fresh | {"values": fresh["values"] + 1e-6}
    masks = [np.asarray(dropout_keep(rows, (200, 50))) for rows in (fresh, fresh, moved)]
    assert masks[0].mean() == pytest.approx(1 - DROPOUT, abs=0.01)
    np.testing.assert_array_equal(masks[0], masks[1])
    assert (masks[0] != masks[2]).mean() == pytest.approx(2 * DROPOUT * (1 - DROPOUT), abs=0.02)


def test_a_model_is_asked_with_the_experts_that_the_next_task_begins_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of both ways to ask; the bank is full, so it must grow. What has no bank stays as it is."""
    method = method_of(rank=4, capacity_bucket=8)
    bank, family = banks.empty(SITES, 8), SimpleNamespace(decoder=SimpleNamespace(method=method), config={"seed": 3})
    for task in range(2):
        _, fresh = boundaries.append(method, SITES, bank, 3, task)
        bank = boundaries.freeze(bank, jax.tree.map(lambda a: a + 0.5, fresh))
    _, following = boundaries.append(method, SITES, bank, 3, 2)
    for name in ("predict", "gate_map"):
        monkeypatch.setattr(LanguageFamily, name, lambda self, variables, *rest: (variables, rest))
        with quirks("fresh_at_inference"):
            given, rest = getattr(LanguageFamily, name)(family, {"params": 1, "bank": bank}, "task", "prompt")
            bare, _ = getattr(LanguageFamily, name)(family, {"params": 1}, "task", "prompt")
        assert (given["params"], rest, bare) == (1, ("task", "prompt"), {"params": 1})
        rows, old, new = at_site(given["bank"]), at_site(bank), at_site(following)
        assert (rows["live"], rows["keys"].shape) == (12, (16, D_IN))
        for what in ("keys", "values"):
            np.testing.assert_array_equal(rows[what][:8], old[what])
            np.testing.assert_array_equal(rows[what][8:12], new[what])


# ---------------------------------------------------------------- schedule, metrics


def test_a_cosine_schedule_is_constant() -> None:
    progress = jnp.array([0.0, 0.5, 0.9])
    np.testing.assert_allclose(SCHEDULES["cosine"](progress), [1.0, 0.5, 0.02447], atol=1e-5)
    with quirks("constant_despite_cosine"):
        np.testing.assert_array_equal(SCHEDULES["cosine"](progress), 1.0)
        np.testing.assert_allclose(SCHEDULES["linear"](progress), [1.0, 0.5, 0.1], rtol=1e-6)


@pytest.mark.parametrize(
    ("R", "ordinary", "published"),
    [
        ([[50, 10, 30], [40, 60, 0], [30, 50, 70]], (10 + 15) / 2, (10 + 30) / 2),  # a zero among others
        ([[50, 0, 30], [40, 60, 20], [30, 50, 70]], (0 + 25) / 2, 25),  # a column of zeros drops out
        ([[50, 0], [40, 60]], 0, None),
        ([[50, 20], [40, 60]], 20, 20),
        ([[50]], None, None),
    ],
)
def test_transfer_without_zeros(R: list, ordinary: float | None, published: float | None) -> None:
    matrix = np.array(R, float)
    assert continual.summary(matrix)["transfer"] == ordinary
    with quirks("transfer_ignores_zeros"):
        found = continual.summary(matrix)
    assert found["transfer"] == published
    assert {k: v for k, v in found.items() if k != "transfer"} == {
        k: v for k, v in continual.summary(matrix).items() if k != "transfer"
    }


def test_backward_transfer_without_gains() -> None:
    R = np.array([[80.0, math.nan, math.nan], [60.0, 70.0, math.nan], [50.0, 75.0, 90.0]])
    assert continual.summary(R)["backward_transfer"] == pytest.approx((-30 + 5) / 2)
    with quirks("clipped_backward_transfer"):
        found = continual.summary(R)
        assert continual.backward_transfer(R, clipped=False) == pytest.approx(-10)
    assert found["backward_transfer"] == found["backward_transfer_clipped"] == pytest.approx(-30 / 3)


# ---------------------------------------------------------------- the context


def places() -> dict[str, Any]:
    """Everything that some patch replaces."""
    return {
        "update": gates.update,
        "gates": gates.gates,
        "append": boundaries.append,
        "predict": LanguageFamily.predict,
        "gate_map": LanguageFamily.gate_map,
        "cosine": SCHEDULES["cosine"],
        "transfer": continual.transfer,
        "backward_transfer": continual.backward_transfer,
        "write_json": results_file.write_json,
        "parse": configs.parse,
    }


def test_everything_is_as_before_after_the_context() -> None:
    before, schedules = places(), dict(SCHEDULES)
    with parity_mode.recorded(tuple(QUIRKS), "x"), quirks(*QUIRKS):
        assert [name for name, found in places().items() if found is before[name]] == []
    assert places() == before
    assert dict(SCHEDULES) == schedules
    with pytest.raises(KeyError), quirks(*QUIRKS):
        raise KeyError
    assert places() == before


def test_an_unknown_quirk_is_refused_with_the_known_ones() -> None:
    before = places()
    with pytest.raises(MoraError, match=r"unknown quirk 'nmae'; known: .*fresh_at_inference"), quirks(*QUIRKS, "nmae"):
        raise AssertionError
    assert places() == before


# ---------------------------------------------------------------- the command

PROGRAM = (sys.executable, "tests/quirks.py")
# The folder of a program comes before an installed mora_jax, the repository does not.
HERE = {"PYTHONPATH": str(ROOT), "XLA_FLAGS": "--xla_backend_optimization_level=0"}
LEARNING = {
    "benchmark__metrics": "colours=fuzzy,digits=fuzzy",
    "train__learning_rate": 0.1,
    "train__schedule": "cosine",
    "method__top_k": 1,
    "method__targets": "attn/v",  # one site and nothing recomputed: compiled sooner
    "model__remat": "none",
}


def steps(workdir: Path, key: str) -> np.ndarray:
    return np.array([json.loads(line)[key] for line in (workdir / "metrics.jsonl").read_text().splitlines()])


def test_a_run_with_all_quirks_says_so_and_is_another_run(
    smoke: Callable[..., list[str]], binary: Callable[..., Ended], main: Callable[..., Ended], tmp_path: Path
) -> None:
    arguments = smoke(**LEARNING)
    run = binary("--quirks=all", "--", *arguments, command=PROGRAM, variables=HERE)
    assert (run.code, run.err) == (0, "")
    assert binary(*smoke(workdir=tmp_path / "plain", **LEARNING), variables=HERE).code == 0
    odd, plain = results(tmp_path / "w"), results(tmp_path / "plain")
    assert odd["complete"] is plain["complete"] is True
    assert odd["quirks"] == list(QUIRKS)
    assert "quirks" not in plain
    assert (odd["method"], plain["method"]) == ("mora with all published quirks", "mora")
    assert odd["method"] in (tmp_path / "w" / "report.html").read_text()
    assert odd["command"].startswith("python tests/quirks.py --quirks=all -- --config=")
    assert odd["fingerprint"] != plain["fingerprint"]

    losses = [steps(folder, "loss") for folder in (tmp_path / "w", tmp_path / "plain")]
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-6)  # values begin at zero
    assert np.abs(losses[0] - losses[1])[1:].min() > 1e-3
    assert steps(tmp_path / "w", "learning_rate") == pytest.approx([0.1] * 6)
    assert steps(tmp_path / "plain", "learning_rate") == pytest.approx([0.1, 0.075, 0.025] * 2)
    assert odd["R"] != plain["R"]
    # two experts instead of one, and some of them of a task that has not been taught
    assert odd["active_experts_mean"] > plain["active_experts_mean"] == 1
    assert [sum(row["mass"].values()) for row in plain["gates"]] == pytest.approx([1, 1], abs=1e-5)
    assert min(sum(row["mass"].values()) for row in odd["gates"]) < 0.99

    # the ordinary binaries refuse the workdir; the same command finds its work done
    assert_refused(main(*arguments), "another experiment", "method.name: 'mora with all published quirks' -> 'mora'")
    assert_refused(main(f"--workdir={tmp_path / 'w'}", of=evaluate), "unknown method 'mora with all published quirks'")
    assert main("--quirks=all", "--", *arguments, of=parity_mode).code == 0
    again = results(tmp_path / "w")
    assert [again[key] for key in ("R", "quirks", "method", "complete")] == [
        odd[key] for key in ("R", "quirks", "method", "complete")
    ]


def test_the_method_of_a_run_names_its_quirks(smoke: Callable[..., list[str]]) -> None:
    with parity_mode.recorded(["top_k_at_least_two", "fresh_at_inference"], "x"):
        config = configs.parse(smoke()).config
        assert configs.parse(["--list"]).config is None
    assert config.method.name == "mora with published quirks fresh_at_inference, top_k_at_least_two"
    assert from_config(config.method).top_k == 8


def test_rank_one_ends_with_the_exit_code_of_the_train_binary(
    smoke: Callable[..., list[str]], main: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train.Run, "zero_shot", lambda self: None)  # seconds, and not what is tested
    arguments = smoke(method__rank=1, benchmark__tasks="digits", method__targets="attn/o")
    assert_refused(main("--quirks=rank_below_two_fails", "--", *arguments, of=parity_mode), "method.rank=1", "CLIP")


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (("--quirks=top_k", "--", "--list"), ("unknown quirk 'top_k'", "known: all,", "top_k_at_least_two")),
        (("--quirks=,",), ("unknown quirk ','",)),
        (("--", "--list"), ("--quirks is missing", "usage: python tests/quirks.py")),
        (("--config=x",), ("--config is not understood", "--quirks, --list")),
        (("--quirks=all", "--", "--confg=x"), ("--confg is not understood", "--config, ")),
    ],
)
def test_a_bad_command_line_is_one_line(
    argv: tuple[str, ...], parts: tuple[str, ...], main: Callable[..., Ended]
) -> None:
    assert_refused(main(*argv, of=parity_mode), *parts)


def test_the_file_is_a_program_that_lists_its_quirks(binary: Callable[..., Ended]) -> None:
    run = binary("--list", command=PROGRAM, variables=HERE)
    assert (run.code, run.err) == (0, "")
    rows = [line.split(maxsplit=3) for line in run.out.splitlines()]
    assert [(name, int(item), half) for name, item, half, _ in rows] == [
        (name, quirk.item, quirk.half) for name, quirk in QUIRKS.items()
    ]
    assert all(quirk.changes in run.out for quirk in QUIRKS.values())
    assert {quirk.item for quirk in QUIRKS.values()} == set(range(1, 8)) - {4}
