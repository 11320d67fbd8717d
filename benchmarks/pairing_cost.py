"""What pairing costs: 1,000 studies of 12 series against 50 rules, and the curve over series and rules.

    python benchmarks/pairing_cost.py [STUDIES]

CPU seconds of one core per study (a patient each), median and largest; the curves should be straight lines.
"""

from __future__ import annotations

import copy
import statistics
import sys
import time
from datetime import UTC, datetime
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


def measure(rule_count: int, series: int, studies: int) -> tuple[float, float, int]:
    """Milliseconds per study, median and largest, and how many pairs were made."""
    in_force, times, pairs = rule_set(rule_count), [], 0
    for number in range(studies):
        volumes = study(number, series)
        started = time.process_time()
        pairs += len(pairing.pair(in_force, volumes, quiet_period_s=30, now=NOW).pairs)
        times.append(1000 * (time.process_time() - started))
    return statistics.median(times), max(times), pairs


def main() -> None:
    """Print the table."""
    studies = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    median, largest, pairs = measure(50, 12, studies)
    print(f"{studies} studies × 12 series × 50 rules: median {median:.1f} ms, largest {largest:.1f} ms, {pairs} pairs")
    in_force, volumes = rule_set(50), study(0, 12)
    decision = pairing.pair(in_force, volumes, quiet_period_s=30, now=NOW)
    started = time.process_time()
    written = trace.as_json(decision.findings)
    print(
        f"the full trace of one study: {1000 * (time.process_time() - started):.1f} ms, {len(str(written)) // 1000} kB"
    )
    print("\nrules  series  ms per study  ms per rule and series")
    for rule_count, series in ((5, 12), (10, 12), (25, 12), (50, 12), (100, 12), (50, 3), (50, 6), (50, 24), (50, 48)):
        median = measure(rule_count, series, max(20, studies // 20))[0]
        print(f"{rule_count:5}  {series:6}  {median:12.2f}  {median / rule_count / series:22.4f}")


if __name__ == "__main__":
    main()
