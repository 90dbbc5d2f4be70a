"""`ffnlab generate`: continues a prompt, token by token."""

from pathlib import Path

__all__ = ["generate"]


def generate(
    model: Path | None = None,
    /,
    *,
    prompt: str,
    max_tokens: int = 200,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    kv: str | None = None,
    seed: int = 0,
) -> None:
    """Streams the continuation of a prompt; stops at the model's end-of-text tokens.

    Args:
      model: a Hugging Face directory, or a model that comes with ffnlab, "embedded" or
        "embedded_small"; "embedded" without one.
      prompt: the text to continue.
      max_tokens: tokens generated at most.
      temperature: 0 takes the most likely token each time.
      top_k: draw among this many most likely tokens.
      top_p: draw among the fewest most likely tokens that reach this probability.
      kv: cache format "dense", "float8" or "int4"; the model's own without it.
      seed: of the draw.
    """
    import jax

    from ffnlab import models
    from ffnlab.errors import ConfigError, at_least, check_seed

    check_seed(seed)
    at_least(1, max_tokens=max_tokens)
    if not prompt:
        raise ConfigError("prompt is empty; give at least one character")
    sampling = models.Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    decoder, tokenizer = models.open_model(model)
    tokens = models.stream_tokens(
        decoder,
        tokenizer.encode(prompt, special=model is not None),
        max_tokens=max_tokens,
        sampling=sampling,
        key=None if sampling.is_greedy else jax.random.key(seed),
        stop=decoder.config.eos,
        kv=kv,
    )
    text = tokenizer.stream()
    print(prompt, end="", flush=True)
    for token in tokens:
        print(text.push(token), end="", flush=True)
    print(text.finish())
