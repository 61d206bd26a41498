"""Folders of small pictures of plain colours, a stream for benchmark `image_folder`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

# task -> class folder -> colour
TASKS: Mapping[str, Mapping[str, tuple[int, int, int]]] = {
    "colours": {"dark_blue": (20, 20, 120), "green": (30, 200, 30), "red": (220, 30, 30)},
    "shades": {"black": (5, 5, 5), "white": (250, 250, 250)},
}
COUNTS = {"train": 8, "test": 3}  # pictures of each class


def write_pictures(
    root: Path, tasks: Mapping[str, Mapping[str, tuple[int, int, int]]] = TASKS, counts: Mapping[str, int] = COUNTS
) -> Path:
    rng = np.random.default_rng(0)
    for task, classes in tasks.items():
        for split, count in counts.items():
            for name, colour in classes.items():
                folder = root / task / split / name
                folder.mkdir(parents=True)
                for i in range(count):
                    noise = rng.integers(-20, 20, (20, 24, 3))
                    pixels = np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)
                    Image.fromarray(pixels).save(folder / f"{i}.png")
    return root
