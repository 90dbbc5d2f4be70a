"""TOML from elsewhere: what is read, and what would keep the parser busy for hours."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ffnlab.errors import FormatError
from ffnlab.formats.untrusted import parse_toml

DEEP = "a" + ".a" * 9
part = st.sampled_from(["a", "-1_b", '"b c"', "'d'", r'"\\\" .x"', '"#"'])


@pytest.mark.parametrize(
    "text",
    [
        'x = "{}"',
        "x = '{}'",
        'x = """\n{}\n""" # {}',
        "x = '''\n{}\n'''",
        'x = """{}"""""\ny = "{}"',
        'x = "\\"{}"',
        '# {} "\nx = 1.5',
        "a.a.a.a.a.a.a.a = 1",
    ],
)
def test_dots_in_texts_do_not_matter(text):
    assert parse_toml(text.replace("{}", DEEP).encode(), "x")


@pytest.mark.parametrize(
    "form",
    [
        "{} = 1",
        "[{}]",
        "[[{}]]",
        "x = {{ {} = 1 }}",
        "y = 1\n{} = 1",
        'x = {{ z = """{{}}"""", {} = 1 }}',
        "x = {{ z = '''a''''', {} = 1 }}",
        'x = {{ z = "\\"", {} = 1 }}',
    ],
)
@given(parts=st.lists(part, min_size=9, max_size=12), dot=st.sampled_from([".", " . ", "\t."]))
def test_keys_of_many_parts_are_refused_wherever_they_stand(form, parts, dot):
    with pytest.raises(FormatError, match="a key of more than 8 parts"):
        parse_toml(form.format(dot.join(parts)).encode(), "x")


@pytest.mark.parametrize(
    "piece", [b".a", b'\\"', b'"', b"a", b"'", b'"a\\".', b'"""', b"# \n", b"a.b="]
)
def test_it_takes_no_longer_for_what_is_hostile(piece):
    begin = time.process_time()
    with pytest.raises(FormatError):
        parse_toml(b'x = "a' + piece * (300_000 // len(piece)), "x")
    assert time.process_time() - begin < 20
