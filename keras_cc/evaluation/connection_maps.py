"""Where a connection could help: a map over alignments, gates and blocks, before any training."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from keras_cc.cc_causal_lm import CCCausalLM
from keras_cc.connections import FusedConnection, SelectedConnection
from keras_cc.evaluation.nats import Rows, answer_nats, texts
from keras_cc.evaluation.scorer import Scorer
from keras_cc.layers.cc_feed_forward import FUSED_ALIGNMENTS

#: Beside the alignments of the fused connection: the published one.
PUBLISHED = "published"


@dataclasses.dataclass(frozen=True)
class ConnectionMap:
    """How likely the answers are, connected here and there: mean nats a token by language.

    Attributes:
        monolingual: of the model as it is.
        pivot: of the same answers after the pivot prompt alone: what is to be had, where answers
            are the same in both languages.
        places: a dict a place, with `alignment`, `gate`, `layers` and `nats` by language, in the
            order in which they were tried. Of the published connection `layers` has the block of
            the pivot that is selected, and the gate is 1.
    """

    monolingual: dict[str, float]
    pivot: dict[str, float]
    places: list[dict[str, Any]]

    @property
    def best(self) -> dict[str, Any]:
        """The place whose answers are the likeliest, over all languages."""
        return min(self.places, key=lambda place: _mean(place["nats"]))

    def table(self) -> str:
        """A Markdown table, the places in columns of languages, the likeliest answers first."""
        languages = list(self.monolingual)
        lines = [("no connection", "", "", self.monolingual), ("pivot alone", "", "", self.pivot)]
        lines += [
            (place["alignment"], f"{place['gate']:g}", str(place["layers"]), place["nats"])
            for place in sorted(self.places, key=lambda place: _mean(place["nats"]))
        ]
        rows = [["alignment", "gate", "blocks", "mean", *languages], ["---"] * (4 + len(languages))]
        for *names, nats in lines:
            rows.append([*names, *(f"{v:.3f}" for v in (_mean(nats), *nats.values()))])
        return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def connection_map(
    model: Any,
    rows: Rows,
    *,
    alignments: Sequence[str] = FUSED_ALIGNMENTS,
    gates: Sequence[float] = (0.3, 1.0),
    layers: "Sequence[Any] | None" = None,
    batch_size: int = 8,
    verbose: "int | str" = "auto",
) -> ConnectionMap:
    """Connect a model at every place in turn, without training, and ask how likely answers are.

    The gate is a constant, and nothing stands in for the connection. It says where the pivot's
    pass knows what the target's lacks, at the price of scoring the rows once a place, and so where
    to begin: a connection that does not help with the pivot at hand has nothing to teach.

    Args:
        model: a `CCCausalLM` with a preprocessor and without a connection: untrained, plainly
            fine-tuned, or merged. It is the same again afterwards.
        rows: from language to row dicts with `instruction`, `output` and `instruction_en`.
        alignments, gates: those of `keras_cc.FusedConnection`; among the alignments maybe
            `"published"`: `keras_cc.SelectedConnection`, once for each block of the pivot, whatever
            gates and layers.
        layers: what `FusedConnection` takes as `layers`, several of them; default: all blocks, and
            each third of them.
        batch_size: int, rows a batch.
        verbose: 0 for no progress bar.

    Returns:
        A `ConnectionMap`.

    Raises:
        ValueError: for a model with a connection, without a preprocessor, no rows beside English,
            and options that `FusedConnection` does not take.

    Example:

    ```python
    rows = {"tr": keras_cc.data.cldr_rows(["tr"], split="validation")[:8]}
    plain = keras_cc.CCCausalLM(model.disconnect(), None, preprocessor=model.preprocessor)
    found = keras_cc.evaluation.connection_map(plain, rows, alignments=["last"], gates=[1.0])
    print(found.table())
    ```

    Source: ours; the place of CC-Tuning (arXiv 2506.00875) is `"last"`.
    """
    if not isinstance(model, CCCausalLM) or model.connection is not None:
        raise ValueError(
            "`model` must be a CCCausalLM without a connection: the map tries its own. "
            f"Received: {type(model).__name__} with "
            f"connection={getattr(model, 'connection', None)!r}"
        )
    others = {language: some for language, some in rows.items() if language != "en" and some}
    if not others:
        raise ValueError(
            "`rows` must have some in another language than English. "
            f"Received: rows in {list(rows)}"
        )
    if layers is None:
        count = model.num_blocks
        ends = [count * third // 3 for third in range(4)]
        layers = [
            "all",
            *(list(range(*pair)) for pair in itertools.pairwise(ends) if pair[0] < pair[1]),
        ]
    fused = [alignment for alignment in alignments if alignment != PUBLISHED]
    options = [
        {"alignment": alignment, "gate": gate, "layers": some}
        for some, alignment, gate in itertools.product(layers, fused, gates)
    ]
    connections: list[Any] = [
        FusedConnection(**one, transform=None, alignment_loss_weight=0.0) for one in options
    ]
    for connection in connections:
        connection.block_numbers(model.num_blocks)  # or it raises, before anything is run
    if PUBLISHED in alignments:
        for number in range(model.num_blocks):
            options.append({"alignment": PUBLISHED, "gate": 1.0, "layers": [number]})
            connections.append(_OneLayer(number))
    plain = Scorer(model, batch_size=batch_size, verbose=0)
    monolingual = _means(answer_nats(plain, others))
    english = plain.prompt_ids(texts(others, "instruction_en"))
    pivot = _means(answer_nats(plain, others, english))
    progress = keras.utils.Progbar(
        len(options), unit_name="place", verbose=1 if verbose == "auto" else verbose
    )
    places = []
    for one, connection in zip(options, connections, strict=True):
        connected = CCCausalLM(model.causal_lm, connection, preprocessor=model.preprocessor)
        try:
            scorer = Scorer(connected, batch_size=batch_size, verbose=0, connected=True)
            places.append({**one, "nats": _means(answer_nats(scorer, others))})
        finally:
            connected.disconnect()
        progress.add(1)
    return ConnectionMap(monolingual, pivot, places)


class _OneLayer(SelectedConnection):
    """The published connection, which selects the same layer of the pivot for every row."""

    def __init__(self, number):
        super().__init__(transform=None)
        self.number = number

    def own_layers(self, num_blocks, dim):
        return {"layer_selector": _Always(self.number, name="layer_selector")}


class _Always(keras.layers.Layer):
    """In place of a `LayerSelector`: one layer, whatever the row."""

    def __init__(self, number, **kwargs):
        super().__init__(**kwargs)
        self.number = number

    def call(self, activations, embedding, training=False):
        rows, layers, _ = activations.shape
        chosen = ops.one_hot([self.number], layers, dtype=activations.dtype)
        return ops.tile(chosen, (rows, 1))


def _means(nats):
    return {language: sum(some) / len(some) for language, some in nats.items()}


def _mean(nats):
    return sum(nats.values()) / len(nats)
