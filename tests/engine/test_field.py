import numpy as np
import pytest
import torch
from engine import bodies

from registration_engine import field as fields
from registration_engine.optimize import unfolded
from registration_engine.spaces import Lattice, linear_coordinates, sample, sampling_from_world
from registration_engine.volume import Grid, Registration

CPU = torch.device("cpu")


def _grid(shape=(24, 26, 28), spacing=(3.0, 1.5, 2.0)) -> Grid:
    return Grid(shape, np.diag([*spacing, 1.0])[[2, 1, 0, 3]])


def _positions(grid: Grid) -> torch.Tensor:
    """(3, Z, Y, X), lattice mm (i, j, k) from the first voxel."""
    axes = [torch.arange(n, dtype=torch.float32) * s for n, s in zip(grid.shape, grid.spacing_mm, strict=True)]
    k, j, i = torch.meshgrid(*axes, indexing="ij")
    return torch.stack([i, j, k])


def _wave(grid: Grid, amplitude_mm: float) -> torch.Tensor:
    i, j, k = _positions(grid)
    window = torch.ones(())
    for axis, n in enumerate(grid.shape):
        profile = torch.sin(torch.linspace(0, np.pi, n)) ** 2
        window = window * profile.view([-1 if a == axis else 1 for a in range(3)])
    return amplitude_mm * window * torch.stack([torch.sin(j / 9), torch.cos(k / 20), torch.sin(i / 11)])


def test_composing_two_linear_maps_gives_their_product():
    grid = _grid()
    lattice, x = Lattice.of(grid, CPU), _positions(grid)
    inner_matrix = torch.eye(3) + torch.tensor([[0.02, 0.01, 0.0], [0.0, -0.03, 0.02], [0.01, 0.0, 0.02]])
    outer_matrix = torch.eye(3) + torch.tensor([[0.0, -0.02, 0.01], [0.03, 0.01, 0.0], [0.0, 0.02, -0.02]])

    def displacement(matrix):
        return torch.tensordot(matrix - torch.eye(3), x, dims=1)

    composed = fields.compose(displacement(outer_matrix), displacement(inner_matrix), lattice)

    inside = (slice(None), slice(2, -2), slice(2, -2), slice(2, -2))
    assert torch.allclose(composed[inside], displacement(outer_matrix @ inner_matrix)[inside], atol=2e-3)


def test_the_jacobian_of_a_linear_map_is_its_determinant():
    grid = _grid()
    matrix = torch.tensor([[1.1, 0.1, 0.0], [0.05, 0.9, -0.1], [0.0, 0.2, 1.2]])
    field = torch.tensordot(matrix - torch.eye(3), _positions(grid), dims=1)

    determinant = fields.jacobian_determinant(field, Lattice.of(grid, CPU).spacing_mm)

    assert determinant.shape == grid.shape
    assert torch.allclose(determinant, torch.linalg.det(matrix).expand(grid.shape), atol=1e-3)


def test_the_jacobian_of_a_reflected_axis_is_negative():
    grid = _grid()
    field = torch.zeros(3, *grid.shape)
    field[0] = -2 * _positions(grid)[0]

    assert (fields.jacobian_determinant(field, Lattice.of(grid, CPU).spacing_mm) < -0.99).all()


def test_a_map_after_its_inverse_is_the_identity():
    grid, onto = _grid(), bodies.grid((20, 22, 24), (3.0, 1.5, 2.0), center=(24.0, 26.0, 40.0))
    linear = np.eye(4)
    linear[:3, :3] = bodies.rotation((1, 0.2, 0), 70) @ np.diag([1.1, 0.95, 1.0])
    linear[:3, 3] = onto.points_mm((np.array(onto.shape) - 1) / 2)
    linear[:3, 3] -= linear[:3, :3] @ grid.points_mm((np.array(grid.shape) - 1) / 2)
    displacement = _wave(grid, 4.0).movedim(0, -1).numpy()
    registration = Registration(grid, linear, linear, displacement, None)

    back = fields.inverse(registration, onto)

    index = np.stack(np.meshgrid(*map(np.arange, onto.shape), indexing="ij"), -1).astype(float)
    fixed_points = onto.points_mm(index) + back.vectors
    forth = torch.tensor(registration.total_field().vectors).movedim(-1, 0)
    at = linear_coordinates(torch.tensor(fixed_points).float().movedim(-1, 0), torch.tensor(sampling_from_world(grid)))
    there = fixed_points + sample(forth, at).movedim(0, -1).numpy()
    inside = (at.abs() < 1).all(0).numpy()
    assert inside.mean() > 0.3
    assert np.abs(there - onto.points_mm(index))[inside].max() < 0.02


def test_smoothing_is_the_same_in_millimetres_along_every_axis():
    grid = _grid((33, 65, 49), (4.0, 2.0, 8 / 3))
    lattice = Lattice.of(grid, CPU)
    impulse = torch.zeros(3, *grid.shape)
    impulse[:, 16, 32, 24] = 1.0

    smoothed = fields.smooth(impulse, 8.0, lattice)[0]

    assert smoothed.sum() == pytest.approx(1.0, abs=1e-4)
    x = _positions(grid) - torch.tensor([24 * 8 / 3, 64.0, 64.0]).view(3, 1, 1, 1)
    widths = [float((smoothed * x[a] ** 2).sum()) ** 0.5 for a in range(3)]
    assert widths == pytest.approx([8.0] * 3, rel=0.02)


def test_smoothing_keeps_a_constant_field_up_to_the_border():
    lattice = Lattice.of(_grid(), CPU)

    smoothed = fields.smooth(torch.full((3, *lattice.shape), 2.5), 6.0, lattice)

    assert torch.allclose(smoothed, torch.tensor(2.5), atol=1e-5)


def test_sharpened_smoothing_lets_wide_waves_pass_and_holds_short_ones_back():
    grid = _grid(shape=(96, 8, 8), spacing=(2.0, 2.0, 2.0))
    along_k = _positions(grid)[2]
    inner = slice(24, -24)

    def passed(wavelength_mm: float, *, sharpened: bool) -> float:
        wave = torch.sin(2 * np.pi * along_k / wavelength_mm)[None]
        smooth = fields.smooth(wave, 6.0, Lattice.of(grid, CPU), sharpened=sharpened)
        return float(smooth[0, inner].abs().max() / wave[0, inner].abs().max())

    for wavelength_mm in (96.0, 24.0, 8.0):
        plain = np.exp(-0.5 * (2 * np.pi * 6.0 / wavelength_mm) ** 2)
        assert passed(wavelength_mm, sharpened=False) == pytest.approx(plain, abs=2e-3)
        assert passed(wavelength_mm, sharpened=True) == pytest.approx(2 * plain - plain**2, abs=2e-3)
    assert passed(96.0, sharpened=True) > 0.99 > 0.93 > passed(96.0, sharpened=False)


def test_smoothing_leaves_no_denormal_numbers():
    lattice = Lattice.of(_grid(), CPU)
    tiny = torch.full((3, *lattice.shape), 1e-39)

    assert not fields.smooth(tiny, 3.0, lattice).any()


def test_resizing_a_linear_field_changes_nothing_in_millimetres():
    source, target = _grid((20, 20, 20), (3.0, 2.0, 4.0)), _grid((30, 27, 39), (2.0, 1.5, 2.0))
    matrix = torch.tensor([[0.1, 0.0, 0.2], [0.0, -0.1, 0.0], [0.3, 0.0, 0.1]])

    resized = fields.resize(torch.tensordot(matrix, _positions(source), dims=1), source, target)

    expected = torch.tensordot(matrix, _positions(target), dims=1)
    inside = (slice(None), slice(0, 28), slice(0, 25), slice(0, 38))
    assert torch.allclose(resized[inside], expected[inside], atol=1e-4)


def test_derivatives_are_per_millimetre_in_the_order_of_components():
    grid = _grid()
    i, j, k = _positions(grid)

    gradient = fields.gradient((2 * i - 3 * j + 0.5 * k)[None], Lattice.of(grid, CPU).spacing_mm)

    assert torch.allclose(gradient.mean(dim=(1, 2, 3)), torch.tensor([2.0, -3.0, 0.5]), atol=1e-4)


def test_the_guard_unfolds_where_it_is_needed_and_leaves_the_rest_alone():
    grid = _grid((32, 32, 32), (2.0, 2.0, 2.0))
    lattice, field = Lattice.of(grid, CPU), _wave(_grid((32, 32, 32), (2.0, 2.0, 2.0)), 1.0)
    folded = field.clone()
    folded[0, 8, 8, 8] += 9.0
    assert fields.jacobian_determinant(folded, lattice.spacing_mm).min() < 0

    guarded = unfolded(folded, lattice, smallest_determinant=0.1)

    assert fields.jacobian_determinant(guarded, lattice.spacing_mm).min() >= 0.1
    assert torch.equal(guarded[:, 24:, 24:, 24:], folded[:, 24:, 24:, 24:])
