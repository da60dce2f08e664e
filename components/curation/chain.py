"""The filters in the order they act: cheap ones on all pictures, dear ones on what is left."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from components.curation.aesthetic import Aesthetic
from components.curation.captioner import Captioner
from components.curation.detectors import model_filters
from components.curation.filters import Filter, cheap_filters
from components.curation.own import own_filters
from components.errors import UserError

CAPTION = "caption"
# Filters without a score of their own, in the order they act in.
DAMAGED, KEY, EXACT, NEAR = "damaged", "duplicate_key", "exact_duplicate", "near_duplicate"
SYNTHETIC = "synthetic"


@dataclass
class Chain:
    """The filters of a run. A picture is rejected by the first one it does not pass.

    cheap: on every picture that decodes; then repeats are looked for; dear: those that run a
    model, cheapest first, on what is left. captioner: writes captions just before the caption
    filter, which then comes last of the dear ones.
    """

    cheap: list[Filter]
    dear: list[Filter]
    captioner: Captioner | None

    @property
    def scored(self) -> list[Filter]:
        """All filters with a score, in order."""
        return [*self.cheap, *self.dear]

    @property
    def names(self) -> list[str]:
        """All reasons for a rejection, in order."""
        cheap, dear = ([f.name for f in part] for part in (self.cheap, self.dear))
        return [DAMAGED, *cheap, KEY, EXACT, NEAR, *dear, SYNTHETIC]


def chain(curation: Mapping[str, Any]) -> Chain:
    """The filters that the params ask for, models not loaded.

    Raises UserError for a name in `skip` that is no filter, and for what is wrong with a
    filter of the user's own.
    """
    aesthetic = Aesthetic.from_params(curation["aesthetic"])
    captioner = Captioner.from_params(curation["captions"])
    built_in = [
        *cheap_filters(curation),
        *model_filters(curation),
        *([aesthetic] if aesthetic else []),
    ]
    filters = [*built_in, *own_filters(curation["own"])]
    unknown = [name for name in curation["skip"] if name not in [f.name for f in filters]]
    if unknown:
        raise UserError(
            f"curation.skip names {unknown[0]!r}, which is no filter here: the filters are "
            f"{', '.join(f.name for f in filters)}."
        )
    filters = [f for f in filters if f.name not in curation["skip"]]
    cheap, dear = [f for f in filters if not f.dear], [f for f in filters if f.dear]
    if captioner:
        dear += [f for f in cheap if f.name == CAPTION]
        cheap = [f for f in cheap if f.name != CAPTION]
    return Chain(cheap, dear, captioner)
