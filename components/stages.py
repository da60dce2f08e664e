"""The stages of dvc.yaml: which function each runs, on which files.

A stage reads params.yaml and files, writes files, and reports to its own run. Nothing here
imports torch before a stage that needs it runs.
"""

import re
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from components.compose import load
from components.errors import UserError
from components.files import hash_of, read_yaml
from components.home import djepa_home
from components.lockfile import check_lock
from components.processes import launched, only_one
from components.runs_view import stage_note
from components.tracking import Tracker, complete_parent, remember, stage_run, wait_sent

CURATED, ENCODED = Path("curated"), Path("encoded")
MODELS, STATES, METRICS = Path("models"), Path("states"), Path("metrics")
REFERENCES, CRITICS, SAMPLES = Path("references"), Path("critics"), Path("samples")
REPORTS, PLOTS, LABELS = Path("reports"), Path("plots"), Path("labels")
BY_MACHINE = ("auto", "simulated")  # what a round's `labels` says when no people are asked


@dataclass
class Call:
    """One call of a stage: its key (the part after `@`), parameters, run and snapshot folder."""

    key: str
    params: dict[str, Any]
    tracker: Tracker
    resume: Path

    @property
    def round(self) -> Mapping[str, str]:
        """The round's line in feedback.rounds."""
        return self.params["feedback"]["rounds"][self.key]


def _curate(call: Call) -> Path:
    from components.curation.curate import curate
    from components.rawdata import DATA, check_recorded

    check_recorded(call.params)
    metrics = METRICS / "curate.json"
    curate(DATA, CURATED, call.params, call.tracker, metrics)
    return metrics


def _contract(call: Call) -> Path:
    from components.curation.contract import check

    metrics = METRICS / "contract.json"
    check(CURATED, metrics, REPORTS / "contract", call.params, call.tracker)
    return metrics


def _encode(call: Call) -> Path:
    from components.tokens.encode import encode

    metrics = METRICS / "encode.json"
    encode(CURATED, ENCODED, metrics, call.params, call.tracker)
    return metrics


def _train(call: Call, phase: str, name: str, init: Path | None, critic: Path | None) -> Path:
    from components.training.phases import train_phase

    metrics = METRICS / "train" / f"{name}.json"
    train_phase(
        phase,
        ENCODED,
        init,
        critic,
        MODELS / name,
        STATES / name,
        metrics,
        call.resume,
        call.params,
        call.tracker,
    )
    _card(call, name)
    return metrics


def _card(call: Call, name: str) -> None:
    """Keep what describes a model with its run: a registered version shows it."""
    for file in ("README.md", "model_index.json"):
        call.tracker.log_artifact(MODELS / name / file, "model")


def _phase1(call: Call) -> Path:
    return _train(call, "phase1", "phase1", None, None)


def _phase2(call: Call) -> Path:
    # What the round's line says of phase2 holds for this round.
    own: Any = call.round.get("phase2", {})
    training = call.params["training"]
    training["phase2"] = training["phase2"] | own
    return _train(call, "phase2", call.key, STATES / call.round["model"], CRITICS / call.key)


def _references(call: Call) -> Path:
    from components.feedback.references import references

    metrics = METRICS / "references" / f"{call.key}.json"
    model = MODELS / call.round["model"]
    references(model, ENCODED, REFERENCES / call.key, metrics, call.key, call.params, call.tracker)
    return metrics


def _critic(call: Call) -> Path:
    from components.feedback.critic import critic

    metrics = METRICS / "critic" / f"{call.key}.json"
    before = call.round["critic"]
    critic(
        REFERENCES / call.key,
        CURATED,
        None if before == "none" else CRITICS / before,
        LABELS / f"{call.round['labels']}.jsonl",
        CRITICS / call.key,
        metrics,
        call.key,
        call.params,
        call.tracker,
    )
    return metrics


def _dpo(call: Call) -> Path:
    from components.training.preference import dpo

    metrics = METRICS / "train" / "dpo.json"
    start = call.params["dpo"]["from"]
    dpo(
        STATES / start,
        MODELS / start,
        ENCODED,
        MODELS / "dpo",
        STATES / "dpo",
        metrics,
        call.resume,
        call.params,
        call.tracker,
    )
    _card(call, "dpo")
    return metrics


def _evaluate(call: Call) -> Path:
    from components.evaluation.evaluate import evaluate

    metrics = METRICS / "evaluate" / f"{call.key}.json"
    # No model that is trained here has the name of one that is scored beside (limits.py).
    beside = call.params["evaluation"]["beside"]
    model = Path(beside[call.key]["model"]) if call.key in beside else MODELS / call.key
    evaluate(model, SAMPLES / call.key, metrics, call.params, call.tracker, resume=call.resume)
    return metrics


def _compare(call: Call) -> Path:
    from components.evaluation.compare import compare

    metrics = METRICS / "compare" / f"{call.key}.json"
    # What preference optimisation is worth shows beside the model that it tuned.
    params = call.params
    baseline = params["dpo"]["from"] if call.key == "dpo" else params["evaluation"]["baseline"]
    compare(SAMPLES / call.key, SAMPLES / baseline, metrics, call.params, call.tracker)
    return metrics


def _report(call: Call) -> Path:
    from components.evaluation.report import report

    report(METRICS, REPORTS / "run", PLOTS, call.params, call.tracker)
    return REPORTS / "run" / "summary.json"


STAGES: dict[str, Callable[[Call], Path]] = {
    "curate": _curate,
    "contract": _contract,
    "encode": _encode,
    "phase1": _phase1,
    "references": _references,
    "critic": _critic,
    "phase2": _phase2,
    "dpo": _dpo,
    "evaluate": _evaluate,
    "evaluate-beside": _evaluate,
    "compare": _compare,
    "compare-beside": _compare,
    "report": _report,
}


TOGETHER = ("phase1", "phase2")  # the stages that torchrun may run in several processes


def definition(stage: str) -> dict[str, Any]:
    """What dvc.yaml says of a stage, with its name there as `name`, and what is in its `do`.

    stage: as `djepa stage` or as `dvc repro` takes it, evaluate@phase1 or evaluate-phase1.
    """
    base, _, key = stage.partition("@")
    stages = read_yaml(Path("dvc.yaml"))["stages"]
    if f"{base}-{key}" in stages:
        return {"name": f"{base}-{key}", **stages[f"{base}-{key}"]}
    entry = stages.get(base, {})
    if not entry or ("foreach" in entry) != bool(key):
        names = [f"{name}@ROUND" if "foreach" in stages[name] else name for name in stages]
        raise UserError(f"dvc.yaml has no stage {stage!r}: it has {', '.join(names)}.")
    return {"name": stage, **entry, **entry.get("do", {})}


def section(stage: str, params: Mapping[str, Any]) -> dict[str, Any]:
    """The part of params.yaml that dvc.yaml lists as the stage's parameters."""
    part: dict[str, Any] = {}
    for name in definition(stage).get("params", []):
        name = name.replace("${key}", stage.partition("@")[2])
        value: Any = params
        for step in name.split("."):
            value = value[step]
        part[name] = value
    return part


def _inputs(stage: str, params: Mapping[str, Any]) -> dict[str, str]:
    """Hashes of the stage's inputs as dvc.lock has them (code is left out: a mended trainer
    goes on from its snapshot)."""
    lock = Path("dvc.lock")
    if not lock.exists():
        return {}
    outs = {
        out["path"]: out["md5"]
        for entry in read_yaml(lock)["stages"].values()
        for out in entry.get("outs", [])
    }
    return {path: outs[path] for path in dependencies(stage, params) if path in outs}


def each(stage: str, params: Mapping[str, Any]) -> Mapping[str, Any]:
    """The mapping for each key of which there is such a stage; empty where there is but one."""
    named = definition(stage).get("foreach")
    return _with_names(named, params) if named else {}


def _with_names(text: str, values: Mapping[str, Any]) -> Any:
    """The value that `${a.b}` names, or a text with every such name filled in, as DVC does."""

    def value(name: str) -> Any:
        found: Any = values
        for step in name.split("."):
            found = found[step]
        return found

    alone = re.fullmatch(r"\$\{([^}]+)\}", text)
    if alone:
        return value(alone[1])
    return re.sub(r"\$\{([^}]+)\}", lambda name: str(value(name[1])), text)


def snapshots(stage: str, params: Mapping[str, Any]) -> Path:
    """The folder for this stage's snapshots: another one for other parameters or inputs."""
    key = hash_of([stage, section(stage, params), _inputs(stage, params)])
    return djepa_home() / "resume" / key


def dependencies(stage: str, params: Mapping[str, Any]) -> list[str]:
    """The paths that dvc.yaml lists as the stage's inputs, names filled in as DVC does."""
    return _filled(stage, params, definition(stage).get("deps", []))


def outputs(stage: str, params: Mapping[str, Any]) -> list[Path]:
    """The paths that dvc.yaml lists as the stage's outputs."""
    return [Path(out) for out in _filled(stage, params, definition(stage)["outs"])]


def _filled(stage: str, params: Mapping[str, Any], paths: list[str]) -> list[str]:
    """Paths of a stage's definition with `${…}` replaced as DVC does."""
    key = stage.partition("@")[2]
    values = {"key": key, "item": each(stage, params).get(key, {}), **params}
    return [str(_with_names(path, values)) for path in paths]


def missing_labels(key: str, params: Mapping[str, Any]) -> Path | None:
    """The file of people's labels that the critic of round `key` needs and lacks; else None."""
    name = params["feedback"]["rounds"][key]["labels"]
    file = LABELS / f"{name}.jsonl"
    nobody = params["feedback"]["critic"] == "none" or name in BY_MACHINE
    return None if nobody or (file.exists() and file.stat().st_size) else file


def _way(path: str, name: str, key: str, params: Mapping[str, Any]) -> str:
    """How to get an input that is missing."""
    if path == params["dpo"]["pairs"]["path"]:
        return "set dpo.pairs.path to what the pairs are read from (docs/dpo.md)"
    if Path(path).parent == LABELS:
        from components.feedback.labels import commands

        return commands(Path(path), REFERENCES / key)
    return f"run `{'djepa data' if path == 'data' else f'dvc repro {name}'}`, which makes it"


def _stop(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def run_stage(stage: str) -> None:
    """Run one stage of dvc.yaml here, in its own tracked run.

    Raises:
        UserError: there is no such stage, params.yaml is stale, an input is not there, or the
            stage refused it.
    """
    base, _, key = stage.partition("@")
    if base not in STAGES:
        raise UserError(f"There is no stage {stage!r}: the stages are {', '.join(STAGES)}.")
    params = load()
    check_lock()
    name, known = definition(stage)["name"], each(stage, params)
    if "@" in name and key not in known:
        where = "evaluation.beside" if base.endswith("-beside") else "feedback.rounds"
        raise UserError(
            f"There is no {key!r} for the stage {base}: {where} has "
            f"{', '.join(known) or 'none'}; add it in params/ or name one of them."
        )
    rank, size = launched() or (0, 1)
    if size > 1 and base not in TOGETHER:
        raise UserError(
            f"The stage {stage} runs in one process: start it without torchrun, which is for "
            f"{' and '.join(TOGETHER)}."
        )
    part = section(stage, params)
    for path in dependencies(stage, params):
        if not Path(path).exists():
            way = _way(path, name, key, params)
            raise UserError(f"The stage {stage} needs {path}, which is not there: {way}.")
    resume = snapshots(stage, params)
    # A polite stop ends the run as KILLED instead of leaving it running for ever.
    signal.signal(signal.SIGTERM, _stop)
    if rank > 0:  # rank 0 reports for all
        STAGES[base](Call(key, params, Tracker(), resume))
        return
    started = time.monotonic()
    with only_one(resume.with_suffix(".lock"), f"The stage {stage}"):
        print(f"{stage}: started", flush=True)
        with stage_run(stage, params, part) as tracker:
            note = stage_note(name, definition(stage).get("desc", ""))
            tracker.set_tags({"mlflow.note.content": note})
            metrics = STAGES[base](Call(key, params, tracker, resume))
            seconds = time.monotonic() - started
            tracker.log_metrics({"seconds": seconds})
            remember(stage, metrics, tracker, seconds)
            if base == "report":
                complete_parent(tracker, METRICS, params)
    if base == "report":  # the end of the graph: what it made can be looked at now
        wait_sent()
    print(f"{stage}: done in {seconds:.1f} s", flush=True)
