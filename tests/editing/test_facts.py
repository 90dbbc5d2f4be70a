"""Facts and their files: what is read, what belongs together, what is refused."""

import json
import warnings

import pytest

from ffnlab.editing import facts
from ffnlab.editing.facts import Fact, checked, parse_facts, read_facts
from ffnlab.errors import ConfigError, FormatError

ADA = {"subject": "Ada", "prompt": "{} was born in", "new": " Rome"}
TOML = """
[[fact]]
subject = "Ada"
prompt = "{} was born in"
new = " Rome"
old = " London"
paraphrases = ["The birthplace of {} is", "Ada is from"]
neighbours = ["Bob was born in"]

[[fact]]
subject = "Bob Stone"
prompt = 'In "{0}" of {}\\n\\tone'
new = " two"
"""


def test_both_formats_are_read(tmp_path):
    (tmp_path / "a.toml").write_text(TOML)
    first, second = read_facts(tmp_path / "a.toml")
    assert first.old == " London" and first.neighbours == ("Bob was born in",)
    assert [first.filled(text) for text in first.paraphrases] == [
        "The birthplace of Ada is",
        "Ada is from",
    ]
    # Filled in by replacing: a place of str.format is text like any other.
    assert (
        second.text == 'In "{0}" of Bob Stone\\n\\tone' and second.head == 'In "{0}" of Bob Stone'
    )
    more = {"old": " London", "neighbours": ["Bob lives in"]}
    tables = {"fact": [ADA | more]}
    (tmp_path / "a.json").write_text(json.dumps(tables))
    assert read_facts(tmp_path / "a.json") == (
        Fact(**ADA, old=" London", neighbours=("Bob lives in",)),
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"subject": ""}, "subject is empty"),
        ({"subject": " "}, "spaces around it"),
        ({"subject": "Ada "}, "spaces around it"),
        ({"subject": "A{}", "prompt": "{} x"}, "stands for itself"),
        ({"prompt": "She was born in"}, "0 times"),
        ({"prompt": "{} and {} were"}, "2 times"),
        ({"new": ""}, "new is empty"),
        ({"old": " Rome"}, "new and old are both"),
        ({"new": "x\x1b[2J"}, r"the character '\\x1b'"),
        ({"new": "x\0"}, r"the character '\\x00'"),
        ({"new": "\ud800"}, r"the character '\\ud800'"),
        ({"prompt": "{}" + "x" * 4000}, "4002 characters"),
        ({"paraphrases": ("", "ok")}, "one of its paraphrases is empty"),
        ({"old": " x", "neighbours": ("x",) * 201}, "201 texts"),
        ({"neighbours": ("Bob was born in",)}, "whose answer is old"),
    ],
)
def test_texts_that_are_no_fact(change, said):
    with pytest.raises(ConfigError, match=said):
        Fact(**(ADA | change))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([], "a list of tables named 'fact'"),
        ({"fact": ADA}, "a list of tables named 'fact'"),
        ({"fact": [ADA], "more": 1}, "nothing else"),
        ({"fact": []}, "no facts"),
        ({"fact": ["Ada"]}, "fact 1: str is no table"),
        ({"fact": [ADA, ADA | {"target": "x"}]}, "fact 2: unknown 'target'"),
        ({"fact": [{"subject": "Ada"}]}, "prompt and new missing"),
        ({"fact": [ADA | {"new": 3}]}, "new is int, not a string"),
        ({"fact": [ADA | {"neighbours": "Bob"}]}, "neighbours must be a list of strings"),
        ({"fact": [ADA | {"paraphrases": [1]}]}, "paraphrases must be a list of strings"),
    ],
)
def test_contents_that_are_no_facts(content, said):
    with pytest.raises(ConfigError, match=said):
        parse_facts(content)


def test_all_problems_are_said_at_once():
    with pytest.raises(ConfigError, match=r"(?s)2 of 3 are no facts.*fact 1.*fact 3"):
        parse_facts({"fact": [ADA | {"new": ""}, ADA, ADA | {"subject": ""}]})


def test_hostile_files(tmp_path, monkeypatch):
    def refused(name, content, said):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(FormatError, match=said):
            read_facts(tmp_path / name)

    refused("a.toml", b"fact = [", "not valid TOML")
    refused("a.toml", b"\xff", "not valid TOML")
    refused("a.toml", b"a = " + b"[" * 100_000, "not valid TOML")
    refused("a.toml", b"a = " + b"1" * 5000, "not valid TOML.*4300 digits")
    refused("a.toml", b"a" + b".a" * 10_000 + b" = 1", "a key of more than 8 parts")
    refused("a.json", b"[" * 100_000, "not valid JSON")
    refused("a.json", b'{"fact": [], "fact": []}', "same key twice")
    refused("a.yaml", b"", r"\.toml or a \.json file")
    monkeypatch.setattr(facts, "FILE_LIMIT", 10)
    refused("a.toml", b"x" * 11, "11 bytes of facts")
    with pytest.raises(FormatError, match="cannot be read"):
        read_facts(tmp_path / "none.toml")
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(FormatError, match="not a regular file"):
        read_facts(tmp_path / "folder.json")
    monkeypatch.setattr(facts, "FACTS_LIMIT", 1)
    with pytest.raises(ConfigError, match="2 facts; at most 1"):
        parse_facts({"fact": [ADA, ADA]})


def test_what_is_given_twice_is_refused():
    with pytest.raises(ConfigError, match="given once; there twice: 'Ada was born in'"):
        checked([Fact(**ADA), Fact(**ADA, old=" London")])


def test_neighbours_that_are_changed_are_warned_of():
    near = Fact(**ADA, old=" London", neighbours=("{}'s son lives in", "Bob was born in"))
    bob = Fact("Bob", "{} was born in", " Oslo")
    with pytest.warns(UserWarning, match="changed themselves: 'Bob was born in'"):
        assert checked([near, bob]) == (near, bob)


def test_contradictions():
    other = Fact("was", "Ada {} born in", " Oslo")  # the same text, of another subject
    with pytest.raises(ConfigError, match="both ' Rome' and ' Oslo' are to follow"):
        checked([Fact(**ADA), other])


def test_facts_that_share_a_key_are_warned_of():
    ada, plays = Fact(**ADA), Fact("Ada", "{} plays", " chess")
    with pytest.warns(UserWarning, match=r"2 facts share all text .* \('Ada'\)"):
        assert checked([ada, plays]) == (ada, plays)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        checked([ada, Fact("Ada", "Now {} plays", " chess"), Fact("Adam", "{} plays", " chess")])
