"""JSON lines to Markdown tables, as docs/performance.md has them."""

from collections.abc import Iterable, Mapping
from typing import Any

from benchmarks.gpu.memory import planned_gib

Line = Mapping[str, Any]


def tables(lines: Iterable[Line]) -> str:
    """All tables; a figure is a median with the least and the most beside it."""
    kinds: dict[str, list[Line]] = {}
    for line in lines:
        kinds.setdefault(line["case"]["kind"], []).append(line)
    parts = [_machines([line for each in kinds.values() for line in each])]
    for kind, table in WAYS.items():
        if kind in kinds:
            parts.append(table(kinds[kind]))
    return "\n\n".join(parts)


def _machines(lines: list[Line]) -> str:
    names = ("gpu", "gib", "driver", "cuda", "torch", "python", "commit")
    said = {
        ", ".join(f"{name} {line[name]}" for name in names if name in line): line["at"][:10]
        for line in lines
    }
    commands = sorted({line["command"] for line in lines})
    machines = [f"Measured {day}: {what}." for what, day in said.items()]
    return "\n".join([*machines, *(f"    {command}" for command in commands)])


def _table(title: str, head: str, rows: Iterable[Iterable[Any]]) -> str:
    columns = [name.strip() for name in head.split("|")]
    lines = [f"### {title}", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    lines += [f"| {' | '.join(str(cell) for cell in row)} |" for row in rows]
    return "\n".join(lines)


def _figure(found: Any, scale: float = 1.0) -> str:
    if not found:
        return "–"
    middle, least, most = (found[name] * scale for name in ("median", "least", "most"))
    if len(found["values"]) == 1:
        return f"{middle:.3g} (once)"
    return f"{middle:.3g} [{least:.3g}, {most:.3g}]"


def _number(line: Line, name: str, digits: int = 1) -> str:
    return f"{line[name]:.{digits}f}" if name in line else "–"


def _failed(line: Line) -> str:
    tried = ", ".join(str(images) for images in line.get("out_of_memory_at", []))
    return " ".join(
        filter(None, [line.get("error", ""), f"(no room for {tried})" if tried else ""])
    )


def _ceilings(lines: list[Line]) -> str:
    rows = [[_figure(x["tflops"]), _figure(x["terabytes_per_second"])] for x in lines]
    head = "bf16 product 8192³, TFLOP/s | copy, TB/s read and written"
    return _table("What the GPU gives", head, rows)


def _training(lines: list[Line]) -> str:
    rows = []
    order = sorted(lines, key=lambda x: ("blh".find(x["case"]["model"]), len(x["case"]["size"])))
    for line in order:
        case = line["case"]
        rows.append(
            [case["model"], case["size"], case["checkpointing"], line.get("images", "–"),
             case.get("parts", 1), _figure(line.get("images_per_second")),
             _figure(line.get("utilisation"), 100),
             _number(line, "tflop_per_image", 2), _number(line, "peak_gib"),
             _number(line, "seconds_first_step", 0), _failed(line)]
        )  # fmt: skip
    head = (
        "network | size | recomputed | batch | parts | images/s | utilisation, % | TFLOP/image | "
        "GiB | "
        "first step, s | "
    )
    return _table("Training with cached latents", head, rows)


def _options(lines: list[Line]) -> str:
    base = next((x for x in lines if x["case"]["option"] == "as it is"), {})
    rate = base.get("images_per_second", {}).get("median")
    rows = []
    for line in lines:
        found = line.get("images_per_second")
        times = f"{found['median'] / rate:.2f}" if found and rate else "–"
        rows.append(
            [line["case"]["option"], line.get("images", "–"), _figure(found), times,
             _figure(line.get("utilisation"), 100), _number(line, "peak_gib"), _failed(line)]
        )  # fmt: skip
    head = "option | batch | images/s | × as it is | utilisation, % | GiB | "
    return _table("Options of the training step, h at 256²", head, rows)


def _memory(lines: list[Line]) -> str:
    rows = []
    for line in lines:
        case, found = line["case"], line.get("measured_gib")
        planned = planned_gib(line) if found else 0.0
        off = f"{100 * (planned / found - 1):+.1f}" if found else "–"
        rows.append(
            [case["model"], case["checkpointing"], case["images"],
             f"{planned:.2f}" if found else "–", _number(line, "measured_gib", 2), off,
             _failed(line)]
        )  # fmt: skip
    head = "network | recomputed | batch | planned, GiB | measured, GiB | off, % | "
    return _table("Memory against `djepa plan`, 256²", head, rows)


def _sampling(lines: list[Line]) -> str:
    rows = []
    order = sorted(lines, key=lambda x: (len(x["case"]["size"]), x["case"]["size"]))
    for line in order:
        case, note = line["case"], line.get("error", "")
        if "steps_measured" in line:
            note = f"{line['steps_measured']} of {case['steps']} steps measured, the rest between"
        rows.append(
            [case["size"], case["batch"], case["steps"], case["euler"], case["way"],
             _figure(line.get("seconds")), _number(line, "pictures_per_second", 3),
             f"{100 * line['utilisation']:.0f}" if "utilisation" in line else "–",
             _number(line, "peak_gib"), note]
        )  # fmt: skip
    head = (
        "size | batch | T | Euler steps | way | seconds a batch | pictures/s | utilisation, % | "
        "GiB | "
    )
    return _table("Sampling, h", head, rows)


WAYS = {
    "ceilings": _ceilings,
    "training": _training,
    "options": _options,
    "memory": _memory,
    "sampling": _sampling,
}
