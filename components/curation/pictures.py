"""Pictures decoded with limits."""

import io
import re
import warnings
from collections.abc import Mapping

import numpy as np
from PIL import Image, ImageOps

FORMATS = ("JPEG", "PNG", "WEBP")
MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"}


class DamagedPicture(Exception):
    """The bytes are no picture that may be used; the message says why."""


def decode(data: bytes, limits: Mapping[str, int]) -> np.ndarray:
    """Decode to uint8 RGB (H, W, 3), turned as EXIF says, transparency over white.

    limits: `pixels`, the most that width × height may be; looked at before any pixel is
    decoded. Raises DamagedPicture for anything else than a whole JPEG, PNG or WebP picture.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            # verify() uses the file up, so the picture is opened twice.
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                if image.width * image.height > limits["pixels"]:
                    raise DamagedPicture(
                        f"{image.width}x{image.height} pixels, limit {limits['pixels']}"
                    )
                if image.mode not in MODES:
                    raise DamagedPicture(f"pixel mode {image.mode} is not read")
                image.verify()
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                image.load()
                turned = ImageOps.exif_transpose(image)
        if turned.mode in ("RGBA", "LA", "PA") or "transparency" in turned.info:
            over = turned.convert("RGBA")
            turned = Image.alpha_composite(Image.new("RGBA", over.size, "white"), over)
        return np.asarray(turned.convert("RGB"))
    except DamagedPicture:
        raise
    # Pillow's decoders raise a dozen kinds of errors on hostile bytes (struct.error, zlib.error,
    # SyntaxError, …), and each means the same here.
    except Exception as problem:
        # Pillow names the buffer by its address, which differs from run to run.
        words = re.sub(r"<_io[^>]*>", "bytes", str(problem))[:120]
        raise DamagedPicture(f"{type(problem).__name__}: {words}") from problem
