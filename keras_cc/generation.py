"""Generation, with the pivot prompt at hand or without.

The causal LM's own compiled loop with its KV cache does the work. Where a pass has to come
before the continuation (the pivot's for a connected one, the prompt's own for a selected
connection or an intervention), it runs once, before the prefill, inside the same compiled
function; every call of `call_with_cache` then runs in the pass under way, which knows the
position that it fills.
"""

import contextlib
import contextvars
import threading
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from keras import ops

from keras_cc.data.columns import describe
from keras_cc.passes import pairing, runs


def generate(
    model, prompts, max_length=None, pivot_prompts=None, stop_token_ids="auto", strip_prompt=False
):
    """What `CCCausalLM.generate` does, see there."""
    preprocessor = model.preprocessor
    if preprocessor is None:
        raise ValueError(
            "`generate` takes strings and needs a preprocessor: set `model.preprocessor = "
            "keras_cc.CCPreprocessor(tokenizer)`. Received: model.preprocessor=None"
        )
    is_single = isinstance(prompts, str)
    texts = _texts("prompts", prompts)
    if not texts:
        if pivot_prompts is not None:
            _pivots(model, pivot_prompts, 0)
        return []
    inputs = preprocessor.generate_preprocess(texts, max_length)
    runs.check_positions(model, inputs["token_ids"].shape[1])
    prompt_lengths = inputs["padding_mask"].sum(axis=1)
    if not runs.is_plain(model):
        reach = min(preprocessor.width_of(prompt_lengths.max()), inputs["token_ids"].shape[1])
        inputs["prompt_positions"] = np.arange(reach, dtype="int32")
    if stop_token_ids == "auto":
        stop_token_ids = preprocessor.stop_token_ids
    if stop_token_ids is not None:  # none among them: there is nothing to stop at
        stop_token_ids = tuple(int(token) for token in stop_token_ids) or None
    if pivot_prompts is not None:
        inputs |= _pivots(model, pivot_prompts, len(texts))
        inputs["answer_positions"] = answer_positions(inputs)
    elif model.intervention is not None and model.intervention.needs_pivot:
        raise ValueError(
            f"`pivot_prompts` must be given: {model.intervention!r} reads the pivot's pass. "
            "Received: pivot_prompts=None"
        )
    outputs = run(model, inputs, stop_token_ids)
    continuations = preprocessor.detokenize(
        ops.convert_to_numpy(outputs["token_ids"]),
        ops.convert_to_numpy(outputs["padding_mask"]),
        prompt_lengths=prompt_lengths if strip_prompt else None,
    )
    return continuations[0] if is_single else continuations


def _pivots(model, pivot_prompts, count):
    takes_pivot = model.intervention is not None and model.intervention.needs_pivot
    if model.connection is None and not takes_pivot:
        raise ValueError(
            "`pivot_prompts` need a connection, and this model has none (plain fine-tuning, or "
            "merged), nor an intervention that reads them. "
            f"Received: connection=None, pivot_prompts={pivot_prompts!r}"
        )
    texts = _texts("pivot_prompts", pivot_prompts)
    if len(texts) != count:
        raise ValueError(
            "`pivot_prompts` must be as many as `prompts`. "
            f"Received: {len(texts)} pivot prompts for {count} prompts"
        )
    return model.preprocessor.pivot_preprocess(texts) if texts else {}


def _texts(name, value):
    """One string or several, as a list; what is in them is checked where they become tokens."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, (Mapping, bytes)) or not isinstance(value, Iterable):
        raise TypeError(
            f"`{name}` must be a string or a list of strings, one a row. "
            f"Received: {name}={describe(value)}"
        )
    return list(value)


def filled(rows, width, stop_token_ids):
    """Rows of ids to continue, as `run` takes them.

    Args:
        rows: sequences of ids, none longer than `width`.
        width: int, T.
        stop_token_ids: what the loop will stop at. It looks for them in what it has yet to fill,
            too, so that is filled with another id.

    Returns:
        A dict of `token_ids`, int32 `(B, T)`, and `padding_mask`, bool `(B, T)`.
    """
    other = next(index for index in range(len(stop_token_ids) + 1) if index not in stop_token_ids)
    token_ids = np.full((len(rows), width), other, "int32")
    mask = np.zeros(token_ids.shape, "bool")
    for i, row in enumerate(rows):
        token_ids[i, : len(row)], mask[i, : len(row)] = row, True
    return {"token_ids": token_ids, "padding_mask": mask}


def answer_positions(inputs):
    """Positions that what is generated can take: int32 `(B, K)`, from the shortest prompt's end on.

    Args:
        inputs: dict of `padding_mask`, a NumPy array `(B, T)`.
    """
    mask = inputs["padding_mask"]
    first = int(mask.sum(axis=1).min()) // 8 * 8  # few widths, since each is compiled
    return np.tile(np.arange(first, mask.shape[1], dtype="int32"), (len(mask), 1))


def run(model, inputs, stop_token_ids):
    """Continue a batch of ids with the causal LM's compiled loop, in the pass that a user gets.

    Args:
        model: a `CCCausalLM` whose causal LM has a sampler.
        inputs: dict of `token_ids` and `padding_mask` `(B, T)`, and those of the pivot prompts, if
            there are any, for the connected pass. `prompt_positions` `(P,)`, 0 to P - 1, says that
            no prompt has more than P tokens, so that a pass over the prompts alone is no wider;
            `answer_positions` `(B, K)`, as `answer_positions` gives them, that no more than K are
            generated, so that a pivot's pass that reads them is no wider.
        stop_token_ids: tuple of ints, or None.

    Returns:
        A dict of tensors, `token_ids` and `padding_mask` `(B, T)`.
    """
    function = _function(model, has_pivots="pivot_token_ids" in inputs)
    inputs = {name: ops.convert_to_tensor(value) for name, value in inputs.items()}
    # Bool, as KerasHub's own: Gemma 3's loop inverts it.
    inputs["padding_mask"] = ops.cast(inputs["padding_mask"], "bool")
    return function(inputs, stop_token_ids=stop_token_ids)


def _function(model, has_pivots):
    """The compiled loop: the causal LM's own, or one that runs in a pass of the model's."""
    with _MAKING:
        base, made = _state(model)
        plain = base.make_generate_function()
        if runs.is_plain(model) and not has_pivots:
            return plain
        # The causal LM drops its own function where it is compiled again, with another sampler.
        if made.plain != plain:
            step_in_pass = _step_in_pass(model, base)
            own = _view(base, generate_step=step_in_pass, generate_function=None)
            made.plain, made.in_pass = plain, own.make_generate_function()
        return made.in_pass


class _Made:
    """What was compiled of a model since it last changed: a loop, and the same in a pass."""

    plain: Any = None
    in_pass: Any = None


# Two threads that are the first to ask compile one function and not two.
_MAKING = threading.RLock()
_sampling: contextvars.ContextVar = contextvars.ContextVar("keras_cc_sampling", default=None)


def _state(model):
    """`(causal LM, its _Made)`: the model's, or those of the sampler that is under way."""
    holder = model._generate_function
    if holder.value is None:
        holder.value = _Made()
    sampling = _sampling.get()
    if sampling is None or sampling.causal_lm is not model.causal_lm:
        return model.causal_lm, holder.value
    return sampling.state(holder.value)


def _view(causal_lm, **own):
    """The causal LM with methods or a sampler of its own, for one caller.

    A shallow copy: weights and layers are the causal LM's, and nothing of that changes, so that
    other threads go on with it meanwhile. Its methods find each other on the copy.
    """
    view = object.__new__(type(causal_lm))
    vars(view).update(vars(causal_lm))
    vars(view).update(own)
    return view


def step(model):
    """What continues a batch of ids in the pass that a user gets, not compiled.

    Args:
        model: a `CCCausalLM` whose causal LM has a sampler.

    Returns:
        A function like KerasHub's `generate_step`: of `inputs`, a dict with `token_ids` and
        `padding_mask` `(B, T)`, and `stop_token_ids`.
    """
    base, _ = _state(model)
    return base.generate_step if runs.is_plain(model) else _step_in_pass(model, base)


def _step_in_pass(model, base):
    _check_sampler(base.sampler)
    call_with_cache = base.call_with_cache

    def step_in_pass(inputs, stop_token_ids=None):
        if model.connection is not None and "pivot_token_ids" in inputs:
            scope = runs.connected(model, inputs, runs.pivot(model, inputs))
            model.connection.extend(scope, inputs)
        else:
            scope = runs.user(model, inputs)

        def call_in_pass(token_ids, cache, cache_update_index, *args, **kwargs):
            scope.index = cache_update_index
            with pairing.enter(scope):
                return call_with_cache(token_ids, cache, cache_update_index, *args, **kwargs)

        own = {name: inputs[name] for name in ("token_ids", "padding_mask")}
        view = _view(base, call_with_cache=call_in_pass)
        if isinstance(scope, pairing.TargetPass) and model.connection.reads_answer:
            view = _view(view, sampler=_pivot_in_turn(model, inputs, scope.pivot, base.sampler))
        return view.generate_step(own, stop_token_ids)

    return step_in_pass


def _pivot_in_turn(model, inputs, pivot_scope, sampler):
    """A sampler that has the pivot's pass read each token before the causal LM goes on from it.

    That pass is run anew over its prompt and the answer so far, without a cache.
    """

    def in_turn(*args, next, **kwargs):  # as KerasHub calls a sampler
        def after_pivot(prompt, cache, index):
            pivot_scope.activations = runs.pivot_so_far(model, inputs, prompt, index)
            return next(prompt, cache, index)

        return sampler(*args, next=after_pivot, **kwargs)

    return in_turn


def _check_sampler(sampler):
    """Refuse samplers that lay out several continuations of a prompt as rows of the batch."""
    name = type(sampler).__name__
    if name in ("BeamSampler", "ContrastiveSampler"):
        raise ValueError(
            f"{name} cannot continue a prompt with a pivot, a selected connection or an "
            'intervention: compile with another sampler, such as "greedy" or "top_k". '
            f"Received: sampler={sampler!r}"
        )


def get_sampler(sampler):
    """The KerasHub sampler that a name or an object stands for."""
    import keras_hub  # here and not above: it imports TensorFlow wherever that is installed

    found = keras_hub.samplers.get(sampler)
    if not isinstance(found, keras_hub.samplers.Sampler):
        raise ValueError(
            "`sampler` must be a keras_hub.samplers.Sampler or the name of one. "
            f"Received: sampler={sampler!r}"
        )
    return found


class Sampling:
    """A sampler that prompts are continued by for a while, in place of the causal LM's own.

    `compile` would forget the options that the user compiled with. What is compiled for this
    sampler is kept here from one `with` to the next, so an object serves one model. Other threads
    go on with the causal LM's own.

    Args:
        sampler: a `keras_hub.samplers` object or name.

    Example:

    ```python
    greedy = Sampling("greedy")
    with greedy.of(model.causal_lm):
        model.generate(prompts)
    ```
    """

    def __init__(self, sampler):
        self.sampler = get_sampler(sampler)
        self.causal_lm = self._of = self._state = None

    @contextlib.contextmanager
    def of(self, causal_lm):
        if self.causal_lm is not causal_lm:
            self.causal_lm, self._of = causal_lm, None
        token = _sampling.set(self)
        try:
            yield
        finally:
            _sampling.reset(token)

    def state(self, of):
        """The causal LM with this sampler, and its `_Made`; new where `of`, the model's, is."""
        if self._of is not of:
            own = _view(self.causal_lm, sampler=self.sampler, generate_function=None)
            self._of, self._state = of, (own, _Made())
        return self._state
