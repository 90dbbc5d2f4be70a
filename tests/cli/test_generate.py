"""`ffnlab generate`: what it prints, where it stops, what it refuses and warns of."""

import json

import jax
import pytest

from ffnlab import models
from ffnlab.cli.main import main
from ffnlab.errors import ConfigError
from ffnlab.formats import Tokenizer
from ffnlab.models import Decoder, DecoderConfig
from tests.formats.test_tokenizer import bpe, spaced

CONFIG = DecoderConfig(
    vocab=300, width=16, hidden=16, layers=1, heads=2, kv_heads=1, head_dim=8, max_positions=64
)
TOKENS = 6


@pytest.fixture
def folder(tmp_path):
    """A random model with a tokenizer that has <s> and </s>."""
    folder = bpe(tmp_path / "model")
    models.save(Decoder(CONFIG, key=jax.random.key(1)), folder)
    return folder


def said(capsys, *arguments: str) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of the command."""
    status = main(["generate", *map(str, arguments), "--max-tokens", str(TOKENS)])
    return status, *capsys.readouterr()


def continued(folder, ids: list[int], **options) -> list[int]:
    """The tokens that follow, by the library."""
    return models.generate(models.load(folder), [ids], max_tokens=TOKENS, **options).lists()[0]


def test_it_stops_at_every_end_that_generation_config_lists(folder, capsys):
    tokenizer = Tokenizer.load(folder)
    ids = tokenizer.encode("abcd", special=True)
    new = continued(folder, ids)
    second = next(i for i in new if i != new[0])  # not the first, which would end it at once
    place = new.index(second)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, second]}))
    status, out, _ = said(capsys, folder, "--prompt", "abcd")
    whole = tokenizer.decode([*ids, *new[:place]]).removeprefix("<s>")
    assert (status, out) == (0, whole + "\n")


def test_streamed_words_keep_their_spaces(tmp_path, capsys):
    folder = tmp_path / "words"
    tokenizer = spaced("metaspace")
    tokenizer.save(folder)
    config = DecoderConfig(**{**vars(CONFIG), "vocab": 12})
    for seed in range(20):  # until the first new word begins with a space
        models.save(Decoder(config, key=jax.random.key(seed)), folder)
        new = continued(folder, [4])
        if new[0] in (4, 5):
            break
    assert new[0] in (4, 5)
    status, out, _ = said(capsys, folder, "--prompt", "\u2581hello")
    assert (status, out) == (0, "\u2581hello" + tokenizer.decode([4, *new])[len("hello") :] + "\n")
    assert out.startswith("\u2581hello ")


def test_errors_stand_on_a_line_of_their_own(folder, capsys, monkeypatch):
    status, out, err = said(capsys, folder, "--prompt", "hi", "--kv", "int3")
    assert (status, out) == (2, "")
    assert err.startswith("ffnlab generate: error: ") and "int3" in err

    def fail(*_, **__):
        yield 100
        raise ConfigError("no more")

    monkeypatch.setattr("ffnlab.text.stream_tokens", fail)
    status, out, err = said(capsys, folder, "--prompt", "hi")
    assert status == 2 and out.startswith("hi") and out.endswith("\n")
    assert err == "ffnlab generate: error: no more\n"


@pytest.mark.parametrize("option", [("--top-p", "0.5"), ("--top-k", "3"), ("--min-p", "0.2")])
def test_drawing_options_need_a_temperature(folder, capsys, option):
    status, out, err = said(capsys, folder, "--prompt", "hi", *option)
    assert (status, out) == (2, "") and "give a temperature above 0" in err
    assert said(capsys, folder, "--prompt", "hi", *option, "--temperature", "1")[0] == 0


def test_a_second_beginning_is_warned_of(folder, capsys):
    status, _, err = said(capsys, folder, "--prompt", "<s>hi")
    assert status == 0 and err.startswith("ffnlab generate: warning: the prompt begins with the")
    assert said(capsys, folder, "--prompt", "hi")[2] == ""


def test_a_chat_is_put_into_the_template(folder, capsys):
    status, _, err = said(capsys, folder, "--prompt", "cab", "--chat")
    assert status == 0 or "no chat template" in err
    (folder / "chat_template.jinja").write_text(
        "{{ bos_token }}{% for m in messages %}a{{ m.content }}b{% endfor %}"
        "{% if add_generation_prompt %}c{% endif %}"
    )
    tokenizer = Tokenizer.load(folder)
    ids = [1, *tokenizer.encode("acabbc")]
    status, out, err = said(capsys, folder, "--prompt", "cab", "--chat")
    assert (status, out, err) == (0, tokenizer.decode(continued(folder, ids)) + "\n", "")


def test_tokens_are_drawn_as_the_model_advises(folder, capsys):
    table = {"do_sample": True, "temperature": 0.5, "top_k": 7, "min_p": 0.1, "typical_p": 0.9}
    (folder / "generation_config.json").write_text(json.dumps(table))
    tokenizer = Tokenizer.load(folder)
    ids = tokenizer.encode("abcd", special=True)
    arguments = ["--prompt", "abcd", "--model-sampling", "--seed", "3"]
    key = jax.random.key(3)
    for more, sampling in (
        ((), models.Sampling(0.5, 7, None, 0.1)),
        (("--top-k", "2", "--temperature", "9"), models.Sampling(9.0, 2, None, 0.1)),
        (("--top-k", "0", "--min-p", "0.9"), models.Sampling(0.5, None, None, 0.9)),
    ):
        status, out, err = said(capsys, folder, *arguments, *more)
        new = continued(folder, ids, sampling=sampling, key=key)
        stream = tokenizer.stream(after=ids)  # new bytes need not be whole characters
        text = "".join([*map(stream.push, new), stream.finish()])
        assert (status, out) == (0, f"abcd{text}\n")
        said_of = "generation_config.json has typical_p, which are not used"
        assert err == f"ffnlab generate: warning: {said_of}\n"
