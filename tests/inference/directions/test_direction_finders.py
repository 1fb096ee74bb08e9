"""Finding directions where the answer is known: linear latents of labels, numpy's SVD, a linear decoder."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dvae.errors import UserError
from dvae.inference.directions import finders, label_regression
from dvae.inference.directions.attributes import LabeledAttributes

SIZES = [3, 2]
ATTRIBUTES = LabeledAttributes({"hair": ["bun", "#aabbcc", "a b"], "hat": ["no", "yes"]}, {})


def labeled(n: int, noise: float = 0.0) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Latents (n, 5) that are sums of effects of two attributes, which occur together more often than by chance; the
    codes (n, 2) and the effects."""
    draw = torch.Generator().manual_seed(0)
    hair = torch.randint(0, 3, (n,), generator=draw)
    hat = torch.where(
        torch.rand(n, generator=draw) < 0.9, (hair == 0).long(), torch.randint(0, 2, (n,), generator=draw)
    )
    effects = [torch.randn(3, 5, generator=draw).double(), torch.randn(2, 5, generator=draw).double()]
    z = 4.0 + effects[0][hair] + effects[1][hat] + noise * torch.randn(n, 5, generator=draw).double()
    return z, torch.stack([hair, hat], 1), effects


def test_correlated_attributes_are_told_apart_exactly() -> None:
    z, codes, effects = labeled(2000)
    found = label_regression.regress(z, codes, SIZES, pairs=False).split(SIZES)
    for mine, true in zip(found, effects, strict=True):
        assert torch.allclose(mine - mine[0], true - true[0], atol=1e-4)
    naive = z[codes[:, 1] == 1].mean(0) - z[codes[:, 1] == 0].mean(0)  # takes hair for hat
    assert (naive - (effects[1][1] - effects[1][0])).abs().max() > 0.3


def test_strength_1_is_the_displacement_from_the_others_by_how_many_they_are() -> None:
    z, codes, (hair, _) = labeled(3000)
    directions, skipped = finders.from_labels(z.float(), codes, ATTRIBUTES, ["hair"])
    assert [one.name for one in directions] == ["hair.bun", "hair.aabbcc", "hair.a_b"]
    assert [one.value for one in directions] == ["bun", "#aabbcc", "a b"]
    assert skipped == {}
    counts = torch.bincount(codes[:, 0]).double()
    expected = hair[1] - (counts[0] * hair[0] + counts[2] * hair[2]) / (counts[0] + counts[2])
    assert torch.allclose(directions[1].vector.double(), expected, atol=1e-4)
    assert directions[1].vector.dtype == torch.float32


def test_noise_averages_out() -> None:
    z, codes, effects = labeled(20000, noise=1.0)
    found = label_regression.regress(z, codes, SIZES, pairs=False).split(SIZES)
    assert (found[0][1] - found[0][0] - (effects[0][1] - effects[0][0])).abs().max() < 0.15


def test_values_that_hardly_occur_are_skipped_with_a_word() -> None:
    z, codes, _ = labeled(300)
    codes[:, 1] = 0
    codes[:3, 1] = 1
    directions, skipped = finders.from_labels(z, codes, ATTRIBUTES, ["hat"])
    assert directions == []
    assert skipped == {"hat=no": "297 of 300 images show it", "hat=yes": "3 of 300 images show it"}


def test_values_whose_names_would_be_the_same_are_refused() -> None:
    z, codes, _ = labeled(300)
    same = LabeledAttributes({"hair": ["#a", "a", "b"], "hat": ["no", "yes"]}, {})
    with pytest.raises(UserError, match=r"two of its values would give the name hair\.a"):
        finders.from_labels(z, codes, same, ["hair"])


def test_maps_keep_their_shape() -> None:
    z, codes, _ = labeled(300)
    directions, _ = finders.from_labels(z[:, :4].reshape(300, 1, 2, 2), codes, ATTRIBUTES, ["hat"])
    assert directions[0].vector.shape == (1, 2, 2)
    assert directions[0].move(torch.zeros(3, 1, 2, 2), 2.0).shape == (3, 1, 2, 2)


def paired(n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Latents (n, 12) with a value of their own for each pair of hair and hat; codes; those values (3, 2, 12)."""
    draw = torch.Generator().manual_seed(3)
    codes = torch.stack([torch.randint(0, 3, (n,), generator=draw), torch.randint(0, 2, (n,), generator=draw)], 1)
    values = 3.0 * torch.randn(3, 2, 12, generator=draw).double()
    return values[codes[:, 0], codes[:, 1]] + 7.0, codes, values


def test_what_a_value_adds_may_depend_on_the_others() -> None:
    z, codes, values = paired(1200)
    directions, _ = finders.from_labels(z, codes, ATTRIBUTES, ["hair", "hat"])
    model = directions[0].model
    assert model is not None
    assert model.pairs
    assert torch.equal(model.predict(z), codes)
    for one in directions:
        wanted = codes.clone()
        attribute = ATTRIBUTES.names.index(one.attribute)
        wanted[:, attribute] = ATTRIBUTES.values[one.attribute].index(one.value)
        moved = one.move(z, 1.0)
        assert (moved - (values[wanted[:, 0], wanted[:, 1]] + 7.0)).abs().max() < 0.15  # by the ridge on pairs
        has = codes[:, attribute] == wanted[:, attribute]
        assert torch.equal(moved[has], z[has])  # nothing to do
        assert torch.allclose(one.move(z, 0.5), 0.5 * (z + moved))
        by = torch.linspace(-1, 2, len(z), dtype=z.dtype)
        assert torch.allclose(one.move(z, by) - z, by[:, None] * (moved - z))


def test_few_images_are_not_asked_about_pairs() -> None:
    z, codes, _ = labeled(20)
    model = label_regression.fit(z, codes, ATTRIBUTES.values)
    assert not model.pairs
    assert label_regression.fit(*labeled(22)[:2], ATTRIBUTES.values).pairs  # 3 + 2 values and 6 pairs


def test_pca_is_numpys_svd() -> None:
    z = torch.randn(200, 6, generator=torch.Generator().manual_seed(1)) @ torch.diag(torch.arange(1.0, 7)) + 3.0
    found = finders.pca(z, 4)
    centered = z.double().numpy() - z.double().numpy().mean(0)
    _, singular, rows = np.linalg.svd(centered, full_matrices=False)
    for i, one in enumerate(found):
        expected = rows[i] * singular[i] / np.sqrt(199)
        expected *= np.sign(expected[np.abs(expected).argmax()])
        assert one.name == f"pca_{i + 1}"
        assert np.allclose(one.vector, expected, rtol=1e-5, atol=1e-6)
        assert one.share == pytest.approx(singular[i] ** 2 / (singular**2).sum())
        assert (centered @ expected / np.linalg.norm(expected)).std(ddof=1) == pytest.approx(
            float(one.vector.norm()), rel=1e-5
        )


def test_more_components_than_there_are_is_refused() -> None:
    z = torch.randn(50, 3, generator=torch.Generator().manual_seed(1))
    z[:, 2] = z[:, 0] + z[:, 1]
    assert len(finders.pca(z, 2)) == 2
    with pytest.raises(UserError, match="components=3: pca finds 2 of them"):
        finders.pca(z, 3)


def test_jacobian_of_a_linear_decoder_is_its_right_singular_vectors() -> None:
    weight = torch.randn(3 * 4 * 4, 5, generator=torch.Generator().manual_seed(2))
    seen = []
    found = finders.jacobian(lambda z: (z @ weight.T).view(-1, 3, 4, 4), torch.randn(7, 5), 3, lambda: seen.append(1))
    _, singular, rows = np.linalg.svd(weight.double().numpy(), full_matrices=False)
    for i, one in enumerate(found):
        unit = one.vector.double().numpy() / one.vector.double().norm().item()
        assert abs(unit @ rows[i]) == pytest.approx(1.0, abs=1e-6)
        assert one.share == pytest.approx(singular[i] ** 2 / (singular**2).sum())
        assert float((one.vector @ weight.T).square().mean().sqrt()) == pytest.approx(finders.JACOBIAN_RMS, rel=1e-5)
    assert len(seen) == 7


def test_jacobian_is_averaged_over_latents_that_may_be_maps() -> None:
    """x_hat = (a^2, b): J'J is diag(4 a^2, 1); its mean over a = 0, 1 is diag(2, 1)."""

    def decode(z: torch.Tensor) -> torch.Tensor:
        a, b = z.flatten(1).unbind(1)
        return torch.stack([a**2, b], 1).view(-1, 1, 1, 2)

    z = torch.tensor([[0.0, 5.0], [1.0, 5.0]]).view(2, 1, 1, 2)
    first, second = finders.jacobian(decode, z, 2, lambda: None)
    assert torch.allclose(first.vector.flatten(), torch.tensor([finders.JACOBIAN_RMS * 1.0, 0.0]), atol=1e-7)
    assert torch.allclose(second.vector.flatten(), torch.tensor([0.0, finders.JACOBIAN_RMS * 2**0.5]), atol=1e-7)
    assert (first.share, second.share) == (pytest.approx(2 / 3), pytest.approx(1 / 3))


def test_columns_do_not_depend_on_how_many_are_taken_together() -> None:
    net = torch.nn.Sequential(torch.nn.Linear(6, 12), torch.nn.Tanh(), torch.nn.Linear(12, 8))
    z = torch.randn(6)
    expected = torch.autograd.functional.jacobian(lambda one: net(one[None])[0], z).T
    for together in (1, 4, 64):
        assert torch.allclose(finders.jacobian_columns(net, z, together), expected, atol=1e-6)


def test_columns_of_a_decoder_with_attention() -> None:
    def net(z: torch.Tensor) -> torch.Tensor:
        tokens = z.view(-1, 1, 3, 2)
        return torch.nn.functional.scaled_dot_product_attention(tokens, tokens.flip(2), tokens**2)

    z = torch.randn(6)
    expected = torch.autograd.functional.jacobian(lambda one: net(one[None]).flatten(), z).T
    assert torch.allclose(finders.jacobian_columns(net, z), expected, atol=1e-6)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_latents_that_are_not_finite_are_refused_in_one_line(number: float) -> None:
    z, codes, _ = labeled(300)
    z[7, 2] = number
    with pytest.raises(UserError, match=r"find=\[pca\]: the latents .* not finite"):
        finders.pca(z, 2)
    with pytest.raises(UserError, match=r"find=\[jacobian\]: the latents .* not finite"):
        finders.jacobian(lambda one: one * number, torch.ones(2, 1, 2, 2), 2, lambda: None)
    with pytest.raises(UserError, match=r"find=\[labels\]: the latents .* not finite"):
        finders.from_labels(z, codes, ATTRIBUTES, ["hair"])


def test_latents_whose_squares_overflow_are_refused_in_one_line() -> None:
    """Each number is finite, in float64 too; products of them are not."""
    z, codes, _ = labeled(300)
    with pytest.raises(UserError, match=r"find=\[pca\]: the latents .* not finite"):
        finders.pca(z * 1e200, 2)
    with pytest.raises(UserError, match=r"find=\[labels\]: the latents .* not finite"):
        finders.from_labels(z * 1e200, codes, ATTRIBUTES, ["hair"])


def test_a_matrix_that_torch_cannot_take_apart_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: torch.Tensor) -> None:
        raise torch.linalg.LinAlgError("linalg.eigh:\n the algorithm failed to converge")

    monkeypatch.setattr(torch.linalg, "eigh", fails)
    with pytest.raises(UserError, match=r"^find=\[pca\]: no directions .* \(linalg.eigh: the algorithm failed"):
        finders.top_eigenvectors(torch.eye(3), 1, "components", "pca")


def test_equations_without_a_solution_are_one_line() -> None:
    with pytest.raises(UserError, match=r"^find=\[labels\]: no directions can be computed here \(.*singular"):
        label_regression.solve(torch.zeros(2, 2), torch.ones(2, 1))
