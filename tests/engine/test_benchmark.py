"""The side by side must be fair before it is fast: its motions are the truth, its table says what is there."""

import json

import numpy as np
import pytest
from engine import bodies

from benchmarks.registration import dynamic, motions
from benchmarks.registration.cases import Case, Pair, cases, sampled
from benchmarks.registration.table import write_table
from registration_engine import evaluation as ev
from registration_engine import warp

GRID = bodies.grid((24, 26, 28), (9.0, 8.0, 8.0))


@pytest.mark.parametrize("seed", [1, 6, 10])
def test_the_known_motions_have_the_size_they_promise_and_never_fold(seed):
    waves = sampled(motions.waves(GRID, seed, largest_mm=9, wavelengths_mm=(50, 180)), GRID)
    breathing = sampled(motions.breathing(GRID, seed), GRID)

    assert np.linalg.norm(waves.vectors, axis=-1).max() == pytest.approx(9, rel=0.1)
    assert 10 < np.linalg.norm(breathing.vectors, axis=-1).max() < 22
    for field in (waves, breathing):
        assert ev.jacobian_determinant(field).min() > 0.3
    again = sampled(motions.breathing(GRID, seed), GRID)
    assert np.array_equal(again.vectors, breathing.vectors)
    assert not np.array_equal(sampled(motions.breathing(GRID, seed + 1), GRID).vectors, breathing.vectors)


def test_back_undoes_a_motion_to_a_thousandth_of_a_millimetre():
    motion = motions.waves(GRID, 3, largest_mm=9, wavelengths_mm=(50, 180))
    points = np.random.default_rng(0).uniform(-90, 90, (500, 3))

    fixed = motions.back(motion, points)

    assert np.abs(fixed + motion(fixed) - points).max() < 1e-3


def test_the_true_motion_brings_a_drawn_phase_to_where_the_reference_has_its_organs():
    on = dynamic.grid((32, 64, 64))
    moving, perfect = (dynamic.volume(8, on=on, still=still, noise=0.0) for still in (False, True))

    registered = warp(moving, sampled(dynamic.motion(8), on), on)

    inside = (slice(6, -6), slice(8, -8), slice(8, -8))
    before, after = (np.abs(v.voxels - perfect.voxels)[inside].mean() for v in (moving, registered))
    assert after < 0.15 * before


def test_uptake_is_known_and_the_middle_phase_is_the_reference():
    assert dynamic.uptake("liver", 0) == 0
    assert dynamic.uptake("aorta", 4) > dynamic.uptake("aorta", 20) > 0
    assert dynamic.REFERENCE == dynamic.PHASES // 2


def test_every_row_has_its_own_name_and_what_is_held_out_is_what_was_promised():
    rows = {case.name: case for case in cases()}

    assert len(rows) == len(cases())
    assert sum(name.startswith("body-ct-") for name in rows) == sum(name.startswith("ms-agent-") for name in rows) == 10
    assert {name for name, case in rows.items() if case.held_out} == {
        "liver-mr-4", "liver-mr-5", "abdomen-ct-mr", "ms-cross",
        *(f"{row}-{seed}" for row in ("body-ct", "ms-agent") for seed in range(6, 11)),
    }  # fmt: skip


def test_the_table_tells_means_reasons_and_what_is_missing(tmp_path):
    def nothing() -> Pair:
        raise AssertionError("a table builds no pair")

    rows = [Case(f"row-{n}", "group", "same", nothing, held_out=n == 2) for n in (1, 2)]
    common = {"machine": "a machine", "versions": "greedy 1", "load": [1.0, 3.0]}
    cells = [
        {"row": "row-1", "method": "greedy", "pmm": 0.5, "folds": 0.0, "sdlogj": 0.2, "cpu_s": 10.0, **common},
        {"row": "row-2", "method": "greedy", "pmm": 0.7, "folds": 0.0, "sdlogj": 0.4, "cpu_s": 30.0, **common},
        {"row": "row-1", "method": "demons", "cannot": "one kind only", **common},
    ]
    for cell in cells:
        with (tmp_path / f"{cell['method']}.jsonl").open("a") as lines:
            lines.write(json.dumps(cell) + "\n")

    write_table(tmp_path / "R.md", tmp_path, rows)

    text = (tmp_path / "R.md").read_text()
    assert "## group (2 pairs, 1 held out)" in text
    assert "| greedy | 2/2 | 0.6000 | 0.00000 | 0.300 | 20 |" in text
    assert "one kind only" in text
    assert "* SimpleITK demons: 1 of 2" in text
    assert "* greedy: 0" not in text
