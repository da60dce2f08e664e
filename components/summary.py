"""What `make demo` ends with: the table, the seconds of each stage, where to look."""

from pathlib import Path

from components.errors import UserError
from components.tracking import recall

METRICS, SAMPLES, REPORTS = Path("metrics"), Path("samples"), Path("reports")


def print_summary() -> None:
    """Print scores by model, seconds by stage, and the ways to look at the results.

    Raises:
        UserError: nothing was evaluated here yet.
    """
    from components.evaluation.report import table

    if not any((METRICS / "evaluate").glob("*.json")):
        raise UserError("There are no scores below metrics/: run `make demo` or `dvc repro` first.")
    print(table(METRICS))
    files = sorted(METRICS.rglob("*.json"))
    notes = [note for file in files if (note := recall(file.read_bytes()))]
    print("Seconds a stage:", ", ".join(f"{n['stage']} {n['seconds']:.0f}" for n in notes))
    for grid in sorted(SAMPLES.glob("*/grid.png")):
        print(f"Pictures with their prompts: {grid}")
    print(f"Report: {REPORTS / 'run' / 'report.html'}")
    print("MLflow: `make ui` says where")
    print("Prefect: `.venv/bin/prefect server start`, then http://127.0.0.1:4200")
    print('Draw one: `.venv/bin/djepa generate "a photo of a red circle"`')
