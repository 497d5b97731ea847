"""A block Krylov basis of a matrix's column space that knows what it has captured and what it may still gain.

For D (b, m, n), a basis U (b, m, l) with orthonormal columns and its image W = D^T U (b, n, l) give the best
approximation of any rank inside the basis from the small Gram W^T W. One cycle reads D twice and adds a block
of w columns (V_1 is Gaussian, and every V_j has a few fresh Gaussian columns more):

    Y = D V_j,   U_{j+1} = orth(Y - U U^T Y),   W_{j+1} = D^T U_{j+1},   V_{j+1} = W_{j+1} rotated and scaled

The eigenvalues of W^T W (Ritz values) never exceed the squared singular values of D and grow towards them.
Grams are summed in float64, products with D are in D's own dtype. Cost per cycle 4 m n w + O((m + n) l w).

Sources: Halko, Martinsson, Tropp, arXiv 0909.4061; Musco, Musco, arXiv 1504.05477.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from lrgpu import backend
from lrgpu.backend import Array

# A block gets one more column, a fresh one, for so many that it has: a Krylov space alone finds no more vectors
# of one repeated singular value than a block has columns, and cannot know that there are others.
_FRESH_SHARE = 32
_LOST = 1e-4  # ||D||^2 - sum S^2 below this share of ||D||^2 has lost too many digits to be a residual


class Approximation(NamedTuple):
    """U (b, m, k), S (b, k) descending, Vh (b, k, n), squared_residual (b,) of ||D - U S Vh||, float64."""

    U: Array
    S: Array
    Vh: Array
    squared_residual: Array


class Krylov:
    """The growing basis. ``ritz``: (b, l) float64, descending. ``passes``: how often D was read."""

    def __init__(self, D: Array, squared_norm: Array, block: Array, seeds: Sequence[int], passes: int = 0):
        """D (b, m, n); squared_norm (b,) float64; block (b, n, w) of any full rank, usually Gaussian;
        seeds: one per matrix, for the fresh columns; passes: how often D was read before."""
        library = backend.of(D)
        batch, rows, columns = D.shape
        self.D, self.squared_norm = D, squared_norm
        self.unit = library.xp.sqrt(library.xp.where(squared_norm > 0, squared_norm, 1.0))[:, None, None]
        self.block = block / library.cast(self.unit, D.dtype)  # D @ block is of order 1 for D of any scale
        self.U = library.empty((batch, rows, 0), D.dtype, D)
        self.W = library.empty((batch, columns, 0), library.xp.float64, D)
        self.gram = library.empty((batch, 0, 0), library.xp.float64, D)
        self.ritz = library.empty((batch, 0), library.xp.float64, D)
        self.previous_ritz = [self.ritz] * 3  # of the three cycles before
        self.leading = self.gram  # of the last call of ``turned``
        self.passes = passes
        self.seeds = seeds
        self.cycles = 0
        self.refilled = squared_norm < 0  # whether a block ran out of directions and got fresh ones, (b,)
        self.doubtful = self.refilled  # ... just now, so that nothing is known yet of what those find, (b,)

    @property
    def width(self) -> int:
        """Number of columns of the basis."""
        return self.U.shape[-1]

    def cycle(self) -> None:
        """Read D twice and add one block."""
        library = backend.of(self.D)
        xp = library.xp
        if self.cycles:
            self.block = self._next_block()
        fresh = orthonormal(self.D @ self.block, self.U)
        image = (fresh.swapaxes(-1, -2) @ self.D).swapaxes(-1, -2)  # D^T @ fresh is slower in memory
        self.passes += 2
        image = library.cast(image, xp.float64)
        self.U = xp.concatenate((self.U, fresh), -1)
        self.W = xp.concatenate((self.W, image), -1)

        columns = self.W.swapaxes(-1, -2) @ image
        old = self.gram.shape[-1]
        top = xp.concatenate((self.gram, columns[:, :old]), -1)
        self.gram = xp.concatenate((top, columns.swapaxes(-1, -2)), -2)
        self.cycles += 1
        self.squares, self.vectors = xp.linalg.eigh(columns[:, old:])
        exhausted = ~self._present().all(-1)
        self.doubtful = exhausted & ~self.refilled
        self.refilled = exhausted
        self.previous_ritz = [self.ritz, *self.previous_ritz[:2]]
        self.ritz = xp.clip(xp.flip(xp.linalg.eigvalsh(self.gram), (-1,)), 0, None)

    def _present(self) -> Array:
        """Which directions (b, w) of the last image are more than rounding noise of the strongest."""
        return self.squares > 1e-14 * self.squares[:, -1:]

    def _next_block(self) -> Array:
        """The last image (b, n, w) with orthonormal columns, those that are null drawn afresh, and a few more."""
        library = backend.of(self.D)
        xp = library.xp
        rows, width = self.W.shape[-2], self.squares.shape[-1]
        present = self._present()
        few = max(1, width // _FRESH_SHARE)
        drawn = few + (width if bool(self.refilled.any()) else 0)
        seeds = [(seed + self.cycles * 0x9E3779B97F4A7C15) % 2**63 for seed in self.seeds]
        fresh = backend.normal(seeds, rows, drawn, self.D, self.D.dtype) * rows**-0.5
        # A direction is only where to look next: the dtype of D is enough for it.
        turn = self.vectors * xp.where(present, self.squares, xp.inf)[:, None, :] ** -0.5
        block = library.cast(self.W[:, :, -width:], self.D.dtype) @ library.cast(turn, self.D.dtype)
        if drawn > few:
            block = block + fresh[..., few:] * ~present[:, None, :]
        block = xp.concatenate((block, fresh[..., :few]), -1)
        return block / library.cast(self.unit, self.D.dtype)

    def outlook(self, rank: int) -> tuple[Array, Array]:
        """(energy that more cycles could still win for the first ``rank``, energy that they leave now), (b,).

        Gains g end up falling by a constant factor rho per cycle or faster, so about g rho / (1 - rho) is to
        come; twice that is assumed. Two alike ratios in a row are believed, down to 1/4. Else rho
        counts as at least 1/2 and what is to come as at least the mean of the last two gains: rho looks too
        small while dominant directions converge in front of a flat tail, and on a plateau large and small
        gains take turns.
        """
        xp = backend.of(self.D).xp
        ritz = [self.ritz, *self.previous_ritz]
        last, middle, first = (self._gain(ritz[i], ritz[i + 1], rank) for i in range(3))
        rho, rho_before = last / xp.clip(middle, 1e-300, None), middle / xp.clip(first, 1e-300, None)
        greater = xp.maximum(rho, rho_before)
        steady = (greater <= 4 * xp.minimum(rho, rho_before)) & (self.cycles > 3)  # the first gain is all
        rho = xp.where(steady, xp.clip(greater, 0.25, 0.95), xp.clip(rho, 0.5, 0.95))
        to_come = 2 * last * rho / (1 - rho)
        to_come = xp.where(steady, to_come, xp.maximum(to_come, xp.sqrt(last * middle)))
        left = self.squared_norm - self.ritz[:, :rank].sum(-1)
        # Where that is mostly rounding, the Ritz values left out are a safe lower bound of it.
        left = xp.where(left > 1e-5 * self.squared_norm, left, self.ritz[:, rank:].sum(-1))
        return xp.where(self.doubtful, left, to_come), left

    def turned(self, rank: int) -> Array:
        """The sine (b,) of the largest angle by which the space of the first ``rank`` has turned since the last call.

        1 at the first call. Energy does not tell: it hardly changes when the last direction turns into the next.
        """
        xp = backend.of(self.D).xp
        before = self.leading
        self.leading = xp.flip(xp.linalg.eigh(self.gram)[1], (-1,))[..., :rank]
        if before.shape[-1] != self.leading.shape[-1]:
            return 1 + 0 * self.squared_norm
        cosines = self.leading[:, : before.shape[-2]].swapaxes(-1, -2) @ before
        least = xp.linalg.eigvalsh(cosines.swapaxes(-1, -2) @ cosines)[:, 0]
        return xp.sqrt(xp.clip(1 - least, 0, None))

    def _gain(self, now: Array, before: Array, rank: int) -> Array:
        """What the leading Ritz values won, beyond what rounding alone may add to each."""
        xp = backend.of(self.D).xp
        gain = now[:, :rank] * (1 - 8 * xp.finfo(self.D.dtype).eps)
        known = min(before.shape[-1], gain.shape[-1])
        gain[:, :known] -= before[:, :known]
        return xp.clip(gain, 0, None).sum(-1)

    def approximation(self, rank: int, which: slice) -> Approximation:
        """The best of this rank inside the basis, for the matrices ``which`` of the batch."""
        library = backend.of(self.D)
        xp = library.xp
        D, squared_norm = self.D[which], self.squared_norm[which]
        _, vectors = xp.linalg.eigh(self.gram[which])
        rotation = xp.flip(vectors, (-1,))[..., :rank]
        right = self.W[which] @ rotation
        S = xp.sqrt((right * right).sum(-2))
        present = S > 1e-3 * xp.finfo(D.dtype).eps * S[:, :1]
        Vh = (right / xp.where(present, S, xp.inf)[:, None, :]).swapaxes(-1, -2)
        U = self.U[which] @ library.cast(rotation * present[:, None, :], D.dtype)
        S = xp.where(present, S, 0.0)
        squared = squared_norm - (S * S).sum(-1)
        S, Vh = library.cast(S, D.dtype), library.cast(Vh, D.dtype)
        if bool((squared < _LOST * squared_norm).any()):
            squared = squared_error(D, U, S, Vh)
        return Approximation(U, S, Vh, xp.clip(squared, 0, None))


def orthonormal(Y: Array, U: Array) -> Array:
    """An orthonormal basis of the columns of Y (b, m, w) outside those of U (b, m, l), from Grams alone.

    Each round projects and rotates Y to the eigenvectors of its Gram. That resolves three to four digits of
    condition in float32, so rounds repeat until the columns come out as unit vectors by themselves (usually
    the second). Columns that are only rounding noise become zero, which is harmless: they carry no energy.
    Two rounds cost a third of a Householder QR, and batch well on a GPU where that does not.
    """
    for attempt in range(5):
        if U.shape[-1]:
            Y = Y - U @ (U.swapaxes(-1, -2) @ Y)
        Y, shortest = _rotated(Y)
        if attempt and shortest > 0.5:
            break
    return Y


def _rotated(Y: Array) -> tuple[Array, float]:
    """Y turned to orthogonal columns of unit length, or zero where they are rounding noise of the longest;
    with the least length that a column had, relative to the largest."""
    library = backend.of(Y)
    xp = library.xp
    _, vectors = xp.linalg.eigh(library.cast(Y.swapaxes(-1, -2) @ Y, xp.float64))
    Y = Y @ library.cast(vectors, Y.dtype)
    length = xp.sqrt((Y * Y).sum(-2))
    longest = xp.amax(length, (-1,))[:, None]
    present = length > 4 * xp.finfo(Y.dtype).eps * longest
    relative = xp.where(present, length / xp.where(longest > 0, longest, 1), 1.0)
    return Y / xp.where(present, length, xp.inf)[:, None, :], float(relative.min())


def squared_error(D: Array, U: Array, S: Array, Vh: Array) -> Array:
    """||D - U S Vh||^2 (b,), term by term, in blocks of rows."""
    library = backend.of(D)
    rows = 256 if library.on_cpu(D) else D.shape[-2]
    US = U * S[:, None, :]
    total = 0 * library.cast(S[:, 0], library.xp.float64)
    for start in range(0, D.shape[-2], rows):
        part = slice(start, start + rows)
        total = total + backend.squared_norm(D[:, part] - US[:, part] @ Vh)
    return total
