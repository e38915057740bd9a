"""From a tuned model to a request answered: SavedModels for TF Serving, and model cards.

In Python, and from a file of a model, whatever backend it was trained on:

    keras_cc.export_saved_model(model, "served/my_model")
    python -m keras_cc.export PRESET_OR_KERAS_FILE served/my_model
"""

from keras_cc.export.model_card import ModelCard as ModelCard
from keras_cc.export.saved_model import export_saved_model as export_saved_model
