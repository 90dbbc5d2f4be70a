"""Help that people can read at 80 columns, and numbers that are refused before any work."""

import re

import pytest

from ffnlab.cli.main import COMMANDS, main

WITH_PARTS = [*COMMANDS, *(f"{name} {part}" for name in COMMANDS for part in COMMANDS[name].parts)]


def help_of(name: str, capsys, monkeypatch) -> str:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main([*name.split(), "--help"])
    return capsys.readouterr().out


@pytest.mark.parametrize("name", WITH_PARTS)
def test_help_is_without_noise_and_fits(name, capsys, monkeypatch):
    said = help_of(name, capsys, monkeypatch)
    for noise in ("None", "default: )", "default: ''", "(default: False)", "(default: True)"):
        assert noise not in said
    assert "\n\n\n" not in said
    usage, *below = said.splitlines()
    assert usage.startswith("usage: ") and all(len(line) <= 80 for line in below)


def test_help_says_what_is_meant(capsys, monkeypatch):
    train = help_of("train", capsys, monkeypatch)
    assert re.search(r"--no-progress +show no bar", train)
    assert re.search(r"--profile INT .*\n.*\(default: 0\)", train), "a 0 is a default"
    assert '"auto" under Slurm, Open MPI' in " ".join(train.replace("│", " ").split())
    generate = help_of("generate", capsys, monkeypatch)
    assert "[OPTIONS] [PATH]" in generate and re.search(r"--top-k INT ", generate)
    assert re.search(r"--remat \{nothing,products\}", help_of("plan", capsys, monkeypatch))
    assert "[OPTIONS] [STR …]" in help_of("tune", capsys, monkeypatch)


def test_a_paragraph_is_wrapped_at_words(capsys, monkeypatch):
    said = help_of("compress", capsys, monkeypatch).split("╭")[0]
    assert "quantized weights are packed in the formats of compressed-tensors" in " ".join(
        said.split()
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("eval --limit -4", "limit=-4 must be at least 1"),
        ("eval --limit 0", "limit=0 must be at least 1"),
        ("eval --window 0", "window=0 must be at least 1"),
        ("eval --stride -2", "stride=-2 must be at least 1"),
        ("generate --prompt a --seed -3", "seed=-3 must lie in 0..4294967295"),
        ("generate --prompt a --seed 4294967296", "seed=4294967296 must lie in 0..4294967295"),
        ("generate --prompt a --max-tokens -1", "max_tokens=-1 must be at least 1"),
        ("run finercut --seed -3", "seed=-3 must lie in 0..4294967295"),
        ("train --profile -2", "profile=-2 must be at least 0"),
        ("train --profile -2 --dry-run", "profile=-2 must be at least 0"),
        ("train --steps 0", "steps=0 must be at least 1"),
        ("train --config a.toml --preset embedded", "--config a.toml and --preset embedded"),
        ("plan a.toml --batch -1", "batch=-1 must be at least 1"),
        ("plan a.toml --length 0", "length=0 must be at least 1"),
        ("bench --turns 0", "turns=0 must be at least 1"),
        ("bench sparse --turns -1", "turns=-1 must be at least 1"),
        ("bench graphs --inputs 64", "inputs=64 must be at least 65"),
        ("bench train --batch 0", "batch=0 must be at least 1"),
        ("bench loop --milliseconds 0", "milliseconds=0 must be at least 1"),
    ],
)
def test_numbers_out_of_range(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments.split()) == 2
    streams = capsys.readouterr()
    assert message in streams.err and streams.err.count("\n") == 1
    assert streams.out == "" and not list(tmp_path.iterdir())


def test_names_are_printed_as_they_are(capsys):
    assert main(["train", "--dry-run", "--out", "runs/[/v2]:smile:"]) == 0
    assert "runs/[/v2]:smile:" in capsys.readouterr().out
