"""Chat templates: transformers' texts (recorded, and live), and templates that mean no good."""

import json
from pathlib import Path

import pytest

from ffnlab.errors import ConfigError, FormatError
from ffnlab.formats import Tokenizer
from ffnlab.formats.tokenizer import chat
from ffnlab.formats.tokenizer.chat import render
from tests.fixtures.chat.record import CONVERSATIONS, TEMPLATES, TOKENS, cases
from tests.formats.test_tokenizer import bpe

RECORDED = Path(__file__).parents[1] / "fixtures" / "chat" / "expected.json"
USER = [{"role": "user", "content": "hi"}]


def compare(expected: list[dict]) -> None:
    """Every case: the same text, or refused by both."""
    assert len(expected) == 2 * len(TEMPLATES) * len(CONVERSATIONS)
    for name, template in TEMPLATES.items():
        for prompt in (True, False):
            mine = [c for c in expected if c["template"] == name and c["prompt"] == prompt]
            allowed = [c for c in mine if c["text"] is not None]
            talks = [CONVERSATIONS[c["conversation"]] for c in allowed]
            found = render(template, talks, tokens=TOKENS, add_generation_prompt=prompt)
            assert found == [c["text"] for c in allowed], name


def test_texts_are_those_of_transformers():
    recorded = json.loads(RECORDED.read_text(encoding="utf-8"))
    compare(recorded)
    refused = [c for c in recorded if c["text"] is None]
    assert {(c["template"], c["conversation"]) for c in refused} == {
        *((name, "tool") for name in ("llama3", "gemma", "mistral", "zephyr")),
        *((name, "system") for name in ("gemma", "mistral")),
    } - {(c["template"], c["conversation"]) for c in recorded if c["text"] is not None}
    for case in refused[::2]:
        talk = CONVERSATIONS[case["conversation"]]
        with pytest.raises(FormatError, match="the chat template fails"):
            render(TEMPLATES[case["template"]], [talk], tokens=TOKENS)


@pytest.mark.parity
def test_texts_are_those_of_transformers_live():
    compare(cases())


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% if %}", "TemplateSyntaxError"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("{% set ns = namespace(__class__=1) %}", "SecurityError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{{ raise_exception('no system here') }}", "no system here"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ 'a' * 10 ** 10 }}", "MemoryError"),
        ("{% for i in range(9999) %}{{ 'a' * 1000 }}{% endfor %}", "more than 4194304 characters"),
        ("{% include '/etc/passwd' %}", "TypeError"),
    ],
)
def test_hostile_templates_end_in_an_error(template, said):
    with pytest.raises(FormatError, match=f"the chat template fails: .*{said}"):
        render(template, [USER], tokens={})


def test_a_template_that_never_ends(monkeypatch):
    monkeypatch.setattr(chat, "SECONDS", 1)
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(FormatError, match="takes more than 1 seconds or 1024 MiB"):
        render(loop, [USER], tokens={})


def test_a_last_message_is_gone_on_with():
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Well, "}]
    plain = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    trimmed = "{% for m in messages %}[{{ m.content | trim }}]{% endfor %}end"
    options = {"tokens": {}, "add_generation_prompt": False, "continue_last": True}
    assert render(plain, [talk, talk[:1]], **options) == ["[hi][Well, ", "[hi"]
    assert render(trimmed, [talk], **options) == ["[hi][Well,"]
    with pytest.raises(FormatError, match="leaves out the last message"):
        render("{{ messages[0].content }}", [talk], **options)
    for messages, prompt in ((talk, True), ([], False), ([{"role": "assistant"}], False)):
        options["add_generation_prompt"] = prompt
        with pytest.raises(ConfigError, match="continue_last needs a last message"):
            render(plain, [messages], **options)


def test_one_process_renders_many_and_begins_anew_after_one_that_ended(monkeypatch):
    with chat.Renderer() as renderer:
        options = {"tokens": {}, "renderer": renderer}
        texts = [render("{{ messages[0].content }}", [USER], **options) for _ in range(2)]
        first = renderer._running
        for template, said in (("{{ 1 / 0 }}", "ZeroDivision"), ("{{ 'a' * 10 ** 10 }}", "Memory")):
            with pytest.raises(FormatError, match=said):
                render(template, [USER], **options)
        assert render("b", [USER], **options) == ["b"] and renderer._running is first
        monkeypatch.setattr(chat, "SECONDS", 1)
        loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
        with pytest.raises(FormatError, match="takes more than"):
            render(loop, [USER], **options)
        assert first.poll() is not None
        assert render("c", [USER], **options) == ["c"] and renderer._running is not first
        last = renderer._running
    assert texts == [["hi"]] * 2 and last.poll() is not None


def test_a_tokenizer_renders_by_its_files(tmp_path):
    folder = bpe(tmp_path / "b")
    template = "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}{{ pad_token }}"
    config = {"bos_token": {"content": "<s>"}, "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
    text = Tokenizer.load(folder).chat(USER)
    assert text == "<s>hi</s>"  # no pad token: nothing is written for it
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "named"}]
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": named}))
    assert Tokenizer.load(folder).chat(USER) == "named"
    assert Tokenizer.load(folder).chat(USER, template="tool_use") == "no"
    with pytest.raises(ConfigError, match="no chat template 'rag'; there are: default, tool_use"):
        Tokenizer.load(folder).chat(USER, template="rag")
    named.pop()
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": named}))
    with pytest.raises(FormatError, match=r"are \['tool_use'\], and none is 'default'"):
        Tokenizer.load(folder).chat(USER)
    (folder / "chat_template.jinja").write_text("{{ add_generation_prompt }}")
    assert Tokenizer.load(folder).chat(USER, add_generation_prompt=False) == "False"
    with pytest.raises(ConfigError, match="no chat template"):
        Tokenizer.bytes().chat(USER)
    (folder / "chat_template.jinja").write_bytes(b"a\xff")
    with pytest.raises(FormatError, match=r"chat_template\.jinja: not UTF-8 \(byte 1\)"):
        Tokenizer.load(folder)


def test_further_templates_lie_in_a_folder(tmp_path):
    folder = bpe(tmp_path / "b")
    (folder / "tokenizer_config.json").write_text('{"chat_template": "of the config"}')
    more = folder / "additional_chat_templates"
    more.mkdir()
    (more / "rag.jinja").write_text("rag {{ messages[0].content }}")
    (more / "note.txt").write_text("no template")
    with pytest.raises(FormatError, match="none is 'default'"):  # those of files go before
        Tokenizer.load(folder).chat(USER)
    (folder / "chat_template.jinja").write_text("default")
    tokenizer = Tokenizer.load(folder)
    tokenizer.save(tmp_path / "c")
    for found in (tokenizer, Tokenizer.load(tmp_path / "c")):
        assert found.chat(USER) == "default"
        assert found.chat(USER, template="rag") == "rag hi"
    bpe_only = bpe(tmp_path / "d")
    Tokenizer.load(bpe_only).save(tmp_path / "c")  # another tokenizer, which has none
    assert not (tmp_path / "c" / "additional_chat_templates").exists()
    (more / "bad.jinja").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FormatError, match="leaves the directory"):
        Tokenizer.load(folder)


@pytest.mark.parametrize(
    "bad", [3, ["text"], [{"name": "default"}], [{"template": "text"}], {"a": 1}]
)
def test_templates_that_are_none_are_refused(bad, tmp_path):
    folder = bpe(tmp_path / "b")
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": bad}))
    with pytest.raises(FormatError, match="chat_template=.*neither a text nor a list"):
        Tokenizer.load(folder).chat(USER)
