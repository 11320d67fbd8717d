import torch

from registration_engine.objectives import multi_axis_mutual_information
from registration_engine.synth import synthetic_pair, unit_lattice
from registration_engine.validation import warped_moving

CPU = torch.device("cpu")
SHAPE = (32, 32, 48)


def test_a_pair_is_a_function_of_seed_and_index() -> None:
    first, again, other, series = (
        synthetic_pair(seed, index, SHAPE, CPU) for seed, index in ((1, 4), (1, 4), (1, 5), (2, 4))
    )

    for name, tensor in vars(first).items():
        assert torch.equal(tensor, vars(again)[name])
    assert not torch.equal(first.fixed, other.fixed)
    assert not torch.equal(first.fixed, series.fixed)


def test_the_known_displacement_makes_the_images_alike() -> None:
    """Over many pairs: true for same contrasts, inverted ones and unrelated modalities alike."""
    gained = 0
    for index in range(20):
        pair = synthetic_pair(7, index, SHAPE, CPU)
        before, after = (
            float(multi_axis_mutual_information(pair.fixed, *warped_moving(pair, displacement)))
            for displacement in (torch.zeros_like(pair.displacement), pair.displacement)
        )
        gained += after < before

    assert gained >= 18  # the rest hardly moves, or is drowned in noise


def test_pairs_are_finite_scaled_and_vary() -> None:
    pairs = [synthetic_pair(3, index, SHAPE, CPU) for index in range(20)]

    for pair in pairs:
        assert pair.input.shape == (1, 2, *SHAPE)
        assert torch.isfinite(pair.input).all()
        assert float(pair.input.amin()) >= 0
        assert float(pair.input.amax()) <= 1
        assert float(pair.fixed.std()) > 0.02
        assert pair.body.any()
    assert any((pair.fixed_valid == 0).any() for pair in pairs)
    lengths = [float(pair.displacement.square().sum(0).sqrt().mean()) for pair in pairs]
    assert 0.5 < sum(lengths) / len(lengths) < 6
    assert max(lengths) > 2 * min(lengths)


def test_most_of_the_deformations_fold_nowhere() -> None:
    from registration_engine.field import jacobian_determinant

    folded = 0
    for index in range(20):
        displacement = synthetic_pair(5, index, SHAPE, CPU).displacement
        folded += bool((jacobian_determinant(displacement, unit_lattice(SHAPE, CPU).spacing_mm) <= 0).any())

    assert folded <= 4  # a sliding wall may tear
