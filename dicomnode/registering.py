"""Registers and judges what a job's folder holds, and keeps what it found there.

Law: nothing here asks the index or sends; a worker that runs a job and a person who reproduces one come the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import registration_engine
from dicomnode import objects, volumes
from dicomnode.errors import RegistrationRejectedError, StudyError
from dicomnode.job_folder import JobFolder, Result
from dicomnode.model import Verdict
from dicomnode.quality import measure
from dicomnode.rule import Rule
from dicomnode.verdict import judge, of_all
from registration_engine import Preset, Volume
from registration_engine.devices import describe_device
from registration_engine.dynamic import register_4d

_SHARES = {"prepare": (0.0, 0.1), "linear": (0.1, 0.3), "field": (0.3, 0.95), "judge": (0.95, 1.0)}
"""From where to where each stage of the engine takes a registration, by the time it needs."""


class _Phases(Sequence[Volume]):
    """The phases of a dynamic series, each read when it is asked for."""

    def __init__(self, roles: Sequence[str], load: Callable[[str], Volume]) -> None:
        self._roles, self._load = roles, load

    def __len__(self) -> int:
        return len(self._roles)

    def __getitem__(self, number: Any) -> Any:
        return self._load(self._roles[number])


def register(
    folder: JobFolder, *, preset: Preset, device: str, seed: int = 0, progress: Callable[[str, float], None]
) -> None:
    """Register, and sample each result on the very grid that will be delivered.

    `progress` is called with the stage of the engine, or with the phase in hand, and the share of the whole that is
    done, which falls only where the engine starts anew for want of memory.

    Raises
    ------
    RegistrationRejectedError
        The one pair has no plausible result.
    StudyError
        These images cannot be registered.
    """
    try:
        if len(folder.order) > 2:
            _register_phases(folder, preset, device, seed, progress)
            return
        fixed, moving = (volumes.load(folder.datasets(role)) for role in ("fixed", "moving"))

        def told(stage: str, part: float) -> None:
            progress(stage, _share(stage, part))

        found = registration_engine.register(fixed, moving, preset=preset, device=device, seed=seed, progress=told)
        folder.write_result(Result(found, objects.sample_grid(found), datetime.now(UTC)))
    except registration_engine.ImplausibleResultError as error:
        raise RegistrationRejectedError(str(error)) from error
    except registration_engine.RegistrationError as error:
        raise StudyError(str(error)) from error


def _register_phases(
    folder: JobFolder, preset: Preset, device: str, seed: int, progress: Callable[[str, float], None]
) -> None:
    """All phases of a dynamic series onto its reference, each from what its neighbour found."""
    order = folder.order
    phases = _Phases(order, lambda role: volumes.load(folder.datasets(role)))
    failed: dict[str, str] = {}
    done = 0

    def told(number: int, stage: str, part: float) -> None:
        progress(f"phase {number + 1}/{len(order)}", (done + _share(stage, part)) / (len(order) - 1))

    registered = register_4d(
        phases, reference=order.index("fixed"), preset=preset, device=device, seed=seed, progress=told
    )
    for phase in registered:
        role = order[phase.number]
        if phase.registration is None:
            failed[role] = f"phase {phase.number}: {phase.error}"
        else:
            sampled = objects.sample_grid(phase.registration)
            folder.write_result(Result(phase.registration, sampled, datetime.now(UTC)), role)
        done += 1
    folder.write_json("failed", failed)


def _share(stage: str, part: float) -> float:
    start, end = _SHARES[stage]
    return start + part * (end - start)


def judge_pairs(folder: JobFolder, rule: Rule) -> tuple[Verdict, str, dict[str, Any]]:
    """Judge what would be delivered of every pair, each alone: the verdict on all of it, its reason, the reports.

    What was measured is kept where the rule's outputs tell of it.
    A report is the engine's, with the measured `figures`; of several pairs it is a list, `phases`, with None for one
    that could not be registered.
    """
    moving, failed = folder.moving_roles, folder.read_json("failed")
    judged: dict[str, tuple[Verdict, str]] = {role: (Verdict.REJECT, reason) for role, reason in failed.items()}
    fixed = volumes.load(folder.datasets("fixed"))
    reports = {}
    for role in moving:
        if role in failed:
            continue
        result = folder.result(role)
        found, sampled = result.registration, result.sampled
        image = volumes.load(folder.datasets(role))
        measured = measure(fixed, image, found, sampled.field, grid_error_mm=sampled.max_error_mm).measured
        if set(rule.outputs) & set(objects.QUALITY):
            folder.write_measured(measured, role)
        figures = measured.figures
        judged[role] = judge(figures, rule.verdict)
        reports[role] = {**found.report.as_dict(), "figures": figures.as_dict()}
    folder.write_json("verdicts", judged)
    report = reports[moving[0]] if len(moving) == 1 else {"phases": [reports.get(role) for role in moving]}
    return *of_all([judged[role] for role in moving]), report


def provenance(folder: JobFolder) -> dict[str, Any]:
    """What a person must know to come to these results again, as plain values.

    `inputs` holds for each role and its drawings the instances (UID, sha256, frames), `order` the roles in time,
    `results` for each role that was registered its report and when it was made, `software` and `machine` what it was
    made with.
    """
    roles = folder.order
    failed = folder.read_json("failed")
    results = {role: folder.result(role) for role in folder.moving_roles if role not in failed}
    devices = sorted({each.registration.report.device for each in results.values()})
    return {
        "inputs": {
            role: [[each.sop_instance_uid, each.sha256, list(frames)] for each, frames in folder.inputs(role)]
            for role in folder.members
        },
        "order": roles,
        "results": {
            role: {"report": each.registration.report.as_dict(), "registered_at": each.registered_at.isoformat()}
            for role, each in results.items()
        },
        "software": {name: version(name) for name in ("dicomnode", "torch", "numpy", "SimpleITK", "pydicom")},
        "machine": {device: describe_device(device) for device in devices},
    }
