"""Linear CKA: the formula, its invariances, streaming, and the small distances that decide between candidates."""

from __future__ import annotations

import math

import mpmath
import numpy
import pytest
import torch

from suite.cka import CKA, linear_cka


def features(tokens=512, width=24, seed=0, offset=0.0):
    """Correlated features (tokens, width) float32, some large, with a mean of their own."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator) * torch.logspace(-1, 1, width)
    return torch.randn(tokens, width, generator=generator) @ mix + torch.randn(width, generator=generator) + offset


def direct_distance(x, y) -> float:
    """1 - CKA by the formula, in float64: round-off of about 1e-15."""
    x, y = x.double().numpy(), y.double().numpy()
    x, y = x - x.mean(0), y - y.mean(0)
    norm = numpy.linalg.norm
    return 1 - norm(y.T @ x) ** 2 / (norm(x.T @ x) * norm(y.T @ y))


def rotation(width, seed=1):
    return torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(seed)).double())[0]


# ---------------------------------------------------------------------------------------------- formula


def test_formula_against_kernels():
    """HSIC of the centred Gram matrices over tokens, the definition of Kornblith et al., equation 3."""
    x, y = features(60, 5).double(), features(60, 9, seed=2).double()
    centre = torch.eye(60) - 1 / 60
    k, m = centre.double() @ x @ x.T @ centre.double(), centre.double() @ y @ y.T @ centre.double()
    hsic = (k * m).sum() / ((k * k).sum().sqrt() * (m * m).sum().sqrt())
    assert linear_cka(x, y) == pytest.approx(float(hsic), rel=1e-12)
    assert linear_cka(y, x) == pytest.approx(linear_cka(x, y), rel=1e-12)


def test_bounds():
    x = features()
    assert linear_cka(x, x) == pytest.approx(1, abs=1e-12) and CKA(x).distance(x) < 1e-15
    assert 0 <= linear_cka(x, features(seed=3)) < 0.5
    ones = torch.cat([torch.ones(4), -torch.ones(4)])[:, None]  # orthogonal features have CKA 0
    other = torch.tensor([1.0, -1.0] * 4)[:, None]
    assert linear_cka(ones, other) == pytest.approx(0, abs=1e-15) and CKA(ones).distance(other) == pytest.approx(1)


def test_invariances():
    x = features().double()
    y = x + 0.3 * features(seed=4).double()
    value = linear_cka(x, y)
    for changed in (y @ rotation(24), 7 * y, y + 100, (3 * y + 1) @ rotation(24, 5)):
        assert linear_cka(x, changed) == pytest.approx(value, rel=1e-10)
        assert CKA(x).distance(changed) == pytest.approx(1 - value, rel=1e-3)
    stretched = y * torch.linspace(1, 5, 24)  # not invariant to any linear map
    assert abs(linear_cka(x, stretched) - value) > 1e-3


# ---------------------------------------------------------------------------------------------- distances


@pytest.mark.parametrize("size", [1.0, 1e-1, 1e-2, 1e-3, 1e-4, 3e-5])
@pytest.mark.parametrize("offset", [0.0, 50.0])
def test_distance_of_a_perturbation(size, offset):
    """Down to 1 - CKA of about 1e-10, where 1 - CKA computed in float32 is noise."""
    x = features(offset=offset)
    y = x + size * features(seed=7)
    expected = direct_distance(x, y)
    assert CKA(x).distance(y) == pytest.approx(expected, rel=1e-3)


def test_distance_at_1e_9_against_many_digits():
    """The formula to 40 digits."""
    mpmath.mp.dps = 40
    x = features(64, 4)
    y = x + 4e-5 * features(64, 4, seed=8)
    a, b = (mpmath.matrix(t.double().tolist()) for t in (x, y))

    def centred(m):
        means = [mpmath.fsum(m[i, j] for i in range(m.rows)) / m.rows for j in range(m.cols)]
        return mpmath.matrix([[m[i, j] - means[j] for j in range(m.cols)] for i in range(m.rows)])

    def square(m):
        return mpmath.fsum(m[i, j] ** 2 for i in range(m.rows) for j in range(m.cols))

    a, b = centred(a), centred(b)
    expected = 1 - square(b.T * a) / mpmath.sqrt(square(a.T * a) * square(b.T * b))
    assert 1e-10 < expected < 1e-8
    assert CKA(x).distance(y) == pytest.approx(float(expected), rel=1e-3)


def test_small_distances_keep_their_order():
    x = features(4096, 64)
    noise = features(4096, 64, seed=9)
    found = [CKA(x).distance(x + 1e-4 * (1 + 0.01 * k) * noise) for k in range(5)]
    assert found == sorted(found) and found[0] < 1e-7
    for k, value in enumerate(found):  # second order in the perturbation
        assert value / found[0] == pytest.approx((1 + 0.01 * k) ** 2, rel=2e-3)


def test_identical_and_scaled_are_zero():
    x = features(4096, 64)
    assert CKA(x).distance(x.clone()) < 1e-15
    assert CKA(x).distance(2 * x) < 1e-12
    assert CKA(x).distance(x + 1000) < 1e-9


def test_massive_channel():
    """One channel a thousand times the others and far from zero, as in large models: it does not drown the distance."""
    x = features(2048, 32)
    x[:, 3] = 3000 + 30 * x[:, 3]
    y = x + 1e-2 * features(2048, 32, seed=10)
    assert CKA(x).distance(y) == pytest.approx(direct_distance(x, y), rel=1e-2)


# ---------------------------------------------------------------------------------------------- streaming


@pytest.mark.parametrize("chunk", [1, 7, 100, 512, 10_000])
def test_chunks_do_not_matter(chunk):
    x = features(offset=5.0)
    y = x + 0.01 * features(seed=11)
    assert CKA(x, chunk).distance(y) == pytest.approx(CKA(x, 512).distance(y), rel=1e-4)


def test_shape_is_tokens_by_features():
    x = features(60, 8)
    y = x + 0.1 * features(60, 8, seed=12)
    assert CKA(x.reshape(5, 12, 8)).distance(y.reshape(5, 12, 8)) == CKA(x).distance(y)


def test_one_reference_many_candidates():
    x = features()
    shared, before = CKA(x), x.clone()
    candidates = [x + s * features(seed=13) for s in (0.1, 0.5, 0.1)]
    copies = [c.clone() for c in candidates]
    found = [shared.distance(c) for c in candidates]
    assert found == [CKA(x).distance(c) for c in candidates] and found[0] == found[2]
    assert torch.equal(x, before) and all(torch.equal(a, b) for a, b in zip(candidates, copies, strict=True))


def test_bfloat16_features():
    x = features().bfloat16()
    y = (x + 0.05 * features(seed=14)).bfloat16()
    assert CKA(x).distance(y) == pytest.approx(direct_distance(x.float(), y.float()), rel=1e-4)


# ---------------------------------------------------------------------------------------------- mistakes


def test_constant_or_infinite_sides():
    x = features()
    assert CKA(x).distance(torch.ones_like(x)) == pytest.approx(1, abs=1e-6)  # the farthest, so it is never chosen
    assert math.isnan(CKA(torch.ones_like(x)).distance(x))
    assert math.isnan(linear_cka(x, torch.ones_like(x)))
    for value in (math.inf, math.nan):
        y = x.clone()
        y[5, 5] = value
        assert math.isnan(CKA(x).distance(y))


def test_other_tokens_are_an_error():
    with pytest.raises(ValueError, match="512.*511"):
        CKA(features()).distance(features()[:-1])
    with pytest.raises(ValueError, match="512.*511"):
        linear_cka(features(), features()[:-1])
