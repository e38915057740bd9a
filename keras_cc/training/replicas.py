"""Several devices or processes at one training: how a batch is shared out, and what must be alike.

- JAX: means are taken over all devices (one program over a mesh). A batch has a multiple of the
  replicas' number, and each process brings its part of it.
- TensorFlow: each replica takes means over its part, and Keras sums gradients over the replicas.
- PyTorch: Keras knows nothing of several processes. Each process of `torch.distributed` takes means
  over its part, and what is here averages gradients and metrics over the processes.
"""

import contextlib
import hashlib
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np

from keras_cc.data.splitting import WHOLE, Split


def split_of(model: Any, training: bool = True) -> Split:
    """How a batch of this model is shared out, here and now.

    Args:
        model: a `CCCausalLM`.
        training: bool; what is scored, every process of PyTorch scores as a whole.

    Raises:
        ValueError: where a mesh has fewer replicas of the model than there are processes, and
            where Keras is to share the data out.
    """
    backend = keras.backend.backend()
    if backend == "jax":
        distribution = keras.distribution.distribution()
        return WHOLE if distribution is None else _of_mesh(distribution)
    if backend == "tensorflow":
        count = model.distribute_strategy.num_replicas_in_sync
        return Split(count, parts=count)
    group = _torch_processes()
    if group is None or not training:
        return WHOLE
    count = group.get_world_size()
    return Split(count, parts=count, processes=count, process=group.get_rank())


def check(model: Any, split: Split, batch_size: "int | None", accumulates: int = 1) -> None:
    """Refuse what cannot be trained on several devices, before anything is.

    Raises:
        ValueError: for a batch size that the replicas do not divide, for a model that was made
            before the distribution, or without a layout for one of its matrices, for gradient
            accumulation on replicas of TensorFlow, and for processes whose models are not the
            same.
    """
    if batch_size is not None and batch_size % split.multiple:
        raise ValueError(
            f"`batch_size` must be a multiple of {split.multiple}, the replicas of the model that "
            f"share a batch. Received: batch_size={batch_size}"
        )
    backend = keras.backend.backend()
    if backend == "jax":
        _check_mesh(model)
    elif backend == "tensorflow":
        _check_strategy(model)
        if accumulates > 1 and split.parts > 1:
            raise ValueError(
                "`gradient_accumulation_steps` must be None on several replicas of TensorFlow: "
                "Keras updates within `ops.cond` then, where TensorFlow lets no replica meet the "
                "others. Take a larger `batch_size`, or JAX or PyTorch. "
                f"Received: {accumulates} steps on {split.parts} replicas"
            )
    elif split.processes > 1:
        _check_alike(model)


@contextlib.contextmanager
def averaging(model: Any, split: Split) -> Iterator[None]:
    """While open, the optimizer gets gradients that are averaged over the processes of PyTorch."""
    if keras.backend.backend() != "torch" or split.processes == 1:
        yield
        return
    import torch

    optimizer, apply = model.optimizer, model.optimizer.apply

    def apply_averaged(gradients, trainable_variables=None):
        whole = [
            torch.zeros_like(v.value) if g is None else g
            for g, v in zip(gradients, trainable_variables, strict=True)
        ]
        _sum(whole)
        for gradient in whole:
            gradient /= split.processes
        return apply(whole, trainable_variables)

    optimizer.apply = apply_averaged
    try:
        yield
    finally:
        del optimizer.apply


def means(metrics: "list[keras.metrics.Metric]") -> "dict[str, Any]":
    """Results of `keras.metrics.Mean` by name, over all processes of PyTorch if there are."""
    if keras.backend.backend() != "torch" or _torch_processes() is None:
        return {metric.name: metric.result() for metric in metrics}
    import torch

    sums = torch.stack([torch.stack([m.total.value, m.count.value]) for m in metrics])
    _sum([sums])
    return {
        metric.name: total / count if count > 0 else torch.zeros_like(total)
        for metric, (total, count) in zip(metrics, sums, strict=True)
    }


def _of_mesh(distribution):
    processes, replicas = distribution.num_processes, distribution.num_model_replicas
    if replicas % processes:
        raise ValueError(
            "The mesh must give each process whole replicas of the model: make its batch axis a "
            f"multiple of the processes. Received: {replicas} replicas, {processes} processes"
        )
    if processes == 1:
        return Split(replicas)
    if distribution.auto_shard_dataset:
        raise ValueError(
            "The distribution must leave the sharing out of batches to `fit`: make it with "
            f"`auto_shard_dataset=False`. Received: {distribution}"
        )
    import jax

    return Split(replicas, processes=processes, process=jax.process_index())


def _check_mesh(model):
    distribution = keras.distribution.distribution()
    if distribution is None:
        return
    devices = set(distribution.device_mesh.backend_mesh.devices.flat)
    for variable in model.variables:
        if variable.value.sharding.device_set != devices:
            raise ValueError(
                "The model must be made under the distribution that it trains with: call "
                "`keras.distribution.set_distribution` before the model is made or loaded. "
                f"Received: {variable.path!r}, which is on {variable.value.sharding}"
            )
    if not isinstance(distribution, keras.distribution.ModelParallel):
        return
    missed = [
        variable.path
        for variable in model.variables
        if len(variable.shape) > 1
        and "lora" not in variable.path
        and distribution.get_tensor_layout(variable.path) is None
    ]
    if missed:
        raise ValueError(
            "The layout map must say where each matrix lies: begin with "
            "`keras_cc.distribution.layout_map`, or add a rule (all None keeps one whole on each "
            f"device). Received: no rule for {missed[0]!r}, and {len(missed) - 1} more"
        )


def _check_strategy(model):
    here = model.distribute_strategy
    if here.num_replicas_in_sync == 1:
        return
    for variable in model.variables:
        if not here.extended.variable_created_in_scope(variable.value):
            raise ValueError(
                "The model must be made under the strategy that it trains with: make or load it "
                f"within `strategy.scope()`. Received: {variable.path!r}, made outside of it"
            )


def _torch_processes():
    """`torch.distributed` where there are several processes, else None."""
    import torch

    group = torch.distributed
    several = group.is_available() and group.is_initialized() and group.get_world_size() > 1
    return group if several else None


def _check_alike(model):
    import torch

    found = hashlib.sha256()
    for variable in model.variables:
        found.update(variable.path.encode())
        found.update(np.ascontiguousarray(keras.ops.convert_to_numpy(variable)).tobytes())
    count = torch.distributed.get_world_size()
    digests: list[Any] = [None] * count
    with _all_there():
        torch.distributed.all_gather_object(digests, found.hexdigest())
    if len(set(digests)) > 1:
        raise ValueError(
            "The processes must begin with the same model: load the same weights, or call "
            "`keras.utils.set_random_seed` with one seed in each before it is made. "
            f"Received: {len(set(digests))} models in {count} processes"
        )


def _sum(tensors):
    """Sum each tensor over the processes, in place."""
    import torch

    with _all_there():
        for work in [torch.distributed.all_reduce(one, async_op=True) for one in tensors]:
            work.wait()


@contextlib.contextmanager
def _all_there():
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            "Another process of this training has ended, or is not answered by: see its own "
            f"message, and start all of them again. Received: {error}"
        ) from error
