"""Pictures: encoded bytes -> the square of 8-bit RGB pixels that CLIP looks at -> numbers.

The order and the arithmetic are those of transformers' CLIPImageProcessor over Pillow: the shorter side is resized
(bicubic, 8 bits), the centre is cut out, and the pixels are normalised. Pixels stay 8-bit until they are on the device.
"""

from __future__ import annotations

import io
from typing import TypeVar

import numpy as np
from jaxtyping import Array, Float, UInt8
from PIL import Image

from mora_jax.errors import MoraError

# Of the pictures that OpenAI's models were trained on, per channel, in 0..1.
OPENAI_MEAN, OPENAI_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
# The formats of data sets. Pillow knows more, some of which start other programs (EPS) or are hardly ever tested.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
MAX_PIXELS = 64_000_000  # of one picture; larger ones are taken for decompression bombs
_SIXTEEN_BITS = ("I", "I;16", "I;16B", "I;16L", "I;16N")
Pixels = TypeVar("Pixels", np.ndarray, Array)


def decode(data: bytes, source: object) -> Image.Image:
    """The picture in `data` as RGB, of an animation the first one.

    Greyscale, palettes and CMYK become RGB, transparency is laid on white, of 16 bits per channel the upper 8 are kept.
    Raises MoraError, naming `source`, for what is no picture in one of FORMATS, is damaged or incomplete, has
    floating-point pixels, or has more than MAX_PIXELS.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise MoraError(f"{source}: a picture with too many pixels ({error})") from None
    # Pillow's readers raise OSError, ValueError, SyntaxError, struct.error and more for broken files.
    except Exception as error:
        raise MoraError(f"{source}: not a picture in one of {', '.join(FORMATS)} ({error})") from error
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise MoraError(f"{source}: {width} x {height} pixels are more than the {MAX_PIXELS} allowed for one picture")
    try:
        return _rgb(image, source)
    except MoraError:
        raise
    except Exception as error:
        raise MoraError(f"{source}: a damaged picture ({error})") from error


def _rgb(image: Image.Image, source: object) -> Image.Image:
    image.load()
    if image.mode in _SIXTEEN_BITS:  # Pillow's own conversion would make white of every value above 255
        values = np.clip(np.asarray(image).astype(np.int64), 0, 0xFFFF)
        return Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise MoraError(f"{source}: floating-point pixels, whose range no file names; known: 1, 8 and 16 bits")
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def centre_square(image: Image.Image, size: int, source: object) -> UInt8[np.ndarray, "size size 3"]:
    """The picture resized so that its shorter side has `size` pixels, bicubic, and of that the square in the middle.

    The other side becomes int(size * long / short). Raises MoraError, naming `source`, for a picture so long and narrow
    that it would then have more than MAX_PIXELS.
    """
    width, height = image.size
    short = min(width, height)
    width, height = size * width // short, size * height // short
    if width * height > MAX_PIXELS:
        raise MoraError(
            f"{source}: {image.size[0]} x {image.size[1]} pixels become {width} x {height} where the shorter side is "
            f"{size}, more than the {MAX_PIXELS} allowed for one picture"
        )
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return np.asarray(resized.crop((left, top, left + size, top + size)))


def pixels(data: bytes, size: int, source: object) -> UInt8[np.ndarray, "size size 3"]:
    """`decode` and `centre_square`: what a model for `size` x `size` pixels looks at."""
    return centre_square(decode(data, source), size, source)


def normalise(
    values: UInt8[Pixels, "*batch height width 3"], mean: tuple[float, ...], std: tuple[float, ...]
) -> Float[Pixels, "*batch height width 3"]:
    """(x / 255 - mean) / std per channel, in float32; of numpy arrays and, inside a model, of JAX ones."""
    shape = (1,) * (values.ndim - 1) + (3,)
    shift, width = (np.asarray(channel, np.float32).reshape(shape) for channel in (mean, std))
    return (values.astype(np.float32) / np.float32(255) - shift) / width


def png(values: UInt8[np.ndarray, "height width *channels"]) -> bytes:
    """The pixels as a PNG file: grey ones, or red, green and blue."""
    file = io.BytesIO()
    Image.fromarray(values).save(file, "PNG")
    return file.getvalue()
