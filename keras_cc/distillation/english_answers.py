"""Self-distillation: the model's own English answers supervise its other languages.

Notable choices:

- An answer depends on its English prompt alone, so each distinct prompt is answered once, whatever
  the number of languages that ask it.
- Every batch has the same shape (the last is filled up by repetition): one compiled loop serves.
- Answers are kept in a file (`answer_cache`), which knows what they come from.
"""

import warnings
from collections.abc import Mapping

import keras

from keras_cc.data import pairs
from keras_cc.data.columns import describe, plain_text, to_columns
from keras_cc.distillation import answer_cache
from keras_cc.generation import Sampling
from keras_cc.options import count


def distill(
    model,
    rows,
    cache=None,
    *,
    batch_size=8,
    max_length=None,
    sampler="greedy",
    keep_pivot=True,
    clean=None,
    verbose=True,
):
    """Replace the answers of rows by the model's own answers to their English prompts.

        output <- generate(pivot prompt),    output_gold <- output

    Trained on, the rows teach the model to answer the target language as it answers English. The
    answers stay in English: nothing is translated. A row in the pivot's language gets the model's
    answer to its own instruction. Columns have the names that `model.preprocessor` gives them.

    A connected model answers on its monolingual, untransformed path. The sampler it was compiled
    with is left as it was.

    Rows are left out, and counted in a warning, where the answer is empty (the model stops at
    once) or too long for a training row of `model.preprocessor`. Answers that fill `max_length`,
    and so are probably cut, are kept and counted in the same warning.

    Args:
        model: a `keras_cc.CCCausalLM` with a preprocessor, connected or not, usually before it is
            trained on the target languages.
        rows: a list (or iterable) of row dicts; they are not changed.
        cache: path of a JSON Lines file that keeps the answers, or None. It is begun where there
            is none, and every batch is added as soon as it is answered: a run that was killed
            goes on from there, and one whose prompts are all in it generates nothing.
        batch_size: int, prompts generated at a time.
        max_length: int, tokens of English prompt and answer together. Default: the
            preprocessor's. A smaller one leaves room for target prompts longer than the English.
        sampler: a `keras_hub.samplers` object or name.
        keep_pivot: bool, whether the rows keep their pivot prompt. Without it a connected model
            trains on them as plain rows.
        clean: None, or a function from an answer to the text that is kept of it, such as its
            first line: a base model goes on after its answer. The cache holds answers as they
            came.
        verbose: bool, whether a progress bar is shown.

    Returns:
        A list of new row dicts, in the order of `rows`. `output` is the model's answer,
        `output_gold` the answer that was there, if one was (under another `output_column`, that
        name with `_gold`). A gold answer of an earlier round is kept.

    Raises:
        TypeError: if `model` is no `CCCausalLM`, `rows` is no list of dicts, or a text no string.
        ValueError: for a row with neither a pivot prompt nor the pivot's language, or whose
            prompt leaves no room for an answer (the message names it); if `cache` is no cache, or
            one of another model or other settings (it stays as it is); if `model` has an
            intervention; if no row is left.

    Example:

    ```python
    rows = keras_cc.distill(model, rows, cache="english_answers.jsonl", max_length=32)
    model.fit(rows, batch_size=8)
    ```

    Source: SDRRL (Zhang et al., ACL 2024, arXiv 2402.12204), without its translated answers and
    code-switching.
    """
    preprocessor = _check_model(model)
    max_length = preprocessor.max_length if max_length is None else max_length
    batch_size = count("batch_size", batch_size, least=1)
    max_length = count("max_length", max_length, least=2)
    rows, names, prompts = _english_prompts(preprocessor, rows)
    lengths = _prompt_lengths(preprocessor, prompts, names, max_length)
    sampling = Sampling(sampler)
    answers = {}
    if cache is not None:
        answers = answer_cache.read(cache, answer_cache.header(model, max_length, sampling.sampler))

    # Prompts of a length together: generation begins where a batch's shortest prompt ends.
    missing = sorted((prompt for prompt in lengths if prompt not in answers), key=lengths.get)
    progress = keras.utils.Progbar(len(missing), verbose=int(verbose), unit_name="prompt")
    with sampling.of(model.causal_lm):
        for start in range(0, len(missing), batch_size):
            batch = missing[start : start + batch_size]
            found = dict(zip(batch, _generate(model, batch, batch_size, max_length), strict=True))
            if cache is not None:
                answer_cache.append(cache, found)
            answers.update(found)
            progress.update(start + len(batch))

    if clean is not None:
        answers = {prompt: clean(answers[prompt]) for prompt in lengths}
    distilled, empty, too_long, cut = [], [], [], []
    for row, name, prompt in zip(rows, names, prompts, strict=True):
        answer = answers[prompt]
        length = preprocessor.answer_length(row[preprocessor.instruction_column], answer)
        if not answer.strip():
            empty.append(name)
        elif length is None:
            too_long.append(name)
        else:
            distilled.append(_distilled(preprocessor, row, answer, keep_pivot))
            if lengths[prompt] + length >= max_length:
                cut.append(name)
    said = [
        f"{len(found)} of {len(rows)} rows {message} (the first: {found[0]})."
        for found, message in (
            (empty, "are left out: the model's answer is empty"),
            (too_long, f"are left out: the answer is too long for {preprocessor.max_length=}"),
            (cut, f"have an answer that fills {max_length=} and is probably cut"),
        )
        if found
    ]
    if not distilled:
        raise ValueError(
            "`model` must answer some English prompt, within the preprocessor's length: no row is "
            f"left. Received: {' '.join(said)}"
        )
    if said:
        warnings.warn(" ".join(said), stacklevel=2)
    return distilled


def _check_model(model):
    if not hasattr(model, "causal_lm") or not hasattr(model, "connection"):
        raise TypeError(
            "`model` must be a keras_cc.CCCausalLM; `CCCausalLM(causal_lm, connection=None)` makes "
            f"one of a causal language model. Received: model={model!r}"
        )
    if model.preprocessor is None:
        raise ValueError(
            "`model` must have a preprocessor, since prompts are strings: set `model.preprocessor "
            "= keras_cc.CCPreprocessor(tokenizer)`. Received: model.preprocessor=None"
        )
    if getattr(model, "intervention", None) is not None:
        raise ValueError(
            "`model` must answer as it is: set `model.intervention = None` to distill. "
            f"Received: model.intervention={model.intervention!r}"
        )
    return model.preprocessor


def _english_prompts(preprocessor, rows):
    """The rows as a list, their names, and the prompt that the model answers for each."""
    found = [] if isinstance(rows, (str, bytes, Mapping)) else list(rows)
    if not found or not all(isinstance(row, Mapping) for row in found):
        raise TypeError(
            f"`rows` must be a list of row dicts, at least one. Received: rows={describe(rows)}"
        )
    instruction_column, id_column = preprocessor.instruction_column, preprocessor.id_column
    lang_column, pivot_column = preprocessor.lang_column, preprocessor.pivot_column
    language = preprocessor.pivot_language
    columns = to_columns(found, (instruction_column, pivot_column, lang_column, id_column))
    names = pairs.row_names(columns, id_column, len(found))
    instructions = pairs.read_texts(columns, instruction_column, names)
    prompts = pairs.read_pivots(columns, instructions, names, pivot_column, lang_column, language)
    for i, row in enumerate(found):
        if prompts[i] is not None:
            continue
        # As in training: what is in the pivot's language has no pivot beside it.
        lang, pivot = plain_text(row.get(lang_column)), plain_text(row.get(pivot_column))
        if not pairs.is_in_pivot_language(lang, instructions[i], pivot, language):
            raise ValueError(
                f"{names[i]}: there is no {pivot_column!r} for the model to answer. Give it one, "
                f"or leave the row out; a row in {language!r} itself says so in {lang_column!r}. "
                f"Received: {pivot_column}={pivot!r}, {lang_column}={lang!r}"
            )
        prompts[i] = instructions[i]
    return found, names, prompts


def _prompt_lengths(preprocessor, prompts, names, max_length):
    """Tokens of each distinct prompt; one that leaves no room for an answer is refused."""
    lengths = {}
    for prompt, name in zip(prompts, names, strict=True):
        if prompt not in lengths:
            try:
                inputs = preprocessor.generate_preprocess([prompt], max_length)
            except ValueError as error:
                raise ValueError(f"{name}: its prompt cannot be answered: {error}") from error
            lengths[prompt] = int(inputs["padding_mask"].sum())
    return lengths


def _generate(model, batch, batch_size, max_length):
    prompts = batch + batch[-1:] * (batch_size - len(batch))
    # A row with an empty pivot goes around the connection and its transform.
    options = {} if model.connection is None else {"pivot_prompts": [""] * batch_size}
    return model.generate(prompts, max_length, strip_prompt=True, **options)[: len(batch)]


def _distilled(preprocessor, row, answer, keep_pivot):
    column = preprocessor.output_column
    new = {**row, column: answer}
    if column in row:
        new.setdefault(f"{column}_gold", row[column])
    if not keep_pivot:
        new.pop(preprocessor.pivot_column, None)
    return new
