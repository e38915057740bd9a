"""The likeliest continuations, from ids and up to stop strings. Not public.

Generation runs in pieces of growing length: stop strings are looked for in text, and KerasHub's
compiled loop knows ids only.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from keras import ops

from keras_cc import generation
from keras_cc.data.widths import width_of
from keras_cc.passes import runs

#: Tokens that are generated before stop strings are looked for; each next piece is twice as long.
FIRST_PIECE = 16


class GreedyGenerator:
    """Continues contexts with the likeliest tokens, in the pass that a user gets.

    Args:
        model: a `CCCausalLM`; what it was compiled with stays as it is.
        preprocessor: a `CCPreprocessor`, for stop tokens and for text.
        batch_size: int, contexts a batch.
        max_length: int, tokens of a context and its continuation together.
    """

    def __init__(self, model: Any, preprocessor: Any, *, batch_size: int, max_length: int) -> None:
        self.model, self.preprocessor = model, preprocessor
        self.batch_size, self.max_length = batch_size, max_length
        self._greedy = generation.Sampling("greedy")  # the model's own may draw

    def as_continued(
        self, contexts: Sequence[Sequence[int]], until: Sequence[str], count: int
    ) -> Iterator[tuple[int, str]]:
        """Continue contexts, the longest first.

        Args:
            contexts: ids, at least one and at most `max_length - count` each.
            until: strings, none empty. The text ends before the first of each.
            count: int, the most tokens of a continuation.

        Yields:
            `(number of the context, text of its continuation)`.
        """
        order = sorted(range(len(contexts)), key=lambda number: -len(contexts[number]))
        for first in range(0, len(order), self.batch_size):
            batch = order[first : first + self.batch_size]
            with self._greedy.of(self.model.causal_lm):
                texts = self._continued([list(contexts[i]) for i in batch], until, count)
            yield from zip(batch, texts, strict=True)

    def _continued(self, contexts, until, count):
        rows, texts = [list(ids) for ids in contexts], [""] * len(contexts)
        open_rows = list(range(len(rows)))
        # What comes before the first token (an intervention, a selected connection) is of the
        # prompt alone: from a longer one it would go on differently.
        piece = FIRST_PIECE if runs.is_plain(self.model) else count
        while open_rows:
            ends = {}
            added = self._added([rows[i] for i in open_rows], piece)
            for i, new in zip(open_rows, added, strict=True):
                start = len(contexts[i])
                rows[i] = (rows[i] + new)[: start + count]
                written = rows[i][start:]
                stops = [n for n, t in enumerate(written) if t in self.preprocessor.stop_token_ids]
                texts[i] = self._text(written[: stops[0]] if stops else written)
                is_stopped = bool(stops) or any(text in texts[i] for text in until)
                ends[i] = is_stopped or len(written) == count
            open_rows = [i for i in open_rows if not ends[i]]
            piece *= 2
        for stop in until:
            texts = [text.split(stop)[0] for text in texts]
        return texts

    def _text(self, ids):
        return self.preprocessor.detokenize(np.array([ids]))[0] if ids else ""

    def _added(self, rows, count):
        """At least `count` more ids of each row, as far as `max_length` lets them."""
        length = min(width_of(max(map(len, rows)) + count), self.max_length)
        stop = self.preprocessor.stop_token_ids
        # Filled up with copies: no other shape to compile.
        copies = [rows[-1]] * (self.batch_size - len(rows))
        inputs = generation.filled([*rows, *copies], length, stop)
        outputs = generation.run(self.model, inputs, stop)
        found = ops.convert_to_numpy(outputs["token_ids"])
        return [found[i, len(row) :].tolist() for i, row in enumerate(rows)]
