"""A picture of the notions in the set, as trained and as targeted."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from components.files import atomic_file


def plot_notions(report: Mapping[str, Any], out: Path, most: int = 40) -> None:
    """Draw `StatisticalSampler.report()` as a PNG: the `most` commonest notions of the set.

    Bars in the set (before) and in the batches trained on (after), a line at the target.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    notions = sorted(report["notions"].items(), key=lambda item: -item[1]["set"])[:most]
    places = range(len(notions))
    figure, axes = pyplot.subplots(figsize=(max(6.0, 0.3 * len(notions)), 4), dpi=100)
    for shift, key, label in (
        (-0.2, "set", "in the set"),
        (0.2, "trained", f"as trained ({report['trained']} samples)"),
    ):
        axes.bar([p + shift for p in places], [v[key] for _, v in notions], 0.4, label=label)
    axes.step(places, [v["target"] for _, v in notions], "k--", where="mid", lw=1, label="target")
    axes.set_xticks(list(places), [name for name, _ in notions], rotation=90, fontsize=7)
    axes.set_ylabel("share of all notions")
    distance = report["distance"]
    axes.set_title(
        f"{report['phase']}, {report['sampling']} sampling: distance to target "
        f"{distance['set']:.3f} before, {distance['trained']:.3f} after",
        fontsize=9,
    )
    axes.legend(fontsize=8)
    figure.tight_layout()
    with atomic_file(out) as temporary:
        figure.savefig(temporary, format="png")
    pyplot.close(figure)
