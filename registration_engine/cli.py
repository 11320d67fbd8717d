"""`registration-engine`: register two image files, or warp one through a field.

Exit status: 0 done, 2 bad input, 3 no plausible result. One line on stderr says why.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from registration_engine.engine import register
from registration_engine.errors import (
    ImplausibleResultError,
    NoOverlapError,
    OutOfDeviceMemoryError,
    RegistrationError,
)
from registration_engine.files import read_field, read_volume, write_field, write_volume
from registration_engine.presets import PRESETS
from registration_engine.resampling import warp

DONE, FAILED, BAD_INPUT, NO_PLAUSIBLE_RESULT = 0, 1, 2, 3


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    options = _parser().parse_args(arguments)
    try:
        if options.command == "register":
            _register(options)
        else:
            _warp(options)
    except (ImplausibleResultError, NoOverlapError) as error:
        return _fail(NO_PLAUSIBLE_RESULT, error)
    except OutOfDeviceMemoryError as error:
        return _fail(FAILED, error)
    except RegistrationError as error:
        return _fail(BAD_INPUT, error)
    except OSError as error:
        return _fail(BAD_INPUT, error)
    return DONE


def _register(options: argparse.Namespace) -> None:
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
    if options.report:
        options.report.write_text(json.dumps(registration.report.as_dict(), indent=2) + "\n", encoding="utf-8")


def _warp(options: argparse.Namespace) -> None:
    field, image = read_field(options.field), read_volume(options.image)
    warped = warp(image, field, field.grid, outside=options.outside, interpolation=options.interpolation)
    write_volume(options.out, warped)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="registration-engine", description="Register medical volumes (NIfTI, MetaImage, NRRD)."
    )
    commands = parser.add_subparsers(dest="command", required=True)

    register_ = commands.add_parser("register", help="find where each fixed point lies in the moving image")
    register_.add_argument("fixed", type=Path, help="the image to register to")
    register_.add_argument("moving", type=Path, help="the image to be resampled")
    register_.add_argument("--preset", default="balanced", help=f"{', '.join(PRESETS)} (default: balanced)")
    register_.add_argument("--out-image", type=Path, help="the moving image on the fixed grid")
    register_.add_argument("--out-field", type=Path, help="total displacement on the fixed grid, LPS mm")
    register_.add_argument("--report", type=Path, help="measurements, as JSON")
    register_.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    register_.add_argument("--seed", type=int, default=0)
    register_.add_argument("--fixed-mask", type=Path, help="only fixed voxels where this is above 0 count")
    register_.add_argument("--moving-mask", type=Path, help="the same for the moving image")

    warp_ = commands.add_parser("warp", help="resample an image through a field, onto the field's grid")
    warp_.add_argument("image", type=Path)
    warp_.add_argument("--field", type=Path, required=True)
    warp_.add_argument("--out", type=Path, required=True)
    warp_.add_argument("--interpolation", choices=("linear", "nearest"), default="linear")
    warp_.add_argument("--outside", type=float, default=0.0, help="value outside the image (default: 0)")
    return parser


def _fail(status: int, error: Exception) -> int:
    print(f"registration-engine: {' '.join(str(error).split())}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
