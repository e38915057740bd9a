"""From rows of text to arrays: the preprocessor, its templates, and what they are made of."""

from keras_cc.preprocessing.cc_preprocessor import CCPreprocessor as CCPreprocessor
