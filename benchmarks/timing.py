"""What the speed benchmarks share: cases in turn, the machine's ceilings, a table and a picture.

Every case runs once in every round, so that a machine that slows down slows down all of them. Read the ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

Case = Callable[[], object]


@dataclass(frozen=True)
class Group:
    """Cases that are compared with each other.

    Attributes:
        title: of the table.
        cases: by name, in row order.
        per: what the milliseconds are of, as in ("step", 256): they are divided by the number.
        ratios: (name, of, against, wanted): how many times as fast the case ``of`` is as ``against``, and the bar.
        bytes_read: that a case cannot do without reading from memory.
        operations: multiplications and additions that a case cannot do without.
        steps: of a case; where they are given, the table has what one takes, and the units a second.
    """

    title: str
    cases: dict[str, Case]
    per: tuple[str, int]
    ratios: tuple[tuple[str, str, str, str], ...] = ()
    bytes_read: dict[str, float] = field(default_factory=dict)
    operations: dict[str, float] = field(default_factory=dict)
    steps: dict[str, int] = field(default_factory=dict)


def measure(cases: Mapping[str, Case], rounds: int) -> dict[str, list[float]]:
    """Seconds of every case in every round, after one round of warming up."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for i in range(rounds + 1):
        for name, case in tqdm(cases.items(), desc=f"round {i} of {rounds}", leave=False):
            wait()
            began = time.perf_counter()
            case()
            wait()
            if i > 0:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def wait() -> None:
    """Until the device has done what it was told."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def device() -> torch.device:
    """Where the benchmarks run."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def machine() -> str:
    """What the numbers were measured on."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    name = platform.machine()
    if Path("/proc/cpuinfo").exists():
        fields = dict(
            line.split(":", 1)
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if ":" in line
        )
        name = next((v.strip() for k, v in fields.items() if k.strip() == "model name"), name)
    return f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def ceilings() -> dict[str, float]:
    """Bytes read a second, and multiplications and additions a second, in float32: the best of a few tries."""
    where = device()
    # 256 MiB, which no cache holds; a GPU would be told of starting it, not of reading
    x = torch.ones(2**26 if where.type == "cpu" else 2**30, device=where)
    a = torch.ones(2048, 2048, device=where)
    reading = min(_seconds(lambda: x.sum()) for _ in range(7))
    multiplying = min(_seconds(lambda: a @ a) for _ in range(7))
    return {"bytes": x.nbytes / reading, "operations": 2 * 2048**3 / multiplying}


def _seconds(case: Case) -> float:
    wait()
    began = time.perf_counter()
    case()
    wait()
    return time.perf_counter() - began


def command_line(
    name: str,
    title: str,
    make_group: Callable[[int], Group],
    batches: Sequence[int],
    packages: Sequence[str],
) -> None:
    """The command line of a speed benchmark: measure, print, and write name.md, name.json and name.png.

    Args:
        name: of the script.
        title: of the page.
        make_group: the cases of a batch size.
        batches: where nothing is said.
        packages: whose versions stand in the table.
    """
    parser = argparse.ArgumentParser(description=title)
    parser.add_argument("--batches", type=int, nargs="+", default=batches)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="folder for the table, the numbers and the plot")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")  # others' deprecations
    warnings.filterwarnings("error", message="compile=True")  # no case is called what it is not
    torch.manual_seed(0)  # of the weights, and of what the peers draw
    command = f"python benchmarks/{name}.py --batches {' '.join(map(str, options.batches))}"
    command += f" --rounds {options.rounds}"
    versions = ", ".join(f"{package} {version(package)}" for package in packages)
    limits = ceilings()
    groups = [make_group(batch) for batch in options.batches]
    seconds = {group.title: measure(group.cases, options.rounds) for group in groups}
    lines = [f"# {title}", "", f"{date.today()}, {machine()}, {versions}.", ""]
    if any(group.bytes_read or group.operations for group in groups):
        lines += [
            f"Read from memory: {limits['bytes'] / 1e9:.0f} GB/s; multiplied: {limits['operations'] / 1e9:.0f} GFLOP/s; both in",
            "the same run, and `share of the ceiling` is against the one that binds. The range is of all rounds.",
        ]
    else:
        lines += ["The range is of all rounds."]
    lines += ["", f"    {command}", ""]
    for group in groups:
        lines += table(group, seconds[group.title], limits)
    text = "\n".join(lines).rstrip() + "\n"
    print(text)
    if options.out is None:
        return
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"{name}.md").write_text(text)
    record: dict[str, Any] = {"machine": machine(), "versions": versions, "command": command}
    record |= {"ceilings": limits, "seconds": seconds}
    (options.out / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    plot(groups, seconds, options.out / f"{name}.png")


def table(
    group: Group, seconds: Mapping[str, list[float]], limits: Mapping[str, float]
) -> list[str]:
    """Markdown: milliseconds with their range, share of the ceiling, and the ratios that are asked for."""
    unit, count = group.per
    heads = [f"ms per {unit}, median (range)"]
    heads += ["steps", "us per step", f"{unit}s a second"] if group.steps else []
    heads += ["share of the ceiling"] if group.bytes_read or group.operations else []
    lines = [f"## {group.title}", "", f"| case | {' | '.join(heads)} |"]
    lines.append("|---|" + "--:|" * len(heads))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name, values in seconds.items():
        low, middle, high = (1000 * v / count for v in (min(values), medians[name], max(values)))
        floor = max(
            group.bytes_read.get(name, 0.0) / limits["bytes"],
            group.operations.get(name, 0.0) / limits["operations"],
        )
        cells = [f"{middle:.2f} ({low:.2f} to {high:.2f})"]
        if group.steps:
            steps = group.steps[name]
            cells += [f"{steps}", f"{1e6 * medians[name] / steps:.0f}", f"{1000 / middle:.4g}"]
        if group.bytes_read or group.operations:
            cells.append(f"{100 * floor / medians[name]:.0f} %" if floor else "-")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    if group.ratios:
        lines += ["", "| ratio | measured | wanted |", "|---|--:|--:|"]
    for name, of, against, wanted in group.ratios:
        lines.append(f"| {name} | {medians[against] / medians[of]:.2f}x | {wanted} |")
    return [*lines, ""]


def plot(groups: list[Group], seconds: Mapping[str, Mapping[str, list[float]]], file: Path) -> None:
    """Bars of the medians with their range, one panel a group; ours in another colour."""
    from matplotlib.figure import Figure

    heights = [len(group.cases) for group in groups]
    figure = Figure(figsize=(8, 0.32 * sum(heights) + 0.9 * len(groups)), layout="constrained")
    panels = figure.subplots(len(groups), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, group in zip(panels, groups, strict=True):
        unit, count = group.per
        for name, values in seconds[group.title].items():
            middle = 1000 * statistics.median(values) / count
            reach = [[middle - 1000 * min(values) / count], [1000 * max(values) / count - middle]]
            colour = "tab:orange" if name.startswith("unicfg") else "0.7"
            axes.barh(name, middle, xerr=reach, color=colour, capsize=2)
            axes.annotate(
                f"{middle:.2f}" if middle < 100 else f"{middle:.0f}",
                (middle, name),
                va="bottom",
                fontsize=7,
            )
        axes.invert_yaxis()
        axes.set(title=group.title, xlabel=f"ms per {unit}")
        axes.tick_params(labelsize=8)
    figure.savefig(file, dpi=110)
