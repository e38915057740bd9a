"""Generation, with the pivot prompt at hand or without.

The causal LM's own compiled loop with its KV cache does the work. For a connected
continuation the pivot's pass runs once, before the prefill, inside the same compiled
function; every call of `call_with_cache` then runs in the target's scope, which knows the
position that it fills.
"""

import contextlib

from keras import ops

from keras_cc import pairing


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
    texts = [prompts] if is_single else list(prompts)
    inputs = preprocessor.generate_preprocess(texts, max_length)
    prompt_lengths = inputs["padding_mask"].sum(axis=1)
    if stop_token_ids == "auto":
        stop_token_ids = preprocessor.stop_token_ids
    if stop_token_ids is not None:
        stop_token_ids = tuple(int(token) for token in stop_token_ids)
    causal_lm = model.causal_lm
    if pivot_prompts is None:
        function, overrides = causal_lm.make_generate_function(), {}
    else:
        inputs = {**inputs, **_pivots(model, pivot_prompts, len(texts))}
        function, overrides = _connected_function(model)
    inputs = {name: ops.convert_to_tensor(value) for name, value in inputs.items()}
    # Bool, as KerasHub's own: Gemma 3's loop inverts it.
    inputs["padding_mask"] = ops.cast(inputs["padding_mask"], "bool")
    with _overriding(causal_lm, **overrides):
        outputs = function(inputs, stop_token_ids=stop_token_ids)
    continuations = preprocessor.detokenize(
        ops.convert_to_numpy(outputs["token_ids"]),
        ops.convert_to_numpy(outputs["padding_mask"]),
        prompt_lengths=prompt_lengths if strip_prompt else None,
    )
    return continuations[0] if is_single else continuations


def _pivots(model, pivot_prompts, count):
    if model.connection is None:
        raise ValueError(
            "`pivot_prompts` need a connection, and this model has none (plain fine-tuning, or "
            "merged). "
            f"Received: connection=None, pivot_prompts={pivot_prompts!r}"
        )
    texts = [pivot_prompts] if isinstance(pivot_prompts, str) else list(pivot_prompts)
    if len(texts) != count:
        raise ValueError(
            "`pivot_prompts` must be as many as `prompts`. "
            f"Received: {len(texts)} pivot prompts for {count} prompts"
        )
    return model.preprocessor.pivot_preprocess(texts)


def _connected_function(model):
    """The compiled connected loop, and what must be overridden while it runs."""
    causal_lm = model.causal_lm
    monolingual = causal_lm.make_generate_function()
    known, *compiled = model._generate_function.value or (None,)
    # The causal LM drops its own function where it is compiled again, with another sampler.
    if known != monolingual:
        call_with_cache, generate_step = causal_lm.call_with_cache, causal_lm.generate_step

        def connected_step(inputs, stop_token_ids=None):
            inputs = dict(inputs)
            pivot_ids, pivot_mask = (
                inputs.pop(name) for name in ("pivot_token_ids", "pivot_padding_mask")
            )
            scope = model.open_target(inputs, pivot_ids, pivot_mask)
            if model.connection.alignment != "last":
                # What is generated is fused as well (it takes the place of the padding).
                has_pivot = ops.any(scope.mask, axis=1, keepdims=True)
                padding = ops.logical_not(ops.cast(inputs["padding_mask"], "bool"))
                scope.fused = ops.logical_or(scope.fused, ops.logical_and(has_pivot, padding))

            def call_in_scope(token_ids, cache, cache_update_index, *args, **kwargs):
                scope.index = cache_update_index
                with pairing.enter(scope):
                    return call_with_cache(token_ids, cache, cache_update_index, *args, **kwargs)

            with _overriding(causal_lm, call_with_cache=call_in_scope):
                return generate_step(inputs, stop_token_ids)

        causal_lm.generate_function = None
        with _overriding(causal_lm, generate_step=connected_step):
            function = causal_lm.make_generate_function()
        causal_lm.generate_function = monolingual
        compiled = [function, {"generate_step": connected_step}]
        model._generate_function.value = (monolingual, *compiled)
    return compiled


@contextlib.contextmanager
def _overriding(causal_lm, **methods):
    """Shadow methods of one instance for a while (tracing looks them up when it runs)."""
    for name, method in methods.items():
        object.__setattr__(causal_lm, name, method)
    try:
        yield
    finally:
        for name in methods:
            vars(causal_lm).pop(name, None)
