"""Live comparison with `transformers`, which runs in a process of its own (`peer_scripts`)."""

import json
import shutil

import pytest

from ffnlab.formats import Tokenizer, llama2c, load, save
from ffnlab.models import remove
from peer_scripts import difference, ours, read, runner

pytestmark = pytest.mark.parity
# Both sides compute in float32 on other kernels; logits are of order 10.
TOLERANCE = 1e-4
WHO = ("theirs", "ours")


@pytest.fixture(scope="module")
def transformers(fixtures):
    """Runs one of the scripts beside the fixtures with transformers."""
    return runner(fixtures / "models", "torch")


@pytest.fixture(scope="module")
def variants(fixtures):
    """Names of the recorded checkpoints."""
    return sorted(file.parent.name for file in (fixtures / "models").glob("*/expected.npz"))


def test_what_we_save_has_the_recorded_logits(tmp_path, fixtures, transformers, variants):
    for name in variants:
        same = name.removesuffix("_wrapped")  # the same text model, without another modality
        shutil.copytree(fixtures / "models" / same, tmp_path / "theirs" / name)
        save(load(fixtures / "models" / name), tmp_path / "ours" / name, max_shard_bytes=20_000)
    transformers("logits.py", *(tmp_path / who / name for who in WHO for name in variants))
    for name in variants:
        recorded = read(fixtures / "models" / name / "expected.npz")
        want, found = (read(tmp_path / who / name / "theirs.npz") for who in WHO)
        for kind in ("full", "cached"):
            # Torch's kernels differ from one processor to another in the last bits.
            assert difference(want[kind], recorded[kind], want["mask"]) < TOLERANCE, name
            # The same program on the same weights: not a bit of them may have changed.
            assert difference(found[kind], want[kind], want["mask"]) == 0.0, name


def test_other_random_models(tmp_path, transformers, variants):
    transformers("make.py", "--out", tmp_path, "--seed", 1000)
    for name in variants:
        want = read(tmp_path / name / "expected.npz")
        found = ours(load(tmp_path / name), want)
        assert difference(found, want["full"], want["mask"]) < TOLERANCE, name


def test_models_with_removed_sublayers(tmp_path, fixtures, transformers):
    cases = {}
    for name in ("llama3", "qwen2", "gemma2", "gemma3", "phi3", "mistral"):
        for units in [(3,), (0, 3), (2, 3), (0, 1, 4)]:
            folder = tmp_path / f"{name}-{'-'.join(map(str, units))}"
            cases[folder] = remove(load(fixtures / "models" / name), units)
            save(cases[folder], folder)
    transformers("logits.py", *cases)
    for folder, model in cases.items():
        found = read(folder / "theirs.npz")
        assert difference(ours(model, found), found["full"], found["mask"]) < TOLERANCE, folder


def test_the_trained_model_and_both_tokenizers(tmp_path, data, transformers):
    source = data / "stories260k"
    model, tokenizer = llama2c.load(source / "stories260K.bin", source / "tok512.bin")
    texts = ["Once upon a time", "", " two  spaces ", "h\u00e9llo \u20ac \U0001f389\n", "a\0b"]
    for name, made in (("stories", tokenizer), ("bytes", Tokenizer.bytes())):
        made.save(tmp_path / name)
        (tmp_path / name / "texts.json").write_text(json.dumps(texts))
    save(model, tmp_path / "stories")
    transformers("logits.py", tmp_path / "stories", tmp_path / "bytes")
    found = read(tmp_path / "stories" / "theirs.npz")
    assert difference(ours(model, found), found["full"], found["mask"]) < TOLERANCE
    for name, made in (("stories", tokenizer), ("bytes", Tokenizer.bytes())):
        told = json.loads((tmp_path / name / "ids.json").read_text())
        assert [ids for ids, _ in told["texts"]] == [made.encode(text) for text in texts]
        assert [back for _, back in told["texts"]] == texts
        assert told["special"] == [made.bos, made.eos[0], made.pad]
