"""The native format: any model of listed types, its structure in JSON, its arrays in safetensors.

Where a Hugging Face family can say a model, that is the default (`ffnlab.formats.huggingface`).
Types of other packages are not read, and nothing in a file is ever imported or called.
"""
