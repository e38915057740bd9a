"""A tiny connected model and rows for trainings of many steps, and what they leave behind."""

import connected
import keras
import numpy as np
import tiny
import tiny_tokenizers
from connected import QUICK

from keras_cc import CCCausalLM, CCPreprocessor, FusedConnection

TOKENIZER = tiny_tokenizers.llama3_tokenizer()
EPOCHS, BATCHES = 3, 4
WORDS = ["dog", "fox", "the", "Kenya"]


def row(number, answered=True):
    return {
        "id": f"r{number}",
        "instruction": f"{number}? dog Kenya {number * 53 % 97} " + "fox " * (number % 3),
        "output": " ".join(WORDS[number % 4 :]) if answered else None,
        "instruction_en": f"What is Kenya {number * 37 % 91} " + "the " * (1 + number % 3),
        "lang": "sw",
    }


ROWS = [row(number) for number in range(2 * BATCHES - 1)]  # the last batch is of one row
PAIRS = [row(number, answered=number % 3 > 0) for number in range(2 * BATCHES)]


def make(accumulate=None, objectives=(), frozen=False, lora=False, **options):
    keras.utils.set_random_seed(0)
    causal_lm = tiny.causal_lm("llama3", vocabulary_size=TOKENIZER.vocabulary_size())
    if frozen:
        causal_lm.backbone.token_embedding.trainable = False
    connection = FusedConnection(dropout=0.5, initial_gate=0.5)
    preprocessor = CCPreprocessor(TOKENIZER, 48)
    model = CCCausalLM(causal_lm, connection, objectives, preprocessor=preprocessor)
    if lora:
        model.enable_lora(2)
    optimizer = keras.optimizers.Adam(0.01, gradient_accumulation_steps=accumulate, **options)
    model.compile(optimizer, **QUICK)
    return model


def state_of(model):
    return connected.weights(model) | {
        f"optimizer {n}": np.array(keras.ops.convert_to_numpy(variable))
        for n, variable in enumerate(model.optimizer.variables)
    }


class NoteRows(keras.callbacks.Callback):
    """Hands on the epoch, the batch and the rows of each step.

    Args:
        note: a function of `(epoch, batch, *rows)`.
    """

    def __init__(self, note):
        super().__init__()
        self.note = note

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        if hasattr(self.model, "jax_state_sync"):
            self.model.jax_state_sync()
        rows = np.array(keras.ops.convert_to_numpy(self.model.last_rows.result()))
        self.note(self.epoch, batch, *rows[rows >= 0].tolist())
