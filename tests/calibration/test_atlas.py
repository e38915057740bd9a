"""The gate atlas equals what the NumPy reference of the formulas says, language by language."""

import json

import connected
import keras
import numpy as np
import pytest
import tiny
from reference import Options, Reference

from keras_cc import CCCausalLM, FusedConnection, SelectedConnection
from keras_cc.calibration.atlas import GateAtlas, gate_atlas
from keras_cc.passes import runs

# Two languages in turn, uneven in rows and lengths, and rows without a pivot in two of them.
ROWS = [
    {"lang": "tr", "instruction": "Kenya'nın para birimi nedir?", "output": "Kenya şilini"},
    {"lang": "ar", "instruction": "ما هي عملة كينيا؟", "output": "شلن"},
    {"lang": "en", "instruction": "Answer the question", "output": "no"},
    {"lang": "tr", "instruction": "the quick fox", "output": "yes"},
    {"lang": "tr", "instruction": "the lazy dog", "output": "no"},
]
PIVOTS = ["What is the currency of Kenya?", "the fox", "Answer the question", "the fox", None]
ROWS = [{**row, "instruction_en": pivot} for row, pivot in zip(ROWS, PIVOTS, strict=True)]

CASES = {
    "default": {},
    "mean": {"alignment": "mean"},
    "last": {"alignment": "last"},
    "layer": {"gate": "layer"},
    "constant": {"gate": 0.3},
    "mlp": {"transform": "mlp"},
    "no_transform": {"transform": None},
    "plain": {"alignment_error": "plain"},
    "one_layer": {"layers": [1]},
    "every_token": {"sink_tokens": 0},
    "english_too": {"without_pivot": "align"},
}


class Recorder(Reference):
    """Keeps the gate of every layer and fused token: `gates[layer]`, a list of arrays."""

    def decide(self, number, difference):
        alpha = super().decide(number, difference)
        self.gates.setdefault(number, []).append(alpha)
        return alpha


def make(connection, **options):
    model = connected.text_model("llama3", connection, **options)
    connected.train_connection(model, scale=0.5)
    return model


def reference_of(model, options=None, num_layers=2, cls=Recorder):
    weights = {v.path: connected.to_numpy(v) for v in model.weights}
    options = dict(options or {})
    options["layers"] = tuple(options.get("layers", range(num_layers)))
    return cls(weights, num_layers=num_layers, options=Options(**options))


def ids_of(x, row):
    """A row's real ids, its pivot's, and the position of its last prompt token."""
    ids = x["token_ids"][row][x["padding_mask"][row] == 1]
    pivot_ids = x["pivot_token_ids"][row][x["pivot_padding_mask"][row] == 1]
    return ids, pivot_ids, int(np.flatnonzero(x["answer_mask"][row])[0])


def expected_maps(model, options):
    """`(gate, gate_by_dimension, alignment_error)` from the reference, token by token."""
    reference = reference_of(model, options)
    layers = reference.options.layers
    x, _, _ = model.preprocessor(ROWS)
    gates, errors = {}, {}  # language -> layer -> a value a token
    by_dimension = {layer: [] for layer in layers}
    for row, (values, pivot) in enumerate(zip(ROWS, PIVOTS, strict=True)):
        if values["lang"] == "en" or pivot is None:
            continue
        reference.gates = {}
        _, _, row_errors = reference.connected(*ids_of(x, row))
        for place, layer in enumerate(layers):
            of_tokens = reference.gates[layer]
            gates.setdefault(values["lang"], {}).setdefault(layer, []).extend(
                np.mean(alpha) for alpha in of_tokens
            )
            by_dimension[layer].extend(of_tokens)
            if row_errors:
                errors.setdefault(values["lang"], {}).setdefault(layer, []).extend(
                    row_errors[place]
                )

    def means(values):
        return {
            of: [np.mean(of_layer) for of_layer in layer.values()] for of, layer in values.items()
        }

    by_dimension = np.array([np.mean(alphas, axis=0) for alphas in by_dimension.values()])
    return means(gates), by_dimension, means(errors)


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=2e-5, atol=1e-6)


@pytest.mark.thorough("default", "last")
@pytest.mark.parametrize("name", CASES)
def test_fused_equals_the_reference(name):
    options = CASES[name]
    model = make(FusedConnection(**options))
    gate, by_dimension, error = expected_maps(model, options)
    assert list(gate) == ["tr", "ar"]

    atlas = gate_atlas(model, ROWS, batch_size=2, verbose=0)
    assert isinstance(atlas, GateAtlas)
    assert atlas.layers == tuple(options.get("layers", (0, 1)))
    assert atlas.rows == {"tr": 2, "ar": 1, "en": 0}
    assert atlas.without_pivot == {"tr": 1, "ar": 0, "en": 1}
    assert list(atlas.gate) == ["tr", "ar"]
    for language in gate:
        close(atlas.gate[language], gate[language])
        assert atlas.gate[language].dtype == np.float64
    if options.get("gate", "dimension") == "dimension":
        assert atlas.gate_by_dimension.shape == (len(atlas.layers), tiny.HIDDEN)
        close(atlas.gate_by_dimension, by_dimension)
        # The dimensions do differ: it is no mean spread out.
        assert np.ptp(atlas.gate_by_dimension, axis=1).min() > 0.01
    else:
        assert atlas.gate_by_dimension is None
    if name == "constant":
        close(np.stack(list(atlas.gate.values())), 0.3)
    else:
        assert abs(gate["tr"][0] - gate["ar"][0]) > 1e-4  # the languages do differ
    if options.get("transform", "linear") is None:
        assert atlas.alignment_error is None
    else:
        assert list(atlas.alignment_error) == ["tr", "ar"]
        for language in error:
            close(atlas.alignment_error[language], error[language])
    assert atlas.selected is None


def test_selected_equals_the_formula():
    layers = 4
    model = make(SelectedConnection(), num_layers=layers)
    kernel = connected.to_numpy(model.connection_layers()["layer_selector"].kernel)
    reference = reference_of(model, num_layers=layers, cls=Reference)
    embeddings = reference.weights["token_embedding/embeddings"]
    x, _, _ = model.preprocessor(ROWS)
    chosen = {"tr": [], "ar": []}
    for row in (0, 1, 3):  # those that have a pivot
        ids, pivot_ids, last_prompt = ids_of(x, row)
        activations = []

        def keep(number, f, kept=activations):
            kept.append(f[-1])
            return f

        reference.forward(pivot_ids, keep)
        scores = (np.mean(activations, axis=0) + embeddings[ids[last_prompt]]) @ kernel
        assert np.diff(np.sort(scores))[-1] > 1e-3  # no tie
        chosen[ROWS[row]["lang"]].append(scores.argmax())
    shares = {of: np.bincount(c, minlength=layers) / len(c) for of, c in chosen.items()}
    assert not np.array_equal(shares["tr"], shares["ar"])

    atlas = gate_atlas(model, ROWS, batch_size=2, verbose=0)
    assert atlas.layers == (0, 1, 2, 3)
    assert list(atlas.selected) == ["tr", "ar"]
    for language, share in shares.items():
        np.testing.assert_array_equal(atlas.selected[language], share)
    assert (atlas.gate, atlas.gate_by_dimension, atlas.alignment_error) == (None, None, None)
    assert atlas.rows == {"tr": 2, "ar": 1, "en": 0}
    assert atlas.without_pivot == {"tr": 1, "ar": 0, "en": 1}


@pytest.mark.thorough("cc")
@pytest.mark.parametrize("options", [{}, {"gate": 0.1, "dropout": 1.0}], ids=["cc", "transform"])
def test_together_it_is_what_evaluate_says(options):
    model = make(FusedConnection(**options))
    model.compile("sgd", **connected.QUICK)
    said = model.evaluate(ROWS, batch_size=5, return_dict=True, verbose=0)
    together = gate_atlas(model, [{**row, "lang": "xx"} for row in ROWS if row["lang"] != "en"])
    close(together.gate["xx"].mean(), said["mean_gate"])
    close(together.alignment_error["xx"].mean(), said["alignment_loss"])


def test_the_gate_of_a_model_that_was_not_trained_is_where_it_starts():
    model = connected.text_model("llama3", FusedConnection(initial_gate=0.2))
    atlas = gate_atlas(model, ROWS, verbose=0)
    close(atlas.gate["tr"], 0.2)
    close(atlas.gate_by_dimension, 0.2)


def test_batches_change_nothing_and_are_compiled_once(monkeypatch):
    model = make("fused")
    model.preprocessor.padding = "max_length"  # one shape, so that what is compiled can be counted
    before = connected.weights(model)
    passes_run = []
    pivot = runs.pivot
    monkeypatch.setattr(runs, "pivot", lambda *args: passes_run.append(1) or pivot(*args))
    in_pairs = gate_atlas(model, ROWS, batch_size=2, verbose=0)
    # Three batches, the last of one row; torch runs what the others trace.
    assert len(passes_run) == (3 if connected.BACKEND == "torch" else 1)
    for other in (1, 8):
        found = gate_atlas(model, ROWS, batch_size=other, verbose=0)
        close(found.gate["tr"], in_pairs.gate["tr"])
        close(found.gate_by_dimension, in_pairs.gate_by_dimension)
        close(found.alignment_error["ar"], in_pairs.alignment_error["ar"])
        assert found.rows == in_pairs.rows
    connected.assert_weights_equal(connected.weights(model), before, rtol=0)


@pytest.mark.thorough("connection0-keys0")
@pytest.mark.parametrize(
    ("connection", "keys"),
    [
        (FusedConnection(), {"gate", "gate_by_dimension", "alignment_error"}),
        (FusedConnection(gate="layer", transform=None), {"gate"}),
        (SelectedConnection(), {"selected"}),
    ],
)
def test_to_dict_is_json(connection, keys):
    atlas = gate_atlas(make(connection), ROWS, verbose=0)
    found = json.loads(json.dumps(atlas.to_dict()))
    assert set(found) == {"layers", *keys}
    assert found["layers"] == [0, 1]
    for name in keys - {"gate_by_dimension"}:
        assert set(found[name]) == {"tr", "ar"} and len(found[name]["tr"]) == 2
        np.testing.assert_array_equal(found[name]["tr"], getattr(atlas, name)["tr"])
    if "gate_by_dimension" in keys:
        np.testing.assert_array_equal(found["gate_by_dimension"], atlas.gate_by_dimension)


@pytest.mark.thorough
def test_rows_come_as_columns_or_from_a_generator_too():
    model = make("fused")
    columns = {name: [row[name] for row in ROWS] for name in ROWS[0]}
    expected = gate_atlas(model, ROWS, verbose=0)
    for rows in (columns, tuple(ROWS), (row for row in ROWS)):
        found = gate_atlas(model, rows, verbose=0)
        np.testing.assert_array_equal(found.gate["tr"], expected.gate["tr"])
    renamed = [{("language" if k == "lang" else k): v for k, v in row.items()} for row in ROWS]
    model.preprocessor.lang_column = "language"
    found = gate_atlas(model, renamed, verbose=0)
    np.testing.assert_array_equal(found.gate["tr"], expected.gate["tr"])


class TestRefused:
    def test_a_model_without_a_connection(self):
        plain = connected.text_model("llama3", None)
        with pytest.raises(ValueError, match=r"`model` .* connection.*Received: .*connection=None"):
            gate_atlas(plain, ROWS)
        with pytest.raises(ValueError, match=r"Received: Llama3CausalLM"):
            gate_atlas(plain.causal_lm, ROWS)
        model = make("fused")
        model.merge()
        with pytest.raises(ValueError, match="before `merge"):
            gate_atlas(model, ROWS)

    def test_a_model_without_a_preprocessor(self):
        model = CCCausalLM(tiny.causal_lm("llama3"))
        with pytest.raises(ValueError, match=r"Received: model.preprocessor=None"):
            gate_atlas(model, ROWS)

    def test_rows(self):
        model = make("fused")
        without = [{k: v for k, v in row.items() if k != "lang"} for row in ROWS]
        with pytest.raises(ValueError, match=r"'lang'.*Received: lang=None in row 0"):
            gate_atlas(model, without)
        with pytest.raises(ValueError, match=r"Received: lang=None in row 2"):
            gate_atlas(model, [*ROWS[:2], without[2]])
        with pytest.raises(ValueError, match=r"lang=3 in row 0"):
            gate_atlas(model, [{**ROWS[0], "lang": 3}])
        with pytest.raises(ValueError, match=r"must have pivots.*Received: 2 rows"):
            gate_atlas(model, [ROWS[2], ROWS[4]], verbose=0)
        with pytest.raises(TypeError, match="Rows must be a list of dicts"):
            gate_atlas(model, model.preprocessor(ROWS))
        with pytest.raises(TypeError, match="Rows must be a list of dicts"):
            gate_atlas(model, [])
        assert gate_atlas(model, ROWS[:1], verbose=0).rows == {"tr": 1}


@pytest.mark.thorough
def test_progress_is_shown_where_asked(capsys):
    keras.utils.enable_interactive_logging()
    model = make("fused")
    gate_atlas(model, ROWS, batch_size=2, verbose=0)
    assert capsys.readouterr().out == ""
    gate_atlas(model, ROWS, batch_size=2)
    assert "3/3" in capsys.readouterr().out
