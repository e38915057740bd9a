"""Distillation: a model's own English answers as supervision, kept in a file."""

from keras_cc.distillation.english_answers import distill as distill
