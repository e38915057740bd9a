"""The forward passes of a `CCCausalLM`: pivot, connected, and the one that a user gets.

Each function opens or runs a `pairing.Pass` for the model's connection, objectives and
intervention; `CCCausalLM.call`, generation, calibration and search are made of them.
"""

import contextlib

import keras
from keras import ops

from keras_cc import losses
from keras_cc.objectives import PairStates
from keras_cc.passes import pairing, positions


def run(model, inputs, scope, training=False):
    """The backbone's hidden states `(B, T, d)` in a pass."""
    check_positions(model, inputs["token_ids"].shape[1])
    backbone = model.causal_lm.backbone
    scope.segments = inputs.get("segment_ids")
    scope.rematerialized = training and model.rematerialize
    with pairing.enter(scope):
        return backbone({name: inputs[name] for name in backbone.input}, training=training)


def check_positions(model, width):
    """Refuse rows that are wider than the model's table of positions, if it has one."""
    most = model.max_positions
    if most is not None and width is not None and width > most:
        raise ValueError(
            f"Rows must have at most {most} tokens, the positions that the model has, prompt and "
            f"answer together: make the preprocessor with `max_length={most}` or less. "
            f"Received: rows of {width} tokens"
        )


def _run_prompts(model, inputs, scope):
    """Run a pass that is read within the prompts alone: generation says how far those reach.

    What it observed has the inputs' length all the same, zeros beyond the prompts.
    """
    reach = inputs.get("prompt_positions")
    if reach is None:
        run(model, inputs, scope)
        return
    length = ops.shape(reach)[0]
    prompts = {name: inputs[name][:, :length] for name in ("token_ids", "padding_mask")}
    run(model, {**inputs, **prompts}, scope)
    beyond = ops.shape(inputs["token_ids"])[1] - length
    for site, value in scope.states.items():
        scope.states[site] = ops.pad(value, [[0, 0], [0, beyond], [0, 0]])


def pivot(model, inputs, training=False, observed=(), is_read=True):
    """Run the pass over the pivot prompts (where something reads it), and return it."""
    mask = ops.cast(inputs["pivot_padding_mask"], "bool")
    if model.connection is None:
        scope = pairing.PivotPass(mask)
    else:
        segments = inputs.get("pivot_segment_ids")
        scope = model.connection.pivot_pass(mask, model.num_blocks, segments)
    scope.observed |= set(observed)
    if not is_read:
        return scope
    if model.connection is not None and model.connection.reads_answer:
        read = _behind_pivot(inputs, positions.answer_start(inputs), _answer_positions(inputs))
    else:
        names = ("token_ids", "padding_mask", "segment_ids")
        read = {name: inputs[f"pivot_{name}"] for name in names if f"pivot_{name}" in inputs}
    # The backbone alone: nobody needs the pivot's logits.
    with _constant(_is_constant(model)):
        run(model, read, scope, training)
    length = ops.shape(inputs["pivot_token_ids"])[1]
    scope.states = {site: value[:, :length] for site, value in scope.states.items()}
    return scope


def _is_constant(model):
    """Whether no gradient goes into the pivot's pass."""
    connection = model.connection
    return connection is not None and connection.pivot_is_constant and not model.objectives


def _constant(where):
    """A scope whose results are constants.

    Compilers see that no gradient is asked for. PyTorch, which does not, would keep each
    activation until the connected pass is done.
    """
    if not where or keras.backend.backend() != "torch":
        return contextlib.nullcontext()
    import torch

    return torch.no_grad()


def pivot_so_far(model, inputs, token_ids, index):
    """What the pivot's pass has computed when the rows are filled up to a position.

    Args:
        model: a `CCCausalLM` whose connection `reads_answer`.
        inputs: those that generation began with.
        token_ids: int tensor `(B, T)`, the rows as they are now.
        index: int scalar, how many of their positions are filled.

    Returns:
        A dict, the `activations` of a `PivotPass`.
    """
    now = {**inputs, "token_ids": token_ids}
    scope = model.connection.pivot_pass(
        ops.cast(inputs["pivot_padding_mask"], "bool"), model.num_blocks
    )
    start = positions.answer_start(inputs)
    run(model, _behind_pivot(now, start, _answer_positions(now), filled=index), scope)
    return scope.activations


def connected(model, inputs, pivot_scope, training=False):
    """The connected pass, not run yet."""
    if model.connection is None:
        return pairing.Pass()
    layers, seed = model._attached.value, model.seed_generator
    return model.connection.target_pass(inputs, pivot_scope, layers, training, seed)


def user(model, inputs):
    """The pass that a user gets, not run yet: monolingual, with the intervention if there is one.

    Passes that have to come before it are run: over the target's own prompt, over the pivot's.
    """
    intervention = model.intervention
    scope = monolingual(model, inputs)
    if intervention is None:
        return scope
    real = ops.cast(inputs["padding_mask"], "bool")
    where = positions.last_prompt(real, inputs.get("answer_mask"))
    sites = intervention.sites(model.num_blocks)
    if intervention.needs_pivot:
        if "pivot_token_ids" not in inputs:
            raise ValueError(
                f"{intervention!r} needs the pivot prompts: `pivot_prompts` of `generate`, or "
                "`pivot_token_ids` and `pivot_padding_mask` of a call. "
                f"Received: inputs with {sorted(inputs)}"
            )
        source = pivot(model, inputs, observed=sites)
        prompt, last = source.mask, positions.last_prompt(source.mask)
        where = ops.logical_and(where, ops.any(last, axis=1, keepdims=True))
    else:
        source, prompt, last = monolingual(model, inputs), positions.up_to(real, where), where
        source.observed |= sites
        if sites:
            _run_prompts(model, inputs, source)
    states = {site: intervention.read(source.states[site], prompt, last) for site in sites}
    intervention.edit(scope, where, states, inputs.get("intervention_options"))
    return scope


def is_plain(model):
    """Whether the pass that a user gets is the causal LM's own, with nothing before it."""
    own = model.connection is not None and model.connection.own_pass(model.num_blocks) is not None
    return model.intervention is None and not own


def monolingual(model, inputs):
    """The monolingual pass, without an intervention, not run yet."""
    connection = model.connection
    if connection is None:
        return pairing.Pass()
    own = connection.own_pass(model.num_blocks)
    if own is not None:
        _run_prompts(model, inputs, own)
    return connection.monolingual_pass(inputs, own, model._attached.value)


def answer_nats(model, inputs, make_pass):
    """Of each row: the negative log-likelihood of its answer, and of how many tokens.

    Args:
        model: a `CCCausalLM`.
        inputs: the model's inputs with `answer_positions` `(B, K)`, and with `y` and
            `sample_weight` `(B, T)`.
        make_pass: a function of model and inputs that gives the pass: `user` or `monolingual`.

    Returns:
        A dict of float32 `(B,)`: `nats` and `tokens`, both weighted.
    """
    inputs = dict(inputs)
    y, weights = inputs.pop("y"), inputs.pop("sample_weight")
    hidden = run(model, inputs, make_pass(model, inputs))
    logits = model.logits(hidden, inputs)
    label, weight = (positions.gather(v, inputs["answer_positions"]) for v in (y, weights))
    nats = ops.where(weight > 0, losses.token_cross_entropy(logits, label), 0.0)
    return {"nats": ops.sum(nats * weight, axis=1), "tokens": ops.sum(weight, axis=1)}


def objective_sites(objectives, num_blocks):
    """`(target sites, pivot sites)` that the objectives read."""
    of_target = {("hidden", n) for o in objectives for n in o.target_blocks(num_blocks)}
    of_pivot = {("hidden", n) for o in objectives for n in o.pivot_blocks(num_blocks)}
    return of_target, of_pivot


def untrained_blocks(objectives, num_blocks):
    """The blocks that the objectives read of the model as it was before it was trained."""
    return {number for o in objectives for number in o.untrained_blocks(num_blocks)}


def objective_outputs(model, inputs, pivot_scope, scope, logits, training=False):
    """Each objective's loss and count, `(B,)` each, by the names of the model's outputs.

    Args:
        model: a `CCCausalLM` with objectives.
        inputs: the dict of a call, with the pivot.
        pivot_scope, scope: the finished passes over both prompts.
        logits: those of `scope`, at `answer_positions`.
        training: bool.
    """
    real = ops.cast(inputs["padding_mask"], "bool")
    last = positions.last_prompt(real, inputs.get("answer_mask"))
    pivot_mask = ops.cast(inputs["pivot_padding_mask"], "bool")
    has_pivot = ops.any(pivot_mask, axis=1)
    answers = inputs.get("answer_mask", ops.zeros_like(inputs["token_ids"]))
    is_own = inputs.get("own_answer")
    following = ops.roll(inputs["token_ids"], -1, axis=1)
    states = PairStates(
        target=_hidden_by_block(scope),
        pivot=_hidden_by_block(pivot_scope),
        target_mask=positions.up_to(real, last),
        pivot_mask=pivot_mask,
        has_pivot=has_pivot,
        pivot_token_ids=inputs["pivot_token_ids"],
        answer_mask=ops.cast(positions.gather(answers, _answer_positions(inputs)), "bool"),
        labels=positions.gather(following, _answer_positions(inputs)),
        is_own=ops.zeros_like(has_pivot) if is_own is None else ops.cast(is_own, "bool"),
        logits=lambda name: _logits_of(name, model, inputs, pivot_scope, logits, training),
        lens=model.lens,
        num_blocks=model.num_blocks,
        untrained=_untrained(model, inputs),
    )
    outputs = {}
    for objective in model.objectives:
        values, counts = objective(states)
        outputs[f"{objective.name}_loss"], outputs[f"{objective.name}_count"] = values, counts
    return outputs


def _untrained(model, inputs):
    """By block, what objectives read of the model as it was before it was trained."""
    blocks = untrained_blocks(model.objectives, model.num_blocks)
    if not blocks:
        return {}
    scope = _plain(model, ops.cast(inputs["padding_mask"], "bool"))
    scope.observed |= {("hidden", number) for number in blocks}
    with model.untrained_weights.scope(model.causal_lm.backbone):
        run(model, inputs, scope)
    return {number: ops.stop_gradient(value) for number, value in _hidden_by_block(scope).items()}


def _plain(model, real):
    """The pass of an English row, not run yet: around a fused connection and its transform."""
    return pairing.Pass() if model.connection is None else model.connection.english_pass(real)


def _answer_positions(inputs):
    """The positions that logits are taken at, int32 `(B, K)`."""
    found = inputs.get("answer_positions")
    if found is None:
        ids = inputs["token_ids"]
        found = ops.zeros_like(ids) + ops.arange(ops.shape(ids)[1], dtype=ids.dtype)
    return ops.cast(found, "int32")


def _logits_of(name, model, inputs, pivot_scope, logits, training):
    """Logits at the answer's positions in another pass than the one at hand, see `PairStates`."""
    if name == "student":
        if model.connection is None:
            return logits
        return model.logits(run(model, inputs, monolingual(model, inputs), training), inputs)
    if name == "connected":
        if not training:
            return logits
        # Without connection dropout and noise: all that the pivot gives.
        scope = connected(model, inputs, pivot_scope)
        return model.logits(run(model, inputs, scope), inputs)
    return _logits_after_pivot(name, model, inputs)


def _logits_after_pivot(name, model, inputs):
    """Logits at the answer's positions after the pivot prompt, the target's behind it or not."""
    ids, where = inputs["token_ids"], _answer_positions(inputs)
    if name == "pivot":
        start, read = positions.answer_start(inputs), where
    else:
        # One start token is enough: both begin with it, where there is one.
        start = ops.cast(inputs["pivot_token_ids"][:, 0] == ids[:, 0], "int32")
        read = ids
    joined = _behind_pivot(inputs, start, read)
    real = ops.cast(joined["padding_mask"], "bool")
    hidden = run(model, joined, _plain(model, real))
    length = ops.sum(ops.cast(inputs["pivot_padding_mask"], "int32"), axis=1)
    where = ops.clip(where + (length - start)[:, None], 0, ops.shape(real)[1] - 1)
    return model.logits(hidden, {"answer_positions": where})


def _behind_pivot(inputs, start, read, filled=None):
    """Rows that begin with the pivot prompt and go on with the target's row from `start` on.

    Args:
        inputs: the dict of a call, with the pivot.
        start: int tensor `(B,)`.
        read: a tensor `(B, K)`, as wide as what is to follow the prompts.
        filled: int scalar, how many positions of the target's rows count, or None: the real ones.

    Returns:
        A dict of `token_ids` and `padding_mask`, `(B, S + K)`. A row without a pivot has no token.
    """
    pivot_ids = inputs["pivot_token_ids"]
    width = ops.shape(pivot_ids)[1] + ops.shape(read)[1]
    length = ops.sum(ops.cast(inputs["pivot_padding_mask"], "int32"), axis=1)
    if filled is None:
        filled = ops.sum(ops.cast(inputs["padding_mask"], "int32"), axis=1)
    total = ops.where(length > 0, length + ops.maximum(filled - start, 0), 0)
    return {
        "token_ids": positions.joined(pivot_ids, length, inputs["token_ids"], start, width),
        "padding_mask": ops.cast(
            ops.arange(width, dtype="int32")[None, :] < total[:, None], "int32"
        ),
    }


def _hidden_by_block(scope):
    return {number: value for (kind, number), value in scope.states.items() if kind == "hidden"}
