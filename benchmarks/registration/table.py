"""RESULTS.md from the cells there are: one table per row of the side by side, means over seeds, and what is missing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.registration.cases import Case

METHODS = ("before", "ants-mi", "ants-cc", "greedy", "elastix", "convexadam", "demons", "fireants", "fast", "balanced",
           "accurate", "paper-student", "paper-teacher")  # fmt: skip
NAMES = {"ants-mi": "ANTs SyN MI", "ants-cc": "ANTs SyN CC", "convexadam": "ConvexAdam", "demons": "SimpleITK demons",
         "fireants": "FireANTs"} | {name: f"**{name}**" for name in METHODS[8:]}  # fmt: skip
COLUMNS = (("dice", "Dice", 3), ("hd95_mm", "HD95 mm", 2), ("tre_mm", "TRE mm", 2), ("tre95_mm", "TRE 95 % mm", 2),
           ("pmm", "PMM", 4), ("folds", "folding", 5), ("sdlogj", "SDlogJ", 3), ("cpu_s", "CPU s", 0),
           ("wall_s", "wall s", 0), ("peak_mb", "peak MB", 0))  # fmt: skip

HEAD = """# Registration side by side

Written by `make bench-registration`; do not edit. One row of a table is one method on the pairs of one group, mean over
those that are done. Dice, HD95, TRE and PMM (patch-wise normalized mutual information over the fixed body, the paper's
Appendix C) say how well the images meet; folding and SDlogJ (over the fixed body, affine part taken out) say at what
price. The same code judges every method's field.

* Seconds and memory are those of a process of its own, from its start to the result: imports, reading and affine start
  included. **CPU seconds are the comparable column**: the machine was shared, and wall seconds say as much about the
  others on it (load averages below) as about the method.
* Peers run at their authors' defaults, on one thread where they can be told so; a cell over 30 minutes of processor
  time is entered as not finished. Greedy and FireANTs take their mutual information where the images are of different
  kinds, their correlation elsewhere.
* ANTs draws random samples; its seed is fixed to 1 (of four unseeded runs of `abdomen-ct-mr` three reached a Dice of
  0.41 to 0.45 and one 0.00).
* HD95 is the larger of the two directed percentiles, mean over the labels that both images have.
* `held out` marks pairs that were never used to choose a setting.
* `brain-t1-two-subjects`: voxelmorph (Apache-2.0) and learn2reg tutorials; `brain-ms`: Lesjak et al., Neuroinformatics
  2017 (CC BY); `body-ct`, `abdomen-ct-mr`: TotalSegmentator (Apache-2.0); `liver-mr-breathing`: mdreg (Apache-2.0);
  `dce` is drawn by `benchmarks/registration/dynamic.py`. No image of them is part of this repository.
"""


def write_table(out: Path, results: Path, rows: Sequence[Case]) -> None:
    """Write the tables of every group that has a cell."""
    cells = [json.loads(line) for path in sorted(results.glob("*.jsonl")) for line in path.read_text().splitlines()]
    by_row = {(cell["method"], cell["row"]): cell for cell in cells}
    loads = [load for cell in cells for load in cell.get("load", [])]
    parts = [HEAD]
    if loads:
        machines = sorted({cell["machine"] for cell in cells})
        parts.append(
            f"Measured on: {'; '.join(machines)}. Load average during the cells: median {np.median(loads):.1f}, "
            f"highest {max(loads):.1f}.\n"
        )
    for group in dict.fromkeys(case.group for case in rows):
        members = [case for case in rows if case.group == group]
        parts.append(_group(group, members, by_row))
    parts += [_costs(by_row), _dynamic(by_row)]
    missing = {method: sum((method, case.name) not in by_row for case in rows) for method in METHODS}
    parts.append("## Cells that are still missing\n")
    parts.append("\n".join(f"* {NAMES.get(m, m)}: {n} of {len(rows)}" for m, n in missing.items() if n))
    parts.append("\n`make bench-registration` goes on where it stopped.\n\n## What ran\n")
    ran = sorted({f"* {NAMES.get(c['method'], c['method'])}: {c['versions']}" for c in cells})
    parts.append("\n".join(ran))
    out.write_text("\n".join(parts) + "\n", encoding="utf-8")


def _group(group: str, members: Sequence[Case], by_row: dict[tuple[str, str], dict[str, Any]]) -> str:
    held = sum(case.held_out for case in members)
    about = f"{len(members)} pair{'s' * (len(members) > 1)}" + (f", {held} held out" if held else "")
    lines = [f"## {group} ({about})\n"]
    table = []
    for method in METHODS:
        found = [by_row[method, case.name] for case in members if (method, case.name) in by_row]
        good = [cell for cell in found if "pmm" in cell]
        reasons = sorted({cell.get("failed") or cell["cannot"] for cell in found if "pmm" not in cell})
        if found:
            table.append((method, good, len(found), reasons))
    if not table:
        return lines[0] + "\nno cell yet\n"
    shown = [c for c in COLUMNS if any(c[0] in cell for _, good, *_ in table for cell in good)]
    lines.append(f"| method | pairs | {' | '.join(title for _, title, _ in shown)} |")
    lines.append("|---|---|" + "---|" * len(shown))
    for method, good, tried, reasons in table:
        pairs = f"{len(good)}/{tried}"
        values = [
            f"{np.mean([cell[key] for cell in good]):.{digits}f}" if all(key in cell for cell in good) and good else ""
            for key, _, digits in shown
        ]
        lines.append(f"| {NAMES.get(method, method)} | {pairs} | {' | '.join(values)} |")
        lines += [f"| | | {reason.replace('|', '/')} |" + " |" * (len(shown) - 1) for reason in reasons]
    return "\n".join(lines) + "\n"


def _costs(by_row: dict[tuple[str, str], dict[str, Any]]) -> str:
    """Seconds and memory of one pair at growing sizes, and the power of the number of voxels they grow by."""
    cells = [(row.split(), cell) for (method, row), cell in by_row.items() if method == "series" and row[:4] == "pair"]
    lines = ["## Cost by size\n", "One pair of the DCE phantom, one thread, drawing not counted.\n"]
    lines += ["| preset | voxels | CPU s | wall s | peak MB |", "|---|---|---|---|---|"]
    powers = []
    for preset in dict.fromkeys(words[1] for words, _ in cells):
        sizes, seconds = [], []
        for words, cell in cells:
            if words[1] == preset:
                sizes.append(np.prod([int(n) for n in words[2:]]))
                seconds.append(cell["cpu_s"])
                shape = "×".join(reversed(words[2:]))
                lines.append(
                    f"| {preset} | {shape} | {cell['cpu_s']:.0f} | {cell['wall_s']:.0f} | {cell['peak_mb']:.0f} |"
                )
        if len(sizes) > 1:
            power = np.polyfit(np.log(sizes), np.log(seconds), 1)[0]
            powers.append(f"CPU seconds of `{preset}` grow by the power {power:.2f} of the number of voxels.")
    return "\n".join([*lines, "", *powers, ""])


def _dynamic(by_row: dict[tuple[str, str], dict[str, Any]]) -> str:
    """The whole series."""
    lines = ["## 30-phase DCE, 256×256×32, through `register_4d`\n"]
    lines += [
        "| preset | TRE before mm | TRE mm | worst phase mm | uptake error before | after | CPU s | wall s | peak MB |"
    ]
    lines += ["|---|---|---|---|---|---|---|---|---|"]
    for (method, row), cell in by_row.items():
        if method == "series" and row.startswith("dce"):
            values = ("tre_before_mm", "tre_mm", "tre_worst_phase_mm", "uptake_error_before", "uptake_error")
            shown = [f"{cell[v]:.2f}" for v in values] + [f"{cell[v]:.0f}" for v in ("cpu_s", "wall_s", "peak_mb")]
            lines.append(f"| {row.split()[1]} | {' | '.join(shown)} |")
    note = "Uptake error: root mean square over the phases, mean of the liver dome against a motion-free drawing."
    return "\n".join([*lines, "", note, ""])
