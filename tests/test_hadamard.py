"""Hadamard matrices of every tabulated order, and the maps made of them."""

from __future__ import annotations

import pytest
import torch

from suite.errors import PTQError
from suite.hadamard import FALLBACKS, TABULATED, decompose, hadamard, online, random_hadamard, random_orthogonal


@pytest.mark.parametrize("order", sorted({m * p for m in TABULATED for p in (1, 2, 4) if m * p <= 344} | {4, 8, 256}))
def test_every_tabulated_order_is_a_hadamard_matrix(order):
    h = hadamard(order).long()
    assert h.shape == (order, order) and set(h.unique().tolist()) == ({1, -1} if order > 1 else {1})
    assert torch.equal(h @ h.T, order * torch.eye(order, dtype=torch.long))


@pytest.mark.parametrize("order", [3, 6, 10, 92])
def test_an_order_that_is_not_reached_says_so(order):
    with pytest.raises(PTQError, match=str(order)):
        hadamard(order)


@pytest.mark.parametrize(
    "width", [1, 2, 32, 128, 256, 512, 24, 384, 640, 704, 56, 72, 80, 88, 104, 120, 216, 280, 312, 344]
)
def test_the_fast_transform_is_the_matrix(width):
    made = online(width)
    x = torch.randn(2, 3, width, dtype=torch.float64)
    m, p = decompose(width)
    # the definition: an entry of H_p is the sign of the common bits of its two indices
    index = torch.arange(p)
    bits = index[:, None] & index
    signs = (
        torch.tensor([[1 - 2 * (int(b).bit_count() % 2) for b in row] for row in bits[:64, :64]]) if p <= 64 else None
    )
    dense = made.matrix()
    if signs is not None:
        expected = torch.kron(hadamard(m).double(), signs.double()) / width**0.5
        assert (dense - expected).abs().max() < 1e-12
    assert (dense @ dense.T - torch.eye(width)).abs().max() < 1e-12
    assert (made.apply(x) - x @ dense).abs().max() < 1e-11
    assert ((dense * width**0.5).abs() - 1).abs().max() < 1e-9, "every entry has the same size"


@pytest.mark.parametrize("fallback", FALLBACKS)
@pytest.mark.parametrize("width", [4864, 18944 // 64])
def test_a_fallback_is_orthogonal_and_named(width, fallback):
    with pytest.raises(PTQError, match=f"{width}.*block-hadamard"):
        online(width)
    made = online(width, fallback)
    assert made.width == width and fallback.split("-")[0] in made.name
    x = torch.randn(4, width, dtype=torch.float64)
    y = made.apply(x)
    assert torch.allclose(y @ y.T, x @ x.T) and not torch.allclose(x, y)


def test_a_fallback_changes_nothing_where_the_table_has_the_order():
    assert {online(640, fallback).name for fallback in ("", *FALLBACKS)} == {"hadamard 20 x 32"}


def test_an_unknown_fallback_is_an_error():
    with pytest.raises(PTQError, match="block-hadamard"):
        online(4864, "block")


def test_random_rotations_are_seeded_and_orthogonal():
    for make in (random_orthogonal, random_hadamard):
        one, again, other = (make(24, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
        assert torch.equal(one, again) and not torch.equal(one, other)
        assert (one @ one.T - torch.eye(24)).abs().max() < 1e-12
