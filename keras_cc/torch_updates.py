"""An optimizer's update on PyTorch, in one pass over the weights. Not public.

Compilers fuse what Keras' optimizers are made of. PyTorch runs it operation by operation, each of
which reads all weights and writes a copy as large as they are: here stand PyTorch's own kernels.
"""

import math


def are_finite(gradients):
    """Whether all numbers of all gradients are finite, a bool tensor `()`; they are read once."""
    import torch

    # The largest magnitude, which is not finite if one of them is not.
    found = [gradient for gradient in gradients if gradient is not None]
    return torch.isfinite(torch.nn.utils.get_total_norm(found, norm_type=math.inf))


def adam(variables, gradients, momentums, velocities, *, step, learning_rate, betas, epsilon):
    """Keras' Adam, in place, by PyTorch's fused kernel.

        m <- beta_1 m + (1 - beta_1) g        v <- beta_2 v + (1 - beta_2) g^2
        w <- w - learning_rate sqrt(1 - beta_2^t) / (1 - beta_1^t) m / (sqrt(v) + epsilon)

    PyTorch adds its epsilon behind the correction of `v`, Keras before it: so it gets
    `epsilon / sqrt(1 - beta_2^t)`.

    Args:
        variables, gradients, momentums, velocities: lists of float32 tensors.
        step: int, t, from 1.
        learning_rate, epsilon: floats.
        betas: two floats.
    """
    import torch
    from torch.optim.adam import adam

    # The kernel goes along the memory, whatever the order of a tensor's dimensions in it.
    gradients = [
        gradient if gradient.stride() == variable.stride() else _laid_out(gradient, variable)
        for gradient, variable in zip(gradients, variables, strict=True)
    ]
    # It counts them on before it reads them.
    steps = [torch.full((), float(step - 1), device=v.device) for v in variables]
    adam(
        variables, gradients, momentums, velocities, [], steps,
        fused=True, amsgrad=False, maximize=False, weight_decay=0.0, lr=learning_rate,
        beta1=betas[0], beta2=betas[1], eps=epsilon / math.sqrt(1 - betas[1] ** step),
    )  # fmt: skip


def _laid_out(gradient, variable):
    import torch

    return torch.empty_like(variable).copy_(gradient)
