"""Storing: files that are whole or absent, any pytree in files, and what such files say of it.

`trees` saves and restores any pytree, `npz` a small one, `files` writes files and folders at once
and reads strict JSON. What a network is called in files of other projects belongs to
`ffnlab.formats`, the checkpoints of a run to `ffnlab.parallel`.
"""
