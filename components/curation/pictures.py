"""Pictures decoded with limits."""

import io
import re
import warnings
from collections.abc import Mapping

import numpy as np
from PIL import Image

# How the bytes begin, the extension that this gives them, Pillow's name of the format.
FORMATS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP", "gif": "GIF", "bmp": "BMP"}
READ = "JPEG, PNG, WebP, GIF, BMP"
BMP_HEADERS = (12, 16, 40, 52, 56, 64, 108, 124)  # bytes; "BM" alone begins many a text
ANIMATED = ("PNG", "WEBP", "GIF")  # a JPEG of several frames holds previews beside the picture
MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"}
GREY_16 = {"I", "I;16", "I;16B", "I;16L", "I;16N"}
ORIENTATION = 0x0112
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class DamagedPicture(Exception):
    """The bytes are no picture that may be used; the message says why."""


def content_extension(data: bytes) -> str:
    """Return jpg, png, webp, gif or bmp by how the bytes begin, or '' for anything else."""
    if data.startswith(b"\xff\xd8\xff"):
        return "jpg"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "webp"
    if data.startswith((b"GIF87a", b"GIF89a")):
        return "gif"
    if data.startswith(b"BM") and int.from_bytes(data[14:18], "little") in BMP_HEADERS:
        return "bmp"
    return ""


def decode(data: bytes, limits: Mapping[str, int]) -> np.ndarray:
    """Decode to uint8 RGB (H, W, 3), turned as EXIF says, transparency over white.

    The format is told by the bytes. Grey of 16 bits becomes 8 bits by dividing by 257.
    limits: `pixels`, the most that width × height may be; looked at before any pixel is
    decoded. Raises DamagedPicture for anything else than one whole JPEG, PNG, WebP, GIF or BMP
    picture, an animation among it.
    """
    extension = content_extension(data)
    if not extension:
        raise DamagedPicture(f"{len(data)} bytes that are no picture of {READ}")
    formats = [FORMATS[extension]]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            # verify() uses the file up, so the picture is opened twice.
            with Image.open(io.BytesIO(data), formats=formats) as image:
                _check(image, limits)
                image.verify()
            with Image.open(io.BytesIO(data), formats=formats) as image:
                image.load()
                return np.asarray(_to_rgb(image))
    except DamagedPicture:
        raise
    # Pillow's decoders raise a dozen kinds of errors on hostile bytes (struct.error, zlib.error,
    # SyntaxError, …), and each means the same here.
    except Exception as problem:
        # Pillow names the buffer by its address, which differs from run to run.
        words = re.sub(r"<_io[^>]*>", "bytes", str(problem))[:120]
        raise DamagedPicture(f"{type(problem).__name__}: {words}") from problem


def _check(image: Image.Image, limits: Mapping[str, int]) -> None:
    """Raise DamagedPicture for what the header alone says must not be decoded."""
    if image.width * image.height > limits["pixels"]:
        raise DamagedPicture(f"{image.width}x{image.height} pixels, limit {limits['pixels']}")
    if image.mode not in MODES | GREY_16:
        raise DamagedPicture(f"pixel mode {image.mode} is not read")
    if image.format in ANIMATED and (frames := getattr(image, "n_frames", 1)) > 1:
        raise DamagedPicture(f"animated, {frames} frames")


def _to_rgb(image: Image.Image) -> Image.Image:
    """Return the loaded picture as RGB: turned, on white, at 8 bits."""
    turn = TURNS.get(_orientation(image))
    if image.mode in GREY_16:
        image = _to_8_bits(image)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        over = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", over.size, "white"), over)
    image = image.convert("RGB")
    return image if turn is None else image.transpose(turn)


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits as grey of 8, the one value that means transparent (PNG) as white."""
    values = np.asarray(image).astype(np.int64).clip(0, 65535)
    grey = ((values + 128) // 257).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[values == transparent] = 255
    return Image.fromarray(grey)


def _orientation(image: Image.Image) -> int:
    """What EXIF says of how the picture is turned, 1 to 8; 1 where EXIF is damaged or absent."""
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # as in decode; the pixels are sound all the same
        return 1
