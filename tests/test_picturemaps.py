"""Gate maps on pictures: shares of gates by task of origin lie on the right patches, on the page and in the PNG."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from workdirs import PICTURED, TASKS, drawn, make

from mora_jax.data.images import decode, png
from mora_jax.reporting import gatemaps, page, picturemaps
from mora_jax.reporting.workdir import read
from mora_jax.runtime.writers import row_name, write_lines

BEFORE = {**PICTURED, "origins": ["colours"] * 2, "sites": {"vision/attn/q": [[2, 1, 1.0]]}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = make(tmp_path / "w")
    write_lines(made / "gates" / f"{row_name(2, TASKS)}.jsonl", [PICTURED])
    write_lines(made / "gates" / f"{row_name(0, TASKS)}.jsonl", [BEFORE])
    return made


def test_shares_add_up_the_gates_of_an_origin() -> None:
    found = picturemaps.shares(PICTURED, "vision/attn/q", ["colours", "digits"])
    assert found.tolist() == [[0, 0.75, 0, 0, 0.5], [0, 0, 0.25, 0, 0]]
    assert picturemaps.silent(PICTURED, "vision/attn/q").tolist() == [True, False, False, True, False]


def test_states_go_from_right_after_a_task_to_the_end(folder: Path) -> None:
    panels = list(gatemaps.panels(read(folder)))
    assert [(p.task, p.site, [when for when, _ in p.states]) for p in panels] == [
        ("colours", "vision/attn/q", ["right after colours", "after the whole stream"])
    ]
    assert panels[0].states[0][1]["sites"] == BEFORE["sites"]


def test_patches_are_drawn_where_they_are(folder: Path) -> None:
    found = drawn(folder)
    images = [a for tag, a in found.elements if tag == "image"]
    assert {a["href"] for a in images} == {f"data:image/png;base64,{PICTURED['picture']}"}
    assert len(images) == 3 + 4  # the picture, its origins and `no expert`, in both states
    paths = [a["d"] for tag, a in found.elements if tag == "path" and a.get("opacity") and "z" in (a["d"] or "")]
    half = picturemaps.SIDE / 2
    assert f"M{half:.1f} 0.0h{half:.1f}v{half:.1f}h-{half:.1f}z" in paths  # token 2 of 2 x 2 patches: above right
    assert "no expert" in found.text
    assert "right after colours" in found.text


def test_the_png_holds_every_state_of_a_task(folder: Path) -> None:
    page.write([folder])
    files = sorted((folder / "gates").glob("*.png"))
    assert [file.name for file in files] == ["colours.png"]
    sheet = np.asarray(Image.open(files[0]))
    strip, line, side = sheet.shape[0] // 2, picturemaps.LINE, picturemaps.SIDE
    left = picturemaps.GAP + side + picturemaps.GAP  # of the first origin
    quarter = sheet[2 * line : 2 * line + side, left : left + side]
    full = tuple(int(picturemaps.PALETTE[0][i : i + 2], 16) for i in (1, 3, 5))
    assert tuple(quarter[side // 4, 3 * side // 4]) == full  # before: all of the gates above right
    assert tuple(quarter[side // 4, side // 4]) != full
    after = sheet[strip + 2 * line : strip + 2 * line + side, left : left + side]
    assert tuple(after[side // 4, 3 * side // 4]) != full


def test_pixels_survive_as_png() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3)).astype(np.uint8)
    np.testing.assert_array_equal(np.asarray(decode(png(pixels), "a picture")), pixels)
