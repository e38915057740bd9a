"""The gate atlas: what a connection does, by layer, by language and by dimension.

One connected pass over paired rows, without dropout and without the Gumbel noise, as
`CCCausalLM.evaluate` runs it. A batch's sums are float32 within a row and float64 across rows.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_cc.calibration.compiled import Compiled
from keras_cc.connections import FusedConnection, SelectedConnection
from keras_cc.data.batches import PreparedBatches
from keras_cc.data.columns import plain_text, to_columns
from keras_cc.data.prepared import PIVOT_KEYS, TARGET_KEYS
from keras_cc.passes import runs

#: The connections that have gates or a selection to be measured.
MEASURED = (FusedConnection, SelectedConnection)


@dataclasses.dataclass(frozen=True)
class GateAtlas:
    """What a connection did on some rows. What its kind of connection does not have is None.

    Attributes:
        layers: the block numbers, from 0, that the arrays' first axis stands for.
        gate: by language, float64 `(layers,)`: the mean of alpha over the fused tokens (and the
            dimensions). 0 is the target's own activation, 1 the pivot's.
        gate_by_dimension: float64 `(layers, d)`, the mean of alpha over the fused tokens of all
            languages. With `gate="dimension"` alone.
        alignment_error: by language, float64 `(layers,)`: the mean over tokens of the squared
            error, relative or plain, that the alignment loss takes the mean over layers of. Not
            without a transform.
        selected: by language, float64 `(layers,)`: the share of rows that select each of the
            pivot's layers. Of the published connection alone.
        rows: by language, how many rows have a pivot: those that all of this is about.
        without_pivot: by language, how many have none, or no more than its sink tokens: left out.
    """

    layers: tuple[int, ...]
    gate: dict[str, np.ndarray] | None
    gate_by_dimension: np.ndarray | None
    alignment_error: dict[str, np.ndarray] | None
    selected: dict[str, np.ndarray] | None
    rows: dict[str, int]
    without_pivot: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        """Lists and numbers for JSON: `layers`, and of the four maps those that there are."""
        found: dict[str, Any] = {"layers": list(self.layers)}
        for name in ("gate", "gate_by_dimension", "alignment_error", "selected"):
            value = getattr(self, name)
            if isinstance(value, dict):
                found[name] = {language: of.tolist() for language, of in value.items()}
            elif value is not None:
                found[name] = value.tolist()
        return found


def gate_atlas(
    model: Any, rows: Any, *, batch_size: int = 8, verbose: "int | str" = "auto"
) -> GateAtlas:
    """Measure what a model's connection does on paired rows, language by language.

        gate[l]            = sum_tokens mean_d alpha_l / fused tokens
        alignment_error[l] = sum_tokens error(T_l, Ff_l) / tokens
        selected[l]        = rows whose arg max is l / rows

    Of all rows together, the means over layers are what `CCCausalLM.evaluate` calls `mean_gate`
    and `alignment_loss`. With connection dropout the training loss also sees streams that went
    through the transform; here, as there, the stream is the connected one.

    Args:
        model: a `CCCausalLM` with a connection and a preprocessor.
        rows: a list of row dicts, or a dict of columns, as `CCCausalLM.fit` takes, with the
            language of each in the preprocessor's `lang_column` (`"lang"`).
        batch_size: int, rows a batch.
        verbose: 0 for no progress bar.

    Returns:
        A `GateAtlas`.

    Raises:
        ValueError: for a model without a connection or a preprocessor, rows without a language,
            or rows of which none has a pivot.

    Example:

    ```python
    atlas = keras_cc.evaluation.gate_atlas(model, rows)
    atlas.gate["tr"].argmax()  # where in `atlas.layers` Turkish leans on English the most
    ```

    Source: the Decision Maker of CC-Tuning (Ye et al., arXiv 2506.00875), whose decisions these
    are.
    """
    probe = ConnectionProbe(model, rows, batch_size, by_language=True)
    return probe.measure(1 if verbose == "auto" else verbose)


class ConnectionProbe:
    """Measures a model's connection on the same rows, again and again, compiled once.

    Args:
        model: a `CCCausalLM` with a connection.
        rows: whatever `CCCausalLM.fit` takes; with `by_language`, what `gate_atlas` takes. They
            are prepared here, once, and kept.
        batch_size: int, rows a batch.
        by_language: bool. Without it, all rows are of the language `""`.

    Raises:
        ValueError: as `gate_atlas`.

    Example:

    ```python
    probe = ConnectionProbe(model, rows)
    before = probe.measure().gate[""]
    ```
    """

    def __init__(
        self, model: Any, rows: Any, batch_size: int = 8, by_language: bool = False
    ) -> None:
        connection = getattr(model, "connection", None)
        if not isinstance(connection, MEASURED):
            raise ValueError(
                "`model` must be a CCCausalLM with a connection, whose gates or selection there "
                "are to measure: before `merge()` or `disconnect()`, and not one made with "
                f"`connection=None`. Received: {type(model).__name__} with "
                f"connection={connection!r}"
            )
        self.model = model
        self.connection = connection
        self.batch_size = batch_size
        self.languages = None
        if by_language:
            rows = rows if isinstance(rows, (Mapping, Sequence)) else list(rows)
            self.languages = _languages(model.preprocessor, rows)
        self.batches = [
            {name: x[name] for name in (*TARGET_KEYS, *PIVOT_KEYS, "row_ids")}
            for x, _, _ in PreparedBatches(rows, model.preprocessor, batch_size, group=True)
        ]
        self._compiled = Compiled(model, self._row_sums)

    def measure(self, verbose: int = 0) -> GateAtlas:
        """One pass over the rows; `verbose` is 0 for no progress bar."""
        sums: dict[str, dict[str, Any]] = {}
        progress = keras.utils.Progbar(len(self.batches), verbose=verbose)
        for number, batch in enumerate(self.batches):
            row_ids = batch["row_ids"]
            found = self._compiled.run(self._padded(batch))
            # What pads the batch is cut off before anything is summed.
            found = {name: value[: len(row_ids)] for name, value in found.items()}
            found["without_pivot"] = 1.0 - found["rows"]
            for row, row_id in enumerate(row_ids):
                language = "" if self.languages is None else self.languages[row_id]
                of_language = sums.setdefault(language, dict.fromkeys(found, 0.0))
                for name, value in found.items():
                    of_language[name] += value[row].astype("float64")
            progress.update(number + 1)
        return self._atlas(sums)

    def _padded(self, batch):
        # A last batch of fewer rows is filled up, so that it compiles nothing new.
        lacking = max(self.batch_size - len(batch["row_ids"]), 0)
        return {
            name: np.pad(batch[name], [(0, lacking), (0, 0)], mode="edge")
            for name in (*TARGET_KEYS, *PIVOT_KEYS)
        }

    def _row_sums(self, inputs):
        """Sums over a row's tokens, tensors `(B,)`, `(B, layers)` or `(B, layers, d)`."""
        model = self.model
        scope = runs.connected(model, inputs, runs.pivot(model, inputs))
        if isinstance(self.connection, SelectedConnection):
            runs.run(model, inputs, scope)
            # Zeros in a row without a pivot.
            selected = ops.cast(self.connection.outputs(scope)["selection"], "float32")
            rows = ops.sum(selected, axis=1)
            return {"rows": rows, "selected": selected}
        scope.dimension_sums = []
        runs.run(model, inputs, scope)
        outputs = self.connection.outputs(scope)
        # With without_pivot="align" rows without a pivot have an error too.
        rows = ops.cast(ops.any(scope.pivot.mask, axis=1), "float32")
        found = {
            "rows": rows,
            "gate": ops.stack(scope.gate_sums, axis=1),
            "gate_by_dimension": ops.stack(scope.dimension_sums, axis=1),
            "gate_tokens": outputs["gate_tokens"],
            "alignment_tokens": rows * outputs["alignment_tokens"],
        }
        if scope.alignment_errors:
            errors = ops.stack(scope.alignment_errors, axis=1)
            found["alignment_error"] = rows[:, None] * errors
        return found

    def _atlas(self, sums):
        if not any(of["rows"] for of in sums.values()):
            total = sum(int(of["without_pivot"]) for of in sums.values())
            raise ValueError(
                "`rows` must have pivots: a row without one bypasses the connection (rows in the "
                f"pivot's own language have none). Received: {total} rows without a pivot"
            )

        def means(name, count):
            known = {of: value for of, value in sums.items() if value[count] > 0}
            if not all(name in value for value in known.values()):
                return None
            return {of: value[name] / value[count] for of, value in known.items()}

        is_fused = isinstance(self.connection, FusedConnection)
        by_dimension = None
        if is_fused and self.connection.gate == "dimension":
            total = sum(of["gate_by_dimension"] for of in sums.values())
            # No token is fused where `alignment="last"` and the prompts are nothing but sinks.
            by_dimension = total / max(sum(of["gate_tokens"] for of in sums.values()), 1)
        num_blocks = self.model.num_blocks
        blocks = self.connection.block_numbers(num_blocks) if is_fused else range(num_blocks)
        return GateAtlas(
            layers=tuple(blocks),
            gate=means("gate", "gate_tokens") if is_fused else None,
            gate_by_dimension=by_dimension,
            alignment_error=means("alignment_error", "alignment_tokens") if is_fused else None,
            selected=None if is_fused else means("selected", "rows"),
            rows={language: int(of["rows"]) for language, of in sums.items()},
            without_pivot={language: int(of["without_pivot"]) for language, of in sums.items()},
        )


def _languages(preprocessor: Any, rows: Any) -> list[str]:
    if preprocessor is None:
        raise ValueError(
            "`model` must have a preprocessor, which knows the rows' columns: `model.preprocessor "
            "= keras_cc.CCPreprocessor(tokenizer)`. Received: model.preprocessor=None"
        )
    column = preprocessor.lang_column
    columns = to_columns(rows, [column, preprocessor.instruction_column])
    languages = [plain_text(value) for value in columns.get(column, [None])]
    for number, language in enumerate(languages):
        if not isinstance(language, str) or not language:
            raise ValueError(
                f"`rows` must say the language of each row in the column {column!r} (another name: "
                "`lang_column` of CCPreprocessor), since an atlas is by language. "
                f"Received: {column}={language!r} in row {number}"
            )
    return languages
