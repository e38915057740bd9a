"""`fit_transform`: least squares on activations that a NumPy model collects by itself."""

import connected
import keras
import numpy as np
import pytest
import tiny
from connected import QUICK
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import Options, Reference

from keras_cc import CCCausalLM, FusedConnection, Incline, SelectedConnection, XTransplant
from keras_cc.passes import positions, runs

D = tiny.HIDDEN
RIDGES = [10.0**k for k in range(-8, 2)]  # what "auto" tries


def make_rows(count=40, seed=0):
    """A preprocessed batch with prompts of 2 to 5 tokens; rows 3, 10, ... and the last: English."""
    x, y, weights = tiny.batch(count, prompt_lengths=[2 + i % 4 for i in range(count)], seed=seed)
    for name in ("pivot_token_ids", "pivot_padding_mask"):
        x[name][3::7] = 0
    return x, y, weights


ROWS = make_rows()


def take(rows, where):
    x, y, weights = rows
    return {name: value[where] for name, value in x.items()}, y[where], weights[where]


def has_pivot(x):
    return x["pivot_padding_mask"].any(axis=1)


class Recording(Reference):
    """Keeps what left each site of the last forward pass, (tokens, d) by (kind, block)."""

    def forward(self, token_ids, replace):
        self.seen = seen = {}

        def keep(number, f):
            seen["before", number], seen["ffn", number] = f, replace(number, f)
            return seen["ffn", number]

        return super().forward(token_ids, keep)

    def attention(self, x, block):
        self.seen["attention", int(block[-1])] = found = super().attention(x, block)
        return found

    def norm(self, x, name):
        # What enters the next block, or the final norm, is what left the block before.
        if name == "sequence_output_layernorm/scale":
            self.seen["hidden", self.num_layers - 1] = x
        elif name.endswith("self_attention_layernorm/scale") and "_0/" not in name:
            self.seen["hidden", int(name.split("/")[0][-1]) - 1] = x
        return super().norm(x, name)


def reference(model, **options):
    return Recording(connected.weights(model), options=Options(**options))


def pairs(x):
    """Ids, pivot ids and the last prompt position of each row with a pivot."""
    for row in np.flatnonzero(has_pivot(x)):
        ids = x["token_ids"][row][x["padding_mask"][row] == 1]
        pivot = x["pivot_token_ids"][row][x["pivot_padding_mask"][row] == 1]
        yield ids, pivot, int(np.flatnonzero(x["answer_mask"][row])[0])


def fused_samples(numpy_model, x, block, positions):
    """`(F, fusion, weight)` of each row: lists of (tokens, d), (tokens, d), (tokens,)."""
    found = []
    for ids, pivot, last in pairs(x):
        numpy_model.connected(ids, pivot, last)
        where = slice(last, last + 1) if positions == "last" else slice(None)
        f, goal = numpy_model.seen["before", block][where], numpy_model.seen["ffn", block][where]
        relative = numpy_model.options.alignment_error == "relative"
        weight = 1 / ((goal**2).sum(-1) + 1e-6) if relative else np.ones(len(f))
        found.append((f, goal, weight))
    return tuple(zip(*found, strict=True))


def last_states(numpy_model, x, sites):
    """The states of both prompts at their last tokens, (rows, sites, d), both passes plain."""
    target, pivot = [], []
    for ids, pivot_ids, last in pairs(x):
        numpy_model.monolingual(ids)
        target.append([numpy_model.seen[site][last] for site in sites])
        numpy_model.stock(pivot_ids)
        pivot.append([numpy_model.seen[site][-1] for site in sites])
    return np.array(target), np.array(pivot)


def least_squares(f, goal, weight=None):
    root = np.sqrt(np.ones(len(f)) if weight is None else weight)[:, None]
    return np.linalg.lstsq(f * root, goal * root, rcond=None)[0]


def mean_error(matrix, f, goal, weight):
    return (weight * ((f @ matrix - goal) ** 2).sum(-1)).sum() / weight.sum()


def assert_close(found, expected, relative=1e-5):
    assert np.linalg.norm(found - expected) <= relative * np.linalg.norm(expected)


def fused_model(scale=0.3, **options):
    connection = FusedConnection(**{"dropout": 0.0, "initial_gate": 0.5, **options})
    model = CCCausalLM(tiny.causal_lm("llama3"), connection)
    connected.train_connection(model, scale=scale)
    return model


def matrices(model):
    """`W` of each transform that the model has now."""
    return {path: layer.transform_matrix.matrix() for path, layer in layers(model).items()}


def layers(model):
    return model._attached.value


def fit(model, rows=ROWS, **options):
    x, y, weights = rows
    return model.fit_transform(x, y, sample_weight=weights, **{"verbose": 0, **options})


# ---------------------------------------------------------------- the fused connection


@pytest.mark.thorough("options0-None")
@pytest.mark.parametrize(
    "options, positions",
    [
        ({}, None),
        ({"without_pivot": "align"}, None),
        ({}, "last"),
        ({"alignment_error": "plain"}, "all"),
        ({"alignment_error": "plain", "alignment": "last"}, "last"),
        ({"alignment": "answer", "layers": [1]}, "all"),
        ({"alignment": "mean", "gate": "layer", "sink_tokens": 0, "layers": [1]}, None),
    ],
)
def test_fused_without_a_ridge_is_least_squares(options, positions):
    model = fused_model(**options)
    blocks = options.get("layers", [0, 1])
    numpy_model = reference(model, **{**options, "layers": tuple(blocks)})
    before = matrices(model)
    fits = fit(model, ridge=0, positions=positions)
    assert list(fits) == [f"block_{block}" for block in blocks]
    for block in blocks:
        samples = fused_samples(numpy_model, ROWS[0], block, positions)
        f, goal, weight = map(np.concatenate, samples)
        expected = least_squares(f, goal, weight)
        found = fits[f"block_{block}"]
        assert_close(found.matrix, expected)
        assert_close(matrices(model)[f"block_{block}"], expected)
        if numpy_model.options.alignment_error == "relative":  # the weights decide something
            assert np.abs(least_squares(f, goal) - expected).max() > 1e-3
        assert (found.rows, found.rank, found.ridge_from) == (len(f), D, "given")
        error = mean_error(before[f"block_{block}"], f, goal, weight)
        np.testing.assert_allclose(found.error_before, error, rtol=1e-4)
        np.testing.assert_allclose(
            found.error_after, mean_error(expected, f, goal, weight), rtol=1e-4, atol=1e-9
        )


def test_the_last_prompt_tokens_alone_give_another_transform():
    everywhere, at_last = fused_model(), fused_model()
    fit(everywhere, ridge=0), fit(at_last, ridge=0, positions="last")
    for path, matrix in matrices(everywhere).items():
        assert np.abs(matrix - matrices(at_last)[path]).max() > 0.01


@pytest.mark.thorough
@pytest.mark.parametrize("ridge", [0, "auto"])
def test_batches_of_any_size_give_the_same(ridge):
    one = fused_model()
    whole = fit(one, ridge=ridge, batch_size=len(ROWS[1]))
    for batch_size in (7, None):
        model = fused_model()
        fits = fit(model, ridge=ridge, batch_size=batch_size)
        for path, matrix in matrices(one).items():
            assert_close(matrices(model)[path], matrix)
            assert (fits[path].rows, fits[path].ridge) == (whole[path].rows, whole[path].ridge)


@pytest.fixture(scope="module")
def evaluated():
    model = fused_model()
    model.compile("sgd", **QUICK)
    return model


def alignment_loss(model, rows=ROWS):
    x, y, weights = rows
    options = {"batch_size": len(y), "verbose": 0, "return_dict": True}
    return model.evaluate(x, y, sample_weight=weights, **options)["alignment_loss"]


@pytest.mark.large
@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    ridge=st.one_of(st.sampled_from(["auto", 0, 1e3]), st.floats(-9, 2).map(lambda k: 10**k)),
    scale=st.sampled_from([0.0, 0.05, 1.0]),
    seed=st.integers(0, 99),
)
def test_the_alignment_loss_is_never_higher_afterwards(evaluated, ridge, scale, seed):
    rng = np.random.default_rng(seed)
    for layer in layers(evaluated).values():
        layer.transform_matrix.assign(np.eye(D) + rng.normal(0, scale, (D, D)))
    before = alignment_loss(evaluated)
    fits = fit(evaluated, ridge=ridge)
    after = alignment_loss(evaluated)
    assert after <= before * (1 + 1e-6)
    # It is what the fits say: the mean over the layers, of relative errors a token.
    for name, value in (("error_before", before), ("error_after", after)):
        numpy_model = reference(evaluated)
        total = 0.0
        for block in (0, 1):
            _, _, weight = map(np.concatenate, fused_samples(numpy_model, ROWS[0], block, "all"))
            total += getattr(fits[f"block_{block}"], name) * weight.mean() / 2
        np.testing.assert_allclose(value, total, rtol=1e-4)


def test_what_few_rows_do_not_determine_stays():
    rows = take(ROWS, np.flatnonzero(has_pivot(ROWS[0]))[:5])
    model = fused_model()
    before = matrices(model)
    message = (
        r"2 of 2 transforms are not determined.* 'block_0', 5 samples span 5 of 16.*"
        r"What they do not span keeps its starting value"
    )
    with pytest.warns(UserWarning, match=message):
        fits = fit(model, rows, ridge=0, positions="last")
    for block, (path, matrix) in enumerate(matrices(model).items()):
        samples = fused_samples(reference(model), rows[0], block, "last")
        f, goal, _ = map(np.concatenate, samples)
        assert (fits[path].rows, fits[path].rank) == (5, 5)
        np.testing.assert_allclose(f @ matrix, goal, atol=1e-4 * np.abs(goal).max())
        unknown = np.linalg.svd(f)[2][5:]  # directions that no sample has
        np.testing.assert_allclose(unknown @ matrix, unknown @ before[path], atol=1e-5)
        assert np.abs(matrix - before[path]).max() > 0.1


def test_too_few_rows_to_choose_a_ridge_by():
    rows = take(ROWS, np.flatnonzero(has_pivot(ROWS[0]))[:9])  # one held out, eight fitted
    model = fused_model()
    with pytest.warns(UserWarning) as seen:
        fits = fit(model, rows, positions="last")
    messages = sorted(str(warning.message) for warning in seen)
    assert "Too few rows to hold some out" in messages[1] and "0.0001 was taken" in messages[1]
    assert "9 samples span 9 of 16" in messages[0]
    assert {(found.ridge, found.ridge_from) for found in fits.values()} == {(1e-4, "default")}


@pytest.mark.thorough
def test_auto_takes_the_ridge_that_every_fifth_pair_likes_best():
    model = fused_model(alignment_error="plain")
    start = matrices(model)
    numpy_model = reference(model, alignment_error="plain")
    fits = fit(model, batch_size=6)
    chosen = set()
    for block in (0, 1):
        rows = list(zip(*fused_samples(numpy_model, ROWS[0], block, "all"), strict=True))
        held_out = [row for number, row in enumerate(rows, 1) if number % 5 == 0]
        fitted = [row for number, row in enumerate(rows, 1) if number % 5]
        assert min(len(held_out), len(fitted)) > 5
        W0, found = start[f"block_{block}"], fits[f"block_{block}"]
        errors = {
            ridge: mean_error(by_hand(fitted, ridge, W0), *join(held_out)) for ridge in RIDGES
        }
        best = min(errors, key=errors.get)
        chosen.add(best)
        assert (found.ridge, found.ridge_from) == (best, "held_out")
        assert list(found.held_out_errors) == pytest.approx(RIDGES)
        np.testing.assert_allclose(
            list(found.held_out_errors.values()), list(errors.values()), rtol=1e-4
        )
        assert_close(found.matrix, by_hand(rows, best, W0))
    assert chosen - {RIDGES[0], RIDGES[-1]}, "the candidates' ends: they decide nothing"


def join(rows):
    return tuple(np.concatenate(part) for part in zip(*rows, strict=True))


def by_hand(rows, ridge, W0):
    """`argmin_W sum ||f W - g||^2 + ridge mean(diag C) ||W - W0||^2`, with rows for the penalty."""
    f, goal, _ = join(rows)
    root = np.sqrt(ridge * (f**2).sum() / D)
    return np.linalg.lstsq(
        np.concatenate([f, root * np.eye(D)]), np.concatenate([goal, root * W0]), rcond=None
    )[0]


def test_rows_without_a_pivot_are_passed_over():
    model, other = fused_model(), fused_model()
    fits = fit(model)
    without = fit(other, take(ROWS, has_pivot(ROWS[0])))
    for path, found in fits.items():
        assert (found.rows, found.ridge) == (without[path].rows, without[path].ridge)
        assert_close(found.matrix, without[path].matrix)


@pytest.mark.thorough
def test_a_bfloat16_model_is_fitted_in_float32():
    connection = FusedConnection(dropout=0.0, initial_gate=0.5)
    model = CCCausalLM(tiny.causal_lm("llama3", dtype="mixed_bfloat16"), connection)
    connected.train_connection(model, scale=0.3)
    fits, expected = fit(model, ridge=0.1), fit(fused_model(), ridge=0.1)
    for path, found in fits.items():
        assert found.error_after < found.error_before
        np.testing.assert_allclose(found.error_after, expected[path].error_after, rtol=0.1)
        assert_close(found.matrix, expected[path].matrix, relative=0.05)
        delta = layers(model)[path].transform_matrix.delta
        assert delta.dtype == "float32"
        matrix = np.eye(D) + connected.to_numpy(delta) / np.sqrt(D)
        np.testing.assert_allclose(matrix, found.matrix, rtol=1e-6, atol=1e-7)


@pytest.mark.thorough
def test_strings_and_a_generator():
    rows = [
        {"instruction": f"the {a} {b}", "output": "yes", "instruction_en": f"a {b} {a}"}
        for a in ("fox", "dog", "quick", "brown")
        for b in ("jumps", "over", "lazy")
    ] + [{"instruction": "English", "output": "no"}]
    found = []
    for source in (rows, (row for row in rows)):
        model = connected.text_model("llama3", FusedConnection(dropout=0.0, initial_gate=0.5))
        found.append(model.fit_transform(source, verbose=0, ridge=1e-3, batch_size=5))
    x, y, weights = model.preprocessor(rows)
    model = connected.text_model("llama3", FusedConnection(dropout=0.0, initial_gate=0.5))
    expected = fit(model, (x, y, weights), ridge=1e-3, batch_size=5)
    for path, fitted in expected.items():
        assert fitted.rows == x["padding_mask"][:-1].sum()
        for other in found:
            assert_close(other[path].matrix, fitted.matrix)


# ---------------------------------------------------------------- the selected connection


@pytest.mark.thorough("last")
@pytest.mark.parametrize("positions", [None, "last"])
def test_selected_is_least_squares_over_all_layers(positions):
    references = pytest.importorskip("reference_selected", reason="PyTorch is not installed")
    model = CCCausalLM(tiny.causal_lm("llama3"), SelectedConnection())
    connected.train_connection(model, scale=0.3)  # X too: the passes are plain, whatever it is
    selection = model.connection_layers()["layer_selector"].kernel
    numpy_model = references.SelectedReference(
        connected.weights(model), connected.to_numpy(selection)
    )
    f, goal = numpy_model.calibration_rows(ROWS[0])
    assert len(f) == 2 * has_pivot(ROWS[0]).sum()
    start = layers(model)["pooled_transform"].matrix()
    fits = fit(model, ridge=0, positions=positions)
    expected = least_squares(f, goal)
    assert list(fits) == ["pooled_transform"]
    found = fits["pooled_transform"]
    assert found.rows == len(f)
    assert_close(found.matrix, expected)
    assert_close(layers(model)["pooled_transform"].matrix(), expected)
    error = mean_error(start, f, goal, np.ones(len(f)))
    np.testing.assert_allclose(found.error_before, error, rtol=1e-4)


# ---------------------------------------------------------------- Incline


@pytest.mark.thorough("None-attention", "fused-ffn")
@pytest.mark.parametrize("site", ["hidden", "ffn", "attention"])
@pytest.mark.parametrize("connection", [None, "fused"])
def test_incline_is_least_squares_at_its_site(site, connection):
    rows = make_rows(96)  # one sample a row here
    # Two heads that share one value give attention outputs that hardly fill the space.
    causal_lm = tiny.causal_lm("llama3", num_key_value_heads=2)
    model = CCCausalLM(causal_lm, connection)
    connected.train_connection(model, scale=0.1)
    trained = matrices(model)
    model.intervention = Incline(sigma=0.5, site=site)
    options = {} if connection else {"transform": None}
    f, goal = last_states(reference(model, **options), rows[0], [(site, 0), (site, 1)])
    fits = fit(model, rows, ridge=0)
    assert list(fits) == ["block_0", "block_1"]
    for block in (0, 1):
        expected = least_squares(f[:, block], goal[:, block])
        kernel = connected.to_numpy(model.intervention.matrices[block].kernel)
        assert_close(fits[f"block_{block}"].matrix, expected)
        assert_close(kernel, expected)
        assert fits[f"block_{block}"].rows == has_pivot(rows[0]).sum()
    found = fit(model, rows, ridge=0.1)["block_1"]  # towards zero, and not what is there
    samples = [(f[:, 1], goal[:, 1], np.ones(len(f)))]
    assert_close(found.matrix, by_hand(samples, 0.1, np.zeros((D, D))))
    assert np.abs(found.matrix - expected).max() > 0.01
    for path, matrix in matrices(model).items():  # what is fitted is the intervention
        np.testing.assert_array_equal(matrix, trained[path])


# ---------------------------------------------------------------- refused


def refused(model, message, rows=ROWS, **options):
    before = connected.weights(model)
    with pytest.raises(ValueError, match=message):
        fit(model, rows, **options)
    connected.assert_weights_equal(connected.weights(model), before, atol=0)


@pytest.mark.parametrize("transform", ["low_rank", "mlp", None])
def test_only_a_matrix_has_a_closed_form(transform):
    model = CCCausalLM(tiny.causal_lm(), FusedConnection(transform=transform))
    refused(model, rf"transform=\"linear\"` alone\. Received: .*transform={transform!r}")


def test_there_must_be_something_to_fit():
    nothing = r"needs a connection with a transform, or an `Incline`.*Received: connection=None, "
    refused(CCCausalLM(tiny.causal_lm(), None), nothing + "intervention=None")
    transplant = CCCausalLM(tiny.causal_lm(), None, intervention=XTransplant(0, 1))
    refused(transplant, nothing + r"intervention=XTransplant")
    selected = CCCausalLM(tiny.causal_lm(), SelectedConnection(transform=None))
    refused(selected, r"no transform to fit. Received: SelectedConnection with transform=None")


@pytest.mark.parametrize("positions", ["first", 0, True, ["last"], ""])
def test_positions_that_there_are_none_of(positions):
    message = r"`positions` must be 'all', 'last' or None. Received: positions="
    refused(CCCausalLM(tiny.causal_lm()), message, positions=positions)


@pytest.mark.parametrize("kind", ["selected", "incline"])
def test_all_positions_need_a_goal_at_each(kind):
    model = CCCausalLM(tiny.causal_lm(), "selected" if kind == "selected" else None)
    if kind == "incline":
        model.intervention = Incline()
    refused(model, r"`positions='all'` needs a goal at every token.*Received", positions="all")


@pytest.mark.parametrize("ridge", [-1e-9, "best", None, True, float("nan"), float("inf")])
def test_a_ridge_that_is_none(ridge):
    rows = take(ROWS, slice(2))
    refused(CCCausalLM(tiny.causal_lm()), r"`ridge` must be .*Received: ridge=", rows, ridge=ridge)


def test_data_without_a_pivot():
    english = take(ROWS, ~has_pivot(ROWS[0]))
    message = r"learns from pairs, and no row has a pivot.*Received: 2 batches without one"
    refused(fused_model(), message, english, batch_size=4)


# ---------------------------------------------------------------- progress


@pytest.mark.thorough
def test_progress_is_shown_and_can_be_left_out(capsys):
    model = fused_model()
    fit(model, ridge=1e-3, verbose=0)
    assert capsys.readouterr() == ("", "")
    fit(model, ridge=1e-3, verbose="auto", batch_size=20)
    assert "2/2" in capsys.readouterr().out


def test_a_bad_ridge_is_refused_before_the_data_is_read():
    read = []

    def rows():
        read.append(1)
        yield tiny.batch()

    with pytest.raises(ValueError, match="`ridge`"):
        CCCausalLM(tiny.causal_lm()).fit_transform(rows, ridge=-1, verbose=0)
    assert read == []


@pytest.mark.thorough
def test_incline_is_fitted_on_the_states_that_it_is_applied_to():
    """Beside a selected connection, `z` at inference is of the pass with the addition."""
    model = CCCausalLM(tiny.causal_lm(), "selected")
    connected.train_connection(model, scale=0.5)
    model.intervention = Incline(0.5)
    rows = tiny.batch(40, prompt_lengths=[2 + i % 4 for i in range(40)], seed=3)
    fits = model.fit_transform(rows[0], rows[1], sample_weight=rows[2], ridge=0, verbose=0)
    x = {k: keras.ops.convert_to_tensor(v[:-1]) for k, v in rows[0].items()}
    source = runs.monolingual(model, x)  # as in `passes.user`
    source.observed |= {("hidden", 0)}
    runs.run(model, x, source)
    where = positions.last_prompt(keras.ops.cast(x["padding_mask"], "bool"), x["answer_mask"])
    f = connected.to_numpy(positions.pick(source.states["hidden", 0], where))
    pivot = runs.pivot(model, x, observed={("hidden", 0)})
    last = positions.last_prompt(pivot.mask)
    goal = connected.to_numpy(positions.pick(pivot.states["hidden", 0], last))
    expected = np.linalg.lstsq(f, goal, rcond=None)[0]
    assert np.abs(fits["block_0"].matrix - expected).max() < 1e-2
