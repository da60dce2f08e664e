"""Statistical-analysis sampling towards billions: made-up descriptors through the real sampler.

    python benchmarks/stream.py run OUT [--streamed 1e7] [--set 1e9] [--rules uniform,sample,notion]
    python benchmarks/stream.py plot OUT [PICTURE.png]

Nothing of the set is stored: a sample's 1 to 8 notions, of 100,000 whose frequencies follow Zipf's
law, come from a hash of its id. `run` writes OUT/RULE.jsonl, a line at each of a row of growing
numbers of candidates streamed, and the sampler's state beside it: started again it goes on from
the last line. Times are those of the sampler alone; making up the descriptors is timed apart.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from components.feedback.sampler import StatisticalSampler
from components.feedback.targets import evenness
from components.files import read_json, write_json

NOTIONS, MOST = 100_000, 8  # notions in all, and of a caption
A_DECADE = 4  # lines written for each tenfold of candidates
RULES = {"uniform": ("uniform", "sample"), "sample": ("statistical", "sample"),
         "notion": ("statistical", "notion")}  # fmt: skip


def mixed(x):
    """SplitMix64's output function: uint64 to uint64 that look random."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Made:
    """n samples of three aspects that follow from their ids; counts its own time."""

    def __init__(self, n):
        self.rungs = {"256x256": (256, 256), "256x192": (256, 192), "192x256": (192, 256)}
        self.n, self.seconds = n, 0.0
        rank = np.arange(1, NOTIONS + 1)
        # One notion drawn is of this rank with p ~ 1 / rank; a caption draws 1 to MOST.
        self.p = np.log1p(1 / rank) / np.log(NOTIONS + 1)
        has = np.mean([1 - (1 - self.p) ** m for m in range(1, MOST + 1)], axis=0)
        self.attribute_counts = np.maximum(np.round(n * has), 1).astype(np.int64)
        self.attribute_names = {
            "notion": [f"n{i}" for i in range(NOTIONS)], "style": [], "source": []
        }  # fmt: skip

    def __len__(self):
        return self.n

    def rows(self, rung):
        return Every(self.n, list(self.rungs).index(rung), len(self.rungs))

    def drawn(self, ids):
        """Notions drawn for each caption, 1 to MOST; those drawn twice count once later."""
        return 1 + (mixed(ids.astype(np.uint64)) & np.uint64(MOST - 1)).astype(np.int64)

    def attributes(self, ids):
        started = time.perf_counter()
        seed = mixed(ids.astype(np.uint64))
        steps = np.arange(1, MOST + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        uniform = (mixed(seed[:, None] + steps) >> np.uint64(11)).astype(float) * 2.0**-53
        rank = np.exp(uniform * np.log(NOTIONS + 1)).astype(np.int32) - 1
        np.minimum(rank, NOTIONS - 1, out=rank)
        count = 1 + (seed & np.uint64(MOST - 1)).astype(np.int64)
        rank[np.arange(MOST) >= count[:, None]] = NOTIONS
        rank.sort(axis=1)
        kept = rank < NOTIONS
        kept[:, 1:] &= rank[:, 1:] != rank[:, :-1]
        answer = rank[kept], np.concatenate([[0], np.cumsum(kept.sum(axis=1))])
        self.seconds += time.perf_counter() - started
        return answer


class Every:
    """The ids first, first + step, … below n, as an array would give them."""

    def __init__(self, n, first, step):
        self.first, self.step, self.count = first, step, (n - first + step - 1) // step

    def __len__(self):
        return self.count

    def __getitem__(self, places):
        return self.first + self.step * places


def rss_anon():
    """MiB of memory that is no file's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon"))


def make(made, rule, tempering):
    sampling, coin = RULES[rule]
    size, aspect = (
        {"mean": m, "std": s, "low": m - 1, "high": m + 1} for m, s in ((256, 0), (0, 0.2))
    )
    phase = {"rungs": list(made.rungs), "size": size, "aspect": aspect, "batch": 1024}
    feedback = {"sampling": sampling, "coin": coin, "discard": 0.5, "most_dropped": 0.9}
    feedback |= {"targets": {"notion": tempering}, "tolerance": 0.1}
    return StatisticalSampler(made, {"training": {"p": phase}, "feedback": feedback}, "p", 0)


def distance(share, target):
    """Total variation."""
    return float(np.abs(share - target).sum() / 2)


def figures(made, sampler, rule, seconds, kept):
    """One line: what was streamed, what it cost, what it reached."""
    drawn, accepted = sampler.tally["drawn"], sampler.tally["accepted"]
    counts, trained = sampler.counts, int(sampler.trained.sum())
    share, target = counts / counts.sum(), sampler.targets.share
    return {
        "rule": rule,
        "set": made.n,
        "streamed": drawn,
        "trained": trained,
        "us_a_sample": 1e6 * (seconds - made.seconds) / trained,
        "us_a_candidate": 1e6 * (seconds - made.seconds) / drawn,
        "us_to_make_up_a_sample": 1e6 * made.seconds / trained,
        "rss_anon_mib": rss_anon(),
        "discarded": 1 - accepted / drawn,
        "evenness": evenness(counts),
        "distance_to_target": distance(share, target),
        "distance_of_set": distance(made.attribute_counts / made.attribute_counts.sum(), target),
        "notions_seen": float((counts > 0).mean()),
        "tail_half_seen": float((counts[NOTIONS // 2 :] > 0).mean()),
        "tail_half_share": float(share[NOTIONS // 2 :].sum()),
        "notions_a_caption": float(counts.sum() / trained),
        # Of the captions with so many notions drawn, an eighth of the stream each.
        "kept_by_notions": (MOST * kept / kept.sum() * accepted / drawn).tolist(),
    }  # fmt: skip


def run(out, streamed, n, rules, tempering):
    out.mkdir(parents=True, exist_ok=True)
    for rule in rules:
        made = Made(n)
        sampler, state = make(made, rule, tempering), out / f"{rule}.state.json"
        seconds, kept = 0.0, np.zeros(MOST, np.int64)
        if state.is_file():
            saved = read_json(state)
            sampler.load_state_dict(saved["sampler"])
            seconds, made.seconds, kept = saved["seconds"], saved["made"], np.array(saved["kept"])
        points = 10 ** np.arange(4, 12, 1 / A_DECADE)
        for point in [p for p in points if sampler.tally["drawn"] < p < 1.01 * streamed]:
            while sampler.tally["drawn"] < point:
                started = time.perf_counter()
                _, ids = sampler.next_batch()
                seconds += time.perf_counter() - started
                kept += np.bincount(made.drawn(ids), minlength=MOST + 1)[1:]
            line = figures(made, sampler, rule, seconds, kept)
            with (out / f"{rule}.jsonl").open("a") as file:
                print(json.dumps(line), file=file)
            saved = {"sampler": sampler.state_dict(), "seconds": seconds, "made": made.seconds}
            write_json(state, saved | {"kept": kept.tolist()})
            short = {k: round(v, 4) for k, v in line.items() if isinstance(v, float)}
            print(f"{rule} {line['streamed']:,}", json.dumps(short), flush=True)


PANELS = (
    ("us_a_sample", "µs a sample trained on, sampler alone"),
    ("rss_anon_mib", "memory of the process, MiB"),
    ("discarded", "share of candidates discarded"),
    ("evenness", "evenness of notions (1: uniform)"),
    ("distance_to_target", "total variation to the target"),
    ("tail_half_seen", "rarer half of the notions: ever trained on"),
    ("tail_half_share", "rarer half: share of all notions trained on"),
    ("notions_a_caption", "notions a caption trained on"),
)
LABELS = {
    "uniform": "uniform",
    "sample": "one coin a sample",
    "notion": "one coin a notion (paper)",
}


def plot(out, picture):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(3, 3, figsize=(12, 9), layout="constrained")
    for i, rule in enumerate(RULES):
        if not (out / f"{rule}.jsonl").is_file():
            continue
        lines = [json.loads(line) for line in (out / f"{rule}.jsonl").read_text().splitlines()]
        streamed = [line["streamed"] for line in lines]
        for axes, (key, _) in zip(panels.flat, PANELS, strict=False):
            axes.plot(streamed, [line[key] for line in lines], ".-", label=LABELS[rule])
        at = np.arange(1, MOST + 1) + 0.27 * (i - 1)
        panels.flat[-1].bar(at, lines[-1]["kept_by_notions"], 0.25)
    for axes, (key, title) in zip(panels.flat, PANELS, strict=False):
        axes.set_xscale("log")
        axes.set_title(title, fontsize=10)
        if key in ("us_a_sample", "rss_anon_mib"):
            axes.set_ylim(0)
    panels[0, 0].legend(frameon=False, fontsize=8)
    panels.flat[-1].set_title("kept, by the notions of the caption", fontsize=10)
    for axes in panels.flat:
        axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("candidates streamed (last panel: notions of the caption)", fontsize=10)
    figure.savefig(picture, dpi=90)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("run", "plot"))
    parser.add_argument("out", type=Path)
    parser.add_argument("picture", type=Path, nargs="?", default=Path("docs/sampling.png"))
    parser.add_argument("--streamed", type=float, default=1e7)
    parser.add_argument("--set", type=float, default=1e9)
    parser.add_argument("--tempering", type=float, default=0.0)
    parser.add_argument("--rules", default=",".join(RULES))
    given = parser.parse_args()
    if given.what == "plot":
        plot(given.out, given.picture)
    else:
        run(given.out, int(given.streamed), int(given.set), given.rules.split(","), given.tempering)


if __name__ == "__main__":
    main()
