"""What pairing costs: 1,000 studies of 12 series against 50 rules, and the curves over rules, examinations and series.

    python benchmarks/pairing_cost.py [STUDIES]

CPU milliseconds of one core per patient, median and largest. The last column is what should stay the same: the cost
of one rule for one series. In the last curve everything is a copy that nothing tells apart, the worst that can be:
each that may be fixed is compared with each that may be moving.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import yaml

from dicomnode import pairing, rules, trace
from dicomnode.model import VolumeRef

NOW = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
STARTER = Path(__file__).resolve().parents[1] / "deploy" / "rules.yaml"
SERIES = (
    ("CT", "Abdomen nativ 3.0 Br38", "", 3.0), ("CT", "ABD_ART_3mm", "Iomeron 400", 3.0),
    ("CT", "VEN_70s 3.0", "Iomeron 400", 3.0), ("CT", "Spätphase 5 min", "Iomeron 400", 3.0),
    ("CT", "Lunge 1.0 Bl57", "", 1.0), ("CT", "Knochen 2.0", "", 2.0), ("CT", "MPR cor", "", 2.0),
    ("CT", "Topogram 0.6", "", 0.6), ("CT", "Dose Report", "", 1.0), ("CT", "MIP 10", "Iomeron 400", 10.0),
    ("MR", "t1_mprage_sag", "", 1.0), ("MR", "t2_space_dark-fluid", "", 1.0),
)  # fmt: skip


def study(number: int, series: int) -> list[VolumeRef]:
    """One patient's study; no two are the same."""
    found = []
    for n in range(series):
        modality, text, agent, thickness = SERIES[n % len(SERIES)]
        found.append(
            VolumeRef(
                patient_id=f"P{number}",
                issuer_of_patient_id="",
                patient_birth_date="19700101",
                patient_sex="F",
                study_instance_uid=f"1.2.{number}",
                series_instance_uid=f"1.2.{number}.{n}",
                frame_of_reference_uid=f"1.2.{number}.9",
                modality=modality,
                shape=(120, 512, 512),
                affine=(0, 0, 0.7, -180, 0, 0.7, 0, -180, thickness, 0, 0, -n, 0, 0, 0, 1),
                last_received_at=NOW.replace(hour=9),
                header={
                    "SeriesDescription": f"{text} {number}-{n}",
                    "ProtocolName": "Abdomen",
                    "BodyPartExamined": "ABDOMEN",
                    "ImageType": ["ORIGINAL", "PRIMARY"],
                    "StudyDate": "20260301",
                    "AcquisitionTime": f"0910{n % 60:02}",
                    "ContrastBolusAgent": agent,
                    "ConvolutionKernel": "Br38",
                    "SliceThickness": thickness + n / 100,
                },
            )
        )
    return found


def rule_set(count: int) -> rules.RuleSet:
    """The starter rules, repeated under other names until there are `count`, each with a bound of its own."""
    document = yaml.safe_load(STARTER.read_text())
    several = []
    for n in range(count):
        rule = copy.deepcopy(document["rules"][n % len(document["rules"])])
        rule["id"] = f"{rule['id']}-{n}"
        rule["roles"]["fixed"].setdefault("prefer", []).append({"SliceThickness": {"max": 1 + n}, "score": 0.5})
        several.append(rule)
    return rules.parse(yaml.safe_dump(document | {"rules": several}), "benchmark")


def examinations(number: int, count: int) -> list[VolumeRef]:
    """One patient's examinations of 12 series each, a month apart."""
    found = []
    for month in range(count):
        day = f"{2010 + month // 12}{month % 12 + 1:02}01"
        found += [
            replace(
                each,
                study_instance_uid=f"{each.study_instance_uid}.{month}",
                series_instance_uid=f"{each.series_instance_uid}.{month}",
                header={**each.header, "StudyDate": day},
            )
            for each in study(number, 12)
        ]
    return found


def measure(rule_count: int, patients: int, volumes_of: Callable[[int], list[VolumeRef]]) -> tuple[float, float, int]:
    """Milliseconds per patient, median and largest, and how many pairs were made."""
    in_force, times, pairs = rule_set(rule_count), [], 0
    for number in range(patients):
        volumes = volumes_of(number)
        started = time.process_time()
        pairs += len(pairing.pair(in_force, volumes, quiet_period_s=30, now=NOW).pairs)
        times.append(1000 * (time.process_time() - started))
    return statistics.median(times), max(times), pairs


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("studies", type=int, nargs="?", default=1000, help="of 12 series each (default: 1000)")
    studies = parser.parse_args().studies
    median, largest, pairs = measure(50, studies, lambda number: study(number, 12))
    print(f"{studies} studies × 12 series × 50 rules: median {median:.1f} ms, largest {largest:.1f} ms, {pairs} pairs")
    in_force, volumes = rule_set(50), study(0, 12)
    decision = pairing.pair(in_force, volumes, quiet_period_s=30, now=NOW)
    started = time.process_time()
    written = trace.as_json(decision.findings)
    print(
        f"the full trace of one study: {1000 * (time.process_time() - started):.1f} ms, {len(str(written)) // 1000} kB"
    )
    few = max(8, studies // 50)
    print("\nrules  series  examinations  ms per patient  µs per rule and series")
    for rule_count, count in [(n, 1) for n in (5, 10, 25, 50, 100)] + [(50, n) for n in (2, 4, 8, 16, 32)]:
        median = measure(rule_count, few, partial(examinations, count=count))[0]
        one = 1000 * median / rule_count / 12 / count
        print(f"{rule_count:5}  {12 * count:6}  {count:12}  {median:14.2f}  {one:22.1f}")
    print("\nrules  series of one examination that nothing tells apart")
    for series in (3, 6, 12, 24, 48):
        median = measure(50, few, partial(study, series=series))[0]
        print(f"   50  {series:6}  {1:12}  {median:14.2f}  {1000 * median / 50 / series:22.1f}")


if __name__ == "__main__":
    main()
