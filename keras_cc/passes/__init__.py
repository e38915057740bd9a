"""The forward passes of a pair.

`pairing` tells a layer which pass it is in, `runs` runs the passes of a model, `positions` finds
the tokens in a row that they are about.
"""
