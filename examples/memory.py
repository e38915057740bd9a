r"""What a training step needs in memory, before it is run.

    python examples/memory.py --model gemma3_270m --batch-size 8 --length 128 --pivot-length 64
    python examples/memory.py --model gemma2_9b --dtype bfloat16 --batch-size 512 \
        --data-parallel 8 --model-parallel 8
    python examples/memory.py --model llama3_8b --dtype bfloat16 --trains lora

    weights + gradients + optimizer + activations + logits + what the process has without a model

of one device. Weights, gradients and optimizer lie on all devices in parts (the layout of
`keras_cc.distribution`), activations on the replicas' in parts of the batch, logits too. How far it
is from what was measured stands in SCALE.md.
"""

import dataclasses
from typing import Literal

import tyro

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Shape:
    """A decoder of a gated feed-forward network, and what it has in numbers."""

    vocabulary: int
    width: int
    layers: int
    heads: int
    key_heads: int
    head: int
    inner: int

    @property
    def block(self) -> int:
        """Weights of a block without its norms' vectors."""
        attention = 2 * self.width * self.head * (self.heads + self.key_heads)
        return attention + 3 * self.width * self.inner

    @property
    def embedding(self) -> int:
        """Weights of the token embedding, which is the head too."""
        return self.vocabulary * self.width

    @property
    def weights(self) -> int:
        """All of them."""
        return self.embedding + self.layers * self.block


SHAPES = {
    "gemma3_270m": Shape(262_144, 640, 18, 4, 1, 256, 2_048),
    "smollm2_135m": Shape(49_152, 576, 30, 9, 3, 64, 1_536),
    "gemma_2b": Shape(256_128, 2_048, 18, 8, 1, 256, 16_384),
    "gemma2_9b": Shape(256_128, 3_584, 42, 16, 8, 256, 14_336),
    "llama3_8b": Shape(128_256, 4_096, 32, 32, 8, 128, 14_336),
}
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
BASE = {"float": 4, "int8": 1, "int4": 0.5}


@dataclasses.dataclass
class Arguments:
    """A training step."""

    model: str = "gemma3_270m"
    """A shape that is known: gemma3_270m, smollm2_135m, gemma_2b, gemma2_9b or llama3_8b."""
    recipe: Literal["cc", "sft"] = "cc"
    """Connected at every block, or plain fine-tuning."""
    trains: Literal["all", "blocks", "lora"] = "all"
    """All weights; all but the token embedding; LoRA of rank 16 on query and value."""
    batch_size: int = 8
    """Rows a step, on all devices together."""
    length: int = 128
    """Target tokens a row."""
    pivot_length: int = 64
    """Pivot tokens a row."""
    answer_length: int = 16
    """Answer tokens a row: logits are taken at these alone."""
    base: Literal["float", "int8", "int4"] = "float"
    """What the weights are kept in; quantised ones do not train, LoRA on them does."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """What is computed in; weights, gradients and optimizer are float32 (mixed precision)."""
    data_parallel: int = 1
    """Replicas that share a batch."""
    model_parallel: int = 1
    """Devices that share each replica's weights."""
    rematerialize: bool = False
    """Blocks are computed twice, `CCCausalLM(..., rematerialize=True)`."""
    runtime: float = 1.3
    """GiB that the process has without a model; JAX's on a CPU by default."""


def estimate(args) -> dict[str, float]:
    """GiB of each part, on one device."""
    if args.model not in SHAPES:
        raise SystemExit(f"--model must be one of {sorted(SHAPES)}. Received: {args.model}")
    if args.batch_size % args.data_parallel:
        raise SystemExit(
            f"--batch-size must be a multiple of --data-parallel. Received: {args.batch_size} and "
            f"{args.data_parallel}"
        )
    shape = SHAPES[args.model]
    devices = args.data_parallel * args.model_parallel
    rows, size = args.batch_size / args.data_parallel, BYTES[args.dtype]
    connection = 2 * shape.layers * shape.width**2 if args.recipe == "cc" else 0
    heads = shape.heads + shape.key_heads
    if args.base != "float" and args.trains != "lora":
        raise SystemExit(
            f"--base {args.base} does not train: take --trains lora. Received: {args.trains}"
        )
    trained = {
        "all": shape.weights,
        "blocks": shape.weights - shape.embedding,
        "lora": shape.layers * 16 * (2 * shape.width + shape.head * heads),
    }[args.trains] + connection
    trained_beside = trained if args.trains == "lora" else connection
    window = min(args.length, 1 << max(args.answer_length - 1, 3).bit_length())
    found = {
        "weights": (BASE[args.base] * shape.weights + 4 * trained_beside) / devices,
        "gradients": 4 * trained / devices,
        "optimizer": 8 * trained / devices,
        "activations": rows * size * _kept(shape, args) / args.model_parallel,
        # Logits, their softmax in float32 and the gradient of it.
        "logits": rows * window * shape.vocabulary * (size + 8) / args.model_parallel,
    }
    return {name: value / GIB for name, value in found.items()} | {"runtime": args.runtime}


def _kept(shape, args) -> float:
    """Numbers that all blocks keep, of one row."""
    if not args.rematerialize:
        return shape.layers * _saved(shape, args)
    # What enters a block, what the pivot's pass left there, and one block at a time in full.
    entering = args.length + (args.pivot_length if args.recipe == "cc" else 0)
    return shape.layers * entering * shape.width + _saved(shape, args)


def _saved(shape, args) -> float:
    """Numbers that a block keeps for its gradient, of one row."""
    attention = shape.head * (2 * shape.heads + 2 * shape.key_heads)
    token = 8 * shape.width + attention + 4 * shape.inner
    scores = 2 * shape.heads * args.length**2
    if args.recipe == "sft":
        return args.length * token + scores
    # The pivot's pass keeps its feed-forward outputs alone: no gradient goes through it.
    fused = args.length * 8 * shape.width + 2 * args.length * args.pivot_length
    return args.length * token + scores + fused + args.pivot_length * shape.width


def main(args) -> dict[str, float]:
    """Print the parts and their sum."""
    found = estimate(args)
    for name, value in found.items():
        print(f"{name:>12} {value:9.2f} GiB")
    print(f"{'a device':>12} {sum(found.values()):9.2f} GiB")
    return found


if __name__ == "__main__":
    main(tyro.cli(Arguments))
