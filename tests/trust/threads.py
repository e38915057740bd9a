"""Threads that generate at once: python tests/trust/threads.py --threads 64 --calls 20

Plain and with pivot prompts, through the fused connection and the selected one, with another
sampler in some threads: each answer must be that of the same call alone.
"""

import argparse
import pathlib
import sys
import threading

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

PROMPTS = ["dog Kenya", "fox the", "Kenya Kenya dog", "the"]
PIVOTS = ["What is Kenya", "the fox", "dog dog", "fox"]


def run(threads, calls, connection="fused"):
    """Returns how many answers were compared.

    Raises:
        AssertionError: for an answer that is another than the same call alone gives.
    """
    import connected

    from keras_cc import generation

    model = connected.text_model("llama3", connection)
    connected.train_connection(model, scale=0.3)
    model.compile("sgd", sampler="greedy", **connected.QUICK)
    sampled = generation.Sampling("top_k")
    ways = [
        (prompts, length, path)
        for prompts, pivots in ((PROMPTS[:1], PIVOTS[:1]), (PROMPTS[1:3], PIVOTS[1:3]))
        for length in (16, 24)
        for path in ({}, {"pivot_prompts": pivots})
    ]
    found, errors, start = {}, [], threading.Barrier(threads)

    def say(number):
        start.wait()
        try:
            for call in range(calls):
                way = (number + call) % len(ways)
                prompts, length, path = ways[way]
                if number % 8 == 7:  # what is drawn is another matter; it must not be the others'
                    with sampled.of(model.causal_lm):
                        model.generate(prompts, length, **path)
                else:
                    found[number, call] = (way, model.generate(prompts, length, **path))
        except Exception as error:
            errors.append(error)

    running = [threading.Thread(target=say, args=(n,)) for n in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    assert not errors, errors[0]
    alone = [model.generate(prompts, length, **path) for prompts, length, path in ways]
    assert len({tuple(texts) for texts in alone}) > 2
    for way, texts in found.values():
        assert texts == alone[way], (way, texts, alone[way])
    return len(found)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=64)
    parser.add_argument("--calls", type=int, default=20)
    given = parser.parse_args()
    for one in ("fused", "selected"):
        compared = run(given.threads, given.calls, one)
        print(f"{one}: {compared} answers of {given.threads} threads as alone", flush=True)
