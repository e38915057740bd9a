"""The two signatures of an exported model, as a `tf.Module`. Imported late: it needs TensorFlow.

Notable choices:

- Keras' `slice_update`, with which KerasHub writes its cache, is an operation of XLA's, and TF
  Serving runs without XLA unless it is started with a flag. While `generate` is traced,
  TensorFlow's own operations stand in for it.
"""

import contextlib
from typing import Any

import tensorflow as tf
from keras import ops

from keras_cc import generation
from keras_cc.cc_causal_lm import Untracked
from keras_cc.export.graph_prompts import GraphPrompts


class Server(tf.Module):
    """What a SavedModel holds: weights, tokenizer, and `generate` and `score` as graphs.

    Args:
        model: a `CCCausalLM`; what it exports is its monolingual path, as a user gets it.
        sampler: a `keras_hub.samplers.Sampler`.
        max_length: int, tokens of prompt and answer together.
        max_length_argument: bool, whether a request says its own, up to `max_length`.
        strip_prompt: bool, whether the prompt is left out of the texts.
        score: `"logits"` or `"log_likelihood"`.
    """

    def __init__(
        self,
        model: Any,
        *,
        sampler: Any,
        max_length: int,
        max_length_argument: bool,
        strip_prompt: bool,
        score: str,
    ) -> None:
        super().__init__()
        self._model, self._sampling = Untracked(model), generation.Sampling(sampler)
        # tf.Variables, and no Keras objects: a SavedModel would trace the calls of those too.
        self._variables = [v.value for v in (*model.variables, *sampler.variables)]
        self._max_length, self._strip_prompt = max_length, strip_prompt
        self._prompts = GraphPrompts(model.preprocessor)
        strings = tf.TensorSpec([None], tf.string, "prompts")
        ids = tf.TensorSpec([None, None], tf.int32, "token_ids")
        mask = tf.TensorSpec([None, None], tf.int32, "padding_mask")
        answer = tf.TensorSpec([None, None], tf.int32, "answer_mask")
        length = [tf.TensorSpec([], tf.int32, "max_length")] if max_length_argument else []
        generate = self._generate if max_length_argument else self._generate_fixed
        score_of = self._logits if score == "logits" else self._log_likelihood
        answer = [] if score == "logits" else [answer]
        self.functions = {
            "generate": tf.function(generate, [strings, *length]),
            "score": tf.function(score_of, [ids, mask, *answer]),
        }

    def _generate_fixed(self, prompts):
        return self._answers(prompts, self._max_length, tf.fill(tf.shape(prompts), ""))

    def _generate(self, prompts, max_length):
        is_fine = (max_length >= 2) & (max_length <= self._max_length)
        said = f"max_length must be from 2 to {self._max_length}."
        errors = tf.fill(tf.shape(prompts), tf.where(is_fine, "", said))
        return self._answers(prompts, tf.clip_by_value(max_length, 2, self._max_length), errors)

    def _answers(self, prompts, max_length, errors):
        encoded = self._prompts.encode(prompts, max_length, errors)
        inputs = {"token_ids": encoded.token_ids, "padding_mask": encoded.padding_mask}
        stop = tuple(self._prompts.stop_token_ids) or None
        model = self._model.value
        with self._sampling.of(model.causal_lm), _without_xla():
            outputs = generation.step(model)(inputs, stop_token_ids=stop)
        keep = outputs["padding_mask"]
        if self._strip_prompt:
            keep &= ~tf.sequence_mask(encoded.lengths, max_length)
        texts = self._prompts.texts(outputs["token_ids"], keep)
        is_answered = encoded.errors == ""
        return {"text": tf.where(is_answered, texts, ""), "error": encoded.errors}

    def _logits(self, token_ids, padding_mask):
        inputs = {"token_ids": token_ids, "padding_mask": padding_mask}
        return {"logits": tf.cast(self._model.value(inputs)["logits"], tf.float32)}

    def _log_likelihood(self, token_ids, padding_mask, answer_mask):
        inputs = {"token_ids": token_ids, "padding_mask": padding_mask, "answer_mask": answer_mask}
        logits = tf.cast(self._model.value(inputs)["logits"], tf.float32)
        next_ids = tf.roll(token_ids, -1, axis=1)
        nats = tf.nn.sparse_softmax_cross_entropy_with_logits(next_ids, logits)
        is_answer = tf.cast(answer_mask, tf.bool)
        return {
            "log_likelihood": -tf.reduce_sum(tf.where(is_answer, nats, 0.0), axis=1),
            "tokens": tf.reduce_sum(tf.cast(is_answer, tf.int32), axis=1),
        }


@contextlib.contextmanager
def _without_xla():
    """Have `keras.ops.slice_update` made of TensorFlow's own operations for a while."""
    own = ops.slice_update
    ops.slice_update = slice_update
    try:
        yield
    finally:
        ops.slice_update = own


def slice_update(inputs, start_indices, updates):
    """What `keras.ops.slice_update` does, without XLA."""
    inputs, updates = tf.convert_to_tensor(inputs), tf.convert_to_tensor(updates)
    return _updated(inputs, list(start_indices), tf.cast(updates, inputs.dtype), 0)


def _updated(inputs, starts, updates, axis):
    if axis == len(starts):
        return updates
    start, size, width = starts[axis], inputs.shape[axis], updates.shape[axis]
    if isinstance(start, int) and start == 0 and size == width:
        return _updated(inputs, starts, updates, axis + 1)
    width = tf.shape(updates)[axis]
    start = tf.clip_by_value(tf.cast(start, tf.int32), 0, tf.shape(inputs)[axis] - width)  # as XLA
    before, within, after = tf.split(
        inputs, [start, width, tf.shape(inputs)[axis] - start - width], axis, num=3
    )
    return tf.concat([before, _updated(within, starts, updates, axis + 1), after], axis)
