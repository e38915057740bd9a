"""The closed form: transforms solved exactly, by ridge regression over one pass of a dataset.

    W = argmin_W  sum_n w_n || f_n W - g_n ||^2  +  penalty || W - W0 ||^2

| what is fitted | f (source) | g (goal) | matrices |
| --- | --- | --- | --- |
| `FusedConnection` | F_l(x) of the connected pass | the fusion in its place | one a layer |
| `SelectedConnection` | F_l(x) of the plain pass | F_l(p) | one for all layers |
| `Incline` | z_l(x) of the plain pass | z_l(p) | one a layer |

(A `Shift` has vectors alone, and means to take: `keras_cc.calibration.language_means`.)

The sums are `keras_cc.calibration.ridge.RidgeSums`: float64, O(d^2) a matrix, whatever the number
of rows.
"""

import warnings

import keras
import numpy as np
from keras import ops

from keras_cc import losses
from keras_cc.calibration.compiled import Compiled
from keras_cc.calibration.language_means import fit_shift
from keras_cc.calibration.ridge import RidgeSums, checked_ridge
from keras_cc.connections import FusedConnection, SelectedConnection
from keras_cc.data.batches import PreparedBatches
from keras_cc.data.prepared import PIVOT_KEYS, TARGET_KEYS
from keras_cc.interventions import Incline, Shift
from keras_cc.passes import pairing, positions, runs

HELD_OUT_EVERY = 5  # of the rows with a pivot, to choose the ridge by


def fit_transform(model, source, *, batch_size=None, ridge="auto", positions=None, verbose="auto"):
    """What `CCCausalLM.fit_transform` does, see there."""
    if isinstance(model.intervention, Shift):
        if ridge != "auto" or positions is not None:
            raise ValueError(
                "`ridge` and `positions` are those of a least squares fit: a `Shift` takes means. "
                f"Received: ridge={ridge!r}, positions={positions!r}"
            )
        return fit_shift(model, source, batch_size=batch_size, verbose=verbose)
    checked_ridge(ridge)  # before the pass over the data, not after it
    samples = _samples(model, positions)
    batches = PreparedBatches(source, model.preprocessor, batch_size=batch_size or 8)
    collect = Compiled(model, samples.collect)
    starts = samples.starts()
    sums = {name: RidgeSums(len(start)) for name, start in starts.items()}
    count = batches.num_batches
    progress = keras.utils.Progbar(
        count if isinstance(count, int) else None, verbose=1 if verbose == "auto" else verbose
    )
    seen = 0
    for number, (x, _, _) in enumerate(batches):
        has_pivot = (x["pivot_padding_mask"] != 0).any(axis=1)
        order = seen + np.cumsum(has_pivot)  # 1, 2, ... over the rows with a pivot
        held_out = has_pivot & (order % HELD_OUT_EVERY == 0)
        seen += int(has_pivot.sum())
        if has_pivot.any():
            found = collect.run({name: x[name] for name in (*TARGET_KEYS, *PIVOT_KEYS)})
            for name in sums:
                _add(sums[name], found, name, held_out)
        progress.update(number + 1)
    if not seen:
        raise ValueError(
            "`fit_transform` learns from pairs, and no row has a pivot (rows in the pivot's own "
            f"language have none). Received: {batches.num_batches} batches without one"
        )
    if not isinstance(count, int):
        progress.update(number + 1, finalize=True)
    fits = {name: sums[name].solve(starts[name], ridge) for name in sums}
    for name, fit in fits.items():
        samples.assign(name, fit.matrix)
    _say_what_is_unknown(fits)
    return fits


def _add(sums, found, name, held_out):
    source, goal, weight = (found[f"{part}/{name}"] for part in ("source", "goal", "weight"))
    positions = weight.size // len(held_out)
    sums.add(
        source.reshape(-1, source.shape[-1]),
        goal.reshape(-1, goal.shape[-1]),
        weight.reshape(-1),
        np.repeat(held_out, positions),
    )


def _say_what_is_unknown(fits):
    poor = {name: fit for name, fit in fits.items() if fit.rank < len(fit.matrix)}
    if poor:
        name, fit = min(poor.items(), key=lambda item: item[1].rank)
        warnings.warn(
            f"{len(poor)} of {len(fits)} transforms are not determined in every direction: for "
            f"{name!r}, {fit.rows} samples span {fit.rank} of {len(fit.matrix)}. What they do not "
            "span keeps its starting value; give more rows, or positions='all' where that can be "
            "had.",
            stacklevel=4,
        )
    default = [fit for fit in fits.values() if fit.ridge_from == "default"]
    if default:
        warnings.warn(
            f"Too few rows to hold some out and choose a ridge by them: {default[0].ridge:g} was "
            "taken. Give more rows, or `ridge=...`.",
            stacklevel=4,
        )


def _samples(model, positions):
    """What collects for the model's intervention, where that has matrices, else its connection."""
    if positions not in (None, "all", "last"):
        raise ValueError(
            f"`positions` must be 'all', 'last' or None. Received: positions={positions!r}"
        )
    if isinstance(model.intervention, Incline):
        return _InclineSamples(model, positions)
    if isinstance(model.connection, FusedConnection):
        return _FusedSamples(model, positions)
    if isinstance(model.connection, SelectedConnection):
        return _SelectedSamples(model, positions)
    raise ValueError(
        "`fit_transform` needs a connection with a transform, or an `Incline` or `Shift` "
        "intervention. "
        f"Received: connection={model.connection!r}, intervention={model.intervention!r}"
    )


class _FusedSamples:
    """`F_l(x)` and what `T_l` stands in for, at every token or the last prompt token."""

    def __init__(self, model, positions):
        kind = model.connection.transform
        if kind != "linear":
            raise ValueError(
                'A closed form is there for `transform="linear"` alone. '
                f"Received: a connection with transform={kind!r}"
            )
        self.model = model
        self.at_last = positions == "last"
        self.layers = {
            path: layer.transform_matrix for path, layer in model._attached.value.items()
        }

    def starts(self):
        return {path: layer.matrix() for path, layer in self.layers.items()}

    def assign(self, path, matrix):
        self.layers[path].assign(matrix)

    def collect(self, inputs):
        model = self.model
        scope = runs.connected(model, inputs, runs.pivot(model, inputs))
        scope.samples = []
        runs.run(model, inputs, scope)
        where = ops.logical_and(scope.mask, ops.any(scope.pivot.mask, axis=1, keepdims=True))
        if self.at_last:
            real = ops.cast(inputs["padding_mask"], "bool")
            last = positions.last_prompt(real, inputs["answer_mask"])
            where = ops.logical_and(where, last)
        found = {}
        for path, (target, fused) in zip(self.layers, scope.samples, strict=True):
            weight = ops.cast(where, "float32")
            fused = ops.cast(fused, "float32")
            if model.connection.alignment_error == "relative":
                weight = weight / losses.relative_scale(fused)
            found[f"source/{path}"] = ops.cast(target, "float32")
            found[f"goal/{path}"] = fused
            found[f"weight/{path}"] = weight
        return found


class _LastPromptSamples:
    """States of two plain passes, each at its own last prompt token."""

    def __init__(self, model, positions):
        if positions == "all":
            raise ValueError(
                "`positions='all'` needs a goal at every token of the target, which only the fused "
                "connection has: the tokens of two languages do not pair up. Leave it out. "
                "Received: positions='all'"
            )
        self.model = model

    def states(self, inputs, sites):
        """`(target's, pivot's, weight)`: `(B, number of sites, d)` twice, and `(B, sites)`."""
        own = self.plain_pass(inputs)
        own.observed |= set(sites)
        runs.run(self.model, inputs, own)
        pivot = runs.pivot(self.model, inputs, observed=sites)
        real = ops.cast(inputs["padding_mask"], "bool")
        of_target = positions.last_prompt(real, inputs["answer_mask"])
        of_pivot = positions.last_prompt(ops.cast(inputs["pivot_padding_mask"], "bool"))
        has_pivot = ops.cast(ops.any(of_pivot, axis=1), "float32")[:, None]
        return (
            positions.pick_sites(own, sites, of_target),
            positions.pick_sites(pivot, sites, of_pivot),
            ops.tile(has_pivot, (1, len(sites))),
        )

    def plain_pass(self, inputs):
        """The pass over the target's prompt that the transform is used after."""
        return pairing.Pass()


class _SelectedSamples(_LastPromptSamples):
    def __init__(self, model, positions):
        super().__init__(model, positions)
        if model.connection.transform is None:
            raise ValueError(
                "The connection has no transform to fit. Received: SelectedConnection with "
                "transform=None"
            )
        self.layer = model._attached.value["pooled_transform"]

    def starts(self):
        return {"pooled_transform": self.layer.matrix()}

    def assign(self, _, matrix):
        self.layer.assign(matrix)

    def collect(self, inputs):
        sites = [("ffn", number) for number in range(self.model.num_blocks)]
        names = ("source", "goal", "weight")
        values = self.states(inputs, sites)
        return {f"{n}/pooled_transform": v for n, v in zip(names, values, strict=True)}


class _InclineSamples(_LastPromptSamples):
    def __init__(self, model, positions):
        super().__init__(model, positions)
        self.layers = model.intervention.matrices

    def starts(self):
        # Not of what is there: least squares has no W0, and a search must not depend on it.
        dim = self.model.causal_lm.backbone.hidden_dim
        return {f"block_{number}": np.zeros((dim, dim)) for number in self.layers}

    def assign(self, name, matrix):
        self.layers[int(name.removeprefix("block_"))].kernel.assign(matrix.astype("float32"))

    def plain_pass(self, inputs):
        return runs.monolingual(self.model, inputs)

    def collect(self, inputs):
        sites = sorted(self.model.intervention.sites(self.model.num_blocks))
        target, pivot, weight = self.states(inputs, sites)
        found = {}
        for place, (_, number) in enumerate(sites):
            found[f"source/block_{number}"] = target[:, place]
            found[f"goal/block_{number}"] = pivot[:, place]
            found[f"weight/block_{number}"] = weight[:, place]
        return found
