"""Least squares for one matrix, from sums that are streamed: the arithmetic of the closed form.

Everything is float64, because sums of squares square the condition of the rows, and because what
a transform keeps is its difference from the identity. One eigendecomposition of the sums serves
every ridge; the matrix is solved for as a change of the one at hand, so that what the rows do not
determine stays as it is.
"""

import dataclasses

import numpy as np

from keras_cc.options import count

# The ridges that "auto" tries, and the one it takes where there are too few rows to try them on.
CANDIDATES = (1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
DEFAULT_RIDGE = 1e-4


@dataclasses.dataclass(frozen=True, eq=False)
class RidgeFit:
    """What `RidgeSums.solve` found.

    Attributes:
        matrix: float64 array `(d, d)`, the `W` of `source @ W`. Subtract the identity before
            casting it down: a small change does not survive beside a 1 in float32.
        ridge: float, the ridge that was used, in units of the mean diagonal of `C`.
        ridge_from: who chose it: `"given"`, `"held_out"`, or `"default"` where `"auto"` had fewer
            than two rows on either side and took `DEFAULT_RIDGE`.
        rank: int, in how many of the `d` directions the sources vary enough to be solved for.
        rows: int, how many rows had a weight above 0, held-out ones included.
        error_before: float, the mean of `||source @ start - goal||^2` per unit of weight over all
            rows. Both errors come from sums: about 1e-13 of the mean `||goal||^2` is rounding.
        error_after: float, the same for `matrix`. Never above `error_before`.
        held_out_errors: dict, the same error over the held-out rows for each candidate ridge,
            fitted to the other rows. Empty unless `ridge_from` is `"held_out"`.
    """

    matrix: np.ndarray
    ridge: float
    ridge_from: str
    rank: int
    rows: int
    error_before: float
    error_after: float
    held_out_errors: dict[float, float]


class RidgeSums:
    """Sums over streamed rows, from which the best matrix from source to goal follows.

        W = arg min  sum_n w_n ||f_n W - g_n||^2 + penalty ||W - W0||^2
        C = sum_n w_n f_n^T f_n     D = sum_n w_n f_n^T g_n     penalty = ridge * trace(C) / d
        W = W0 + (C + penalty I)^-1 (D - C W0)

    `W0` is the matrix at hand. The penalty pulls towards it and not towards zero, so for every
    ridge the error over all the rows is at most `W0`'s. No row is kept: memory is `C` and `D` in
    float64, twice (held-out rows have their own), and a few times that while solving.

    Args:
        dim: int, the width `d` of sources and goals.

    Raises:
        ValueError: if `dim` is not an integer >= 1.

    Example:

    ```python
    import numpy as np
    from keras_cc.calibration.ridge import RidgeSums

    rng = np.random.default_rng(0)
    source, rotation = rng.normal(size=(50, 3)), np.eye(3)[[1, 2, 0]]
    sums = RidgeSums(dim=3)
    sums.add(source[:30], source[:30] @ rotation)
    sums.add(source[30:], source[30:] @ rotation, held_out=np.ones(20, bool))
    fit = sums.solve(start=np.eye(3))
    fit.ridge, fit.rank, fit.rows  # 1e-08, 3, 50
    np.round(fit.matrix)  # rotation
    ```

    Source: ridge regression towards a prior mean; least squares between the activations of two
    languages is INCLINE's (arXiv 2410.12462).
    """

    def __init__(self, dim):
        self.dim = count("dim", dim, least=1)
        self.fitted = _Sums.zeros(self.dim)
        self.held_out = _Sums.zeros(self.dim)

    @property
    def rows(self):
        """How many rows with a weight above 0 were added, held-out ones included."""
        return self.fitted.rows + self.held_out.rows

    def add(self, source, goal, weight=None, held_out=None):
        """Add a batch of rows. Nothing is added where an argument is refused.

        Args:
            source: float array `(n, d)`, the rows `f`.
            goal: float array `(n, d)`, the rows `g`.
            weight: float array `(n,)`, at least 0; None for 1 everywhere. A row of weight 0 is not
                counted, and its values are not read.
            held_out: bool array `(n,)`, True for the rows that only choose the ridge and are
                fitted once it is chosen; None for none.

        Raises:
            ValueError: for another shape, a weight that is negative or not finite, a `held_out`
                that is not bool, or a source or goal that is not finite in a row with a weight.
        """
        source, goal = np.asarray(source), np.asarray(goal)
        for name, value in (("source", source), ("goal", goal)):
            if value.ndim != 2 or value.shape[1] != self.dim or len(value) != len(source):
                raise ValueError(
                    f"`source` and `goal` must both have shape (n, {self.dim}). "
                    f"Received: {name}.shape={value.shape}, source.shape={source.shape}"
                )
        n = len(source)
        weight = np.ones(n) if weight is None else np.asarray(weight, "float64")
        held_out = np.zeros(n, bool) if held_out is None else np.asarray(held_out)
        for name, value in (("weight", weight), ("held_out", held_out)):
            if value.shape != (n,):
                raise ValueError(
                    f"`{name}` must hold one value a row, shape ({n},). "
                    f"Received: {name}.shape={value.shape}"
                )
        if held_out.dtype != bool:
            raise ValueError(
                "`held_out` must be bool, True for the rows that are held out. "
                f"Received: held_out.dtype={held_out.dtype}"
            )
        if not (np.isfinite(weight) & (weight >= 0)).all():
            raise ValueError(
                "`weight` must be finite and at least 0; leave a row out with a weight of 0. "
                f"Received: weights from {weight.min()} to {weight.max()}"
            )
        counted = np.flatnonzero(weight > 0)
        # Before the products, so that squares of float32 neither round nor overflow.
        source, goal = source[counted].astype("float64"), goal[counted].astype("float64")
        for name, value in (("source", source), ("goal", goal)):
            broken = counted[~np.isfinite(value).all(axis=1)]
            if len(broken):
                raise ValueError(
                    f"`{name}` must be finite in every row with a weight; compute it in float32 or "
                    f"bfloat16, or give such a row a weight of 0. Received: {len(broken)} of {n} "
                    f"rows not finite, the first at index {broken[0]}"
                )
        weight, held_out = weight[counted], held_out[counted]
        for sums, chosen in ((self.fitted, ~held_out), (self.held_out, held_out)):
            if chosen.any():
                sums.add(source[chosen], goal[chosen], weight[chosen])

    def solve(self, start, ridge="auto"):
        """The matrix of least penalised error over all rows; the sums stay as they are.

        A direction of the sources counts as known where its share of `C`, an eigenvalue, is above
        `max(rows, d) * 2.2e-16` of the largest, what adding up that many numbers in float64 can
        get wrong. Along the others the rows say nothing: there the matrix keeps the start, with
        every ridge, 0 included.

        Args:
            start: float array `(d, d)`, the matrix at hand, towards which the penalty pulls.
            ridge: float, at least 0, in units of the mean diagonal of `C`, so that it has no
                scale; 0 is plain least squares. `"auto"` fits each of `CANDIDATES` to the rows
                that are not held out, and takes the one with the least error on the held-out rows
                (the larger one if two are equal); all rows are then fitted with it. With fewer
                than two rows on either side it is `DEFAULT_RIDGE`, and the result says so.

        Returns:
            A `RidgeFit`.

        Raises:
            ValueError: if there are no rows, or `start` or `ridge` is not as above.
        """
        start = np.asarray(start, "float64")
        if start.shape != (self.dim, self.dim) or not np.isfinite(start).all():
            raise ValueError(
                f"`start` must be a finite matrix of shape ({self.dim}, {self.dim}). Received: "
                f"start.shape={start.shape}, {np.count_nonzero(~np.isfinite(start))} not finite"
            )
        ridge = checked_ridge(ridge)
        if not self.rows:
            raise ValueError(
                "There is nothing to fit: no row had a pivot, that is, none was added with a "
                "weight above 0. Give data whose rows have a pivot prompt. Received: rows=0"
            )
        held_out_errors, ridge_from = {}, "given"
        if ridge == "auto":
            if min(self.fitted.rows, self.held_out.rows) < 2:
                ridge, ridge_from = DEFAULT_RIDGE, "default"
            else:
                held_out_errors = self._held_out_errors(start)
                # `min` keeps the first of equals: from the largest, the most cautious one.
                ridge = min(reversed(held_out_errors), key=held_out_errors.get)
                ridge_from = "held_out"
        total = self.fitted + self.held_out
        spectrum = _Spectrum(total, start)
        before = total.error_sum(start)
        change = spectrum.shrinkage(ridge)[:, None] * spectrum.slope
        # In C's own basis every term of the sum is at most 0, whatever the rounding.
        after = before + np.sum(change * (spectrum.values[:, None] * change - 2 * spectrum.slope))
        return RidgeFit(
            matrix=start + spectrum.vectors @ change,
            ridge=ridge,
            ridge_from=ridge_from,
            rank=int(np.count_nonzero(spectrum.known)),
            rows=total.rows,
            error_before=float(before / total.weight),
            error_after=float(max(after, 0.0) / total.weight),
            held_out_errors=held_out_errors,
        )

    def _held_out_errors(self, start):
        """Held-out error of each candidate, fitted to the other rows, without forming its matrix.

        W = W0 + V diag(h) S,  S = V^T (D - C W0),  h = 1 / (eigenvalues + penalty)
        error(W) = error(W0) - 2 h.b + h^T (K * S S^T) h
        b = rowsum(S * V^T (D' - C' W0)),  K = V^T C' V,  C' and D' of the held-out rows
        """
        spectrum, unseen = _Spectrum(self.fitted, start), self.held_out
        v, slope = spectrum.vectors, spectrum.slope
        linear = np.sum(slope * (v.T @ unseen.residual(start)), axis=1)
        quadratic = (v.T @ unseen.gram @ v) * (slope @ slope.T)
        before, errors = unseen.error_sum(start), {}
        for ridge in CANDIDATES:
            h = spectrum.shrinkage(ridge)
            error = before - 2 * h @ linear + h @ quadratic @ h
            errors[ridge] = float(max(error, 0.0) / unseen.weight)
        return errors


@dataclasses.dataclass
class _Sums:
    gram: np.ndarray  # C = sum w f^T f, (d, d)
    cross: np.ndarray  # D = sum w f^T g, (d, d)
    goal_square: float = 0.0  # E = sum w ||g||^2
    weight: float = 0.0
    rows: int = 0

    @classmethod
    def zeros(cls, dim):
        return cls(np.zeros((dim, dim)), np.zeros((dim, dim)))

    def add(self, source, goal, weight):
        root = np.sqrt(weight)[:, None]
        source, goal = source * root, goal * root
        self.gram += source.T @ source
        self.cross += source.T @ goal
        self.goal_square += float(np.sum(goal * goal))
        self.weight += float(np.sum(weight))
        self.rows += len(weight)

    def __add__(self, other):
        fields = (field.name for field in dataclasses.fields(self))
        return _Sums(*(getattr(self, name) + getattr(other, name) for name in fields))

    def residual(self, matrix):
        """`sum w f^T (g - f W) = D - C W`: minus half the gradient of the error, (d, d)."""
        return self.cross - self.gram @ matrix

    def error_sum(self, matrix):
        """`sum w ||f W - g||^2 = tr(W^T C W) - 2 tr(W^T D) + E`, at least 0."""
        error = self.goal_square - np.sum(matrix * (self.cross + self.residual(matrix)))
        return max(float(error), 0.0)


class _Spectrum:
    """The eigenbasis of `C`: there a ridge is one division a direction."""

    def __init__(self, sums, start):
        values, self.vectors = np.linalg.eigh(sums.gram)
        cutoff = values[-1] * max(sums.rows, len(values)) * np.finfo("float64").eps
        self.known = values > cutoff
        self.values = np.maximum(values, 0.0)
        self.slope = self.vectors.T @ sums.residual(start)
        self.mean_diagonal = float(np.trace(sums.gram)) / len(values)

    def shrinkage(self, ridge):
        """`1 / (eigenvalue + penalty)`, 0 along the unknown directions, (d,)."""
        result = np.zeros_like(self.values)
        result[self.known] = 1.0 / (self.values[self.known] + ridge * self.mean_diagonal)
        return result


def checked_ridge(ridge):
    if isinstance(ridge, str) and ridge == "auto":
        return ridge
    number = isinstance(ridge, (int, float, np.integer, np.floating))
    if not number or isinstance(ridge, bool) or not np.isfinite(ridge) or ridge < 0:
        raise ValueError(
            '`ridge` must be "auto" or a finite number, at least 0, in units of the mean diagonal '
            f"of the sources' second moments. Received: ridge={ridge!r}"
        )
    return float(ridge)
