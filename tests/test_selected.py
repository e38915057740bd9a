"""The published connection: equal to its PyTorch reference, in training, alone, in generation."""

import json
import subprocess
import sys

import connected
import keras
import numpy as np
import pytest
import tiny
from backend_tools import gradients
from connected import QUICK, ROWS, logits, monolingual
from keras import ops
from reference_selected import SelectedReference, mean_nats, row_of
from test_reference_selected import KERNELS, example

from keras_cc import CCCausalLM, FusedConnection, SelectedConnection
from keras_cc.layers import LayerSelector

L, D = 3, tiny.HIDDEN
PROMPTS = ["Kenya'nın para", "the quick brown fox"]
PIVOTS = ["What is the currency of Kenya?", "a fox"]
LENGTH = 28
S_PATH = "layer_selector/kernel"

pytestmark = [
    # KerasHub leaves the vocabulary's file open, and Keras quantises what it can.
    pytest.mark.filterwarnings("ignore:unclosed file.*vocabulary.spm:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:Layer .* does not have a `quantize` method:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*The use of `x.T` on tensors of dim:UserWarning"),
]


def draw(model, seed=0, transform=True):
    """Random S and X, where no two layers and no two paths agree."""
    rng, layers = np.random.default_rng(seed), model.connection_layers()
    layers["layer_selector"].kernel.assign(rng.normal(size=(D, L)).astype("float32"))
    if transform:
        layers["pooled_transform"].assign(np.eye(D) + 0.3 * rng.normal(size=(D, D)))
    return model


def make(family="llama3", dtype=None, drawn=True, **options):
    causal_lm = tiny.causal_lm(family, dtype=dtype, num_layers=L)
    model = CCCausalLM(causal_lm, SelectedConnection(**options))
    return (
        draw(model, transform="pooled_transform" in model.connection_layers()) if drawn else model
    )


def reference_of(model):
    """The reference with the model's weights as they are now."""
    layers = model.connection_layers()
    return SelectedReference(
        connected.weights(model.causal_lm),
        connected.to_numpy(layers["layer_selector"].kernel),
        layers["pooled_transform"].matrix() if "pooled_transform" in layers else None,
        model.connection.temperature,
    )


@pytest.fixture
def fixed_noise(monkeypatch):
    """Have every step draw the same noise, NumPy's: the backends' generators differ."""

    def fix(noise):
        monkeypatch.setattr(
            LayerSelector,
            "gumbel_noise",
            lambda self, shape, dtype: ops.cast(noise, dtype),
        )

    return fix


def tensors(x):
    return {name: ops.convert_to_tensor(value) for name, value in x.items()}


def close(actual, expected, scale=1e-5):
    expected = np.asarray(expected)
    np.testing.assert_allclose(actual, expected, atol=scale * max(1, np.abs(expected).max()))


def rows_are(found, expected, x):
    """Logits `(B, T, V)` equal the reference's rows, at the real positions."""
    for row, wanted in enumerate(expected):
        close(found[row][x["padding_mask"][row] == 1], wanted)


def without_pivot(x):
    return {name: value for name, value in x.items() if not name.startswith("pivot_")}


def compiled(model, optimizer=None, **kwargs):
    model.compile(optimizer or keras.optimizers.SGD(0.1), **{**QUICK, **kwargs})
    return model


def fit(model, x, y, weights, **kwargs):
    options = {"batch_size": len(y), "shuffle": False, "verbose": 0, **kwargs}
    return model.fit(x, y, sample_weight=weights, **options).history


# ---------------------------------------------------------------- the connected pass


class TestConnectedPass:
    @pytest.mark.thorough
    @pytest.mark.parametrize("temperature", [1.0, 0.4])
    def test_a_training_step(self, temperature, fixed_noise):
        model = make(temperature=temperature)
        x, y, weights, noise = example()
        reference = reference_of(model)
        expected, quiet = (reference.batch(x, y, weights, n) for n in (noise, None))
        assert (np.array(expected["selection"]) != quiet["selection"]).any()  # it decides
        fixed_noise(noise)
        names = {v.path: v for v in model.trainable_variables}
        assert S_PATH in names and len(names) == len(connected.weights(model.causal_lm)) - 1
        inputs, outputs = tensors(x), {}

        def loss():
            outputs.update(model(inputs, training=True))
            return model.compute_loss(inputs, ops.convert_to_tensor(y), outputs, weights)

        close(connected.to_numpy(loss()), expected["loss"].item())
        close(connected.to_numpy(outputs["selection"]), expected["selection"])
        rows_are(connected.to_numpy(outputs["logits"]), expected["logits"], x)
        wanted = reference.gradients(
            expected["loss"], *("S" if path == S_PATH else path for path in names)
        )
        found = gradients(loss, names.values())
        for path, actual, of_path in zip(names, found, wanted, strict=True):
            top = np.abs(of_path).max()
            assert top > 1e-4, path
            np.testing.assert_allclose(actual, of_path, atol=1e-5 * top, err_msg=path)

    def test_fit_takes_that_step(self, fixed_noise):
        x, y, weights, noise = example()
        model = compiled(make(temperature=0.4), keras.optimizers.SGD(0.5))
        reference, before = reference_of(model), connected.weights(model)
        expected = reference.batch(x, y, weights, noise)
        fixed_noise(noise)
        logs = fit(model, x, y, weights)
        assert set(logs) == {"loss", "sft_loss", "token_accuracy"}
        np.testing.assert_allclose(logs["loss"], [expected["loss"].item()], rtol=1e-5)
        np.testing.assert_allclose(logs["sft_loss"], logs["loss"])
        hits = sum(
            ((of_row.argmax(-1) == y[row, : len(of_row)]) * weights[row, : len(of_row)]).sum()
            for row, of_row in enumerate(expected["logits"])
        )
        np.testing.assert_allclose(logs["token_accuracy"], [hits / weights.sum()], rtol=1e-5)
        after = connected.weights(model)
        assert connected.moved(before, after) == {v.path for v in model.trainable_variables}
        for path in (S_PATH, *KERNELS):
            name = "S" if path == S_PATH else path
            step = 0.5 * reference.gradients(expected["loss"], name)[0]
            found = before[path] - after[path]
            np.testing.assert_allclose(found, step, atol=1e-5 * np.abs(step).max() + 1e-7)

    def test_without_training_there_is_no_noise(self, fixed_noise):
        x, y, weights, _ = example()
        model = make(temperature=0.4)
        expected = reference_of(model).batch(x, y, weights)
        fixed_noise(np.full((3, L), np.nan))  # drawn, it would show
        found = connected.outputs(model, x)
        assert set(found) == {"logits", "selection"}
        rows_are(found["logits"], expected["logits"], x)
        close(found["selection"], expected["selection"])
        assert not np.isfinite(connected.to_numpy(model(tensors(x), training=True)["logits"])).all()

    @pytest.mark.thorough
    def test_the_noise_is_drawn_anew_each_step_and_follows_the_seed(self):
        x, y, weights = tiny.batch()

        def run(seed):
            keras.utils.set_random_seed(seed)
            model = compiled(make(drawn=False), keras.optimizers.SGD(0.0))
            return fit(model, x, y, weights, epochs=8)["loss"]

        one = run(1)
        assert len(set(one)) > 1
        assert run(1) == one != run(2)

    def test_the_pivots_padding_and_the_order_of_the_rows_change_nothing(self):
        model, (x, _, _) = make(), tiny.batch()
        before = logits(model, x)
        longer = {
            name: np.pad(v, [(0, 0), (0, 4)], constant_values=0 if "mask" in name else 7)
            for name, v in x.items()
        }
        longer["pivot_token_ids"] = np.where(
            longer["pivot_padding_mask"], longer["pivot_token_ids"], 7
        )
        real = x["padding_mask"].astype(bool)
        close(logits(model, longer)[:, :9][real], before[real])
        turned = {name: value[::-1] for name, value in x.items()}
        close(logits(model, turned)[::-1][real], before[real])

    def test_the_answer_is_not_read_by_the_selection(self):
        model, (x, _, _) = make(), tiny.batch()
        before = connected.outputs(model, x)
        other = {**x, "token_ids": x["token_ids"].copy()}
        for row, last in enumerate((3, 2, 4)):  # the last prompt tokens
            other["token_ids"][row, last + 1 :] = (x["token_ids"][row, last + 1 :] + 5) % 61
        after = connected.outputs(model, other)
        np.testing.assert_array_equal(after["selection"], before["selection"])
        for row, last in enumerate((3, 2, 4)):
            close(after["logits"][row, : last + 1], before["logits"][row, : last + 1])


# ---------------------------------------------------------------- rows without a pivot


class TestRowsWithoutPivot:
    def test_are_the_stock_models_beside_others(self):
        model, (x, _, _) = make(), tiny.batch()
        stock = logits(tiny.causal_lm(num_layers=L), monolingual(x))
        found = connected.outputs(model, x)
        close(found["logits"][2], stock[2])
        assert not found["selection"][2].any() and found["selection"][:2].any(axis=1).all()
        real = x["padding_mask"].astype(bool)
        for row, last in ((0, 3), (1, 2)):  # and a pair's own, before the addition
            close(found["logits"][row, :last], stock[row, :last])
            assert (np.abs(found["logits"] - stock)[row][real[row]][last:].max(-1) > 1e-3).all()
        # What such a row holds is nothing to the others.
        other = {**x, "token_ids": x["token_ids"].copy()}
        other["token_ids"][2] = 5
        np.testing.assert_allclose(logits(model, other)[:2], found["logits"][:2], atol=1e-6)

    @pytest.mark.thorough
    def test_a_batch_of_them_is_plain_fine_tuning(self):
        x, y, weights, _ = example()
        x = {**x, "pivot_padding_mask": np.zeros_like(x["pivot_padding_mask"])}
        stock = tiny.causal_lm(num_layers=L)
        expected = connected.sft_loss(logits(stock, monolingual(x)), y, weights)
        models = [make(), CCCausalLM(stock, connection=None)]
        before = connected.weights(models[0])
        for model in models:
            compiled(model)
            np.testing.assert_allclose(fit(model, x, y, weights)["loss"], [expected], rtol=1e-5)
        after, plain = (connected.weights(model) for model in models)
        moved = connected.moved(before, after)
        assert moved == set(plain) and S_PATH not in moved
        for path, value in plain.items():
            np.testing.assert_allclose(after[path], value, atol=1e-6, err_msg=path)

    def test_they_give_the_selection_no_gradient(self, fixed_noise):
        model = make()
        x, y, weights, noise = example()
        fixed_noise(noise)
        kernel = model.connection_layers()["layer_selector"].kernel

        def of(weights):
            inputs = tensors(x)

            def loss():
                outputs = model(inputs, training=True)
                return model.compute_loss(inputs, ops.convert_to_tensor(y), outputs, weights)

            return gradients(loss, [kernel])[0]

        alone = weights * np.array([[0.0], [0.0], [1.0]])  # the third row's loss
        assert not of(alone).any() and np.abs(of(weights)).max() > 1e-3


# ---------------------------------------------------------------- the path that a user gets


class TestMonolingual:
    @pytest.mark.parametrize("with_answers", [True, False])
    def test_a_call(self, with_answers):
        model, (x, _, _) = make(temperature=0.4), tiny.batch()
        x = without_pivot(x) if with_answers else monolingual(x)
        reference = reference_of(model)
        found = connected.outputs(model, x)
        assert set(found) == {"logits"}
        expected = []
        for row in range(3):
            ids, _, last = row_of(x, row)
            assert last == ((3, 2, 4) if with_answers else (6, 6, 7))[row]
            expected.append(reference.monolingual(ids, last)[0].detach().numpy())
        rows_are(found["logits"], expected, x)
        stock = logits(tiny.causal_lm(num_layers=L), monolingual(x))
        assert np.abs(found["logits"] - stock).max() > 0.1

    @pytest.mark.thorough
    def test_before_a_fit_the_matrix_is_the_identity(self):
        model, (x, _, _) = make(drawn=False), tiny.batch()
        assert (model.connection_layers()["pooled_transform"].matrix() == np.eye(D)).all()
        reference, alone = reference_of(model), without_pivot(x)
        expected = []
        for row in range(3):
            ids, _, last = row_of(x, row)
            expected.append(reference.connected(ids, ids[: last + 1], last)[0].detach().numpy())
        rows_are(logits(model, alone), expected, x)

    def test_without_a_transform_it_is_the_stock_model(self):
        model, (x, _, _) = make(transform=None), tiny.batch()
        assert list(model.connection_layers()) == ["layer_selector"]
        stock = logits(tiny.causal_lm(num_layers=L), monolingual(x))
        close(logits(model, without_pivot(x)), stock)
        assert np.abs(logits(model, x) - stock).max() > 0.1

    def test_evaluate_scores_it_and_reports_the_connected_pass(self):
        x, y, weights, _ = example()
        model = compiled(make(temperature=0.4))
        reference = reference_of(model)
        alone = []
        for row in range(3):
            ids, _, last = row_of(x, row)
            alone.append(reference.monolingual(ids, last)[0])
        expected = mean_nats(alone, y, weights).item()
        paired = reference.batch(x, y, weights)["loss"].item()
        assert abs(expected - paired) > 1e-2
        before = connected.weights(model)
        for batch_size in (3, 2):  # means are over tokens, not batches
            found = model.evaluate(
                x, y, sample_weight=weights, batch_size=batch_size, verbose=0, return_dict=True
            )
            assert set(found) == {"loss", "sft_loss", "connected_sft_loss", "token_accuracy"}
            np.testing.assert_allclose(found["sft_loss"], expected, rtol=1e-5)
            np.testing.assert_allclose(found["connected_sft_loss"], paired, rtol=1e-5)
        connected.assert_weights_equal(connected.weights(model), before, atol=0)
        history = fit(compiled(model, keras.optimizers.SGD(0.0)), x, y, weights,
                      validation_data=(x, y, weights))  # fmt: skip
        np.testing.assert_allclose(history["val_sft_loss"], [expected], rtol=1e-5)
        np.testing.assert_allclose(history["val_connected_sft_loss"], [paired], rtol=1e-5)


# ---------------------------------------------------------------- generation


def text_model(family="llama3", seed=0, **options):
    connection = SelectedConnection(**options)
    model = connected.text_model(family, connection, num_layers=L)
    fill_backbone(model)
    if seed is not None:
        draw(model, seed, transform=model.connection.transform is not None)
    return compiled(model, sampler="greedy")


def fill_backbone(model, seed=5):
    """Weights whose feed-forward activations are large: what is added decides what is said."""
    tiny.fill(model.causal_lm.backbone, seed)
    for variable in model.causal_lm.backbone.weights:
        if "feedforward_output_dense" in variable.path or "ffw_linear" in variable.path:
            variable.assign(3 * connected.to_numpy(variable))


def generate(model, prompts=PROMPTS, pivots=None):
    return model.generate(prompts, LENGTH, pivot_prompts=pivots, stop_token_ids=None)


def real_ids(batch, name=""):
    rows = zip(batch[f"{name}token_ids"], batch[f"{name}padding_mask"], strict=True)
    return [ids[mask == 1] for ids, mask in rows]


def greedy(model, pivots=None):
    """The reference's ids, prompt and continuation, row by row."""
    reference = reference_of(model)
    prompts = real_ids(model.preprocessor.generate_preprocess(PROMPTS, LENGTH))
    sources = [None] * len(prompts)
    if pivots is not None:
        sources = real_ids(model.preprocessor.pivot_preprocess(pivots), "pivot_")
    return [
        [*ids, *reference.greedy(ids, LENGTH - len(ids), source)]
        for ids, source in zip(prompts, sources, strict=True)
    ]


def is_greedy_by_calls(model, ids, pivots=None):
    """Whether `model(x)` over prompt and answer, without a cache, says each token of the answer.

    `answer_mask` says where the prompts, which differ in length, end.
    """
    prompt = model.preprocessor.generate_preprocess(PROMPTS, LENGTH)
    is_answer = np.arange(LENGTH) >= prompt["padding_mask"].sum(axis=1)[:, None] - 1
    pivot = {} if pivots is None else model.preprocessor.pivot_preprocess(pivots)
    x = {"token_ids": ids, "padding_mask": np.ones_like(ids), **pivot}
    said = logits(model, {**x, "answer_mask": is_answer.astype("int32")}).argmax(axis=-1)
    return (said[:, :-1] == ids[:, 1:])[is_answer[:, :-1]].all()


def stock_generate(model, prompts=PROMPTS):
    """What the same weights say with nothing connected."""
    stock = connected.text_model("llama3", None, num_layers=L)
    names = connected.weights(model.causal_lm)
    for variable in stock.causal_lm.weights:
        variable.assign(names[variable.path])
    stock.compile("sgd", sampler="greedy", **QUICK)
    return generate(stock, prompts)


@pytest.fixture(scope="module")
def model():
    return text_model()


class TestGenerate:
    @pytest.mark.thorough("pivots1")
    @pytest.mark.parametrize("pivots", [None, PIVOTS])
    def test_is_greedy_decoding_without_a_cache(self, model, pivots, seen_ids):
        texts = generate(model, pivots=pivots)
        expected = greedy(model, pivots)
        np.testing.assert_array_equal(seen_ids[0], expected)
        # The addition stays at the prompt's last token: this recomputes with it there.
        assert is_greedy_by_calls(model, seen_ids[0], pivots)
        assert generate(model, pivots=pivots) == texts != stock_generate(model)
        other = generate(model, pivots=PIVOTS if pivots is None else None)
        assert other != texts

    def test_the_addition_does_not_wander_with_the_tokens_that_are_generated(self, model):
        # What it must not be: an addition at whatever token is the last by now.
        reference = reference_of(model)
        ids = list(real_ids(model.preprocessor.generate_preprocess(PROMPTS, LENGTH))[0])
        while len(ids) < LENGTH:
            ids.append(int(reference.monolingual(ids, len(ids) - 1)[0][-1].argmax()))
        assert ids != greedy(model)[0]

    @pytest.mark.thorough
    @pytest.mark.parametrize("pivots", [None, PIVOTS])
    def test_an_untrained_transform(self, pivots, seen_ids):
        model = text_model(seed=None)
        generate(model, pivots=pivots)
        np.testing.assert_array_equal(seen_ids[0], greedy(model, pivots))

    @pytest.mark.thorough("pivots1")
    @pytest.mark.parametrize("pivots", [None, PIVOTS])
    def test_prompts_of_different_lengths_as_each_alone(self, model, pivots):
        together = generate(model, pivots=pivots)
        for row, text in enumerate(together):
            pivot = None if pivots is None else pivots[row]
            assert generate(model, PROMPTS[row], pivot) == text
        turned = generate(model, PROMPTS[::-1], None if pivots is None else pivots[::-1])
        assert turned[::-1] == together

    def test_an_empty_pivot_leaves_its_row_stock(self, model):
        both, stock = generate(model, pivots=PIVOTS), stock_generate(model)
        assert both[0] != stock[0] and both[1] != stock[1]
        assert generate(model, pivots=[PIVOTS[0], ""]) == [both[0], stock[1]]
        assert generate(model, pivots=["", ""]) == stock

    @pytest.mark.thorough
    def test_without_a_transform_only_the_pivot_changes_it(self):
        model = text_model(transform=None)
        assert generate(model) == stock_generate(model) != generate(model, pivots=PIVOTS)

    @pytest.mark.thorough
    def test_gemma_3_by_hand(self, seen_ids):
        # Whose embeddings are scaled, whose norms come after, and whose window slides.
        model = text_model("gemma3")
        for pivots in (None, PIVOTS):
            generate(model, pivots=pivots)
            assert is_greedy_by_calls(model, seen_ids[-1], pivots)
        assert (seen_ids[0] != seen_ids[1]).any()
        assert not is_greedy_by_calls(model, seen_ids[0], PIVOTS)

    def test_a_sampler_that_lays_out_rows_is_refused(self):
        model = text_model()
        model.compile("sgd", sampler="beam", **QUICK)
        for pivots in (None, PIVOTS):
            with pytest.raises(ValueError, match=r"BeamSampler cannot continue.*Received: sampler"):
                generate(model, pivots=pivots)

    @pytest.mark.thorough
    def test_follows_every_change_of_weights(self, seen_ids, tmp_path):
        model = text_model()
        said = []

        def check():
            for pivots in (None, PIVOTS):
                generate(model, pivots=pivots)
                np.testing.assert_array_equal(seen_ids[-1], greedy(model, pivots))
            said.append(np.concatenate(seen_ids[-2:]).tolist())
            assert said[-1] not in said[:-1]

        check()
        model.save_cc_weights(tmp_path / "first.safetensors")
        draw(model, seed=9)
        check()
        layer = model.connection_layers()["pooled_transform"]
        before = connected.to_numpy(layer.delta)
        with pytest.warns(UserWarning):  # a handful of samples for 16 dimensions
            model.fit_transform(ROWS, ridge=0.0, verbose=0)
        assert np.abs(connected.to_numpy(layer.delta) - before).max() > 1e-2
        check()
        model.fit(ROWS, epochs=2, batch_size=3, verbose=0)
        check()
        fill_backbone(model, seed=40)
        check()
        fill_backbone(model)
        model.load_cc_weights(tmp_path / "first.safetensors")
        generate(model)
        np.testing.assert_array_equal(seen_ids[-1].tolist(), said[0][: len(PROMPTS)])
        model.disconnect()
        assert generate(model) == stock_generate(model)


# ---------------------------------------------------------------- files

IN_A_FRESH_PROCESS = """
import sys, json, keras, numpy as np, keras_cc
keras_cc.layers.LayerSelector.gumbel_noise = lambda self, shape, dtype: 0.0
folder = sys.argv[1]
with open(f"{folder}/rows.json", encoding="utf-8") as file:
    rows = json.load(file)
model = keras.models.load_model(f"{folder}/model.keras")
x = model.preprocessor(rows)[0]
alone = {k: x[k] for k in ("token_ids", "padding_mask")}
result = {
    "alone": model(alone)["logits"],
    "paired": model(x)["logits"],
    "X": model.connection_layers()["pooled_transform"].matrix(),
    "repr": repr(model.connection),
    "trainable": sorted(v.path for v in model.trainable_variables if "feedforward" not in v.path),
    "text": model.generate(rows[0]["instruction"], 40),
    "paired_text": model.generate(rows[0]["instruction"], 40, pivot_prompts="the fox"),
    "loss": model.fit(rows, batch_size=3, shuffle=False, epochs=4, verbose=0).history["loss"],
    "S": model.connection_layers()["layer_selector"].kernel,
}
result = {name: keras.ops.convert_to_numpy(v) if keras.ops.is_tensor(v) or name == "S" else v
          for name, v in result.items()}
np.savez(f"{folder}/result.npz", **result)
"""


class TestFiles:
    @pytest.mark.large
    def test_a_keras_file_loads_in_a_fresh_process(self, tmp_path, fixed_noise):
        fixed_noise(np.zeros((1, L)))
        (tmp_path / "rows.json").write_text(json.dumps(ROWS), encoding="utf-8")
        model = text_model(temperature=0.5)
        compiled(model, keras.optimizers.Adam(0.01), sampler="greedy")
        model.fit(ROWS, batch_size=3, shuffle=False, verbose=0)
        model.save(tmp_path / "model.keras")
        x = model.preprocessor(ROWS)[0]
        layers = model.connection_layers()
        expected = {
            "alone": logits(model, monolingual(x)),
            "paired": logits(model, x),
            "X": layers["pooled_transform"].matrix(),
        }
        exactly = {
            "repr": "SelectedConnection(temperature=0.5, transform='linear')",
            "trainable": sorted(
                v.path for v in model.trainable_variables if "feedforward" not in v.path
            ),
            "text": model.generate(ROWS[0]["instruction"], 40),
            "paired_text": model.generate(ROWS[0]["instruction"], 40, pivot_prompts="the fox"),
        }
        # Adam's moments go on from where they were; Keras saves no generator's state.
        history = model.fit(ROWS, batch_size=3, shuffle=False, epochs=4, verbose=0).history
        expected.update(loss=history["loss"], S=connected.to_numpy(layers["layer_selector"].kernel))
        subprocess.run(
            [sys.executable, "-c", IN_A_FRESH_PROCESS, str(tmp_path)],
            check=True,
            env=connected.environment(),
        )
        with np.load(tmp_path / "result.npz") as loaded:
            for name, value in expected.items():
                np.testing.assert_allclose(loaded[name], value, atol=1e-4, err_msg=name)
            for name, value in exactly.items():
                assert loaded[name].tolist() == value, name
            assert np.abs(loaded["alone"] - loaded["paired"]).max() > 1e-2
        assert exactly["text"] != exactly["paired_text"]

    @pytest.mark.thorough(".safetensors")
    @pytest.mark.parametrize("ending", [".safetensors", ".weights.h5"])
    def test_the_connections_weights_alone(self, ending, tmp_path):
        path = str(tmp_path / f"connection{ending}")
        model, other = make(), draw(make(drawn=False), seed=9)
        x, _, _ = tiny.batch()
        model.save_cc_weights(path)
        assert np.abs(logits(other, x) - logits(model, x)).max() > 1e-2
        other.load_cc_weights(path)
        for inputs in (x, without_pivot(x)):
            np.testing.assert_array_equal(logits(other, inputs), logits(model, inputs))
        if ending == ".safetensors":
            import safetensors.numpy

            stored = safetensors.numpy.load_file(path)
            shapes = {S_PATH: (D, L), "pooled_transform/delta": (D, D)}
            assert {name: value.shape for name, value in stored.items()} == shapes

    def test_weights_of_another_connection_are_refused(self, tmp_path):
        def fused():
            return CCCausalLM(tiny.causal_lm(num_layers=L), FusedConnection(dropout=0.0))

        shallow = CCCausalLM(tiny.causal_lm(num_layers=2), "selected")
        kinds = {"selected": make, "no_x": lambda: make(transform=None), "fused": fused,
                 "shallow": lambda: shallow}  # fmt: skip
        for name, of_kind in kinds.items():
            of_kind().save_cc_weights(tmp_path / f"{name}.safetensors")
        says = r"SelectedConnection|transform=|backbone"
        for name, into in [("fused", "selected"), ("selected", "fused"), ("no_x", "selected"),
                           ("selected", "no_x"), ("selected", "shallow")]:  # fmt: skip
            model = kinds[into]()
            before = connected.weights(model)
            with pytest.raises(ValueError, match=rf"(?s){says}.*Received: "):
                model.load_cc_weights(tmp_path / f"{name}.safetensors")
            connected.assert_weights_equal(connected.weights(model), before, atol=0)

    def test_merge_is_refused_with_the_reason_and_the_model_goes_on(self):
        x, y, weights = tiny.batch()
        model = compiled(make())
        before, paths = logits(model, x), [v.path for v in model.weights]
        message = r"`merge\(\)` cannot fold.*depends on the prompt.*Received: connection=Selected"
        for _ in range(2):
            with pytest.raises(ValueError, match=message):
                model.merge()
        np.testing.assert_array_equal(logits(model, x), before)
        assert model.connection is not None and [v.path for v in model.weights] == paths
        with pytest.raises(ValueError, match="cannot be saved as a preset"):
            model.causal_lm.save_to_preset("nowhere")
        assert np.isfinite(fit(model, x, y, weights)["loss"]).all()
        stock = model.disconnect()
        assert model.merge() is stock and "save_to_preset" not in vars(stock)


# ---------------------------------------------------------------- training options


class TestTrainingOptions:
    @pytest.mark.thorough
    @pytest.mark.parametrize("when", ["before", "after", "compiled"])
    def test_lora(self, when):
        keras.utils.set_random_seed(0)
        causal_lm = tiny.causal_lm(num_layers=L)
        if when == "before":
            causal_lm.backbone.enable_lora(2)
        model = draw(CCCausalLM(causal_lm, "selected"))
        x, y, weights = tiny.batch()
        if when == "compiled":
            fit(compiled(model), x, y, weights)
        if when != "before":
            model.enable_lora(2)
        if when != "compiled":
            compiled(model)
        trainable = {v.path for v in model.trainable_variables}
        lora = {path for path in trainable if "lora" in path}
        # Query and value, two matrices each, in three blocks; and S.
        assert len(lora) == 12 and trainable == lora | {S_PATH}
        before = connected.weights(model)
        fit(model, x, y, weights, epochs=2)
        assert connected.moved(before, connected.weights(model)) == trainable

    @pytest.mark.thorough
    def test_micro_batches_are_one_batch(self, fixed_noise):
        x, y, weights, _ = example()
        fixed_noise(np.array([[0.0, 3.0, -1.0]]))  # of any row, whatever the batch
        after = []
        for micro_batches in (None, 3):
            optimizer = keras.optimizers.SGD(0.1, gradient_accumulation_steps=micro_batches)
            model = compiled(make(), optimizer)
            before = connected.weights(model)
            fit(model, x, y, weights, batch_size=3 // (micro_batches or 1))
            after.append(connected.weights(model))
            assert S_PATH in connected.moved(before, after[-1])
        connected.assert_weights_equal(*after, atol=2e-6)

    @pytest.mark.thorough
    def test_mixed_bfloat16(self, fixed_noise):
        family = "gemma3"  # which scales its embeddings in bfloat16
        x, y, weights = tiny.batch()
        fixed_noise(np.array([[0.0, 50.0, 0.0]]))  # which decides, whatever is rounded
        expected = fit(compiled(make(family)), x, y, weights)["loss"]
        model = compiled(make(family, "mixed_bfloat16"), keras.optimizers.AdamW(0.01))
        for layer in model.connection_layers().values():
            assert {v.dtype for v in layer.weights} == {"float32"} == {layer.compute_dtype}
        before = connected.weights(model)
        found = fit(model, x, y, weights, epochs=3)["loss"]
        np.testing.assert_allclose(found[0], expected[0], rtol=0.05)
        assert found[2] < found[0]
        after = connected.weights(model)
        assert S_PATH in connected.moved(before, after) and np.isfinite(after[S_PATH]).all()
        assert "pooled_transform/delta" not in connected.moved(before, after)

    @pytest.mark.thorough
    def test_one_batch_is_learned(self):
        keras.utils.set_random_seed(3)
        x, y, weights = tiny.batch()
        model = make(drawn=False)
        model.compile(keras.optimizers.Adam(1e-2))  # as a user would, compiled
        losses = fit(model, x, y, weights, epochs=40)["loss"]
        assert losses[-1] < 0.3 * losses[0]


# ---------------------------------------------------------------- refused


class TestRefused:
    @pytest.mark.parametrize(
        "option, value",
        [("temperature", t) for t in (0, -1, -0.5, "1", None, True, float("nan"), float("inf"))]
        + [("transform", t) for t in ("mlp", "low_rank", "cubic", True, 0, ["linear"])],
    )
    def test_options(self, option, value):
        with pytest.raises(ValueError, match=rf"`{option}` must be .*Received: {option}="):
            SelectedConnection(**{option: value})

    def test_an_option_of_the_other_connection(self):
        with pytest.raises(TypeError, match="alignment"):
            SelectedConnection(alignment="mean")

    @pytest.mark.parametrize(
        "connection", ["selectd", "Selected", SelectedConnection, ["selected"]]
    )
    def test_a_connection_of_no_kind(self, connection):
        causal_lm = tiny.causal_lm()
        message = (
            r"`connection` must be one of \['flare', 'fused', 'selected'\].*Received: connection="
        )
        with pytest.raises(ValueError, match=message):
            CCCausalLM(causal_lm, connection)
        CCCausalLM(causal_lm, "selected")  # it is as it was

    def test_a_model_that_is_connected_already(self):
        causal_lm = tiny.causal_lm()
        model = CCCausalLM(causal_lm, "selected")
        paths = [v.path for v in causal_lm.variables]
        for connection in ("selected", "fused", None):
            with pytest.raises(ValueError, match=r"connected already.*Received: "):
                CCCausalLM(causal_lm, connection)
        assert [v.path for v in causal_lm.variables] == paths
        model.disconnect()
        CCCausalLM(causal_lm, "fused").disconnect()
        CCCausalLM(causal_lm, "selected")

    def test_right_options_come_back(self):
        for options in ({}, {"temperature": 0.5}, {"temperature": 2, "transform": None}):
            connection = SelectedConnection(**options)
            assert connection.get_config() == {"temperature": 1.0, "transform": "linear", **options}
            config = keras.saving.serialize_keras_object(connection)
            again = keras.saving.deserialize_keras_object(config)
            assert repr(again) == repr(connection)
