"""`registration-engine`: register image files, warp one through a field, judge what was found.

One line on stderr says why something could not be done.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from registration_engine import training_cli
from registration_engine.dynamic import reference_number, region_mean, register_4d
from registration_engine.engine import register
from registration_engine.errors import (
    ImplausibleResultError,
    InvalidRequestError,
    NoOverlapError,
    OutOfDeviceMemoryError,
    RegistrationError,
)
from registration_engine.files import (
    VolumeFiles,
    read_field,
    read_volume,
    require_writable,
    write_field,
    write_volume,
)
from registration_engine.prepare import body
from registration_engine.presets import PRESETS
from registration_engine.report import evaluate, read_landmarks, write_evaluation, write_uptake
from registration_engine.resampling import warp
from registration_engine.volume import Volume

DONE, FAILED, BAD_INPUT, NO_PLAUSIBLE_RESULT = 0, 1, 2, 3


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    options = _parser().parse_args(arguments)
    try:
        return _COMMANDS[options.command](options)
    except (ImplausibleResultError, NoOverlapError) as error:
        return _fail(NO_PLAUSIBLE_RESULT, error)
    except OutOfDeviceMemoryError as error:
        return _fail(FAILED, error)
    except RegistrationError as error:
        return _fail(BAD_INPUT, error)
    except OSError as error:
        return _fail(BAD_INPUT, f"{error.filename}: {error.strerror}" if error.filename else error)


def _register(options: argparse.Namespace) -> int:
    inputs = [f for f in (options.fixed, options.moving, options.fixed_mask, options.moving_mask) if f]
    for path in (options.out_image, options.out_field):
        if path:
            require_writable(path, inputs)
    if options.report:
        require_writable(options.report, inputs, suffixes=("",))
    fixed, moving = read_volume(options.fixed), read_volume(options.moving)
    registration = register(
        fixed,
        moving,
        preset=options.preset,
        device=options.device,
        seed=options.seed,
        fixed_mask=read_volume(options.fixed_mask) if options.fixed_mask else None,
        moving_mask=read_volume(options.moving_mask) if options.moving_mask else None,
    )
    field = registration.total_field()
    if options.out_image:
        # What lies outside the moving image looks like its darkest part: air in CT, nothing in MR.
        write_volume(options.out_image, warp(moving, field, fixed.grid, outside=float(moving.voxels.min())))
    if options.out_field:
        write_field(options.out_field, field)
    report = json.dumps(registration.report.as_dict(), indent=2) + "\n"
    if options.report:
        options.report.write_text(report, encoding="utf-8")
    elif not (options.out_image or options.out_field):
        print(report, end="")
    return DONE


def _warp(options: argparse.Namespace) -> int:
    require_writable(options.out, [options.field, options.image])
    field, image = read_field(options.field), read_volume(options.image)
    warped = warp(image, field, field.grid, outside=options.outside, interpolation=options.interpolation)
    write_volume(options.out, warped)
    return DONE


def _register_4d(options: argparse.Namespace) -> int:
    phases = VolumeFiles(options.phases)
    middle = reference_number(options.reference, len(phases))
    options.out.mkdir(parents=True, exist_ok=True)
    names = [f"phase_{number:0{len(str(len(phases) - 1))}d}" for number in range(len(phases))]
    for name in names:
        for file in (f"{name}.nii.gz", f"{name}_field.nii.gz"):
            require_writable(options.out / file, options.phases)
    fixed = phases[middle]
    region = _region(fixed, options.region)
    before = [region_mean(phase, fixed.grid, region) for phase in phases]
    after, reports, failed = [float("nan")] * len(phases), dict[str, Any](), 0
    after[middle] = before[middle]

    found = register_4d(
        phases,
        reference=middle,
        preset=options.preset,
        device=options.device,
        seed=options.seed,
        progress=_tell_stage,
    )
    for phase in found:
        name = names[phase.number]
        if phase.registration is None:
            reports[name] = {"error": str(phase.error)}
            failed += 1
            print(f"registration-engine: {options.phases[phase.number]}: {phase.error}", file=sys.stderr)
            continue
        field, moving = phase.registration.total_field(), phases[phase.number]
        image = warp(moving, field, fixed.grid, outside=float(moving.voxels.min()))
        write_volume(options.out / f"{name}.nii.gz", image)
        write_field(options.out / f"{name}_field.nii.gz", field)
        after[phase.number] = region_mean(moving, fixed.grid, region, field)
        reports[name] = phase.registration.report.as_dict()
    told = {"reference": middle, "phases": dict(sorted(reports.items()))}
    (options.out / "report.json").write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    write_uptake(options.out, before, after)
    return NO_PLAUSIBLE_RESULT if failed else DONE


def _evaluate(options: argparse.Namespace) -> int:
    if len(options.moving) != len(options.field):
        raise InvalidRequestError(
            f"Got {len(options.moving)} moving images and {len(options.field)} fields, expected one field for each"
        )
    if (options.fixed_labels is None) != (options.moving_labels is None):
        raise InvalidRequestError("Labels: got one of --fixed-labels and --moving-labels, expected both or none")
    labels = None
    if options.fixed_labels:
        labels = read_volume(options.fixed_labels), read_volume(options.moving_labels)
    landmarks = read_landmarks(options.landmarks) if options.landmarks else None
    backward = read_field(options.backward_field) if options.backward_field else None
    if len(options.moving) > 1 and (labels or landmarks or backward):
        raise InvalidRequestError("Labels, landmarks and a backward field belong to one moving image, got several")
    fixed = read_volume(options.fixed)
    region = _region(fixed, options.region)
    options.out.mkdir(parents=True, exist_ok=True)
    before, after = [], []
    for number, (image, field_file) in enumerate(zip(options.moving, options.field, strict=True)):
        moving, field = read_volume(image), read_field(field_file)
        found = evaluate(
            fixed,
            moving,
            field,
            region,
            labels=labels,
            landmarks_mm=landmarks,
            backward=backward,
            normalized=not options.unnormalized,
        )
        folder = options.out if len(options.moving) == 1 else options.out / f"{number:03d}"
        folder.mkdir(parents=True, exist_ok=True)
        write_evaluation(folder, found, region)
        before.append(region_mean(moving, fixed.grid, region))
        after.append(region_mean(moving, fixed.grid, region, field))
        print(found.table(), end="")
    if len(options.moving) > 1:
        write_uptake(options.out, before, after)
    return DONE


def _region(fixed: Volume, mask: Path | None) -> npt.NDArray[np.bool_]:
    """Where to measure: the mask, or the body as the engine sees it."""
    given = read_volume(mask) if mask else None
    if given is None:
        return body(fixed)
    return np.asarray(warp(given, None, fixed.grid, interpolation="nearest").voxels > 0)


def _finite(text: str) -> float:
    if not np.isfinite(value := float(text)):
        raise argparse.ArgumentTypeError(f"got {text}, expected a finite number")
    return value


def _tell_stage(phase: int, stage: str, part: float) -> None:
    if part == 0:
        print(f"phase {phase}: {stage}", file=sys.stderr)


_COMMANDS = {
    "register": _register,
    "warp": _warp,
    "register-4d": _register_4d,
    "evaluate": _evaluate,
    **training_cli.COMMANDS,
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="registration-engine",
        description="Register medical volumes (NIfTI, MetaImage, NRRD). Exit status: 0 done; 1 not enough memory; "
        "2 bad input; 3 no plausible result; 4 a training has steps left.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    training_cli.add_commands(commands)

    register_ = commands.add_parser("register", help="find where each fixed point lies in the moving image")
    register_.add_argument("fixed", type=Path, help="the image to register to")
    register_.add_argument("moving", type=Path, help="the image to be resampled")
    register_.add_argument("--preset", default="balanced", help=f"{', '.join(PRESETS)} (default: balanced)")
    register_.add_argument("--out-image", type=Path, help="the moving image on the fixed grid")
    register_.add_argument("--out-field", type=Path, help="total displacement on the fixed grid, LPS mm")
    register_.add_argument("--report", type=Path, help="measurements, as JSON; printed where no file is asked for")
    register_.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    register_.add_argument("--seed", type=int, default=0, help="of what is drawn at random (default: 0)")
    register_.add_argument("--fixed-mask", type=Path, help="only fixed voxels where this is above 0 count")
    register_.add_argument("--moving-mask", type=Path, help="the same for the moving image")

    warp_ = commands.add_parser("warp", help="resample an image through a field, onto the field's grid")
    warp_.add_argument("image", type=Path, help="in the field's moving space")
    warp_.add_argument("--field", type=Path, required=True, help="total displacement, LPS mm, as `register` writes it")
    warp_.add_argument("--out", type=Path, required=True, help="the image on the field's grid")
    warp_.add_argument(
        "--interpolation", choices=("linear", "nearest"), default="linear", help="nearest for labels (default: linear)"
    )
    warp_.add_argument("--outside", type=_finite, default=0.0, help="value outside the image (default: 0)")

    series = commands.add_parser("register-4d", help="register every phase of a dynamic series to one of them")
    series.add_argument("phases", nargs="+", type=Path, metavar="PHASE", help="in order of time")
    series.add_argument("--reference", default="middle", help="middle (n // 2), first or a zero-based number")
    series.add_argument("--out", type=Path, required=True, help="folder for images, fields, report and uptake curves")
    series.add_argument("--region", type=Path, help="uptake is measured where this is above 0 (default: the body)")
    series.add_argument("--preset", default="balanced", help=f"{', '.join(PRESETS)} (default: balanced)")
    series.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    series.add_argument("--seed", type=int, default=0, help="of what is drawn at random (default: 0)")

    evaluate_ = commands.add_parser("evaluate", help="measure and picture a registration, whoever made it")
    evaluate_.add_argument("--fixed", type=Path, required=True, help="the image that was registered to")
    evaluate_.add_argument("--moving", type=Path, required=True, nargs="+", help="several: the phases of a series")
    evaluate_.add_argument(
        "--field", type=Path, required=True, nargs="+", help="total displacement, one per moving image"
    )
    evaluate_.add_argument("--out", type=Path, required=True, help="folder for evaluation.json, table.csv and pictures")
    evaluate_.add_argument("--fixed-labels", type=Path, help="whole numbers above 0, for overlap and distance")
    evaluate_.add_argument("--moving-labels", type=Path, help="the same for the moving image, with the same numbers")
    evaluate_.add_argument(
        "--landmarks", type=Path, help="CSV: fixed_x,fixed_y,fixed_z,moving_x,moving_y,moving_z; LPS mm"
    )
    evaluate_.add_argument("--region", type=Path, help="measure where this is above 0 (default: the body)")
    evaluate_.add_argument("--unnormalized", action="store_true", help="patch-wise mutual information in nat, not NMI")
    evaluate_.add_argument("--backward-field", type=Path, help="from moving to fixed, for the inverse consistency")
    return parser


def _fail(status: int, error: Exception | str) -> int:
    print(f"registration-engine: {' '.join(str(error).split())}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
