"""llama2.c files: a numpy forward pass with interleaved rotation, and a trained model's words."""

import math
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as hs

from ffnlab.errors import FormatError
from ffnlab.formats import llama2c

D, H, N, HEADS, KV, V, T = 16, 20, 2, 4, 2, 24, 12
SHAPES = {
    "embed": (V, D),
    "attn_norm": (N, D),
    "q": (N, D, D),
    "k": (N, D // 2, D),
    "v": (N, D // 2, D),
    "o": (N, D, D),
    "ffn_norm": (N, D),
    "gate": (N, H, D),
    "down": (N, D, H),
    "up": (N, H, D),
    "norm": (D,),
    "cos": (T, 2),
    "sin": (T, 2),
}


def weights(rng, tied):
    shapes = SHAPES if tied else SHAPES | {"head": (V, D)}
    return {name: rng.normal(0, 0.4, shape).astype(np.float32) for name, shape in shapes.items()}


def write(file, arrays, tied, vocab=V):
    header = struct.pack("<7i", D, H, N, HEADS, KV, vocab if tied else -vocab, T)
    file.write_bytes(header + b"".join(a.tobytes() for a in arrays.values()))


def norm(x, scale):
    return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + 1e-5) * scale


def rotate(x, position):
    """Pairs (2i, 2i + 1) of each head, as llama2.c turns them."""
    heads, size = x.shape
    for i in range(0, size, 2):
        angle = position * 10000.0 ** (-i / size)
        a, b = x[:, i].copy(), x[:, i + 1].copy()
        x[:, i] = a * math.cos(angle) - b * math.sin(angle)
        x[:, i + 1] = a * math.sin(angle) + b * math.cos(angle)
    return x


def reference(w, tokens):
    keys, values, logits = [[] for _ in range(N)], [[] for _ in range(N)], []
    size = D // HEADS
    for position, token in enumerate(tokens):
        x = w["embed"][token].copy()
        for n in range(N):
            y = norm(x, w["attn_norm"][n])
            q = rotate((w["q"][n] @ y).reshape(HEADS, size), position)
            keys[n].append(rotate((w["k"][n] @ y).reshape(KV, size), position))
            values[n].append((w["v"][n] @ y).reshape(KV, size))
            out = []
            for head in range(HEADS):
                k = np.stack(keys[n])[:, head // (HEADS // KV)]
                score = k @ q[head] / math.sqrt(size)
                p = np.exp(score - score.max())
                out.append(p / p.sum() @ np.stack(values[n])[:, head // (HEADS // KV)])
            x = x + w["o"][n] @ np.concatenate(out)
            y = norm(x, w["ffn_norm"][n])
            gate = w["gate"][n] @ y
            x = x + w["down"][n] @ (gate / (1 + np.exp(-gate)) * (w["up"][n] @ y))
        logits.append(w.get("head", w["embed"]) @ norm(x, w["norm"]))
    return np.stack(logits)


@pytest.mark.parametrize("tied", [True, False])
def test_a_small_file_against_a_plain_forward_pass(tmp_path, tied):
    rng = np.random.default_rng(0)
    w, tokens = weights(rng, tied), rng.integers(0, V, 10)
    write(tmp_path / "m.bin", w, tied)
    model = llama2c.load_model(tmp_path / "m.bin")
    logits = model(jnp.asarray(tokens[None], jnp.int32))[0]
    assert np.abs(np.asarray(logits) - reference(w, tokens)).max() < 1e-4


def test_damaged_files(tmp_path):
    file, w = tmp_path / "m.bin", weights(np.random.default_rng(0), True)
    write(file, w, True)
    whole = file.read_bytes()
    for content, text in [
        (whole[:20], "too short"),
        (whole[:-4], "asks for"),
        (whole + b"\0", "asks for"),
        (struct.pack("<7i", D, H, N, HEADS, KV, V, 2**30) + whole[28:], "max_positions"),
        (struct.pack("<7i", D, H, -N, HEADS, KV, V, T) + whole[28:], "layers=-2"),
        (struct.pack("<7i", D, H, N, 3, KV, V, T) + whole[28:], "heads"),
        (whole[:28] + struct.pack("<f", math.nan) + whole[32:], "embed.w holds NaN"),
    ]:
        file.write_bytes(content)
        with pytest.raises(FormatError, match=text):
            llama2c.load_model(file)


def pieces(words=("he", " the", "th", " t", " he")):
    tokens = [(0.0, b"<unk>"), (0.0, b"\n<s>\n"), (0.0, b"\n</s>\n")]
    tokens += [(0.0, f"<0x{b:02X}>".encode()) for b in range(256)]
    tokens += [(-float(i), word.encode()) for i, word in enumerate(words)]
    return tokens + [(-50.0 - i, c.encode()) for i, c in enumerate(" theé")]


def write_tokens(file, tokens):
    body = b"".join(struct.pack("<fi", score, len(piece)) + piece for score, piece in tokens)
    file.write_bytes(struct.pack("<i", 8) + body)


def merge_by_score(tokens, text):
    """As llama2.c does it: characters or bytes, then the best pair first, leftmost on ties."""
    ids = {piece: i for i, (_, piece) in reversed(list(enumerate(tokens)))}
    found = []
    for char in " " + text if text else "":
        raw = char.encode()
        found += [ids[raw]] if raw in ids else [byte + 3 for byte in raw]
    while True:
        best = None
        for i, (a, b) in enumerate(zip(found, found[1:], strict=False)):
            joined = ids.get(tokens[a][1] + tokens[b][1])
            if joined is not None and (best is None or tokens[joined][0] > best[0]):
                best = tokens[joined][0], i, joined
        if best is None:
            return found
        found[best[1] : best[1] + 2] = [best[2]]


@settings(max_examples=200, deadline=None)
@given(text=hs.text(hs.sampled_from("the éx€"), max_size=20))
def test_the_tokenizer_joins_as_llama2c_does(tmp_path_factory, text):
    file = tmp_path_factory.getbasetemp() / "tok.bin"
    if not file.exists():
        write_tokens(file, pieces())
    tokenizer = llama2c.load_tokenizer(file, len(pieces()))
    ids = tokenizer.encode(text)
    assert ids == merge_by_score(pieces(), text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode(text, special=True) == [1, *ids]


def test_damaged_tokens(tmp_path):
    file, count = tmp_path / "t.bin", len(pieces())
    write_tokens(file, pieces())
    whole = file.read_bytes()
    for content, vocab, text in [
        (whole[:-1], count, "has length"),
        (whole + b"\0\0", count, "ends inside"),
        (whole, count + 1, "tokens, the model has"),
        (whole[:8] + struct.pack("<i", -5) + whole[12:], count, "length -5"),
        (whole.replace("é".encode(), b"\xc3\x28"), count, "not UTF-8"),
    ]:
        file.write_bytes(content)
        with pytest.raises(FormatError, match=text):
            llama2c.load_tokenizer(file, vocab)


def test_the_trained_model_continues_as_its_manifest_says(data):
    folder = data / "stories260k"
    model, tokenizer = llama2c.load(folder / "stories260K.bin", folder / "tok512.bin")
    want = (
        "Once upon a time, there was a little girl named Lily. "
        "She loved to play outside in the park."
    )

    @jax.jit
    def next_token(model, tokens, length):
        logits = jax.lax.dynamic_index_in_dim(model(tokens)[0], length - 1, keepdims=False)
        return logits.argmax()

    ids = [tokenizer.bos]
    while len(ids) < 40 and len(tokenizer.decode(ids, skip_special=True)) < len(want):
        padded = jnp.asarray([ids + [0] * (40 - len(ids))], jnp.int32)
        ids.append(int(next_token(model, padded, len(ids))))
    assert tokenizer.decode(ids, skip_special=True) == want
    assert tokenizer.encode(want, special=True) == ids
