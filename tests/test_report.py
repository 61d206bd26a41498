"""The report: it shows the numbers of results.json, lets no data become markup, and says in one line what is wrong."""

from __future__ import annotations

import copy
import html
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from launching import Ended, assert_refused
from workdirs import ANSWERS, GATES, MAP, PICTURED, RESULTS, SUMMARY, TASKS, Page, R, drawn, make, share

from mora_jax import report
from mora_jax.errors import MoraError
from mora_jax.metrics import continual
from mora_jax.reporting import charts, page, single
from mora_jax.reporting.markup import Markup, el, embedded
from mora_jax.runtime.writers import write_json, write_lines
from mora_jax.train import Run


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    return lambda *argv: Ended(report.main([str(word) for word in argv]), *capsys.readouterr())


# --- one run ----------------------------------------------------------------------------------------------------------


def test_the_report_goes_into_the_workdir(tmp_path: Path, command: Callable[..., Ended]) -> None:
    run = command(make(tmp_path / "w"))
    assert run == Ended(0, f"{tmp_path / 'w' / 'report.html'} written\n", "")
    assert (tmp_path / "w" / "report.html").exists()


def test_the_file_needs_nothing_else(tmp_path: Path) -> None:
    text = page.write([make(tmp_path / "w")]).read_text(encoding="utf-8")
    assert "default-src 'none'" in html.unescape(text)
    assert not re.search(r"https?:|\bsrc=|<link|url\(|@import", text)


def test_numbers_are_those_of_the_results(tmp_path: Path) -> None:
    found = drawn(make(tmp_path / "w"))
    assert found.row("zero-shot") == ["11.5", "2.2", "0.0"]
    for i, task in enumerate(TASKS):
        matrix, gains = (row[1:] for row in found.rows if row[0].startswith(f"{i + 1} {task}"))
        assert matrix == ["·" if v is None else f"{v:.1f}" for v in R[i]]
        assert gains[0] == f"{R[-1][i]:.1f}"
    for name, value in SUMMARY.items():
        assert found.row(name) == ["·" if value is None else f"{value:.2f}", continual.CONVENTIONS[name]]
    assert [row for row in found.rows if row[0] == "1 colours choice"] == [
        ["1 colours choice", "60.0", "11.5 +48.5", "51.5 +8.5", "21.8 +38.2"]
    ]
    for fact in ("1,234,567", "jax 9.8.7", "cpu cpu x 1 (some core)", "--workdir=w", "60.0", '"learning_rate": 0.002'):
        assert fact in found.text


def test_curves_stand_where_the_scores_are(tmp_path: Path) -> None:
    found = drawn(make(tmp_path / "w"))
    heights = {float(a["cy"]) for tag, a in found.elements if tag == "circle" and (a["class"] or "").startswith("mark")}
    plot = charts.HEIGHT - charts.BOTTOM - charts.TOP
    for value in (v for row in [*R, RESULTS["zero_shot"]] for v in row if v is not None):
        assert min(abs(y - (charts.HEIGHT - charts.BOTTOM - value / 100 * plot)) for y in heights) < 0.11


def test_gate_mass_is_drawn_by_origin(tmp_path: Path) -> None:
    found = drawn(make(tmp_path / "w"))
    widths = [a["style"] for tag, a in found.elements if tag == "span" and "style" in a]
    expected = [[100], [75, 25], [87.5, 12.5], [50, 50]]
    assert widths == [f"width:{w:.2f}%" for bar in expected for w in bar]
    assert "digits: attn/q" in found.text
    gates = [a for tag, a in found.elements if tag == "path" and (a["class"] or "").startswith("gate")]
    assert [a["class"] for a in gates] == ["gate s0", "gate s1"]  # one cell of each origin


def test_a_block_that_is_trained_on_changes_its_name(tmp_path: Path) -> None:
    rows = [{**GATES[0], **share(a=1.0), "on": {}}, {**GATES[1], **share(**{"a + b": 1.0}), "on": {}}]
    found = drawn(make(tmp_path / "w", {"gates": rows}))
    assert [a["title"] for _, a in found.elements if "title" in a] == ["a: 100.0 %", "a + b: 100.0 %"]


def test_predictions_to_browse(tmp_path: Path) -> None:
    data = drawn(make(tmp_path / "w")).data
    assert [row["name"] for row in data["rows"]] == ["zero-shot", "after 3 moods"]
    task = data["rows"][1]["tasks"][0]
    assert (task["name"], task["of"]) == ("colours", 2)
    shown = [[*(data["texts"][i] for i in record[:3]), record[3]] for record in task["shown"]]
    assert shown == [list(record.values()) for record in ANSWERS]


def test_many_predictions_and_long_prompts_are_cut_and_said_to_be(tmp_path: Path) -> None:
    folder, records = make(tmp_path / "w"), [{**ANSWERS[0], "prompt": "x" * 5000 + "end"}] * (single.EXAMPLES + 5)
    write_lines(folder / "predictions" / "03_moods" / "colours.jsonl", records)
    found = drawn(folder)
    task = found.data["rows"][1]["tasks"][0]
    assert (len(task["shown"]), task["of"]) == (single.EXAMPLES, single.EXAMPLES + 5)
    assert f"The first {single.EXAMPLES} of each task" in found.text
    assert found.data["texts"][task["shown"][0][0]] == "… " + "x" * (single.LETTERS - 3) + "end"


def test_a_long_loss_curve_is_thinned(tmp_path: Path) -> None:
    folder = make(tmp_path / "w")
    write_lines(folder / "metrics.jsonl", [{"step": i, "task": "colours", "loss": 1.0} for i in range(5000)])
    assert page.write([folder]).stat().st_size < 60_000


@pytest.mark.parametrize(
    "changes",
    [
        {"gates": None},
        {"R": None, "method": "zero_shot", "gates": None, "summary": dict.fromkeys(SUMMARY)},
        {"gates": [{**GATES[0], "mass": None, "on": {"colours": {**GATES[0]["on"]["colours"], "mass": None}}}]},
        {
            "tasks": ["a"],
            "metric": ["choice"],
            "R": [[50.0]],
            "zero_shot": [None],
            "baselines": {},
            "eval_examples": [3],
        },
    ],
)
def test_what_a_run_does_not_have_is_left_out(changes: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "w"
    write_json(folder / "results.json", RESULTS | changes)
    found = drawn(folder)
    assert found.data is None
    assert "None" not in found.text
    assert "nan" not in found.text
    assert ("Gates" in found.text) == (changes.get("gates", True) is not None)


@pytest.mark.parametrize("taught", [0, 1, 2])
def test_an_unfinished_run_is_drawn_as_far_as_it_went(taught: int, tmp_path: Path) -> None:
    rows = R[:taught] + [[None] * 3] * (3 - taught)
    summary = continual.summary(np.array(R)[:taught, :taught].astype(float)) if taught else {}
    found = drawn(make(tmp_path / "w", {"complete": False, "R": rows, "summary": summary, "gates": GATES[:taught]}))
    assert f"not finished: {taught} of 3 tasks taught and evaluated" in found.text
    assert found.row("zero-shot") == ["11.5", "2.2", "0.0"]
    assert len([row for row in found.rows if len(row) == 4 and row[0][0].isdigit()]) == taught
    assert drawn(make(tmp_path / "v")).text.count("not finished") == 0


# --- escaping ---------------------------------------------------------------------------------------------------------

NASTY = "</script><script>alert(1)</script><img src=x onerror=alert(1)>&amp;\"'`\u2028"


def test_no_data_becomes_markup(tmp_path: Path) -> None:
    nasty = dict.fromkeys(("benchmark", "method", "model", "device", "command"), NASTY)
    nasty |= {"versions": {NASTY: NASTY}, "config": {NASTY: {NASTY: NASTY}}, "metric": [NASTY] * 3}
    nasty |= {"baselines": {NASTY: [1.0, 2.0, None]}, "summary": {NASTY: 1.0}}
    gates = copy.deepcopy(GATES)
    gates[1] |= {"task": NASTY, "mass": {NASTY: 1.0}, "on": {NASTY: share(**{NASTY: 1.0})}}
    folders = [make(tmp_path / name, nasty | {"gates": gates}) for name in ("w", "v")]
    for folder in folders:
        write_lines(folder / "gates" / "03_moods.jsonl", [{**MAP, "task": NASTY, "tokens": [NASTY] * 3}])
        write_lines(
            folder / "predictions" / "03_moods" / "digits.jsonl", [dict.fromkeys(ANSWERS[0], NASTY) | {"score": 0}]
        )
        write_lines(folder / "metrics.jsonl", [{"step": 1, "task": NASTY, "loss": 1.0}])
    for found, scripts in ((drawn(folders[0]), 2), (drawn(*folders), 1)):
        assert [tag for tag, _ in found.elements].count("script") == scripts
        assert not {"img", "iframe", "link", "object"} & {tag for tag, _ in found.elements}
        assert not [name for _, attributes in found.elements for name in attributes if name.startswith("on")]
        assert NASTY in found.text
    assert NASTY in drawn(folders[0]).data["texts"]


def test_a_nasty_task_name(tmp_path: Path) -> None:
    """A file name cannot hold a slash, so there are no predictions here."""
    write_json(tmp_path / "w" / "results.json", RESULTS | {"tasks": ["<b>a</b>", "&", '"'], "gates": None})
    found = drawn(tmp_path / "w")
    assert "1 <b>a</b>choice" in [re.sub(r"\s+choice$", "choice", row[0]) for row in found.rows]
    assert [tag for tag, _ in found.elements].count("script") == 1


def test_elements() -> None:
    assert el("p", "<", Markup("<wbr/>"), None, 3, class_="a", data_x='"', id=None) == (
        '<p class="a" data-x="&quot;">&lt;<wbr/>3</p>'
    )
    assert "<" not in embedded("i", ["</script>", "&", "\u2029"]).removeprefix("<script").removesuffix("</script>")


# --- several runs -----------------------------------------------------------------------------------------------------


def test_several_runs_side_by_side(tmp_path: Path, command: Callable[..., Ended], monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    other = {
        "method": "inc_lora",
        "gates": None,
        "summary": SUMMARY | {"learned": 41.375, "backward_transfer": -7.0},
        "config": {"train": {"learning_rate": 0.004}, "seed": 3},
    }
    folders = make(tmp_path / "a" / "run"), make(tmp_path / "b" / "run", other)
    assert command(*folders) == Ended(0, "report.html written\n", "")
    found = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    a, b = found.row("1 a/run"), found.row("2 b/run")  # as much of the path as tells them apart
    assert a[:3] == ["mora", "3", "3/3"]
    assert b[:3] == ["inc_lora", "3", "3/3"]
    assert a[3:] == ["·" if v is None else f"{v:.2f}" for v in SUMMARY.values()]
    assert (b[4], b[8]) == ("41.38", "-7.00")
    assert found.row("train.learning_rate") == ["0.002", "0.004"]
    assert not [row for row in found.rows if row[0] == "seed"]
    assert len([row for row in found.rows if row[0] == "zero-shot"]) == 2
    assert "1 a/run: 64.4, -6.9" in found.text
    assert "2 b/run: 41.4, -7.0" in found.text
    assert "do not compare" not in found.text


def test_runs_of_different_streams_are_told_apart(tmp_path: Path) -> None:
    stream = {"tasks": ["x", "digits", "y"], "complete": False}
    summary = SUMMARY | {"backward_transfer": None}
    found = drawn(make(tmp_path / "a"), make(tmp_path / "b", stream | {"summary": summary}))
    assert "These runs differ in tasks: their scores do not compare." in found.text
    assert "Not finished, shown as far as they went: 2 b." in found.text
    assert "Without a point, as one of its two numbers is not defined: 2 b." in found.text


# --- errors -----------------------------------------------------------------------------------------------------------


def results_with(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: write_json(folder / "results.json", RESULTS | changes)


def text(name: str, content: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(content, encoding="utf-8")


BROKEN: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    "no results": (lambda folder: (folder / "results.json").unlink(), ("holds no results.json", "zero-shot row")),
    "no JSON": (text("results.json", "{"), ("results.json cannot be read",)),
    "a list": (text("results.json", "[]"), ("tasks must be a list",)),
    "no R": (text("results.json", json.dumps({k: v for k, v in RESULTS.items() if k != "R"})), ("R must be null or",)),
    "no square R": (results_with(R=[[1.0, 2.0]]), ("R must be null or one row per task",)),
    "text in R": (results_with(R=[["1", None, None]] * 3), ("R must be",)),
    "NaN": (text("results.json", json.dumps(RESULTS | {"zero_shot": [float("nan")] * 3})), ("zero_shot must be",)),
    "short baselines": (results_with(baselines={"majority": [1.0]}), ("baselines must be",)),
    "broken gates": (results_with(gates=[{"task": "a"}]), ("gates must be null or a list",)),
    "no loss": (text("metrics.jsonl", '{"step": 1, "task": "a"}\n'), ("metrics.jsonl line 1 has no usable loss",)),
    "prediction": (
        text("predictions/03_moods/colours.jsonl", json.dumps(ANSWERS[0]) + "\n{}\n"),
        ("colours.jsonl line 2 has no usable prompt, answer",),
    ),
    "cut prediction": (text("predictions/03_moods/colours.jsonl", '{"a\n'), ("colours.jsonl line 1 is not JSON",)),
    "no tasks": (results_with(tasks=[]), ("tasks must be a list of names",)),
    "no counts": (results_with(eval_examples=[2, None, 2]), ("eval_examples must be one number per task",)),
    "no parameters": (results_with(trainable_parameters=None), ("trainable_parameters must be a number",)),
    "loss of NaN": (text("metrics.jsonl", '{"step": 1, "task": "a", "loss": NaN}\n'), ("no usable loss",)),
    "expert out of reach": (
        lambda folder: write_lines(folder / "gates" / "03_moods.jsonl", [MAP | {"sites": {"q": [[0, 4, 0.5]]}}]),
        ("03_moods.jsonl line 1: sites must hold",),
    ),
    "a picture of other patches": (
        lambda folder: write_lines(folder / "gates" / "03_moods.jsonl", [PICTURED | {"tokens": ["class", *"abcde"]}]),
        ("03_moods.jsonl line 1: picture must be null or a PNG with a class token and n x n patches",),
    ),
    "a picture that is none": (
        lambda folder: write_lines(folder / "gates" / "03_moods.jsonl", [PICTURED | {"picture": "R0lGODlh"}]),
        ("03_moods.jsonl line 1: picture must be null or a PNG",),
    ),
    "gate map": (text("gates/03_moods.jsonl", "[]\n"), ("03_moods.jsonl line 1 has no usable task",)),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_workdir_is_named_in_one_line(name: str, tmp_path: Path, command: Callable[..., Ended]) -> None:
    folder, (damage, parts) = make(tmp_path / "w"), BROKEN[name]
    damage(folder)
    assert_refused(command(folder), str(folder), *parts)
    assert not (folder / "report.html").exists()


def test_bad_arguments(tmp_path: Path, command: Callable[..., Ended]) -> None:
    folder = make(tmp_path / "w")
    assert_refused(command(), "usage: python -m mora_jax.report DIR")
    assert_refused(command(folder, "--colour=red"), "--colour=red")
    assert_refused(command(tmp_path / "no"), "no is no folder")
    assert_refused(command(folder, tmp_path / "w" / ".."), "holds no results.json")
    assert_refused(command(folder, tmp_path / "x" / ".." / "w"), "given twice")
    assert_refused(command(folder, f"--output={tmp_path}"), f"{tmp_path} is a folder")
    assert_refused(command(folder, f"--output={folder / 'results.json' / 'x.html'}"), "x.html cannot be written")


def test_a_half_written_last_line_of_metrics_is_no_error(tmp_path: Path) -> None:
    folder = make(tmp_path / "w")
    whole = drawn(folder).text
    with open(folder / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 13, "ta')
    assert drawn(folder).text == whole


@pytest.mark.parametrize(("problem", "trace"), [(MoraError("no room"), False), (ZeroDivisionError("oops"), True)])
def test_a_report_that_fails_is_told_and_ends_no_run(problem: Exception, trace: bool, monkeypatch, capsys) -> None:
    def fail(workdirs: list[Path]) -> Path:
        raise problem

    monkeypatch.setattr(page, "write", fail)
    Run.draw_report(SimpleNamespace(workdir=Path("w"), display=SimpleNamespace(say=print)))
    err = capsys.readouterr().err
    assert f"warning: no report ({problem}); the run is complete without it" in err
    assert ("Traceback" in err) == trace


# --- charts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 100, [0, 20, 40, 60, 80, 100]), (0, 0.45, [0, 0.1, 0.2, 0.3, 0.4, 0.5]), (-7, 12, [-10, -5, 0, 5, 10, 15])],
)
def test_ticks_are_round_and_cover_the_data(low: float, high: float, expected: list[float]) -> None:
    assert charts.ticks(low, high) == expected


@pytest.mark.parametrize("value", [0.0, 3.7, -2.0, 1e-9, 1e9])
def test_ticks_of_a_single_value(value: float) -> None:
    found = charts.ticks(value, value)
    assert len(found) > 1
    assert found[0] <= value <= found[-1]
