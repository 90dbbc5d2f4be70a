"""Tokenizers in the files of others, checked before use, and the chat templates beside them."""
