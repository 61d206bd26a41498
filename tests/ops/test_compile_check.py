"""The compilers of TPU and GPU as a regression test: what counts as worse, and one kernel each for real."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from mora_jax import compilers
from mora_jax.ops.gated_projection import compile_check
from mora_jax.ops.gated_projection.compile_check import RECORD, identity, regressions
from mora_jax.ops.gated_projection.shapes import SHAPES

ROW = {"target": "v5e", "kernel": "forward", "shape": "a", "temporaries": 0, "vmem": 100, "spills": 7}
GPU = {"target": "h100", "kernel": "forward", "shape": "a", "registers": 90, "spills": 0, "tensor_core": 4}


def test_what_is_equal_or_less_is_no_regression():
    assert regressions([ROW, GPU], [ROW, GPU]) == []
    assert regressions([ROW | {"vmem": 99, "spills": 0}], [ROW]) == []


@pytest.mark.parametrize(
    ("row", "change", "says"),
    [
        (ROW, {"temporaries": 1}, "v5e:forward:a: temporaries 0 -> 1"),
        (ROW, {"spills": 8}, "v5e:forward:a: spills 7 -> 8"),
        (GPU, {"registers": 255}, "h100:forward:a: registers 90 -> 255"),
        (GPU, {"tensor_core": 0}, "h100:forward:a: tensor_core 4 -> 0"),
        (ROW, {"unsupported": "too wide"}, "v5e:forward:a is declined now: too wide"),
        (ROW, {"shape": "b"}, "v5e:forward:b is not recorded; --update writes it down"),
    ],
)
def test_more_of_anything_is_a_regression(row, change, says):
    assert regressions([row | change], [row]) == [says]


def test_an_update_replaces_its_own_rows_only(tmp_path, monkeypatch):
    monkeypatch.setattr(compile_check, "RECORD", tmp_path / "compiled.json")
    compile_check.write([ROW | {"spills": 3, "seconds": 1.0}], [ROW, GPU])
    rows = json.loads((tmp_path / "compiled.json").read_text())["rows"]
    assert rows == [GPU, ROW | {"spills": 3}]


def test_the_record_holds_every_kernel_shape_and_target():
    rows = json.loads(RECORD.read_text(encoding="utf-8"))["rows"]
    kernels = ("forward", "backward", "decode")
    targets = [target for targets in compile_check.TARGETS.values() for target in targets]
    wanted = {(target, kernel, shape) for target in targets for kernel in kernels for shape in SHAPES}
    assert wanted <= {identity(row) for row in rows}


def test_the_record_keeps_what_the_kernels_are_for():
    """No memory of size tokens x experts on TPU, no spill on Hopper, both products on its tensor cores."""
    rows = {identity(row): row for row in json.loads(RECORD.read_text(encoding="utf-8"))["rows"]}
    for target in ("v5e", "v5p"):
        assert rows[target, "forward", "target"]["temporaries"] == 0
        unfused = rows[target, "unfused_backward", "target"]["temporaries"]
        assert rows[target, "backward", "target"]["temporaries"] < unfused / 4
    for (target, _, _), row in rows.items():
        if target == "h100":
            assert row["spills"] == 0
            assert row["tensor_core"] > 0


def run(*names: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", compile_check.__name__, *names]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=dict(os.environ))


@pytest.mark.skipif(
    not compilers.FOLDER.is_dir(), reason="the compilers are installed by `bash launch.sh test` on Linux x86-64"
)
def test_one_kernel_for_a_tpu_and_one_for_a_gpu_for_real():
    done = run("smollm2_135m/q:forward:v5e", "smollm2_135m/q:forward:h100")
    assert done.returncode == 0, done.stderr
    assert "nothing got worse" in done.stdout
    assert "v5e" in done.stdout
    assert "h100" in done.stdout


def test_without_compilers_one_line_says_how_to_get_them(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compilers, "FOLDER", tmp_path / "none")
    monkeypatch.setattr(sys, "argv", ["compile_check"])
    assert compile_check.main() == 2
    assert "`bash launch.sh test` installs the compilers" in capsys.readouterr().err
