"""Gate maps on pictures: whose experts answer at which patch, as SVG in the report and as PNG beside it."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from workdirs import TASKS, drawn, make

from mora_jax.data.images import png
from mora_jax.errors import MoraError
from mora_jax.reporting import picturemaps
from mora_jax.reporting.workdir import read
from mora_jax.runtime.writers import row_name, write_lines

# A class token before four patches; two experts of each task, the second task came later.
PICTURE = {
    "task": "colours",
    "layer": 1,
    "truncated": False,
    "tokens": ["class", "row 1, column 1", "row 1, column 2", "row 2, column 1", "row 2, column 2"],
    "origins": ["colours", "colours", "digits", "digits"],
    "sites": {"vision/attn/q": [[0, 0, 1.0], [1, 0, 0.25], [1, 1, 0.25], [1, 3, 0.5], [4, 2, 1.0]]},
    "before": {"origins": ["colours", "colours"], "sites": {"vision/attn/q": [[1, 0, 1.0], [2, 1, 0.75]]}},
    "picture": base64.b64encode(png(np.full((6, 6, 3), 200, np.uint8))).decode(),
}


@pytest.fixture
def workdir(tmp_path: Path) -> Path:
    folder = make(tmp_path / "w")
    write_lines(folder / "gates" / f"{row_name(2, TASKS)}.jsonl", [PICTURE])
    return folder


def test_gate_mass_is_summed_over_the_experts_of_a_task_at_each_patch() -> None:
    before, after = picturemaps.strips(PICTURE, "vision/attn/q")
    assert (before.title, after.title) == ("after colours", "after the whole stream")
    np.testing.assert_array_equal(before.mass["colours"], [[1.0, 0.75], [0, 0]])
    np.testing.assert_array_equal(after.mass["colours"], [[0.5, 0], [0, 0]])
    np.testing.assert_array_equal(after.mass["digits"], [[0.5, 0], [0, 1.0]])
    assert list(before.mass) == ["colours"]


def test_what_is_not_known_of_before_is_not_drawn() -> None:
    (after,) = picturemaps.strips(PICTURE | {"before": None}, "vision/attn/q")
    assert after.title == "after the whole stream"


def test_the_report_shows_the_picture_beside_its_maps(workdir: Path) -> None:
    page = drawn(workdir)
    assert "on the first evaluated picture, before and after later tasks" in page.text
    for text in ("after colours", "after the whole stream", "colours: vision/attn/q"):
        assert text in page.text
    (image,) = [attributes for name, attributes in page.elements if name == "image"]
    assert image["href"] == f"data:image/png;base64,{PICTURE['picture']}"
    opacities = [float(a["opacity"]) for name, a in page.elements if name == "path" and "gate" in (a["class"] or "")]
    assert sorted(opacities) == [0.4, 0.4, 0.8, 1.0, 1.0]
    assert not (workdir / "gates" / "colours.png").exists(), "the report went elsewhere"


def test_a_png_has_a_tile_for_each_task_in_each_strip(workdir: Path) -> None:
    (path,) = picturemaps.save(read(workdir))
    assert path == workdir / "gates" / "colours.png"
    pixels = np.asarray(Image.open(path))
    step, tall = picturemaps.TILE + picturemaps.GAP, picturemaps.TILE + picturemaps.GAP + 2 * picturemaps.HEAD
    assert pixels.shape == (2 * tall + picturemaps.GAP, 3 * step + picturemaps.GAP, 3)

    def patch(row: int, tile: int, i: int, j: int) -> list[int]:
        quarter = picturemaps.TILE // 4
        y = row * tall + 2 * picturemaps.HEAD + (2 * i + 1) * quarter
        return pixels[y, picturemaps.GAP + tile * step + (2 * j + 1) * quarter].tolist()

    blue, brown = ([int(colour[i : i + 2], 16) for i in (1, 3, 5)] for colour in picturemaps.COLOURS[:2])
    assert patch(0, 0, 0, 0) == [200] * 3
    assert (patch(0, 1, 0, 0), patch(0, 1, 1, 1)) == (blue, [255] * 3)
    assert patch(0, 2, 0, 0) == [255] * 3, "before, there was no second task"
    assert (patch(1, 2, 1, 1), patch(1, 2, 1, 0)) == (brown, [255] * 3)
    half = patch(1, 1, 0, 0)
    assert all(abs(2 * value - 255 - full) <= 2 for value, full in zip(half, blue, strict=True))


def test_a_cell_outside_the_earlier_map_is_refused(workdir: Path) -> None:
    broken = json.loads(json.dumps(PICTURE))
    broken["before"]["sites"]["vision/attn/q"].append([0, 2, 0.5])
    write_lines(workdir / "gates" / f"{row_name(2, TASKS)}.jsonl", [broken])
    with pytest.raises(MoraError, match="line 1: sites must hold"):
        read(workdir)
