"""Win rate of a model over a baseline on the same prompts, by an automatic judge.

The paper's three questions in order of priority (prompt adherence, coherence, realism; the next
one counts only after "same"); win rate = (better + 0.5 · same) / (better + same + worse).
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from components.errors import UserError
from components.evaluation.detector import Blob, Detections, realism
from components.evaluation.embedded import detector_of
from components.evaluation.folder import Sample, read_folder
from components.evaluation.geneval import SCORE_THRESHOLD, clauses
from components.evaluation.win_rates import sentence, win_rate
from components.files import write_json
from components.progress import Progress
from components.scenes.world import World
from components.tracking import Tracker

JUDGE = "embedded detector, three questions: adherence, coherence, realism"
QUESTIONS = ("correct", "share", "coherence", "realism")
Answers = tuple[float, float, float, float]  # to QUESTIONS, see `answers`


def answers(metadata: Mapping[str, Any], blobs: Sequence[Blob]) -> Answers:
    """What the judge measures on one picture, larger is better, in order of priority.

    Adherence: GenEval's verdict (0 or 1), then the share of its clauses met. Coherence: minus
    the number of patches that are no known shape and of objects not asked for. Realism: mean
    overlap of the objects with their ideal drawing, 0 where there is none.
    """
    met = [ok for ok, _ in clauses(metadata, as_detections(blobs))]
    asked = Counter({c["class"]: 0 for c in metadata["include"]})
    for clause in metadata["include"]:
        asked[clause["class"]] += clause["count"]
    known = Counter(b.shape for b in blobs if b.score > SCORE_THRESHOLD)
    strange = len(blobs) - known.total() + (known - asked).total()
    return float(all(met)), sum(met) / len(met), -float(strange), realism(blobs)


def as_detections(blobs: Sequence[Blob]) -> Detections:
    """Blobs as GenEval's rules read them."""
    detections: Detections = {}
    for blob in blobs:
        detections.setdefault(blob.shape, []).append([*blob.box, blob.score, blob.color])
    return detections


def verdict(a: Answers, b: Answers, margin: float) -> int:
    """1 when A is better, 0 for the same, −1 when worse; the first difference decides.

    Args:
        a, b: from `answers`.
        margin: realism nearer than this is the same.
    """
    for i in range(3):
        if a[i] != b[i]:
            return 1 if a[i] > b[i] else -1
    if abs(a[3] - b[3]) > margin:
        return 1 if a[3] > b[3] else -1
    return 0


def compare(
    samples: Path,
    baseline: Path,
    metrics_out: Path,
    params: Mapping[str, Any],
    tracker: Tracker,
) -> dict[str, Any]:
    """Judge two evaluation folders picture by picture and write the win rate of the first.

    Writes `metrics_out`: win_rate, low, high (95 %, bootstrap clustered by prompt), better, same,
    worse, n, judge, model, baseline, tasks (win rate of each).

    Raises:
        UserError: the folders hold other prompts or pictures.
    """
    settings = params["evaluation"]
    world = World.from_params(params["data"])
    detector = detector_of(world, settings["detector"])
    ours, theirs = read_folder(samples), read_folder(baseline)
    if [(s.filename, s.metadata) for s in ours] != [(s.filename, s.metadata) for s in theirs]:
        raise UserError(
            f"{samples} and {baseline} hold pictures of other prompts; evaluate both with the "
            "same evaluation parameters first."
        )
    tested: set[tuple[int, int]] = set()

    def judge(sample: Sample) -> Answers:
        image = sample.open()
        if image.size not in tested:
            detector.self_test(*image.size)
            tested.add(image.size)
        return answers(sample.metadata, detector.blobs(image))

    verdicts = []
    progress = Progress(f"judging {samples.name} against {baseline.name}", len(ours), "pairs")
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        verdicts.append(verdict(judge(a), judge(b), float(settings["realism_margin"])))
        progress.at(i + 1)
    prompts, tags = ([s.metadata[key] for s in ours] for key in ("prompt", "tag"))
    outcome = win_rate(verdicts, prompts, tags, settings)
    outcome |= {"judge": JUDGE, "model": samples.name, "baseline": baseline.name}
    write_json(metrics_out, outcome)
    tracker.log_metrics({"win_rate": outcome["win_rate"]})
    print(sentence(outcome), flush=True)
    return outcome
