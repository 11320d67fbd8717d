"""One registration by one method in a process of its own: `python methods.py METHOD FIXED MOVING CONTRAST OUT`.

Runs in the method's own environment, so it imports nothing of ours. Each method is called as its authors document it,
at their defaults, and what it found is turned into one total displacement on the fixed grid, LPS mm. Seconds and memory
are read before that and before writing: from the start of the process to the result in memory, imports, reading and
affine start included.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Finish = Callable[[], Any]
"""Turns what a method found into a SimpleITK vector image on the fixed grid."""


class CannotRunError(Exception):
    """The method is not made for this pair, and why."""


def demons(fixed: str, moving: str, contrast: str, _: Path) -> Finish:
    """SimpleITK, fast symmetric forces demons: histogram matching and three levels, as its notebooks do it."""
    import SimpleITK as sitk  # noqa: N813

    if contrast == "other":
        raise CannotRunError("demons compare intensities: one kind of image only")
    target, source = (sitk.ReadImage(path, sitk.sitkFloat32) for path in (fixed, moving))
    source = sitk.Resample(source, target, sitk.Transform(), sitk.sitkLinear, _darkest(source))
    matched = sitk.HistogramMatching(source, target, 1024, 7, True)
    method = sitk.FastSymmetricForcesDemonsRegistrationFilter()
    method.SetNumberOfIterations(50)
    method.SetStandardDeviations(1.0)
    field = None
    for shrink in (4, 2, 1):
        small = [_shrunk(image, shrink) for image in (target, matched)]
        if field is None:
            start = sitk.Image(small[0].GetSize(), sitk.sitkVectorFloat64)
            start.CopyInformation(small[0])
        else:
            start = sitk.Resample(field, small[0])
        field = method.Execute(*small, start)
    return lambda: field


def ants_mi(fixed: str, moving: str, contrast: str, work: Path) -> Finish:
    """ANTsPy, `registration(…, "SyN")`: affine and SyN by Mattes mutual information."""
    return _ants("SyN", fixed, moving, contrast, work)


def ants_cc(fixed: str, moving: str, contrast: str, work: Path) -> Finish:
    """ANTsPy, `registration(…, "SyNCC")`: rigid, affine, and SyN by cross-correlation."""
    return _ants("SyNCC", fixed, moving, contrast, work)


def _ants(kind: str, fixed: str, moving: str, _: str, work: Path) -> Finish:
    import ants
    import SimpleITK as sitk  # noqa: N813

    found = ants.registration(
        ants.image_read(fixed), ants.image_read(moving), type_of_transform=kind, outprefix=str(work / "ants_")
    )
    warp, matrix = found["fwdtransforms"]

    def finish() -> Any:
        # The last one added acts first: x → affine(warp(x)).
        total = sitk.CompositeTransform(3)
        total.AddTransform(sitk.ReadTransform(matrix))
        total.AddTransform(sitk.DisplacementFieldTransform(sitk.ReadImage(warp, sitk.sitkVectorFloat64)))
        return _field_of(total, fixed)

    return finish


def greedy(fixed: str, moving: str, contrast: str, work: Path) -> Finish:
    """Greedy as in its quick start: affine, then NCC of radius 2; NMI where the images are of different kinds."""
    import SimpleITK as sitk  # noqa: N813
    from picsl_greedy import Greedy3D

    metric = "NMI" if contrast == "other" else "NCC 2x2x2"
    images = f"-d 3 -threads 1 -i {fixed} {moving} -m {metric} -n 100x50x10"
    run = Greedy3D()
    run.execute(f"{images} -a -ia-identity -o {work}/affine.mat")
    run.execute(f"{images} -it {work}/affine.mat -o {work}/warp.nii.gz")

    def finish() -> Any:
        run.execute(f"-d 3 -rf {fixed} -r {work}/warp.nii.gz {work}/affine.mat -rc {work}/total.nii.gz")
        return sitk.ReadImage(f"{work}/total.nii.gz", sitk.sitkVectorFloat64)

    return finish


def elastix(fixed: str, moving: str, _: str, __: Path) -> Finish:
    """itk-elastix: its default translation, affine and B-spline parameter maps; more than one thread crashes it."""
    import itk
    import numpy as np
    import SimpleITK as sitk  # noqa: N813

    target, source = (itk.imread(path, itk.F) for path in (fixed, moving))
    maps = itk.ParameterObject.New()
    for name in ("translation", "affine", "bspline"):
        maps.AddParameterMap(maps.GetDefaultParameterMap(name))
    _, found = itk.elastix_registration_method(target, source, parameter_object=maps, log_to_console=False)

    def finish() -> Any:
        field = itk.transformix_deformation_field(source, found)
        image = sitk.GetImageFromArray(np.asarray(field, dtype=np.float64), isVector=True)
        image.CopyInformation(sitk.ReadImage(fixed))
        return image

    return finish


def convexadam(fixed: str, moving: str, _: str, __: Path) -> Finish:
    """ConvexAdam, `convex_adam_pt` at its defaults, the moving image first resampled to the fixed grid; no affine."""
    import numpy as np
    import SimpleITK as sitk  # noqa: N813
    import torch
    from convexAdam.convex_adam_MIND import convex_adam_pt

    target, source = (sitk.ReadImage(path, sitk.sitkFloat32) for path in (fixed, moving))
    on_fixed = sitk.Resample(source, target, sitk.Transform(), sitk.sitkLinear, _darkest(source))
    found = convex_adam_pt(target, on_fixed, dtype=torch.float32, device=torch.device("cpu"))

    def finish() -> Any:
        # voxels along the array axes (k, j, i) → LPS mm
        directions = np.array(target.GetDirection()).reshape(3, 3) * target.GetSpacing()
        image = sitk.GetImageFromArray(found[..., ::-1] @ directions.T, isVector=True)
        image.CopyInformation(target)
        return image

    return finish


def fireants(fixed: str, moving: str, contrast: str, work: Path) -> Finish:
    """FireANTs as in its README: affine, then greedy by CC of 5 voxels; MI where the images are of different kinds."""
    import SimpleITK as sitk  # noqa: N813
    from fireants.io import BatchedImages, Image
    from fireants.registration.affine import AffineRegistration
    from fireants.registration.greedy import GreedyRegistration

    images = [BatchedImages([Image.load_file(path, device="cpu")]) for path in (fixed, moving)]
    loss = {"loss_type": "mi"} if contrast == "other" else {"loss_type": "cc", "cc_kernel_size": 5}
    affine = AffineRegistration([8, 4, 2, 1], [200, 100, 50, 20], *images, optimizer="Adam", optimizer_lr=3e-3, **loss)
    affine.optimize()
    found = GreedyRegistration(
        scales=[4, 2, 1],
        iterations=[200, 100, 25],
        fixed_images=images[0],
        moving_images=images[1],
        deformation_type="compositive",
        smooth_grad_sigma=1,
        optimizer="adam",
        optimizer_lr=0.5,
        init_affine=affine.get_affine_matrix().detach(),
        **loss,
    )
    found.optimize()

    def finish() -> Any:
        found.save_as_ants_transforms(str(work / "total.nii.gz"))
        return sitk.ReadImage(str(work / "total.nii.gz"), sitk.sitkVectorFloat64)

    return finish


def ours(preset: str) -> Callable[[str, str, str, Path], Finish]:
    """This engine with one of its presets, on the CPU."""

    def run(fixed: str, moving: str, _: str, __: Path) -> Finish:
        from registration_engine import register
        from registration_engine.files import read_volume
        from registration_engine.resampling import field_image

        found = register(read_volume(Path(fixed)), read_volume(Path(moving)), preset=preset, device="cpu")
        return lambda: field_image(found.total_field())

    return run


METHODS = {"demons": demons, "ants-mi": ants_mi, "ants-cc": ants_cc, "greedy": greedy, "elastix": elastix,
           "convexadam": convexadam, "fireants": fireants}  # fmt: skip


def main(name: str, fixed: str, moving: str, contrast: str, out: str) -> int:
    """Run one method; write OUT/field.nii and OUT/measured.json, or say in it why the method cannot run."""
    work = Path(out)
    try:
        finish = METHODS.get(name, ours(name))(fixed, moving, contrast, work)
    except CannotRunError as error:
        (work / "measured.json").write_text(json.dumps({"cannot": str(error)}))
        return 0
    wall, cpu = so_far()
    measured = {"wall_s": round(wall, 2), "cpu_s": round(cpu, 2), "peak_mb": round(peak_mb())}
    import SimpleITK as sitk  # noqa: N813

    sitk.WriteImage(sitk.Cast(finish(), sitk.sitkVectorFloat32), str(work / "field.nii"))
    (work / "measured.json").write_text(json.dumps(measured))
    return 0


def so_far() -> tuple[float, float]:
    """Wall and processor seconds since this process started, its children included."""
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    ticks = Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19]
    wall = time.clock_gettime(time.CLOCK_BOOTTIME) - float(ticks) / os.sysconf("SC_CLK_TCK")
    return wall, sum(u.ru_utime + u.ru_stime for u in usage)


def peak_mb() -> float:
    """Largest resident memory of this process; getrusage would tell that of the parent it was forked from."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) / 1000


def _darkest(image: Any) -> float:
    import SimpleITK as sitk  # noqa: N813

    return float(sitk.GetArrayViewFromImage(image).min())


def _shrunk(image: Any, factor: int) -> Any:
    import SimpleITK as sitk  # noqa: N813

    if factor == 1:
        return image
    smooth = sitk.SmoothingRecursiveGaussian(image, [0.5 * factor * s for s in image.GetSpacing()])
    # An axis keeps eight voxels: thin stacks are not shrunk away.
    return sitk.Shrink(smooth, [max(1, min(factor, n // 8)) for n in image.GetSize()])


def _field_of(transform: Any, fixed: str) -> Any:
    import SimpleITK as sitk  # noqa: N813

    target = sitk.ReadImage(fixed)
    return sitk.TransformToDisplacementField(
        transform, sitk.sitkVectorFloat64, target.GetSize(), target.GetOrigin(), target.GetSpacing(),
        target.GetDirection(),
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
