"""Hadamard matrices, built; and orthogonal maps that are applied to activations fast enough to stay in the model.

A Hadamard matrix of order n has entries +1, -1 and H H' = n I. It exists for n = 1, 2 and, as far as is known, for all
multiples of 4. Built here, for orders m times a power of two, from

    Sylvester's doubling     H_2n = [[H, H], [H, -H]]
    Paley's two families     order q + 1 for prime powers q = 3 mod 4, order 2 (q + 1) for prime powers q = 1 mod 4
                             (Paley, "On orthogonal matrices", 1933)
    Goethals and Seidel      order 4 n from four circulant matrices with A A' + B B' + C C' + D D' = 4 n I
                             ("A skew Hadamard matrix of order 36", 1970); the first rows for n = 39 and 43 below were
                             found by a search over unions of orbits of a group of multipliers of Z_n

Letters: n width, m order of the small factor, p a power of two, b number of blocks: n = b * m * p.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from suite.errors import PTQError, unknown

# The orders, times any power of two, whose matrices the public tables have, and so the kernels of engines.
TABULATED = (1, 12, 20, 28, 36, 40, 44, 52, 60, 108, 140, 156, 172)
FALLBACKS = ("constructed", "block-hadamard", "random")

_RADIX = 64  # the fast transform multiplies by matrices of at most this order: fewer passes over memory than by 2

_CIRCULANT = {  # n -> first rows of the four circulant blocks
    39: (
        "++-++-++++++--+++++-+-++-+-+-+----++-++",
        "+-++-+-+++-+-+-----++-----+++--++-+--+-",
        "+-++++-+++++-----+-++--+-+-++--++-+--++",
        "+++--++-----+-+++-++--+-----+++++--++--",
    ),
    43: (
        "+--+-++---+-+------++--++------+-+---++-+--",
        "+--+-+++--+-+-----+++--++-+-++++-++--++-+--",
        "++--+--+-+-+-++++++--+---++-+++---+++----+-",
        "+-+---+++-+-------+---+++-+++++++-+---+++-+",
    ),
}


# ---------------------------------------------------------------------------------------------- construction


@functools.cache
def hadamard(m: int) -> Tensor:
    """A Hadamard matrix (m, m) of entries +1 and -1, int8.

    Raises PTQError if none of the constructions here reaches the order.

    >>> hadamard(12).shape
    torch.Size([12, 12])
    """
    if m == 1:
        return torch.ones(1, 1, dtype=torch.int8)
    if m == 2:
        return torch.tensor([[1, 1], [1, -1]], dtype=torch.int8)
    if m % 4 == 0 and _prime_power(m - 1):  # m - 1 = 3 mod 4
        return _paley_one(m - 1)
    if m % 4 == 0 and (m // 2 - 1) % 4 == 1 and _prime_power(m // 2 - 1):
        return _paley_two(m // 2 - 1)
    if m % 4 == 0 and m // 4 in _CIRCULANT:
        return _goethals_seidel(m // 4)
    if m % 2 == 0 and _reached(m // 2):
        return torch.kron(hadamard(2), hadamard(m // 2))
    raise PTQError(
        f"no Hadamard matrix of order {m} is known here: orders are 1, 2, and multiples of 4 that Paley's or "
        f"Goethals and Seidel's construction reaches"
    )


def _reached(m: int) -> bool:
    try:
        hadamard(m)
    except PTQError:
        return False
    return True


def _prime_power(q: int) -> tuple[int, int] | None:
    """(prime, exponent) of a prime power, else None."""
    for prime in itertools.chain((2,), range(3, math.isqrt(q) + 1, 2)):
        if q % prime == 0:
            exponent = 0
            while q % prime == 0:
                q, exponent = q // prime, exponent + 1
            return (prime, exponent) if q == 1 else None
    return (q, 1) if q > 1 else None


def _jacobsthal(q: int) -> Tensor:
    """(q, q) int8: entry (a, b) is 1 if a - b is a square of the field of q elements, -1 if not, 0 if a = b."""
    prime, degree = _prime_power(q)
    elements = list(itertools.product(range(prime), repeat=degree))  # polynomials, the constant term first
    modulus = _irreducible(prime, degree)
    squares = {_product(a, a, modulus, prime) for a in elements[1:]}
    table = [
        [
            0 if a == b else 1 if tuple((x - y) % prime for x, y in zip(a, b, strict=True)) in squares else -1
            for b in elements
        ]
        for a in elements
    ]
    return torch.tensor(table, dtype=torch.int8)


def _product(a: tuple, b: tuple, modulus: tuple, prime: int) -> tuple:
    """Product of two polynomials modulo one that is monic of degree len(a)."""
    degree = len(a)
    out = [0] * (2 * degree - 1)
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            out[i + j] = (out[i + j] + x * y) % prime
    for k in range(2 * degree - 2, degree - 1, -1):
        for j in range(degree):
            out[k - degree + j] = (out[k - degree + j] - out[k] * modulus[j]) % prime
    return tuple(out[:degree])


def _irreducible(prime: int, degree: int) -> tuple:
    """The lower coefficients of a monic irreducible polynomial: no monic polynomial of half its degree divides it."""
    if degree == 1:
        return (0,)
    for lower in itertools.product(range(prime), repeat=degree):
        if not any(
            _divides(factor, (*lower, 1), prime)
            for k in range(1, degree // 2 + 1)
            for factor in ((*f, 1) for f in itertools.product(range(prime), repeat=k))
        ):
            return lower
    raise AssertionError("there is one of every degree")


def _divides(factor: tuple, polynomial: tuple, prime: int) -> bool:
    rest = list(polynomial)
    while len(rest) >= len(factor):
        lead = rest[-1]
        for j, x in enumerate(factor):
            at = len(rest) - len(factor) + j
            rest[at] = (rest[at] - lead * x) % prime
        rest.pop()
    return not any(rest)


def _paley_one(q: int) -> Tensor:
    """Order q + 1: I + S with S = [[0, 1], [-1, Q]] skew."""
    s = torch.zeros(q + 1, q + 1, dtype=torch.int8)
    s[0, 1:], s[1:, 0], s[1:, 1:] = 1, -1, _jacobsthal(q)
    return s + torch.eye(q + 1, dtype=torch.int8)


def _paley_two(q: int) -> Tensor:
    """Order 2 (q + 1): of the symmetric C = [[0, 1], [1, Q]], 0 becomes [[1, -1], [-1, -1]], and c becomes c H_2."""
    c = torch.zeros(q + 1, q + 1, dtype=torch.int8)
    c[0, 1:], c[1:, 0], c[1:, 1:] = 1, 1, _jacobsthal(q)
    middle = torch.tensor([[1, -1], [-1, -1]], dtype=torch.int8)
    return torch.kron(c, hadamard(2)) + torch.kron(torch.eye(q + 1, dtype=torch.int8), middle)


def _goethals_seidel(n: int) -> Tensor:
    rows = [torch.tensor([1 if sign == "+" else -1 for sign in row], dtype=torch.int8) for row in _CIRCULANT[n]]
    a, b, c, d = (torch.stack([row.roll(k) for k in range(n)]) for row in rows)  # (n, n) each
    br, cr, dr = (x.flip(1) for x in (b, c, d))  # times the back-diagonal matrix
    bt, ct, dt = (x.T.flip(1) for x in (b, c, d))
    return torch.cat(
        [torch.cat(line, 1) for line in ((a, br, cr, dr), (-br, a, dt, -ct), (-cr, -dt, a, bt), (-dr, ct, -bt, a))]
    )


# ---------------------------------------------------------------------------------------------- maps


@dataclass(frozen=True, eq=False)
class Orthogonal:
    """The orthogonal map x -> x (I_b kron F kron H_p) of vectors of width n = b * m * p: small to store, fast to apply.

    factor (m, m): a Hadamard matrix divided by sqrt(m), or any orthogonal matrix; power: p; name: for records.

    >>> x = torch.randn(3, 24)
    >>> torch.allclose(online(24).apply(x).norm(dim=-1), x.norm(dim=-1))
    True
    """

    name: str
    factor: Tensor = field(repr=False)
    power: int
    blocks: int = 1

    @property
    def width(self) -> int:
        return self.blocks * len(self.factor) * self.power

    def apply(self, x: Tensor) -> Tensor:
        """(..., n) -> (..., n), in the type of x."""
        return transform(x, self.factor.to(x.device, x.dtype), self.power)

    @property
    def shape(self) -> dict:
        """JSON for all but the factor's entries; see `shell`."""
        return {"name": self.name, "order": len(self.factor), "power": self.power, "blocks": self.blocks}

    @classmethod
    def shell(cls, name: str, order: int, power: int, blocks: int) -> Orthogonal:
        """The map of a `shape`, the entries of its factor still to be filled in."""
        return cls(name, torch.zeros(order, order), power, blocks)

    def matrix(self) -> Tensor:
        """(n, n) float64: `apply(x) == x @ matrix()`."""
        return self.apply(torch.eye(self.width, dtype=torch.float64))


def transform(x: Tensor, factor: Tensor, power: int) -> Tensor:
    """x (..., b * m * p) times I_b kron factor (m, m) kron the orthonormal Walsh-Hadamard matrix of order p.

    The power of two is transformed in O(n log p): by matrices of order 64 and less, one digit of the index at a time.
    """
    shape, m = x.shape, len(factor)
    rest, size = power, 1  # digits still to do; stride of the digit in hand
    while rest > 1:
        radix = min(rest, _RADIX)
        h = _walsh(radix).to(x.device, x.dtype)
        x = torch.einsum("...rs,rq->...qs", x.reshape(*shape[:-1], -1, radix, size), h).reshape(shape)
        rest, size = rest // radix, size * radix
    if m > 1:
        x = torch.einsum("...ms,mq->...qs", x.reshape(*shape[:-1], -1, m, power), factor).reshape(shape)
    return x


@functools.cache
def _walsh(p: int) -> Tensor:
    """(p, p) float64, orthonormal."""
    h = torch.ones(1, 1, dtype=torch.float64)
    while len(h) < p:
        h = torch.kron(hadamard(2).double(), h)
    return h / math.sqrt(p)


def decompose(n: int, orders: tuple[int, ...] = TABULATED) -> tuple[int, int] | None:
    """(m, p) with n = m * p, m the smallest of `orders` and p a power of two; None if there is none.

    >>> decompose(2816), decompose(4864)
    ((44, 64), None)
    """
    return next(((m, n // m) for m in sorted(orders) if n % m == 0 and (n // m).bit_count() == 1), None)


def online(n: int, fallback: str = "", seed: int = 0) -> Orthogonal:
    """The Hadamard transform of width n, for use inside a model.

    fallback, where the public tables have no matrix of order n: "constructed": a Hadamard matrix that is built here and
    that no engine's kernel has; "block-hadamard": equal blocks of the largest power of two, or tabulated order, that
    divides n; "random": a seeded random orthogonal matrix of the odd part of n, times the power of two's transform.

    Raises PTQError: there is no such matrix and no fallback was asked for; an unknown fallback; a fallback that does
    not help either.

    >>> online(4864, "block-hadamard").name
    'block-hadamard 19 x 256'
    """
    check_fallback(fallback)
    found = decompose(n)
    if found is not None:
        m, p = found
        return Orthogonal(f"hadamard {m} x {p}" if m > 1 else f"hadamard {p}", hadamard(m).double() / math.sqrt(m), p)
    p = n & -n  # the power of two in n
    if fallback == "constructed":
        for m in (n // p, 2 * n // p, 4 * n // p):
            if n % m == 0 and _reached(m):
                return Orthogonal(f"constructed hadamard {m} x {n // m}", hadamard(m).double() / math.sqrt(m), n // m)
        raise PTQError(
            f"no Hadamard matrix of order {n} can be constructed here: use the fallback block-hadamard or random"
        )
    if fallback == "block-hadamard":
        size = max(
            (m * q for m in TABULATED for q in (2**k for k in range(n.bit_length())) if n % (m * q) == 0), default=1
        )
        if size < 2:
            raise PTQError(f"no block of a Hadamard matrix divides the odd width {n}: use the fallback random")
        m, q = decompose(size)
        return Orthogonal(f"block-hadamard {n // size} x {size}", hadamard(m).double() / math.sqrt(m), q, n // size)
    if fallback == "random":
        generator = torch.Generator().manual_seed(seed)
        return Orthogonal(f"random {n // p} x hadamard {p}, seed {seed}", random_orthogonal(n // p, generator), p)
    raise PTQError(
        f"no Hadamard matrix of order {n} in the public tables (orders are a power of two times "
        f"{', '.join(map(str, TABULATED))}): ask for a fallback, one of {', '.join(FALLBACKS)}"
    )


def check_fallback(fallback: str) -> None:
    if fallback and fallback not in FALLBACKS:
        raise unknown("fallback", fallback, FALLBACKS)


def random_orthogonal(n: int, generator: torch.Generator) -> Tensor:
    """(n, n) float64, uniform over the orthogonal group: Q of a Gaussian matrix, its signs those of R's diagonal."""
    q, r = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator))
    return (q * r.diagonal().sign()).contiguous()


def random_hadamard(n: int, generator: torch.Generator, fallback: str = "") -> Tensor:
    """(n, n) float64: random signs of the channels, then the Hadamard transform. Raises PTQError as `online` does."""
    signs = torch.randint(0, 2, (n,), generator=generator).double() * 2 - 1
    return signs[:, None] * online(n, fallback, int(generator.initial_seed())).matrix()
