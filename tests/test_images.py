"""Pictures: the pixels of the reference, every mode of a file, and what is refused."""

from __future__ import annotations

import io
import struct
import time
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from mora_jax.data import images
from mora_jax.errors import MoraError

SIZES = ((224, 224), (64, 64), (300, 200), (200, 300), (331, 227), (37, 53), (500, 20), (20, 500), (225, 224), (9, 7))


def picture(width: int, height: int, channels: int = 3) -> np.ndarray:
    """Waves with noise on them: something to resample, and sharp edges for the bicubic overshoot."""
    rng = np.random.default_rng(width * 1000 + height)
    y, x = np.mgrid[:height, :width]
    waves = [127 + 120 * np.sin(x / (3 + c) + y / (5 - c / 2)) for c in range(channels)]
    noise = rng.integers(-30, 31, (height, width, channels))
    return np.clip(np.stack(waves, -1) + noise, 0, 255).astype(np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def reference(image: Image.Image, size: int) -> np.ndarray:
    """[3, size, size] of transformers' processor over Pillow, normalised."""
    pytest.importorskip("torch", reason="transformers' processors need torch")
    pytest.importorskip("transformers", reason="transformers is the other side of the comparison")
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    return np.asarray(processor(image, return_tensors="np")["pixel_values"][0])


def in_levels(theirs: np.ndarray) -> np.ndarray:
    """Normalised numbers back to 0..255, [size, size, 3]."""
    std, mean = (np.asarray(numbers, np.float64) for numbers in (images.OPENAI_STD, images.OPENAI_MEAN))
    return (theirs.transpose(1, 2, 0) * std + mean) * 255


@pytest.mark.parametrize("shape", SIZES, ids=lambda shape: f"{shape[0]}x{shape[1]}")
@pytest.mark.parametrize("size", [224, 33])
def test_pixels_equal_the_reference(shape: tuple[int, int], size: int) -> None:
    image = Image.fromarray(picture(*shape))
    theirs = reference(image, size)
    ours = images.pixels(encoded(image), size, "memory")
    assert ours.shape == (size, size, 3)
    assert ours.dtype == np.uint8
    assert ours.std() > 5
    np.testing.assert_allclose(ours, in_levels(theirs), atol=1e-3)  # not one level apart
    numbers = images.normalise(ours, images.OPENAI_MEAN, images.OPENAI_STD)
    assert numbers.dtype == np.float32
    np.testing.assert_allclose(numbers.transpose(2, 0, 1), theirs, atol=1e-5)


def modes() -> dict[str, Image.Image]:
    rgba = picture(40, 30, 4)
    rgba[5:15, 5:15, 3] = 0
    colours = Image.fromarray(picture(40, 30))
    return {
        "grey": Image.fromarray(picture(40, 30, 1)[..., 0]),
        "grey_alpha": Image.fromarray(rgba[..., 2:].copy(), "LA"),
        "alpha": Image.fromarray(rgba, "RGBA"),
        "palette": colours.quantize(50),
        "bilevel": colours.convert("1"),
    }


@pytest.mark.parametrize("name", ["grey", "grey_alpha", "alpha", "palette", "bilevel"])
def test_modes_equal_the_reference(name: str) -> None:
    image = modes()[name]
    ours = images.pixels(encoded(image), 24, name)
    np.testing.assert_allclose(ours, in_levels(reference(image, 24)), atol=1e-3)


def test_transparency_is_white_in_every_form() -> None:
    rgba = picture(12, 12, 4)
    rgba[..., 3] = 255
    rgba[:, 6:, 3] = 0
    decoded = np.asarray(images.decode(encoded(Image.fromarray(rgba, "RGBA")), "x"))
    np.testing.assert_array_equal(decoded[:, :6], rgba[:, :6, :3])
    assert (decoded[:, 6:] == 255).all()
    palette = Image.fromarray(np.repeat([[0, 1]], 4, 0).repeat(4, 1).astype(np.uint8), "P")
    palette.putpalette([10, 20, 30, 40, 50, 60])
    for kind in ("PNG", "GIF"):
        decoded = np.asarray(images.decode(encoded(palette, kind, transparency=1), "x"))
        assert (decoded[:, :4] == (10, 20, 30)).all()
        assert (decoded[:, 4:] == 255).all()


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk_becomes_rgb(kind: str) -> None:
    image = Image.new("CMYK", (8, 8), (255, 0, 0, 0))
    decoded = np.asarray(images.decode(encoded(image, kind), "x")).astype(int)
    assert (np.abs(decoded - (0, 255, 255)) <= 2).all()


def test_sixteen_bits_keep_the_upper_eight() -> None:
    """Pillow's own conversion would make white of all above 255."""
    values = np.linspace(0, 65535, 48 * 40).astype(np.uint16).reshape(40, 48)
    for kind, dtype in (("PNG", "<u2"), ("TIFF", "<u2"), ("TIFF", ">u2"), ("PPM", "<u2")):
        data = encoded(Image.fromarray(values.astype(dtype)), kind)
        decoded = np.asarray(images.decode(data, "x"))
        np.testing.assert_array_equal(decoded, np.repeat((values >> 8)[..., None], 3, -1))


def test_sixteen_bits_per_colour_keep_the_upper_eight() -> None:
    """A PNG written by hand, for Pillow writes none."""
    values = np.linspace(0, 65535, 6 * 5 * 3).astype(">u2").reshape(5, 6, 3)
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    data = png_of(6, 5, 16, 2, rows)
    np.testing.assert_array_equal(np.asarray(images.decode(data, "x")), values >> 8)


def test_an_animation_gives_its_first_picture() -> None:
    frames = [Image.new("RGB", (9, 9), colour) for colour in ("red", "lime")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert (np.asarray(images.decode(data, "x")) == (255, 0, 0)).all()


def test_normalise_is_the_same_inside_a_model() -> None:
    values = np.random.default_rng(0).integers(0, 256, (2, 5, 5, 3)).astype(np.uint8)
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.25, 1.0)
    ours = images.normalise(values, mean, std)
    assert ours.dtype == np.float32
    by_hand = (values.astype(np.float64) / 255 - mean) / std
    np.testing.assert_allclose(ours, by_hand, atol=1e-6)
    inside = jax.jit(lambda x: images.normalise(x, mean, std))(jnp.asarray(values))
    assert inside.dtype == jnp.float32
    np.testing.assert_allclose(inside, ours, atol=1e-6)


# --- refusals ---------------------------------------------------------------------------------------------------------


def png_of(width: int, height: int, bits: int, colour: int, rows: bytes) -> bytes:
    """A PNG file (PNG specification, 5.3): a signature and chunks with checksums."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no picture",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        b"\x89PNG\r\n\x1a\n",
        b"GIF89a",
        b"II*\0",
    ],
    ids=["empty", "text", "eps", "png_head", "gif_head", "tiff_head"],
)
def test_what_is_no_picture(data: bytes) -> None:
    with pytest.raises(MoraError, match=r"pets/cat 1\.jpg: not a picture in one of BMP, GIF, JPEG, PNG"):
        images.decode(data, "pets/cat 1.jpg")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP", "PPM"])
def test_an_incomplete_picture(kind: str) -> None:
    data = encoded(Image.fromarray(picture(60, 60)), kind)
    assert images.decode(data, "x").size == (60, 60)
    with pytest.raises(MoraError, match=r"^half\.img: "):
        images.decode(data[: len(data) // 2], "half.img")


def test_bit_flips_never_end_in_another_error(rng: np.random.Generator) -> None:
    for kind in ("JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP", "PPM"):
        data = encoded(Image.fromarray(picture(20, 20)), kind)
        refused = 0
        for _ in range(60):
            spoilt = bytearray(data)
            for at in rng.integers(0, len(data), 3):
                spoilt[at] = rng.integers(256)
            try:
                images.pixels(bytes(spoilt), 8, "x")
            except MoraError:
                refused += 1
        assert refused < 60 or kind == "PNG"  # PNG has checksums


@pytest.mark.parametrize(("width", "height"), [(8001, 8000), (12_000, 12_000), (60_000, 60_000)])
def test_a_bomb_is_refused_before_it_is_unpacked(width: int, height: int) -> None:
    data = png_of(width, height, 1, 0, b"")
    start = time.process_time()
    with pytest.raises(MoraError, match=r"bomb\.png: .*pixels"):
        images.decode(data, "bomb.png")
    assert time.process_time() - start < 0.5


def test_a_bomb_in_a_text_chunk_is_refused() -> None:
    notes = PngImagePlugin.PngInfo()
    notes.add_text("comment", "a" * 50_000_000, zip=True)
    data = encoded(Image.new("L", (4, 4)), pnginfo=notes)
    assert len(data) < 100_000
    with pytest.raises(MoraError, match=r"bomb\.png: .*[Dd]ecompressed"):
        images.decode(data, "bomb.png")


@pytest.mark.parametrize("shape", [(1, 20_000), (20_000, 1)], ids=str)
def test_a_picture_that_explodes_when_resized_is_refused(shape: tuple[int, int]) -> None:
    """20,000 pixels that would become 224 x 4,480,000."""
    data = encoded(Image.new("RGB", shape))
    assert images.pixels(data, 8, "x").shape == (8, 8, 3)
    with pytest.raises(MoraError, match=r"long\.png: .* pixels become .*4480000.* more than the 64000000 allowed"):
        images.pixels(data, 224, "long.png")


def test_floating_point_pixels_are_refused() -> None:
    data = encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF")
    with pytest.raises(MoraError, match=r"x\.tif: floating-point pixels"):
        images.decode(data, "x.tif")
