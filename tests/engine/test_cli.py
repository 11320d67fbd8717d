import json
import subprocess
import sys

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813 — the name its users know
from engine import bodies

from registration_engine.cli import main
from registration_engine.errors import InvalidVolumeError
from registration_engine.files import read_field, read_volume, write_field, write_volume
from registration_engine.volume import DisplacementField


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two small oblique volumes as files, the moving one displaced by breathing."""
    folder = tmp_path_factory.mktemp("pair")
    oblique = bodies.grid((20, 26, 28), (6.0, 5.0, 5.0), rotation=bodies.rotation((1, 1, 0), 12))
    write_volume(folder / "fixed.nii.gz", bodies.volume(oblique, through=bodies.breathing(9.0)))
    write_volume(folder / "moving.mha", bodies.volume(bodies.grid((26, 27, 30), (5.0, 5.0, 5.0)), seed=1))
    return folder / "fixed.nii.gz", folder / "moving.mha"


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def test_the_written_field_resamples_the_moving_image_to_the_written_image(pair, tmp_path):
    fixed, moving = pair
    image, field, report = tmp_path / "w.nii.gz", tmp_path / "f.nii.gz", tmp_path / "r.json"

    wanted = ("--out-image", image, "--out-field", field, "--report", report)
    status = run("register", fixed, moving, "--preset", "fast", "--device", "cpu", "--seed", 4, *wanted)

    assert status == 0
    transform = sitk.DisplacementFieldTransform(sitk.ReadImage(str(field), sitk.sitkVectorFloat64))
    source, target = (sitk.ReadImage(str(p), sitk.sitkFloat32) for p in (moving, fixed))
    darkest = float(sitk.GetArrayViewFromImage(source).min())
    expected = sitk.Resample(source, target, transform, sitk.sitkLinear, darkest)
    written = sitk.ReadImage(str(image))
    assert np.allclose(sitk.GetArrayFromImage(written), sitk.GetArrayFromImage(expected), atol=1e-3)
    before = sitk.GetArrayFromImage(sitk.Resample(source, target)) - sitk.GetArrayFromImage(target)
    after = sitk.GetArrayFromImage(written) - sitk.GetArrayFromImage(target)
    assert np.abs(after).mean() < 0.7 * np.abs(before).mean()

    told = json.loads(report.read_text())
    assert {"similarity_before", "similarity_after", "sdlogj", "peak_memory_bytes"} <= set(told)
    assert (told["preset"], told["device"], told["seed"], told["model_sha256"]) == ("fast", "cpu", 4, None)
    assert told["folding_fraction"] == 0
    assert told["similarity_after"] > told["similarity_before"]
    assert all(seconds >= 0 for seconds in told["seconds"].values())


@pytest.mark.parametrize("suffix", [".nii.gz", ".mha", ".nrrd"])
def test_volumes_and_fields_come_back_from_every_format(suffix, tmp_path):
    volume = bodies.volume(bodies.grid((9, 10, 11), (4.0, 2.0, 3.0), rotation=bodies.rotation((1, 2, 3), 40)))
    vectors = np.random.default_rng(0).normal(size=(9, 10, 11, 3)).astype(np.float32)

    write_volume(tmp_path / f"v{suffix}", volume)
    write_field(tmp_path / f"f{suffix}", DisplacementField(vectors, volume.grid))

    assert np.array_equal(read_volume(tmp_path / f"v{suffix}").voxels, volume.voxels)
    assert read_volume(tmp_path / f"v{suffix}").grid.is_same_as(volume.grid)
    assert np.array_equal(read_field(tmp_path / f"f{suffix}").vectors, vectors)
    assert read_field(tmp_path / f"f{suffix}").grid.is_same_as(volume.grid)


def test_labels_are_warped_without_new_values(tmp_path):
    on = bodies.grid((10, 12, 14))
    labels = np.random.default_rng(1).integers(0, 5, on.shape).astype(np.float32)
    write_volume(tmp_path / "labels.nii.gz", type(bodies.volume(on))(labels, on))
    write_field(tmp_path / "f.nii.gz", DisplacementField(np.full((*on.shape, 3), 1.1), on))

    files = (tmp_path / "labels.nii.gz", "--field", tmp_path / "f.nii.gz", "--out", tmp_path / "out.nii.gz")
    status = run("warp", *files, "--interpolation", "nearest")

    assert status == 0
    assert np.array_equal(read_volume(tmp_path / "out.nii.gz").voxels[:-1, :-1, :-1], labels[:-1, :-1, :-1])


def _image_of(kind: str) -> sitk.Image:
    if kind == "four dimensions":
        return sitk.Image([8, 8, 8, 2], sitk.sitkFloat32)
    if kind == "colours":
        return sitk.Image([8, 8, 8], sitk.sitkVectorUInt8, 3)
    if kind == "a constant":
        return sitk.Image([8, 8, 8], sitk.sitkFloat32)
    image = sitk.Image([8, 8, 8], sitk.sitkFloat64)
    image[2, 2, 2] = {"a NaN": float("nan"), "a value too large": 1e30, "a value no float32 holds": 1e300}.get(kind, 1)
    if kind == "a voxel as large as a planet":
        image.SetSpacing((1e9, 1, 1))
    return image


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("four dimensions", "got 4 dimensions, expected 3"),
        ("colours", "got 3 values per voxel, expected a scalar image"),
        ("a constant", "every voxel has the value 0"),
        ("a NaN", "1 of 512 voxels are NaN"),
        ("a value too large", "expected within 1e+18"),
        ("a value no float32 holds", "1 of 512 voxels are NaN or infinite"),
        ("a voxel as large as a planet", "expected all within 1000000 mm"),
    ],
)
def test_bad_input_ends_with_status_2_and_one_line(kind, reason, pair, tmp_path, capsys):
    sitk.WriteImage(_image_of(kind), str(tmp_path / "bad.nrrd"))

    status = run("register", pair[0], tmp_path / "bad.nrrd")

    told = capsys.readouterr()
    assert status == 2
    assert reason in told.err
    assert told.err.count("\n") == 1
    assert told.out == ""


def test_a_scaled_nifti_of_one_byte_a_voxel_is_whole(tmp_path):
    """The reader makes float of it, four times as wide as what the file holds."""
    path = tmp_path / "scaled.nii"
    voxels = np.random.default_rng(0).integers(0, 255, (12, 13, 14)).astype(np.uint8)
    sitk.WriteImage(sitk.GetImageFromArray(voxels), str(path))
    content = bytearray(path.read_bytes())
    content[112:120] = np.array([2.5, 7.0], "<f4").tobytes()  # scl_slope, scl_inter
    path.write_bytes(content)

    assert np.allclose(read_volume(path).voxels, 2.5 * voxels + 7)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".mha", ".nrrd"])
def test_a_file_cut_short_is_refused_and_never_filled_up(suffix, tmp_path):
    image = sitk.GetImageFromArray(np.random.default_rng(0).normal(size=(9, 10, 11)).astype(np.float32))
    sitk.WriteImage(image, str(tmp_path / f"whole{suffix}"))
    whole = (tmp_path / f"whole{suffix}").read_bytes()
    (tmp_path / f"cut{suffix}").write_bytes(whole[: len(whole) * 2 // 3])

    read_volume(tmp_path / f"whole{suffix}")
    with pytest.raises(InvalidVolumeError, match=f"cut{suffix}: c"):
        read_volume(tmp_path / f"cut{suffix}")


def test_where_nothing_can_be_written_no_work_begins(pair, tmp_path, capsys):
    before = pair[1].read_bytes()
    for bad, reason in (
        (tmp_path / "w.png", "ends with .nii"),
        (tmp_path / "nowhere" / "w.nii.gz", "a folder that is there"),
        (tmp_path, "ends with .nii"),
        (pair[1], "got an input"),
    ):
        assert run("register", *pair, "--out-image", bad) == 2
        assert run("warp", pair[1], "--field", pair[0], "--out", bad) == 2
        told = capsys.readouterr().err.splitlines()
        assert [reason in line for line in told] == [True, True], told
    assert pair[1].read_bytes() == before


def test_without_an_output_file_the_measurements_are_printed(pair, capsys):
    assert run("register", *pair, "--preset", "rigid", "--device", "cpu") == 0
    assert json.loads(capsys.readouterr().out)["preset"] == "rigid"


def test_a_missing_file_and_an_unknown_preset_end_with_status_2(pair, tmp_path, capsys):
    assert run("register", pair[0], tmp_path / "nowhere.nii.gz") == 2
    assert run("register", *pair, "--preset", "quick") == 2
    told = capsys.readouterr().err.splitlines()
    assert "nowhere.nii.gz: cannot be read" in told[0]
    assert "expected one of rigid, fast, balanced, accurate" in told[1]


def test_images_that_cannot_be_brought_together_end_with_status_3(pair, tmp_path, capsys):
    image = read_volume(pair[1])
    shell, core = np.ones(image.grid.shape, np.float32), np.zeros(image.grid.shape, np.float32)
    shell[2:-2, 2:-2, 2:-2] = 0
    core[11:15, 11:15, 13:17] = 1
    for name, voxels in (("shell", shell), ("core", core)):
        write_volume(tmp_path / f"{name}.mha", type(image)(voxels, image.grid))

    masks = ("--fixed-mask", tmp_path / "core.mha", "--moving-mask", tmp_path / "shell.mha")
    status = run("register", pair[1], pair[1], "--preset", "rigid", *masks)

    assert status == 3
    assert "after every start" in capsys.readouterr().err


def test_the_optimisation_imports_without_simpleitk_and_without_side_effects():
    program = (
        "import sys, warnings, torch\n"
        "before = (torch.get_num_threads(), torch.is_grad_enabled(), list(warnings.filters))\n"
        "sys.modules['SimpleITK'] = None\n"
        "import registration_engine\n"
        "from registration_engine import affine, field, losses, metrics, optimize, search\n"
        "assert before == (torch.get_num_threads(), torch.is_grad_enabled(), list(warnings.filters))\n"
        "assert not torch.cuda.is_initialized()\n"
    )

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)

    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
