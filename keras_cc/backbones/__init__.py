"""KerasHub's backbones, and what is changed in them.

`families` says where a block's feed-forward output comes from, `surgery` connects and folds (the
only file that touches private names of Keras), `adapting` puts adapters in, `taps` reads and edits
at the sites of a block.
"""
