"""Training on pairs: the trainer, and the guards around a fit.

`paired_trainer` is the training half of `CCCausalLM`; `non_finite` stops it and names the rows;
`guards` leave a working model behind when it fails.
"""
