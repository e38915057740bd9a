"""The input of a training on many devices, as one of its processes sees it, without a model.

    python examples/simulate_input.py --pairs 1000000 --processes 64 --batch-size 512

Writes shards of JSON lines, no two pairs alike, and reads them as a stream: parse, tokenise, pair,
pad, take this process' part. With `--tokenized` it tokenises them once, into files, and reads
those, shuffled. Prints pairs a second and the memory of the process, part by part: a pace that
falls or memory that grows would not last for a thousand million pairs.
"""

import contextlib
import dataclasses
import itertools
import json
import pathlib
import resource
import sys
import tempfile
import time

import benchmark_epoch

NAMES = ("ka", "mo", "ri", "ta", "zu", "le", "ni", "sho", "vu", "pa")


@dataclasses.dataclass
class Arguments:
    """What is simulated."""

    model: str = "smollm2_135m"
    """Whose tokenizer; `tiny` for trying the script."""
    pairs: int = 1_000_000
    """Pairs that are read."""
    processes: int = 64
    """Processes that share each batch."""
    batch_size: int = 512
    """Pairs a batch, of all processes together."""
    max_length: int = 128
    """Tokens of the longest row."""
    shards: int = 8
    """Files."""
    tokenized: bool = False
    """Tokenise the pairs once, and read the tokens."""


def word(number):
    """A word that no other number has."""
    return "".join(NAMES[int(digit)] for digit in str(number))


def write(folder, args):
    """The shards, pairs in turn."""
    with contextlib.ExitStack() as open_files:
        paths = [folder / f"{n:05}.jsonl" for n in range(args.shards)]
        files = [open_files.enter_context(open(path, "w", encoding="utf-8")) for path in paths]
        for number in range(args.pairs):
            name = word(number)
            row = {
                "id": f"pair-{number}",
                "lang": "tr",
                "instruction": f"{name} kentinin posta kodu ve nüfusu nedir? Kısaca yaz.",
                "output": f"{name}: {number * 7919 % 99991}",
                "instruction_en": f"What are the postal code and population of {name}? Be short.",
            }
            files[number % args.shards].write(json.dumps(row, ensure_ascii=False) + "\n")


def read(folder):
    """All pairs, a shard after the other."""
    for path in sorted(folder.glob("*.jsonl")):
        with open(path, encoding="utf-8") as lines:
            yield from map(json.loads, lines)


def resident():
    """GiB that this process has in memory now, or where the system does not say, at most."""
    status = pathlib.Path("/proc/self/statm")
    if status.exists():
        return int(status.read_text().split()[1]) * resource.getpagesize() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main(args):
    """Prints and returns `(pairs, pairs a second, GiB)` of each tenth."""
    from keras_cc import CCPreprocessor, data
    from keras_cc.data.batches import PreparedBatches
    from keras_cc.data.splitting import Split

    tokenizer = benchmark_epoch.tokenizer_of(args)
    preprocessor = CCPreprocessor(tokenizer, args.max_length, template="{instruction}\n")
    split = Split(args.processes, args.processes, args.processes, process=0)
    found = []
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        write(folder, args)
        size = sum(path.stat().st_size for path in folder.iterdir()) / 2**20
        print(f"{args.pairs} pairs, {size:.0f} MiB in {args.shards} shards", file=sys.stderr)
        pairs, options = (lambda: read(folder)), {}
        if args.tokenized:
            begin = time.perf_counter()
            rows = -(-args.pairs // args.shards)
            pairs = data.tokenize(pairs, preprocessor, folder / "ids", shard_rows=rows, verbose=0)
            options = {"shuffle": True, "group": True, "seed": 0}
            size = sum(path.stat().st_size for path in (folder / "ids").iterdir()) / 2**20
            pace = args.pairs / (time.perf_counter() - begin)
            print(f"tokenised once, {pace:,.0f} a second: {size:.0f} MiB", file=sys.stderr)
        batches = PreparedBatches(
            pairs, preprocessor, args.batch_size, method="a simulation", split=split, **options
        )
        tenth = max(1, args.pairs // args.batch_size // 10)
        stream, done = iter(batches), 0
        while True:
            begin = time.perf_counter()
            count = sum(1 for _ in itertools.islice(stream, tenth))
            if not count:
                break
            done += count * args.batch_size
            pace = count * args.batch_size / (time.perf_counter() - begin)
            found.append((min(done, args.pairs), pace, resident()))
            print(f"{found[-1][0]:>10} pairs {pace:>10,.0f} a second {found[-1][2]:8.3f} GiB")
    return found


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Arguments))
