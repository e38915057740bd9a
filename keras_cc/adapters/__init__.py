"""Adapters: small layers that are trained while the model stays as it is."""

from keras_cc.adapters.madx import MADX as MADX
from keras_cc.adapters.madx import text_rows as text_rows
