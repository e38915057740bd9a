"""One cell of the protocol `transfer`: trained on a mixture, scored on what English alone was told.

Notable choices:

- All methods get the same rows at the same steps. Pairs without an answer are for those that learn
  from them; the others get answered rows in their place, which is the harder thing to beat.
- Beside what a user gets stands what there was to borrow: the answers' likelihood with the English
  prompt at hand, through the connection, or in the context with the model's own English answer.
"""

import time
from collections.abc import Mapping
from typing import Any

import keras

from keras_cc.comparison import making, relations
from keras_cc.comparison.costs import inference_cost, machine
from keras_cc.comparison.experiment import UNTUNED
from keras_cc.comparison.mixing import mix
from keras_cc.comparison.rows import spread
from keras_cc.comparison.transfer import Transfer
from keras_cc.demo import laboratory_preset
from keras_cc.evaluation import Task, choice, evaluate
from keras_cc.evaluation.metrics import normalize
from keras_cc.evaluation.nats import answer_ids, answer_nats, by_language, pivot_ids, texts
from keras_cc.evaluation.scorer import Scorer
from keras_cc.report.grouping import VERSION

#: Of a cell: the parts that are scored.
SCORED = ("pairs", "held_out")
METRICS = ("exact_match", "f1")
#: Items a part of the sample that learning curves and what could be borrowed are taken of.
SAMPLED = 16


def run_transfer(experiment: Transfer, verbose: "int | str" = "auto") -> dict[str, Any]:
    """Train one method with one seed, and score what crossed.

    Args:
        experiment: a `Transfer`.
        verbose: 0 for no progress bars.

    Returns:
        A dict that JSON can hold, as `keras_cc.comparison.run` returns it, with the part of each
        item (`parts`), the metrics `choice` (the gold answer is the likeliest of the relation's)
        and `wrong_language` (the answer is one of this item in another language). Of a `sample`
        (`items` and `parts`, as the cell's own) are the `curve` and `borrowed`: the answers' nats
        with English at hand.
    """
    keras.utils.set_random_seed(experiment.seed)
    loaded = experiment.load_rows()
    rows = loaded["rows"]
    model, parameters = making.make_model(
        experiment, lambda inner: _preprocessor(experiment, inner, rows)
    )
    scored, parts = _scored(rows, experiment.every_language)
    sample, sampled_parts = _scored(rows, experiment.every_language, SAMPLED)
    scorer = Scorer(model, batch_size=2 * experiment.batch_size, verbose=verbose)
    trained: dict[str, Any] = {"history": {}}
    if experiment.recipe != UNTUNED:
        trained = _train(model, experiment, rows, sample, scorer, verbose)
    parameters["extra"] = making.extra_parameters(model)
    start = time.perf_counter()
    longest = max(len(ids) for ids in scorer.answer_ids(texts(scored)))
    task = Task(experiment.task, "generate", METRICS, max_new_tokens=longest + 2)
    result = evaluate(
        model, task, scored, scorer=scorer, batch_size=4 * experiment.batch_size, verbose=verbose
    )
    scores: dict[str, Any] = {
        metric: dict(by_language) for metric, by_language in result.scores.items()
    }
    candidates = relations.candidates(rows)
    if experiment.recipe != UNTUNED:  # which finds no answer likely, so that all would be tried
        scores["choice"] = _choices(scorer, scored, candidates)
    scores["wrong_language"] = _wrong_language(result.predictions, scored)
    said = dict(zip(result.items["en"], result.predictions["en"], strict=True))
    borrowed = _borrowed(model, scorer, sample, said)
    return {
        "version": VERSION,
        "key": experiment.key,
        "name": experiment.name,
        "config": experiment.config,
        "metric": task.metric,
        "items": result.items,
        "parts": parts,
        "sample": {"items": _ids(sample), "parts": sampled_parts},
        "scores": {
            metric: {language: making.floats(values) for language, values in by_language.items()}
            for metric, by_language in scores.items()
        },
        "borrowed": {
            path: {language: making.floats(values) for language, values in by_language.items()}
            for path, by_language in borrowed.items()
        },
        "english_perplexity": making.english_perplexity(scorer, scored),
        **trained,
        "seconds": {**trained.get("seconds", {}), "evaluate": time.perf_counter() - start},
        "parameters": parameters,
        "inference": inference_cost(model, scored),
        "atlas": making.gates(model, scored, experiment.batch_size, verbose),
        "rows": {
            "train": len(rows["train"]["en"]),
            "left_out": loaded["left_out"],
            "truncated": model.preprocessor.truncated_count,
        },
        "machine": machine(),
        **_laboratory(experiment),
    }


def _laboratory(experiment):
    """Which of its models a cell of the laboratory is of."""
    if experiment.model != relations.LABORATORY:
        return {}
    return {"fingerprint": laboratory_preset.fingerprint()}


def training_rows(experiment: Transfer, rows: Mapping[str, Any], takes_pairs: bool) -> list:
    """The rows of a training, batch after batch; see `Transfer` for the shares.

    Args:
        experiment: a `Transfer`.
        rows: from part to language to rows.
        takes_pairs: bool, whether the method learns from pairs without an answer.
    """
    targets = [language for language in experiment.languages if language != "en"]
    told = {
        "english": relations.PARTS if experiment.facts != "none" else ("train",),
        "target": relations.PARTS if experiment.facts == "all" else ("train",),
    }
    kinds = {
        "english": [row for part in told["english"] for row in rows[part]["en"]],
        "target": [row for k in targets for part in told["target"] for row in rows[part][k]],
        "pairs": [
            {**row, "output": None, "answers": None} for k in targets for row in rows["pairs"][k]
        ],
    }
    english, pairs = experiment.english_share, experiment.pair_share
    without = {"english": english, "target": 1 - english}
    before = experiment.pairs_after
    phases = [(experiment.steps, without)]
    if takes_pairs and pairs:
        share = {"english": english, "target": 1 - english - pairs, "pairs": pairs}
        phases = [(before, without), (experiment.steps - before, share)]
    return mix(kinds, phases, experiment.batch_size, experiment.seed)


def _scored(rows, languages, count=0):
    """`(rows, their parts)` by language: `count` items a part, or all."""
    some = {
        language: {part: spread(rows[part][language], count) for part in SCORED}
        for language in languages
    }
    return (
        {k: [row for kept in parts.values() for row in kept] for k, parts in some.items()},
        {k: [part for part, kept in parts.items() for _ in kept] for k, parts in some.items()},
    )


def _ids(rows):
    return {language: [str(row["id"]) for row in some] for language, some in rows.items()}


def _train(model, experiment, rows, sample, scorer, verbose):
    """Returns curves and seconds."""
    recipe, start = experiment.resolve(), time.perf_counter()
    bars = 0 if verbose == 0 else 1
    train = training_rows(experiment, rows, model.learns_from_prompts)
    steps = experiment.steps
    model.compile(making.optimizer(model, experiment, steps), sampler="greedy")
    curve = _Curve(scorer, sample, max(1, steps // experiment.curve) if experiment.curve else 0)
    prepared, began = time.perf_counter() - start, time.perf_counter()
    history = model.fit(
        train,
        batch_size=experiment.batch_size,
        shuffle=False,
        callbacks=[curve],
        verbose=bars,
    ).history
    fitted = time.perf_counter()
    paired = [row for row in train if row.get("output") and row.get("lang") != "en"]
    unlike = list({(row["id"], row["lang"]): row for row in paired}.values())
    found = recipe.finish(model, unlike, unlike[:64], verbose=verbose)
    if experiment.finish == "refit":
        found["fits"] = model.fit_transform(unlike, verbose=verbose)
    return {
        "history": {**{k: making.floats(v) for k, v in history.items()}, "step": [steps]},
        "curve": curve.seen,
        "steps": steps,
        "chosen": found["search"].best if "search" in found else None,
        "seconds": {
            "prepare": prepared,
            "train": fitted - began - curve.seconds,
            "curve": curve.seconds,
            "finish": time.perf_counter() - fitted,
        },
    }


class _Curve(keras.callbacks.Callback):
    """Nats of each answer by language, now and then: `nll`, a list of dicts, beside `step`."""

    def __init__(self, scorer, scored, every):
        super().__init__()
        self._scorer, self._scored, self._every = scorer, scored, every
        self._done, self.seconds = 0, 0.0
        self.seen: dict[str, list] = {"step": [], "nll": []}

    def on_train_batch_end(self, batch, logs=None):
        self._done += 1
        if not self._every or self._done % self._every:
            return
        start = time.perf_counter()
        if hasattr(self.model, "jax_state_sync"):
            self.model.jax_state_sync()  # JAX keeps the state outside the model while it trains
        quiet, self._scorer.verbose = self._scorer.verbose, 0
        nats = answer_nats(self._scorer, self._scored)
        self._scorer.verbose = quiet
        self.seen["step"].append(self._done)
        self.seen["nll"].append({k: making.floats(v) for k, v in nats.items()})
        self.seconds += time.perf_counter() - start


def _preprocessor(experiment, inner, rows):
    every = [row for part in rows.values() for some in part.values() for row in some]
    return making.with_room(
        inner,
        [row["instruction"] for row in every],
        [row["output"] for row in every],
        [row["instruction_en"] for row in every],
        experiment.template,
        experiment.max_length,
        any_answer=True,
        in_turn=experiment.asks_in_turn,
        padding="longest",
    )


# ---------------------------------------------------------------- scores


def _choices(scorer, rows, candidates):
    """1 where the likeliest of a language's candidates is an accepted answer."""
    ids = {language: answer_ids(scorer, some) for language, some in candidates.items()}
    contexts = scorer.prompt_ids(texts(rows, "instruction"))
    pivots = pivot_ids(scorer, rows)
    asked = [(language, row) for language, some in rows.items() for row in some]
    accepted = [
        [n for n, text in enumerate(candidates[language]) if text in row["answers"]]
        for language, row in asked
    ]
    every = [(row, n) for row, numbers in enumerate(accepted) for n in numbers]
    totals: list[dict[int, float]] = [{} for _ in asked]
    found = scorer.log_likelihoods(
        [(contexts[row], ids[asked[row][0]][n]) for row, n in every],
        None if pivots is None else [pivots[row] for row, _ in every],
    )
    for (row, n), one in zip(every, found, strict=True):
        totals[row][n] = one.total
    golds = [max(some, key=lambda n: some[n]) for some in totals]
    hits = choice.ranks_first(
        scorer,
        contexts,
        [ids[language] for language, _ in asked],
        golds,
        [some[gold] for some, gold in zip(totals, golds, strict=True)],
        pivots,
    )
    return by_language(rows, map(float, hits))


def _wrong_language(predictions, rows):
    """1 where a prediction is an answer of its item in another language, and none in its own."""
    accepted = {
        language: {str(row["id"]): _normal(row["answers"], language) for row in some}
        for language, some in rows.items()
    }
    found = {}
    for language, some in rows.items():
        own = set().union(*accepted[language].values())  # a word of both languages is not wrong
        found[language] = []
        for row, text in zip(some, predictions[language], strict=True):
            other = set().union(*(accepted[k][str(row["id"])] for k in rows if k != language))
            found[language].append(float(normalize(text, language) in other - own))
    return found


def _normal(answers, language):
    return {normalize(answer, language) for answer in answers}


def _borrowed(model, scorer, rows, said):
    """Nats of the answers with English at hand: `in_context`, and `connected` where it can be.

    `in_context` is after the English prompt and the model's own English answer, which is `said` by
    id; the rows in English are left out.
    """
    prompts = scorer.prompt_ids(texts(rows, "instruction"))
    pivots = scorer.prompt_ids(texts(rows, "instruction_en"))
    ids = scorer.answer_ids([said[str(row["id"])] + "\n" for some in rows.values() for row in some])
    joined = []
    for pivot, answer, prompt in zip(pivots, ids, prompts, strict=True):
        begins = bool(prompt) and bool(pivot) and prompt[0] == pivot[0]  # one start token will do
        joined.append(pivot + answer + prompt[int(begins) :])
    found = {"in_context": answer_nats(scorer, rows, joined)}
    if model.connection is not None:
        with_pivots = Scorer(
            model, batch_size=scorer.batch_size, verbose=scorer.verbose, connected=True
        )
        found["connected"] = answer_nats(with_pivots, rows)
    return {
        path: {language: nats for language, nats in by_language.items() if language != "en"}
        for path, by_language in found.items()
    }
