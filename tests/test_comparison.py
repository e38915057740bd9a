"""Cells of a comparison: their keys, what they hold, and a run that is killed and goes on."""

import concurrent.futures
import dataclasses
import json
import math
import os
import threading
import time

import connected
import numpy as np
import pytest
from test_examples import tiny_load

import keras_cc
import keras_cc.demo
from keras_cc import comparison, recipes
from keras_cc.comparison import UNTUNED, Cells, Experiment, costs, making
from keras_cc.connections import FusedConnection
from keras_cc.passes import runs
from keras_cc.report.grouping import VERSION

pytest.importorskip("babel", reason="the CLDR set needs babel")
pytest.importorskip("scipy", reason='keras_cc.evaluation needs "keras-cc[evaluation]"')


SMALL = {
    "model": "demo:tiny",
    "languages": ("en", "tr"),
    "train_rows": 6,
    "dev_rows": 3,
    "epochs": 1,
    "batch_size": 4,
}


@pytest.fixture
def tiny_demo(monkeypatch):
    monkeypatch.setattr(keras_cc.demo, "load", tiny_load)
    monkeypatch.setattr(comparison.rows, "HELD_OUT", 3)


def fake_cell(experiment):
    """A cell as `run` returns it, made of the seed: what resuming is tested with."""
    draw = np.random.default_rng(int(experiment.key, 16))
    hits = {lang: draw.integers(0, 2, 4).astype(float).tolist() for lang in experiment.languages}
    nats = {lang: draw.random(4).tolist() for lang in experiment.languages}
    return {
        "version": VERSION,
        "key": experiment.key,
        "name": experiment.name,
        "config": experiment.config,
        "metric": "exact_match",
        "items": {lang: ["a", "b", "c", "d"] for lang in experiment.languages},
        "scores": {"exact_match": hits, "nll": nats},
        "english_perplexity": 20.0,
        "history": {"step": [2, 4], "loss": [2.0, 1.0], "val_sft_loss": [3.0, 2.5]},
        "seconds": {"train": 1.0, "finish": 0.0, "evaluate": 1.0},
        "parameters": {"model": 10, "trained": 2, "extra": 0},
        "inference": {"ratio": 1.0, "low": 1.0, "high": 1.0},
        "atlas": None,
        "rows": {"train": 12, "held_out": 6},
        "machine": {"backend": "jax", "cores": 2, "processor": "x", "keras": "3", "keras_hub": "0"},
    }


def killed_or_kept(experiment, folder):
    """Instead of training, in the process of a cell."""
    if experiment.recipe == "cc":
        os._exit(9)
    Cells(folder / "cells").add(experiment, fake_cell(experiment))


def some_experiments():
    methods = ("sft", "cc", "cc dropout=0.9")
    return [
        Experiment(UNTUNED, **SMALL),
        *(Experiment.parse(m, seed=seed, **SMALL) for seed in (0, 1) for m in methods),
    ]


@pytest.mark.once
class TestExperiment:
    def test_a_method_is_parsed_and_named(self):
        parsed = Experiment.parse("cc dropout=0.9 layers=[1,-1] gate=layer refit", seed=3, **SMALL)
        assert parsed.options == {"dropout": 0.9, "layers": [1, -1], "gate": "layer"}
        assert (parsed.recipe, parsed.finish, parsed.seed) == ("cc", "refit", 3)
        assert parsed.name == "cc dropout=0.9 layers=[1, -1] gate=layer refit"
        assert Experiment.parse("sft").name == "sft"
        parsed = Experiment.parse("cc connection_learning_rate=1e-3 rank=4", **SMALL)
        assert (parsed.connection_learning_rate, parsed.options) == (1e-3, {"rank": 4})
        assert parsed.name == "cc rank=4 connection_learning_rate=0.001"

    @pytest.mark.parametrize(
        "field",
        [
            "seed",
            "task",
            "languages",
            "train_rows",
            "epochs",
            "steps",
            "learning_rate",
            "connection_learning_rate",
            "options",
            "finish",
        ],
    )
    def test_the_key_stands_for_every_part(self, field):
        other = {
            "seed": 1,
            "task": "xnli",
            "languages": ("en", "sw"),
            "train_rows": 7,
            "epochs": 2,
            "steps": 5,
            "learning_rate": 1e-3,
            "connection_learning_rate": 1e-3,
            "options": {"dropout": 0.1},
            "finish": "refit",
        }
        plain = Experiment("cc", **SMALL)
        assert dataclasses.replace(plain, **{field: other[field]}).key != plain.key
        assert Experiment("cc", **SMALL).key == plain.key
        assert len(plain.key) == 16 and int(plain.key, 16) >= 0

    def test_the_untuned_model_has_one_key_whatever_is_trained(self):
        untuned = Experiment(UNTUNED, **SMALL)
        assert dataclasses.replace(untuned, seed=5, epochs=9, lora_rank=0).key == untuned.key
        assert dataclasses.replace(untuned, dev_rows=2).key != untuned.key

    @pytest.mark.parametrize(
        ("wrong", "message"),
        [
            ({"recipe": "magic"}, "`recipe` must be one of"),
            ({"task": "magic"}, "magic"),
            ({"languages": ("tr", "sw")}, '`languages` must hold "en"'),
            ({"languages": ("en", "tr", "tr")}, "each language once"),
            ({"score_on": "test"}, "`score_on` must be one of"),
            ({"finish": "magic"}, "`finish` must be one of"),
            ({"steps": -1}, "`steps` must be an integer >= 0"),
            ({"connection_learning_rate": -1.0}, "`connection_learning_rate` must be"),
            ({"recipe": "dft", "connection_learning_rate": 0.1}, "without a connection"),
        ],
    )
    def test_wrong_values_are_refused(self, wrong, message):
        with pytest.raises(ValueError, match=message):
            Experiment(**wrong)

    def test_a_method_with_a_stray_word_is_refused(self):
        with pytest.raises(ValueError, match="`method` must be a recipe"):
            Experiment.parse("cc dropout 0.9")

    def test_options_that_do_not_fit_are_refused(self):
        with pytest.raises(ValueError, match="the recipe 'sft' has none"):
            Experiment("sft", {"dropout": 0.5}, **SMALL)
        with pytest.raises(ValueError, match="`dropout` must be"):
            Experiment("cc", {"dropout": 2}, **SMALL)

    @pytest.mark.parametrize("method", ["cc transform=low_rank refit", "sft refit", "dft refit"])
    def test_what_has_no_closed_form_is_not_refitted(self, method):
        with pytest.raises(ValueError, match=r"`finish` can be 'refit'.*Received: recipe="):
            Experiment.parse(method, **SMALL)

    def test_other_rows_are_another_key(self, tmp_path):
        file = tmp_path / "train" / "xnli" / "tr.jsonl"
        file.parent.mkdir(parents=True)
        file.write_text("{}")
        experiment = Experiment(task="xnli", data=str(tmp_path), languages=("en", "tr"))
        before = experiment.key
        file.write_text('{"id": 1}')
        os.utime(file, ns=(1, 1))  # a coarse clock may give both the same time
        assert experiment.key != before

    def test_other_defaults_are_another_key(self, monkeypatch):
        before = {name: Experiment(name, **SMALL).key for name in ("cc", "sft", "dft")}
        changed = dataclasses.replace(
            recipes.get("cc"), connection=lambda: keras_cc.FusedConnection(dropout=0.25)
        )
        monkeypatch.setitem(recipes.RECIPES, "cc", changed)
        assert Experiment("cc", **SMALL).key != before["cc"]
        assert {name: Experiment(name, **SMALL).key for name in ("sft", "dft")} == {
            name: before[name] for name in ("sft", "dft")
        }


def write_xnli(folder, with_pivot=lambda id: True):
    """20 items to train on and 6 others, each in English and Turkish."""
    for split, ids in (("train", range(20)), ("dev", range(20, 26))):
        for lang in ("en", "tr"):
            path = folder / split / "xnli" / f"{lang}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            rows = [
                {
                    "task": "xnli", "lang": lang, "id": i, "instruction": f"{i}?",
                    "output": "1", "answers": ["1"],
                    **({"instruction_en": f"{i}??"} if with_pivot(i) else {}),
                }
                for i in ids
            ]  # fmt: skip
            path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return {"task": "xnli", "data": str(folder), "languages": ("en", "tr")}


@pytest.mark.once
class TestRows:
    def test_the_three_sets_share_no_id(self, tmp_path):
        experiment = Experiment(**write_xnli(tmp_path))
        rows = comparison.rows.load_rows(experiment)
        assert sorted({r["id"] for r in rows["train"]}) == list(range(16))
        assert sorted({r["id"] for r in rows["held_out"]}) == [16, 17, 18, 19]
        assert [r["id"] for r in rows["scored"]["tr"]] == list(range(20, 26))
        chosen = comparison.rows.load_rows(dataclasses.replace(experiment, score_on="held_out"))
        assert [r["id"] for r in chosen["held_out"] if r["lang"] == "tr"] == [16, 18]
        assert [r["id"] for r in chosen["scored"]["tr"]] == [17, 19]

    @pytest.mark.parametrize(
        ("count", "expected"), [(0, [0, 1, 2, 3]), (2, [0, 2]), (9, [0, 1, 2, 3])]
    )
    def test_spread(self, count, expected):
        assert comparison.rows.spread([0, 1, 2, 3], count) == expected


@pytest.mark.once
class TestResuming:
    def test_a_killed_run_goes_on_where_it_was(self, tmp_path, monkeypatch):
        report = pytest.importorskip("keras_cc.report")
        pytest.importorskip("matplotlib", reason='pictures need "keras-cc[report]"')
        done, limit = [], [3]

        def run(experiment, **kwargs):
            if len(done) == limit[0]:
                raise KeyboardInterrupt
            done.append(experiment.key)
            return fake_cell(experiment)

        monkeypatch.setattr(comparison.cells, "run", run)
        experiments = some_experiments()
        with pytest.raises(KeyboardInterrupt):
            comparison.run_all(experiments, tmp_path / "killed", workers=0, verbose=0)
        limit[0] = math.inf
        resumed = comparison.run_all(experiments, tmp_path / "killed", workers=0, verbose=0)
        assert len(done) == len(set(done)) == len(experiments)  # nothing was run twice
        straight = comparison.run_all(experiments, tmp_path / "straight", workers=0, verbose=0)
        assert resumed == straight
        tables = [
            report.write(cells[1:], tmp_path / name)["results.md"].read_text(encoding="utf-8")
            for name, cells in (("a", resumed), ("b", straight))
        ]
        assert tables[0] == tables[1]

    def test_a_cell_that_fails_is_named_and_the_others_are_kept(self, tmp_path, monkeypatch):
        def run(experiment, **kwargs):
            if experiment.recipe == "sft":
                raise MemoryError("too large")
            return fake_cell(experiment)

        monkeypatch.setattr(comparison.cells, "run", run)
        experiments = some_experiments()
        with pytest.raises(RuntimeError, match=r"2 of 7 cells failed.*\n.*sft, seed 0.*too large"):
            comparison.run_all(experiments, tmp_path, workers=0, verbose=0)
        cells = Cells(tmp_path / "cells")
        assert [e.recipe for e in experiments if e not in cells] == ["sft", "sft"]

    @pytest.mark.large
    def test_a_process_that_is_killed_takes_no_other_with_it(self, tmp_path, monkeypatch):
        monkeypatch.setattr(comparison.cells, "_run_and_keep", killed_or_kept)
        experiments = [Experiment(recipe, **SMALL) for recipe in ("cc", "sft", "dft")]
        with pytest.raises(RuntimeError, match=r"1 of 3 cells failed.*\n.*cc, seed 0"):
            comparison.run_all(experiments, tmp_path, workers=1, verbose=0)
        cells = Cells(tmp_path / "cells")
        assert [e.recipe for e in experiments if e in cells] == ["sft", "dft"]

    def test_distillations_take_turns(self, tmp_path, monkeypatch):
        """They write one file of answers."""

        class Threads(concurrent.futures.ThreadPoolExecutor):
            def __init__(self, workers, mp_context):
                super().__init__(workers)

        distilling, together = threading.Lock(), threading.Barrier(3)

        def run(experiment, folder):
            if experiment.recipe == "sft":
                together.wait(timeout=60)  # passed only by all three at once
            else:
                assert distilling.acquire(blocking=False)
                time.sleep(0.1)
                distilling.release()
            Cells(folder / "cells").add(experiment, fake_cell(experiment))

        monkeypatch.setattr(concurrent.futures, "ProcessPoolExecutor", Threads)
        monkeypatch.setattr(comparison.cells, "_run_and_keep", run)
        experiments = [Experiment("distilled_sft", seed=seed, **SMALL) for seed in range(3)]
        experiments += [Experiment("sft", seed=seed, **SMALL) for seed in range(3)]
        assert len(comparison.run_all(experiments, tmp_path, workers=6, verbose=0)) == 6

    def test_an_unfinished_file_is_no_cell(self, tmp_path):
        cells, experiment = Cells(tmp_path), Experiment(**SMALL)
        cells.path(experiment).with_suffix(".123.part").write_text("{")
        assert experiment not in cells
        cells.add(experiment, fake_cell(experiment))
        assert cells[experiment] == fake_cell(experiment)

    def test_before_is_the_untuned_models_mean(self, tmp_path):
        cells, experiments = Cells(tmp_path), some_experiments()[:2]
        for experiment in experiments:
            cells.add(experiment, fake_cell(experiment))
        untuned, tuned = cells.load(experiments)
        hits = untuned["scores"]["exact_match"]["tr"]
        assert tuned["before"]["exact_match"]["tr"] == sum(hits) / 4
        assert tuned["before"]["english_perplexity"] == 20.0


@pytest.mark.filterwarnings("ignore:.*(rows are left out|is probably cut|were truncated)")
@pytest.mark.filterwarnings("ignore:.*are not determined in every direction")
class TestRun:
    @pytest.mark.thorough
    @pytest.mark.parametrize("recipe", ["sft", "cc", "cc_published", "xtransplant"])
    def test_a_cell_holds_what_a_report_needs(self, recipe, tiny_demo):
        cell = comparison.run(Experiment(recipe, **SMALL), verbose=0)
        assert json.loads(json.dumps(cell)) == cell
        assert set(cell["scores"]) >= {"exact_match", "nll"}
        assert {lang: len(ids) for lang, ids in cell["items"].items()} == {"en": 3, "tr": 3}
        for by_language in cell["scores"].values():
            assert {lang: len(values) for lang, values in by_language.items()} == {"en": 3, "tr": 3}
        assert len(cell["history"]["val_sft_loss"]) == 1
        assert cell["steps"] == 3  # 12 rows by 4
        assert cell["english_perplexity"] > 1
        assert ("connected" in str(cell["history"])) == (recipe in ("cc", "cc_published"))
        assert (cell["atlas"] is not None) == (recipe in ("cc", "cc_published"))
        mergeable = recipe in ("sft", "cc")
        assert (cell["parameters"]["extra"] == 0) == (mergeable or recipe == "xtransplant")
        assert (cell["inference"]["ratio"] == 1.0) == mergeable

    @pytest.mark.thorough
    @pytest.mark.parametrize(
        ("recipe", "steps"),
        [
            ("translation_sft", 6),
            ("cross_lingual_sft", 6),
            ("distilled_sft", 3),
            ("contrastive", 6),
        ],
    )
    def test_gold_rows_are_whole_and_the_task_has_its_epochs(
        self, recipe, steps, tiny_demo, tmp_path
    ):
        cell = comparison.run(Experiment(recipe, **SMALL), answers=tmp_path, verbose=0)
        # An untrained model's own answers have no end.
        assert (cell["rows"]["truncated"] == 0) == (recipe != "distilled_sft")
        assert cell["steps"] == steps
        assert len(list(tmp_path.glob("english_answers_*.jsonl"))) == (recipe == "distilled_sft")

    @pytest.mark.thorough
    @pytest.mark.parametrize("recipe", ["cc", "xtransplant"])
    def test_rows_without_english_prompts(self, recipe, tiny_demo, tmp_path):
        settings = {**SMALL, **write_xnli(tmp_path, with_pivot=lambda id: id % 2), "train_rows": 0}
        cell = comparison.run(Experiment(recipe, **settings), verbose=0)
        assert cell["rows"]["train"] == 32 and set(cell["scores"]) == {"accuracy", "nll"}
        assert np.isfinite(cell["scores"]["nll"]["tr"]).all()

    @pytest.mark.thorough
    def test_endings_are_trained_as_they_are_scored(self, tiny_demo, tmp_path, monkeypatch):
        settings = {**SMALL, **write_xnli(tmp_path), "task": "xstorycloze_endings"}
        for path in tmp_path.glob("*/xnli"):
            path.rename(path.with_name("xstorycloze"))
        for path in tmp_path.glob("*/xstorycloze/*.jsonl"):
            rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
            for row in rows:
                row["instruction"] = f"the {row['id']}\n(1) fox\n(2) dog\nWhich?"
                row["instruction_en"] = row["instruction"]
            path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        seen, fit = [], keras_cc.CCCausalLM.fit

        def spy(model, rows, **kwargs):
            x = model.preprocessor(rows[:1])[0]
            ids = x["token_ids"][0][np.asarray(x["padding_mask"][0], bool)].tolist()
            seen.append((model.tokenizer, ids, int(np.asarray(x["answer_mask"]).sum())))
            return fit(model, rows, **kwargs)

        monkeypatch.setattr(keras_cc.CCCausalLM, "fit", spy)
        cell = comparison.run(Experiment("cc", **settings), verbose=0)
        ((tokenizer, ids, answer),) = seen
        assert ids[0] == tokenizer.start_token_id
        # The story without a template, its right ending, and no token more than the end token.
        assert tokenizer.detokenize(ids[1:]).startswith("the 0 fox")
        assert answer == len(tokenizer.tokenize(" fox")) + 1
        assert set(cell["scores"]) == {"accuracy", "accuracy_per_character", "nll"}
        assert cell["atlas"] is not None

    @pytest.mark.thorough("selected-2")
    @pytest.mark.parametrize(
        ("connection", "passes_of_user"),
        [(None, 1), ("selected", 2), (FusedConnection(transform="mlp"), 1)],
    )
    def test_the_stock_pass_is_the_model_as_it_came(self, connection, passes_of_user, monkeypatch):
        model = connected.text_model("llama3", connection)
        connected.train_connection(model)
        x, y, sample_weight = model.preprocessor(connected.ROWS)
        inputs = {**x, "y": y, "sample_weight": sample_weight}
        inputs["answer_positions"] = np.argmax(x["answer_mask"], axis=1)[:, None].astype("int32")
        seen, plain = [], runs.run
        monkeypatch.setattr(runs, "run", lambda *a, **k: seen.append(0) or plain(*a, **k))
        users = runs.answer_nats(model, inputs, runs.user)
        assert len(seen) == passes_of_user
        stock = runs.answer_nats(model, inputs, costs._stock_pass(model))
        assert len(seen) == passes_of_user + 1
        as_it_came = connected.text_model("llama3", None)
        expected = runs.answer_nats(as_it_came, inputs, runs.user)
        for name, value in expected.items():
            np.testing.assert_allclose(
                connected.to_numpy(stock[name]), connected.to_numpy(value), rtol=1e-4
            )
        differs = np.abs(connected.to_numpy(users["nats"]) - connected.to_numpy(stock["nats"]))
        assert (differs.max() > 1e-4) == (connection is not None)

    @pytest.mark.thorough
    def test_the_same_seed_gives_the_same_scores(self, tiny_demo):
        first, again, other = (
            comparison.run(Experiment("cc", seed=seed, **SMALL), verbose=0) for seed in (4, 4, 5)
        )
        assert first["scores"] == again["scores"]
        assert first["scores"]["nll"] != other["scores"]["nll"]

    @pytest.mark.thorough
    @pytest.mark.parametrize("recipe", ["sft", "translation_sft", "contrastive"])
    def test_all_recipes_may_have_the_same_steps(self, recipe, tiny_demo, monkeypatch):
        seen, step = [], keras_cc.CCCausalLM.fit

        def fit(model, *args, **kwargs):
            history = step(model, *args, **kwargs)
            seen.append(int(model.optimizer.inner_optimizer.iterations))
            return history

        monkeypatch.setattr(keras_cc.CCCausalLM, "fit", fit)
        cell = comparison.run(Experiment(recipe, steps=8, **SMALL), verbose=0)
        assert cell["steps"] == 8 and seen == [8]
        # 12 rows by 4 are 3 steps a pass, or 6 with the translations.
        ends = [6, 8] if recipe == "translation_sft" else [3, 6, 8]
        assert cell["history"]["step"] == ends
        assert len(cell["history"]["loss"]) == len(ends)

    @pytest.mark.thorough("cc")
    @pytest.mark.parametrize("recipe", ["cc", "cc_published"])
    def test_a_connection_may_have_a_learning_rate_of_its_own(self, recipe):
        model = connected.text_model("llama3", recipes.get(recipe).connection())
        rates = {"learning_rate": 0.0, "connection_learning_rate": 0.1}
        optimizer = making.optimizer(model, Experiment(recipe, **{**SMALL, **rates}), steps=4)
        model.compile(optimizer, **connected.QUICK)
        before = connected.weights(model)
        model.fit(connected.ROWS, batch_size=3, epochs=4, verbose=0)
        moved = connected.moved(before, connected.weights(model))
        own = {v.path for layer in model.connection_layers().values() for v in layer.weights}
        assert moved and moved <= own

    @pytest.mark.thorough
    def test_refit_fits_the_transforms(self, tiny_demo):
        cell = comparison.run(Experiment("cc", finish="refit", **SMALL), verbose=0)
        assert cell["fit"]["after"] <= cell["fit"]["before"] * (1 + 1e-6)
