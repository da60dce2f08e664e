"""The curves of preference optimisation."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from components.files import atomic_file


def preference_plot(history: Sequence[Mapping[str, float]], kept: int, out: Path) -> None:
    """Write a PNG with implicit accuracy, margin and the winners' flow loss by step.

    All on held-out pairs. history: the checks, as Tuning has them; kept: the step gone back to.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 3, figsize=(10, 2.9), dpi=110, layout="constrained")
    titles = {
        "accuracy": "implicit accuracy, with its 95 % interval",
        "margin": "margin (inside of the sigmoid)",
        "winner": "flow loss on winners",
    }
    for axes, (key, title) in zip(panels, titles.items(), strict=True):
        # Before the first step the two models are one, and nothing is preferred.
        shown = history[1:] if key == "accuracy" else history
        steps = [check["step"] for check in shown]
        axes.plot(steps, [check[key] for check in shown], marker=".")
        axes.axvline(kept, color="grey", linestyle="dotted", label=f"kept: step {kept}")
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("step")
        axes.spines[["top", "right"]].set_visible(False)
    low, high = ([check[f"accuracy_{end}"] for check in history[1:]] for end in ("low", "high"))
    panels[0].fill_between([check["step"] for check in history[1:]], low, high, alpha=0.2)
    panels[0].axhline(0.5, color="black", linewidth=0.6)
    panels[0].set_ylim(0, 1.02)
    panels[2].axhline(history[0]["winner"], color="black", linewidth=0.6)
    panels[0].legend(frameon=False, fontsize=8, loc="lower right")
    with atomic_file(out) as temporary:
        figure.savefig(temporary, format="png")
    pyplot.close(figure)
