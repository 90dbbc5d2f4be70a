"""Directories as `transformers` writes them: configs of model families, names of tensors, values.

`load` and `save` are the way in and out; `families` and `names` are the tables that say what is
what; `sidecar` is the file beside them for what no other tool can say.
"""
