"""Where in a row: its last prompt token, what lies beyond its first ones, and values there."""

from keras import ops


def gather(values, positions):
    """`values[b, positions[b, k]]`: `(B, T, ...)` at `(B, K)` gives `(B, K, ...)`."""
    batch, length = ops.shape(values)[:2]
    flat = ops.reshape(values, (-1, *values.shape[2:]))
    offsets = ops.arange(batch, dtype="int32")[:, None] * ops.cast(length, "int32")
    return ops.take(flat, ops.cast(positions, "int32") + offsets, axis=0)


def beyond(mask, count, segments=None):
    """`mask`, bool `(batch, length)`, without the first `count` True positions of each row.

    Of packed rows, whose `segments` are int `(batch, length)`: of each pair in a row.
    """
    place = ops.cumsum(ops.cast(mask, "int32"), axis=1)
    if segments is not None:  # what came before in the row counts where it is of the same pair
        there = ops.arange(ops.shape(segments)[1])
        so_far = ops.logical_and(same(segments, segments), there[:, None] >= there[None, :])
        counted = ops.logical_and(so_far, mask[:, None, :])
        place = ops.sum(ops.cast(counted, "int32"), axis=2)
    return ops.logical_and(mask, place > count)


def same(segments, others):
    """Where two tokens of a packed row are of one pair: bool `(batch, length, other length)`."""
    return ops.equal(segments[:, :, None], others[:, None, :])


def last_prompts(mask, answer_mask, segments):
    """`last_prompt` of each pair in packed rows, whose `segments` are int `(batch, length)`."""
    answers = ops.cast(answer_mask, "bool")
    before = _shifted(answers, ops.zeros_like(answers[:, :1]), 1)
    first = ops.logical_and(answers, ops.logical_not(before))
    following = _shifted(segments, ops.zeros_like(segments[:, :1]), -1)
    last_real = ops.logical_and(mask, ops.not_equal(following, segments))
    answered = ops.logical_and(same(segments, segments), answers[:, None, :])
    return ops.where(ops.any(answered, axis=2), first, last_real)


def _shifted(values, edge, by):
    """`values` of the position before (`by` 1) or behind (-1) each, `edge` beyond the rows."""
    if by > 0:
        return ops.concatenate([edge, values[:, :-1]], axis=1)
    return ops.concatenate([values[:, 1:], edge], axis=1)


def last_prompt(mask, answer_mask=None):
    """True at each row's last prompt token: the first answer position, or the last real one.

    Args:
        mask: bool tensor `(..., length)`, True at real tokens.
        answer_mask: int or bool tensor of the same shape, or None: there is no answer.

    Returns:
        bool tensor `(batch, length)`, with one True a row, none in a row without a token.
    """
    count = ops.cumsum(ops.cast(mask, "int32"), axis=-1)
    last_real = ops.logical_and(mask, count == count[..., -1:])
    if answer_mask is None:
        return last_real
    answers = ops.cast(answer_mask, "bool")
    first = ops.logical_and(answers, ops.cumsum(ops.cast(answers, "int32"), axis=1) == 1)
    return ops.where(ops.any(answers, axis=1, keepdims=True), first, last_real)


def answer_start(inputs):
    """Where the answer begins in each row, or would: right behind the last prompt token.

    Args:
        inputs: dict of `padding_mask` and maybe `answer_mask`, `(batch, length)`.

    Returns:
        int32 tensor `(batch,)`.
    """
    real = ops.cast(inputs["padding_mask"], "bool")
    last = last_prompt(real, inputs.get("answer_mask"))
    return ops.cast(ops.argmax(ops.cast(last, "int32"), axis=1), "int32") + 1


def up_to(mask, last):
    """`mask`, bool `(batch, length)`, without what lies behind the True of `last` in each row."""
    last = ops.cast(last, "int32")
    return ops.logical_and(mask, ops.cumsum(last, axis=1) - last == 0)


def joined(first, length, second, start, width):
    """Each row of `first` up to its length, and after it the row of `second` from its start on.

    Args:
        first: tensor `(batch, F)`.
        length: int tensor `(batch,)`, how much of each row of `first` is taken.
        second: tensor `(batch, S)`.
        start: int tensor `(batch,)`, where each row of `second` begins.
        width: int, the width of the result.

    Returns:
        A tensor `(batch, width)`. Beyond the end of `second` stands its last value.
    """
    place = ops.arange(width, dtype="int32")[None, :]
    length, start = (ops.cast(value, "int32")[:, None] for value in (length, start))
    both = ops.concatenate([first, second], axis=1)
    in_second = ops.clip(place - length + start, 0, ops.shape(second)[1] - 1)
    in_second = in_second + ops.shape(first)[1]
    return gather(both, ops.where(place < length, place, in_second))


def pick(values, where):
    """`values` `(batch, length, dim)` at the one True of each row of `where`: `(batch, dim)`.

    Zeros in a row without one.
    """
    return ops.sum(ops.where(where[..., None], values, ops.zeros_like(values)), axis=1)


def pick_sites(scope, sites, where):
    """What a finished pass observed at `sites`, at one position: float32 `(batch, sites, dim)`.

    Args:
        scope: a `Pass` that observed them.
        sites: a sequence of sites; the result is in its order.
        where: bool tensor `(batch, length)` with at most one True a row.
    """
    picked = [pick(scope.states[site], where) for site in sites]
    return ops.cast(ops.stack(picked, axis=1), "float32")
