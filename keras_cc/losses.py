"""The parts of the training loss, as pure functions with explicit denominators."""

from keras import ops


def token_cross_entropy(logits, labels):
    """Negative log-likelihood of each label, in nats and float32.

    Args:
        logits: float tensor `(..., vocabulary)`.
        labels: int tensor `(...)`, ids below `vocabulary`.

    Returns:
        float32 tensor `(...)`: `logsumexp(logits) - logits[label]`.

    Example:

    ```python
    keras_cc.losses.token_cross_entropy(keras.ops.zeros((1, 4)), keras.ops.array([2]))  # log(4)
    ```
    """
    logits = ops.cast(logits, "float32")
    picked = ops.take_along_axis(logits, ops.cast(labels, "int32")[..., None], axis=-1)[..., 0]
    return ops.logsumexp(logits, axis=-1) - picked


def masked_mean(values, weights):
    """`sum(values * weights) / sum(weights)`, and 0 where the weights sum to 0.

    Args:
        values: float32 tensor, any shape.
        weights: float32 tensor of the same shape, non-negative.

    Returns:
        `(mean, total weight)`, two float32 scalars.

    Example:

    ```python
    values, weights = keras.ops.array([1.0, 5.0]), keras.ops.array([1.0, 0.0])
    keras_cc.losses.masked_mean(values, weights)  # 1.0, 1.0
    ```
    """
    total = ops.sum(weights)
    # Where the weight is 0, a value that is not finite must not reach the sum.
    values = ops.where(weights > 0, values, 0.0)
    return ops.sum(values * weights) / ops.maximum(total, 1e-9), total


def squared_error(prediction, goal, relative=True):
    """Squared error of each token over the hidden dimension, in float32.

        plain:     ||prediction - goal||^2
        relative:  ||prediction - goal||^2 / relative_scale(goal)

    The relative error has no scale, so that no layer (their activations differ by
    orders of magnitude) and no single token (the first one, an attention sink, is often
    a thousand times larger) decides the loss alone.

    Args:
        prediction: float tensor `(batch, length, d)`.
        goal: float tensor of the same shape.
        relative: bool.

    Returns:
        float32 tensor `(batch, length)`.

    Example:

    ```python
    one, two = keras.ops.ones((1, 1, 4)), 2 * keras.ops.ones((1, 1, 4))
    keras_cc.losses.squared_error(one, two, relative=False)  # [[4.0]]
    keras_cc.losses.squared_error(one, two)  # [[0.25]]
    ```
    """
    goal = ops.cast(goal, "float32")
    error = ops.sum(ops.square(ops.cast(prediction, "float32") - goal), axis=-1)
    if not relative:
        return error
    return error / relative_scale(goal)


def relative_scale(goal):
    """What the relative squared error divides by, `||goal||^2 + 1e-6`, without a gradient.

    Args:
        goal: float tensor `(..., d)`.

    Returns:
        float32 tensor `(...)`.

    Example:

    ```python
    keras_cc.losses.relative_scale(keras.ops.ones((1, 1, 4)))  # [[4.000001]]
    ```
    """
    squares = ops.square(ops.cast(goal, "float32"))
    return ops.stop_gradient(ops.sum(squares, axis=-1)) + 1e-6
