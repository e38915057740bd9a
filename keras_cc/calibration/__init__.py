"""What is measured on a trained model by passes over rows, and what is solved from that.

`closed_form` fits transforms by ridge regression (`ridge`), `atlas` says where the gates open,
`compiled` runs a function of a model's inputs on any backend.
"""
