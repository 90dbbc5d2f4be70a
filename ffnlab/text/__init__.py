"""Text by a language model: generation, sampling, perplexity, and the harness of lm-eval.

Tokenizers and models in files belong to `ffnlab.formats`, corpora and windows to `ffnlab.data`.
"""

from ffnlab.text.evaluate import Perplexity, perplexity
from ffnlab.text.generate import Generated, generate, stream_tokens
from ffnlab.text.sample import Sampling

__all__ = ["Generated", "Perplexity", "Sampling", "generate", "perplexity", "stream_tokens"]
