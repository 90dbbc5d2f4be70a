"""Models and tokenizers in the files of llama2.c: a flat float32 file, and scored tokens.

Model file: seven int32 (width, hidden, layers, heads, kv_heads, vocab, max_positions; a negative
vocab says that the head is not the embedding), then float32 arrays, each stacked over layers:
embedding, attention norms, q, k, v, o, FFN norms, gate, down, up, final norm, two tables of the
rotary embedding (which follow from the sizes), and the head if it is its own. Matrices are
[out, in]. Rotation pairs channels 2i and 2i + 1 there, and i and i + head_dim / 2 here, so the rows
of q and k are put in another order.

Tokenizer file: int32 longest token, then per token float32 score, int32 length, bytes. Ids 0, 1, 2
are unknown, beginning and end; 3 to 258 are single bytes. Text is split into characters, or bytes
where a character is no token, and the neighbours whose union has the best score are joined first.
"""

import math
import struct
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from ffnlab.errors import FormatError, require
from ffnlab.formats.huggingface.plan import is_variable, variables
from ffnlab.formats.stream import is_finite
from ffnlab.formats.tokenizer.backends import LibraryBackend
from ffnlab.formats.tokenizer.tokenizer import Tokenizer
from ffnlab.formats.untrusted import file_size
from ffnlab.models.config import DecoderConfig
from ffnlab.models.decoder import Decoder
from ffnlab.storage.files import StrPath
from ffnlab.weights import Dense

SIZES = ("width", "hidden", "layers", "heads", "kv_heads", "vocab", "max_positions")
LIMITS = (2**16, 2**18, 2**10, 2**10, 2**10, 2**22, 2**20)
TOKENS_LIMIT = 16 * 1024 * 1024
UNKNOWN, BOS, EOS = "<unk>", "<s>", "</s>"


def load(file: StrPath, tokenizer_file: StrPath, *, dtype=jnp.float32) -> tuple[Decoder, Tokenizer]:
    """Loads a llama2.c model with its tokenizer.

    Args:
      file: the model, such as stories260K.bin.
      tokenizer_file: its tokens, such as tok512.bin.
      dtype: of the parameters.
    Returns:
      (model, tokenizer).
    Raises:
      FormatError: a file is damaged, too short or too long for what its header says, or holds NaN.
    """
    model = load_model(file, dtype=dtype)
    return model, load_tokenizer(tokenizer_file, model.config.vocab)


def load_model(file: StrPath, *, dtype=jnp.float32) -> Decoder:
    """Loads the model; see `load`."""
    file = Path(file)
    config = _config(file)
    shapes = _shapes(config)
    expected = 28 + 4 * sum(math.prod(shape) for shape in shapes.values())
    if file_size(file) != expected:
        raise FormatError(f"{file}: {file_size(file)} bytes; its header asks for {expected}")
    arrays, flat = {}, np.fromfile(file, "<f4", offset=28)
    for name, shape in shapes.items():
        arrays[name], flat = flat[: math.prod(shape)].reshape(shape), flat[math.prod(shape) :]
        if not is_finite(arrays[name]):
            raise FormatError(f"{file}: {name} holds NaN or infinity")
    for name, heads in (("attn.q.w", config.heads), ("attn.k.w", config.kv_heads)):
        arrays[name] = _halves(arrays[name], heads)
    abstract = jax.eval_shape(lambda key: Decoder(config, key=key), jax.random.key(0))
    filled = []
    for path, variable in variables(abstract).items():
        filled.append(variable.replace(_value(arrays, path, dtype)))
    return jax.tree.unflatten(jax.tree.structure(abstract, is_leaf=is_variable), filled)


def _config(file: Path) -> DecoderConfig:
    if file_size(file) < 28:
        raise FormatError(f"{file}: too short for a llama2.c model")
    with open(file, "rb") as handle:
        raw = struct.unpack("<7i", handle.read(28))
    sizes = dict(zip(SIZES, map(abs, raw), strict=True))
    for (name, size), value, limit in zip(sizes.items(), raw, LIMITS, strict=True):
        if not 1 <= size <= limit or (value < 0 and name != "vocab"):
            raise FormatError(f"{file}: {name}={value}; 1 to {limit} is accepted")
    if sizes["width"] % sizes["heads"] or sizes["heads"] % sizes["kv_heads"]:
        raise FormatError(f"{file}: sizes {sizes} do not divide into heads")
    head_dim = sizes["width"] // sizes["heads"]
    if head_dim % 2:
        raise FormatError(f"{file}: head_dim={head_dim} must be even")
    return DecoderConfig(
        **sizes, head_dim=head_dim, eps=1e-5, tie_embeddings=raw[5] > 0, bos=1, eos=(2,)
    )


def _shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    n, d, h = config.layers, config.width, config.hidden
    kv = config.kv_heads * config.head_dim
    shapes = {
        "embed.w": (config.vocab, d),
        "attn_norm.scale": (n, d),
        "attn.q.w": (n, d, d),
        "attn.k.w": (n, kv, d),
        "attn.v.w": (n, kv, d),
        "attn.o.w": (n, d, d),
        "ffn_norm.scale": (n, d),
        "ffn.gate.w": (n, h, d),
        "ffn.down.w": (n, d, h),
        "ffn.up.w": (n, h, d),
        "norm.scale": (d,),
        "rope cosines": (config.max_positions, config.head_dim // 2),
        "rope sines": (config.max_positions, config.head_dim // 2),
    }
    return shapes if config.tie_embeddings else shapes | {"head.w": (config.vocab, d)}


def _halves(w: np.ndarray, heads: int) -> np.ndarray:
    """Puts the even rows of each head before the odd ones; w is [layers, heads * head_dim, in]."""
    n, out, width = w.shape
    pairs = w.reshape(n, heads, out // heads // 2, 2, width)
    return pairs.swapaxes(2, 3).reshape(n, out, width)


def _value(arrays: dict[str, np.ndarray], path: str, dtype) -> jax.Array | Dense:
    if path.startswith("layers["):
        layer, _, name = path.removeprefix("layers[").partition("].")
        array = arrays[name][int(layer)]
    else:
        array = arrays[path]
    array = array.T if array.ndim == 2 and path != "embed.w" else array
    value = jnp.asarray(array, dtype)
    return Dense(value) if array.ndim == 2 else value


def load_tokenizer(file: StrPath, vocab: int) -> Tokenizer:
    """Loads the tokenizer of a llama2.c model (needs the extra `run`).

    Args:
      file: the tokens.
      vocab: how many there are.
    Raises:
      FormatError: the file is damaged or has another number of tokens.
    """
    library = require("tokenizers", extra="run")
    pieces = _pieces(Path(file), vocab)
    ids: dict[str, int] = {}
    for i, (_, piece) in enumerate(pieces):
        ids.setdefault(piece, i)
    model = library.models.BPE(
        vocab=ids, merges=_merges(pieces, ids), unk_token=UNKNOWN, fuse_unk=True, byte_fallback=True
    )
    inner = library.Tokenizer(model)
    inner.normalizer = library.normalizers.Prepend(" ")
    inner.decoder = library.decoders.Sequence(
        [
            library.decoders.ByteFallback(),
            library.decoders.Fuse(),
            library.decoders.Strip(" ", 1, 0),
        ]
    )
    special = [library.AddedToken(t, special=True, normalized=False) for t in (UNKNOWN, BOS, EOS)]
    inner.add_special_tokens(special)
    inner.post_processor = library.processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, 1)]
    )
    return Tokenizer(LibraryBackend(inner), bos=1, eos=(2,))


def _pieces(file: Path, vocab: int) -> list[tuple[float, str]]:
    if file_size(file) > TOKENS_LIMIT:
        raise FormatError(f"{file}: more than {TOKENS_LIMIT} bytes")
    content, pieces, at = file.read_bytes(), [], 4
    while at < len(content):
        if at + 8 > len(content):
            raise FormatError(f"{file}: ends inside token {len(pieces)}")
        score, length = struct.unpack_from("<fi", content, at)
        piece = content[at + 8 : at + 8 + length]
        if not 0 <= length <= 2**16 or len(piece) != length or not math.isfinite(score):
            raise FormatError(f"{file}: token {len(pieces)} has length {length}, score {score}")
        try:
            pieces.append((score, piece.decode()))
        except UnicodeDecodeError:
            raise FormatError(f"{file}: token {len(pieces)} is not UTF-8") from None
        at += 8 + length
    if len(pieces) != vocab or vocab < 259:
        raise FormatError(f"{file}: {len(pieces)} tokens, the model has {vocab} (at least 259)")
    names = {0: UNKNOWN, 1: BOS, 2: EOS}
    return [(score, names.get(i, piece)) for i, (score, piece) in enumerate(pieces)]


def _merges(pieces: list[tuple[float, str]], ids: dict[str, int]) -> list[tuple[str, str]]:
    """Every way to join two tokens into a third, the best first."""
    found = []
    for i, (score, piece) in enumerate(pieces[259:], 259):
        if ids[piece] != i:
            continue
        splits = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
        found += [(-score, i, left, right) for left, right in splits if {left, right} <= ids.keys()]
    return [(left, right) for _, _, left, right in sorted(found)]
