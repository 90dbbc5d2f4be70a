"""Generation: one compiled prefill, one compiled loop of decode steps over a static cache.

Prompts of a batch are padded on the left, so that all rows fill the same cache slot at each step.
Lengths are rounded up (prompts to PROMPT_STEP tokens, the cache to CACHE_STEP slots, long ones to
an eighth of the next power of two) and all other numbers are traced: a new prompt, temperature, p,
stop list or number of tokens up to the rounded one compiles nothing. The loop ends when every row
has stopped.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ffnlab import weights
from ffnlab.errors import ConfigError
from ffnlab.models.decoder import Cache, Decoder
from ffnlab.text.sample import Sampling, draw, greedy

__all__ = ["Generated", "generate", "stream_tokens"]

PROMPT_STEP = 32
CACHE_STEP = 64
STREAM_CHUNK = 16  # decode steps between two looks at the tokens; the first chunks are shorter
NONE = -1  # where a row has no token
Prompts = Sequence[Sequence[int]] | Int[Array | np.ndarray, "b t"]


class Generated(NamedTuple):
    """What was generated.

    Attributes:
      tokens: [b, n] int32, n = max_tokens; -1 after a row's end. Stop tokens are not in it.
      lengths: [b] int32, tokens of each row.
      stopped: [b] bool, whether the row met a stop token (else it reached max_tokens).
    """

    tokens: np.ndarray
    lengths: np.ndarray
    stopped: np.ndarray

    def lists(self) -> list[list[int]]:
        """The tokens of each row as a list of its own length."""
        return [row[:n].tolist() for row, n in zip(self.tokens, self.lengths.tolist(), strict=True)]


class State(NamedTuple):
    """A generation in progress.

    Attributes:
      cache: keys and values; of all tokens but the last chosen one.
      last: [b] int32, the last chosen token, the next to be read.
      tokens: [b, n] int32, chosen so far, -1 elsewhere.
      step: [] int32, how many are chosen.
      stopped: [b] bool.
      keys: [b] random keys.
    """

    cache: Cache
    last: Array
    tokens: Array
    step: Array
    stopped: Array
    keys: Array


class Choice(NamedTuple):
    """The traced part of how tokens are chosen.

    Attributes:
      temperature: [] float32.
      top_p, min_p: [] float32, or None.
      stop: [s] int32, ids that end a row.
    """

    temperature: Array
    top_p: Array | None
    min_p: Array | None
    stop: Array


def generate(
    model: Decoder,
    prompts: Prompts,
    *,
    max_tokens: int,
    sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
    key: Array | None = None,
    stop: Sequence[int] = (),
    kv: str | None = None,
) -> Generated:
    """Continues each prompt of a batch.

    Row i draws with `fold_in(key, i)`: what it gets does not depend on the other rows, up to the
    rounding of batched products.

    Args:
      model: any decoder; its weights are prepared for the backend (`weights.prepare`), which costs
        nothing when they are already.
      prompts: lists of token ids of any lengths >= 1, or int [b, t] with -1 as padding at either
        end.
      max_tokens: tokens generated at most for each row, >= 1.
      sampling: greedy by default.
      key: random key; needed unless greedy.
      stop: ids that end a row; they are not part of the result.
      kv: cache kind "dense", "float8" or "int4" for all layers; what each layer says when None.
    Returns:
      the new tokens, without the prompts.
    Raises:
      ConfigError: an empty prompt, an id outside the vocabulary, an unknown kind, no key, or
        prompt and new tokens exceed the model's max_positions.
    """
    rows = check(model, prompts, max_tokens, sampling, key, kv)
    prepared, state, advance = begin(model, rows, max_tokens, sampling, key, stop, kv)
    state = advance(prepared, state, max_tokens)
    tokens = np.asarray(state.tokens)[:, :max_tokens]
    lengths = np.sum(tokens != NONE, axis=1, dtype=np.int32)
    return Generated(tokens, lengths, np.asarray(state.stopped))


def stream_tokens(
    model: Decoder,
    prompt: Sequence[int],
    *,
    max_tokens: int,
    sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
    key: Array | None = None,
    stop: Sequence[int] = (),
    kv: str | None = None,
) -> Iterator[int]:
    """Continues one prompt and yields each token soon after it is chosen.

    Arguments, errors (raised at the call) and tokens are those of `generate` with one row. The
    compiled loop runs a few steps between looks, 1, 2, 4, … up to 16, so streaming is nearly as
    fast.
    """
    rows = check(model, [prompt], max_tokens, sampling, key, kv)

    def tokens() -> Iterator[int]:
        prepared, state, advance = begin(model, rows, max_tokens, sampling, key, stop, kv)
        shown, chunk = 0, 1
        while True:
            ready = int(state.step)
            for token in np.asarray(state.tokens)[0, shown:ready].tolist():
                if token == NONE:
                    return
                yield token
            if ready >= max_tokens or bool(state.stopped[0]):
                return
            shown = ready
            state = advance(prepared, state, min(ready + chunk, max_tokens))
            chunk = min(2 * chunk, STREAM_CHUNK)

    return tokens()


def check(
    model: Decoder,
    prompts: Prompts,
    max_tokens: int,
    sampling: Sampling,
    key: Array | None,
    kv: str | None,
) -> list[list[int]]:
    """The prompts as lists, after all checks that need no compute."""
    if max_tokens < 1:
        raise ConfigError(f"max_tokens={max_tokens} must be at least 1")
    if key is None and not sampling.is_greedy:
        raise ConfigError(
            f"temperature={sampling.temperature} draws at random and needs a key; "
            "pass key=jax.random.key(0), or temperature 0 for greedy decoding"
        )
    rows = unpadded(prompts)
    if not rows or not all(rows):
        raise ConfigError(
            "prompts must hold at least one prompt, and each at least one token: begin with the "
            "model's bos token"
        )
    vocab, limit = model.config.vocab, model.config.max_positions
    for i, row in enumerate(rows):
        wrong = [t for t in row if not 0 <= t < vocab]
        if wrong:
            raise ConfigError(f"prompt {i} holds the id {wrong[0]}, outside 0..{vocab - 1}")
        if len(row) + max_tokens > limit:
            raise ConfigError(
                f"prompt {i} has {len(row)} tokens; with max_tokens={max_tokens} it exceeds the "
                f"model's max_positions={limit}; shorten either"
            )
    jax.eval_shape(lambda: model.init_cache(1, CACHE_STEP, kind=kv))  # refuses unknown kinds
    return rows


def unpadded(prompts: Prompts) -> list[list[int]]:
    """Each prompt as a list of ints; -1 at either end of an array's row is padding."""
    if not isinstance(prompts, jax.Array | np.ndarray):
        return [[int(t) for t in row] for row in prompts]
    rows = []
    for row in np.asarray(prompts).tolist():
        real = [i for i, t in enumerate(row) if t != NONE]
        rows.append(row[real[0] : real[-1] + 1] if real else [])
    return rows


def left_padded(rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Prompts of a batch as (tokens [b, t] int32, valid [b, t] bool), t a multiple of PROMPT_STEP.

    >>> tokens, valid = left_padded([[5, 6]])
    >>> tokens.shape, tokens[0, -3:].tolist(), int(valid.sum())
    ((1, 32), [0, 5, 6], 2)
    """
    t = rounded(max(map(len, rows)), PROMPT_STEP)
    tokens, valid = np.zeros((len(rows), t), np.int32), np.zeros((len(rows), t), bool)
    for i, row in enumerate(rows):
        tokens[i, t - len(row) :] = row
        valid[i, t - len(row) :] = True
    return tokens, valid


def rounded(n: int, step: int) -> int:
    """n rounded up to a multiple of step, and to few multiples of it where n is large.

    >>> [rounded(n, 32) for n in (1, 33, 500, 5000)]
    [32, 64, 512, 5120]
    """
    step = max(step, 1 << max(n.bit_length() - 3, 0))
    return -(-n // step) * step


def begin(
    model: Decoder,
    rows: Sequence[Sequence[int]],
    max_tokens: int,
    sampling: Sampling,
    key: Array | None,
    stop: Sequence[int],
    kv: str | None,
) -> tuple[Decoder, State, functools.partial]:
    """Runs the prefill; returns (prepared model, state, advance(model, state, limit) -> state)."""
    prepared = weights.prepare(model)
    tokens, valid = left_padded(rows)
    length = rounded(tokens.shape[1] + max_tokens, CACHE_STEP)
    top_p, min_p = (
        None if share is None else jnp.float32(share) for share in (sampling.top_p, sampling.min_p)
    )
    stop_ids = jnp.asarray([*stop] or [NONE], jnp.int32)
    choice = Choice(jnp.float32(sampling.temperature), top_p, min_p, stop_ids)
    key = jax.random.key(0) if key is None else key
    how = {"top_k": sampling.top_k, "is_greedy": sampling.is_greedy}
    state = prefill(prepared, tokens, valid, key, choice, length=length, kv=kv, **how)
    return prepared, state, functools.partial(decode, choice=choice, **how)


@functools.partial(jax.jit, static_argnames=("length", "kv", "top_k", "is_greedy"))
def prefill(
    model: Decoder,
    tokens: Int[Array | np.ndarray, "b t"],
    valid: Bool[Array | np.ndarray, "b t"],
    key: Array,
    choice: Choice,
    *,
    length: int,
    kv: str | None,
    top_k: int | None,
    is_greedy: bool,
) -> State:
    """Reads the prompts and chooses each row's first token."""
    b, t = tokens.shape
    cache = model.init_cache(b, length, kind=kv)
    logits, cache = model.extend(tokens, cache, valid=valid, last=True)
    empty = jnp.full((b, length - t), NONE, jnp.int32)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(b))
    begun = State(
        cache, jnp.zeros((b,), jnp.int32), empty, jnp.int32(0), jnp.zeros((b,), bool), keys
    )
    return choose(begun, logits[:, -1], choice, top_k, is_greedy)


@functools.partial(jax.jit, static_argnames=("top_k", "is_greedy"), donate_argnames="state")
def decode(
    model: Decoder,
    state: State,
    limit: Int[Array, ""] | int,
    *,
    choice: Choice,
    top_k: int | None,
    is_greedy: bool,
) -> State:
    """Chooses tokens until `limit` are chosen or all rows have stopped; `state` is consumed."""

    def unfinished(state: State) -> Bool[Array, ""]:
        return (state.step < limit) & ~jnp.all(state.stopped)

    def step(state: State) -> State:
        logits, cache = model.extend(state.last[:, None], state.cache, last=True)
        return choose(state._replace(cache=cache), logits[:, -1], choice, top_k, is_greedy)

    return jax.lax.while_loop(unfinished, step, state)


def choose(
    state: State, logits: Float[Array, "b v"], choice: Choice, top_k: int | None, is_greedy: bool
) -> State:
    """The state with one more token of each row that has not stopped."""
    if is_greedy:
        ids = greedy(logits)
    else:
        keys = jax.vmap(jax.random.fold_in, (0, None))(state.keys, state.step)
        ids = draw(
            keys,
            logits,
            temperature=choice.temperature,
            top_k=top_k,
            top_p=choice.top_p,
            min_p=choice.min_p,
        )
    stopped = state.stopped | jnp.any(ids[:, None] == choice.stop, axis=1)
    column = jnp.where(stopped, NONE, ids)[:, None]
    tokens = jax.lax.dynamic_update_slice_in_dim(state.tokens, column, state.step, axis=1)
    last = jnp.where(stopped, 0, ids)
    return State(state.cache, last, tokens, state.step + 1, stopped, state.keys)
