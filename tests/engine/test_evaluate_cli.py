import csv
import json
import subprocess
import sys

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813 — the name its users know
from engine import bodies
from PIL import Image

from registration_engine import DisplacementField, Volume, pictures
from registration_engine.cli import main
from registration_engine.files import write_field, write_volume

GRID = bodies.grid((26, 30, 32), (4.5, 4.0, 4.0), rotation=bodies.rotation((1, 1, 0), 12))


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A pair, the true field between them, labels, landmarks."""
    folder = tmp_path_factory.mktemp("judged")
    through = bodies.breathing(10.0)
    points = GRID.points_mm(np.moveaxis(np.indices(GRID.shape, dtype=float), 0, -1))
    truth = DisplacementField(through(points) - points, GRID)
    moving_grid = bodies.grid((34, 36, 38), (4.0, 4.0, 4.0))
    moving_points = moving_grid.points_mm(np.moveaxis(np.indices(moving_grid.shape, dtype=float), 0, -1))

    def organs(at):
        return (np.linalg.norm(at - (16, -4, 10), axis=-1) < 16) + 2.0 * (
            np.linalg.norm(at - (-18, 0, -12), axis=-1) < 13
        )

    for name, volume in {
        "fixed": bodies.volume(GRID, through=through),
        "moving": bodies.volume(moving_grid, seed=1),
        "fixed_labels": Volume(organs(through(points)), GRID),
        "moving_labels": Volume(organs(moving_points), moving_grid),
    }.items():
        write_volume(folder / f"{name}.nii.gz", volume)
    write_field(folder / "field.nii.gz", truth)
    write_field(folder / "still.nii.gz", DisplacementField(np.zeros_like(truth.vectors), GRID))
    marks = GRID.points_mm(np.random.default_rng(2).uniform(6, 20, (40, 3)))
    with (folder / "landmarks.csv").open("w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(["fixed_x", "fixed_y", "fixed_z", "moving_x", "moving_y", "moving_z"])
        lines.writerows(np.hstack([marks, through(marks)]).round(4).tolist())
    return folder


def test_evaluate_writes_measures_a_table_and_pictures_of_the_true_field(files, tmp_path, capsys):
    status = run(
        "evaluate", "--fixed", files / "fixed.nii.gz", "--moving", files / "moving.nii.gz", "--field",
        files / "field.nii.gz", "--fixed-labels", files / "fixed_labels.nii.gz", "--moving-labels",
        files / "moving_labels.nii.gz", "--landmarks", files / "landmarks.csv", "--out", tmp_path / "out",
    )  # fmt: skip

    assert status == 0
    told = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    measures = told["measures"]
    assert measures["tre_mm"]["before"] > 4
    assert measures["tre_mm"]["after"] < 0.3
    assert measures["patch_nmi"]["after"] > measures["patch_nmi"]["before"] + 0.1
    assert measures["mean_dice"]["after"] > 0.88 > measures["mean_dice"]["before"]
    assert measures["mean_hd95_mm"]["after"] <= 6 < measures["mean_hd95_mm"]["before"]
    assert measures["folding_fraction"]["after"] == 0
    assert 0 < measures["inverse_consistency_mm"]["after"] < 0.1
    assert measures["inverse_consistency_mm"]["before"] is None
    assert sorted(told["labels"]) == ["1", "2"]
    rows = list(csv.DictReader((tmp_path / "out" / "table.csv").read_text().splitlines()))
    assert {r["measure"] for r in rows if not r["label"]} == set(measures)
    assert float(next(r["after"] for r in rows if r["measure"] == "tre_mm")) == pytest.approx(
        measures["tre_mm"]["after"], rel=1e-4
    )
    assert capsys.readouterr().out == (tmp_path / "out" / "table.csv").read_text()
    for name in ("overlays.png", "patches.png", "motion.png"):
        with Image.open(tmp_path / "out" / name) as picture:
            assert min(picture.size) > 600


def test_evaluate_of_several_phases_draws_their_uptake(files, tmp_path):
    moving, field = [files / "moving.nii.gz"] * 2, [files / "still.nii.gz", files / "field.nii.gz"]

    status = run(
        "evaluate", "--fixed", files / "fixed.nii.gz", "--moving", *moving, "--field", *field, "--out", tmp_path,
        "--unnormalized",
    )  # fmt: skip

    assert status == 0
    rows = list(csv.DictReader((tmp_path / "uptake.csv").read_text().splitlines()))
    assert rows[0]["before"] == rows[0]["after"] == rows[1]["before"] != rows[1]["after"]
    assert (tmp_path / "uptake.png").exists()
    measures = json.loads((tmp_path / "001" / "evaluation.json").read_text())["measures"]
    assert "patch_nmi" not in measures
    assert measures["patch_mi_nat"]["after"] > measures["patch_mi_nat"]["before"] > 0


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--moving", "moving.nii.gz", "moving.nii.gz", "--field", "field.nii.gz"), "2 moving images and 1 fields"),
        (("--moving", "moving.nii.gz", "--field", "field.nii.gz", "--fixed-labels", "fixed_labels.nii.gz"), "or none"),
        (("--moving", "moving.nii.gz", "--field", "field.nii.gz", "--landmarks", "bad.csv"), "expected fixed_x"),
        (("--moving", "moving.nii.gz", "--field", "field.nii.gz", "--landmarks", "fixed.nii.gz"), "no table of comma"),
        (("--moving", "moving.nii.gz", "--field", "field.nii.gz", "--landmarks", "long.csv"), "no table of comma"),
        (("--moving", "moving.nii.gz", "--field", "field.nii.gz", "--landmarks", "/dev/zero"), "expected a file of"),
        (("--moving", "fixed.nii.gz", "--field", "fixed.nii.gz"), "expected a field of 3"),
        (("--moving", "moving.nii.gz", "--field", "huge.mha"), "expected within 1e+06"),
        (
            (
                "--moving",
                "moving.nii.gz",
                "--field",
                "field.nii.gz",
                "--fixed-labels",
                "far.mha",
                "--moving-labels",
                "far.mha",
            ),
            "none of the 2 that both images share reaches the fixed image",
        ),
    ],
)
def test_evaluate_refuses_what_does_not_fit_in_one_line(files, arguments, reason, tmp_path, capsys):
    (files / "bad.csv").write_text("x,y,z\n1,2,3\n")
    (files / "long.csv").write_text('"' + "x" * 200_000)
    huge = sitk.GetImageFromArray(np.full((4, 4, 4, 3), 1e30, np.float32), isVector=True)
    sitk.WriteImage(huge, str(files / "huge.mha"))
    far = sitk.ReadImage(str(files / "fixed_labels.nii.gz"))
    far.SetOrigin((9000.0, 0.0, 0.0))
    sitk.WriteImage(far, str(files / "far.mha"))
    resolved = [a if a.startswith("--") else files / a for a in arguments]

    status = run("evaluate", "--fixed", files / "fixed.nii.gz", *resolved, "--out", tmp_path)

    error = capsys.readouterr().err
    assert (status, error.count("\n")) == (2, 1)
    assert reason in error


def test_register_4d_replaces_no_phase_that_it_reads(files, tmp_path, capsys):
    before = (files / "moving.nii.gz").read_bytes()
    phases = [tmp_path / f"phase_{number}.nii.gz" for number in range(2)]
    for phase in phases:
        phase.write_bytes(before)

    assert run("register-4d", *phases, "--out", tmp_path) == 2
    assert "got an input, expected another file" in capsys.readouterr().err
    assert [phase.read_bytes() == before for phase in phases] == [True, True]


def test_register_4d_writes_every_phase_its_field_a_report_and_the_uptake(files, tmp_path, capsys):
    constant = tmp_path / "constant.nii.gz"
    write_volume(constant, Volume(np.ones(GRID.shape), GRID))

    status = run(
        "register-4d", files / "moving.nii.gz", files / "fixed.nii.gz", constant, "--out", tmp_path / "out",
        "--preset", "rigid", "--reference", "middle",
    )  # fmt: skip

    assert status == 3  # one phase could not be registered
    told = json.loads((tmp_path / "out" / "report.json").read_text())
    assert told["reference"] == 1
    assert told["phases"]["phase_0"]["preset"] == "rigid"
    assert "every voxel has the value 1" in told["phases"]["phase_2"]["error"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "phase_0.nii.gz", "phase_0_field.nii.gz", "report.json", "uptake.csv", "uptake.png",
    ]  # fmt: skip
    rows = list(csv.DictReader((tmp_path / "out" / "uptake.csv").read_text().splitlines()))
    assert rows[1]["before"] == rows[1]["after"]
    assert rows[2]["after"] == ""
    assert "phase 0: linear" in capsys.readouterr().err


@pytest.mark.parametrize("turn", [np.eye(3), np.diag([-1, -1, 1]), np.eye(3)[[1, 2, 0]], np.eye(3)[[2, 0, 1]]])
def test_planes_are_turned_the_radiological_way_whatever_the_grid(turn):
    on = bodies.grid((20, 24, 28), (2.0, 3.0, 2.0), rotation=turn)
    points = on.points_mm(np.moveaxis(np.indices(on.shape, dtype=float), 0, -1))
    left, back, head = (points[..., n] > 12 for n in range(3))

    for which, right_of, below in (("axial", left, back), ("coronal", left, ~head), ("sagittal", back, ~head)):
        across = pictures.plane(right_of.astype(np.float32), on, which, side=64)
        down = pictures.plane(below.astype(np.float32), on, which, side=64)
        assert max(across.shape) == 64
        assert across[:, -1].mean() > 0.9 > across[:, 0].mean()
        assert down[-1].mean() > 0.9
        assert down.mean(1)[0] <= down.mean(1)[-1]


def test_overlays_and_maps_have_the_colours_they_promise():
    bright, dark = np.ones((16, 16), np.float32), np.zeros((16, 16), np.float32)
    windows = ((0.0, 1.0), (0.0, 1.0))

    assert pictures.red_green(bright, bright, windows).getpixel((3, 3)) == (255, 255, 0)
    assert pictures.red_green(bright, dark, windows).getpixel((3, 3)) == (255, 0, 0)
    board = pictures.checkerboard(bright, dark, windows, tiles=8)
    assert [board.getpixel((x, 0))[0] for x in (0, 2, 4)] == [255, 0, 255]
    mapped = pictures.heat_map(np.array([[0, 1], [np.nan, 0.5]], np.float32), (0, 1))
    assert [mapped.getpixel(at) for at in ((0, 0), (1, 0), (0, 1))] == [pictures.HEAT[0], pictures.HEAT[-1], (0, 0, 0)]


def test_what_the_pages_of_the_node_may_use_needs_no_torch():
    program = (
        "import sys\n"
        "from registration_engine import evaluation, patches, pictures, report\n"
        "assert 'torch' not in sys.modules\n"
    )

    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
