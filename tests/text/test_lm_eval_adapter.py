"""The adapter for lm-evaluation-harness: its answers by brute force, with a stub of the harness.

`test_lm_eval_hflm.py` compares it with the harness's own class.
"""

import sys
import types

import jax
import numpy as np
import pytest
import tokenizers

from ffnlab.errors import ConfigError, FormatError, MissingExtraError
from ffnlab.formats import Tokenizer, load
from ffnlab.formats.tokenizer.files import Beside
from ffnlab.models import Decoder, DecoderConfig
from ffnlab.text import generate
from ffnlab.text.lm_eval.adapter import Requests, cut, harness_model, logp_and_best
from ffnlab.text.lm_eval.texts import Row

CONFIG = DecoderConfig(
    vocab=256, width=16, hidden=16, layers=1, heads=2, kv_heads=1, head_dim=8, max_positions=48
)
PAIRS = [
    ("ab", "c"),
    ("", "hello"),
    ("the cat ", "sat"),
    ("x" * 60, "yz"),
    ("q", "w" * 48),
    ("a", ""),
]


@pytest.fixture(scope="module")
def model():
    return Decoder(CONFIG, key=jax.random.key(0))


@pytest.fixture(scope="module")
def requests(model):
    return Requests(model, Tokenizer.bytes(), batch=3, max_tokens=8)


forward = jax.jit(lambda model, tokens: model(tokens))


def brute_force(model, ids, first):
    """ln p of ids[first:], one forward pass over the last 48 tokens of context at a time."""
    total, best = 0.0, True
    for place in range(first, len(ids)):
        padded = np.zeros((1, 48), np.int32)
        start = max(0, len(ids) - 49)
        padded[0, : place - start] = ids[start:place]
        logits = np.asarray(forward(model, padded)[0, place - start - 1], np.float64)
        total += logits[ids[place]] - np.log(np.exp(logits).sum())
        best &= int(np.argmax(logits)) == ids[place]
    return total, best


def test_loglikelihood_is_the_sum_over_the_continuation(model, requests):
    answers = requests.loglikelihood(PAIRS)
    for (context, continuation), (logp, best) in zip(PAIRS, answers, strict=True):
        stripped = context.rstrip()
        ids = [0, *(context + continuation).encode()]
        first = 1 + len(stripped.encode())
        expected, expected_best = brute_force(model, ids, first)
        # Float32 logits.
        np.testing.assert_allclose(logp, expected, rtol=1e-4, atol=1e-5)
        assert best == expected_best


def test_the_most_likely_continuation_is_greedy(model, requests):
    ids = generate(model, [[0, *b"ab"]], max_tokens=4).lists()[0]
    tokens = np.zeros((1, 33), np.int32)
    tokens[0, :7] = [0, *b"ab", *ids]
    _, best = logp_and_best(model, tokens, np.int32(6))
    assert np.asarray(best)[0, 2:6].all()
    answers = requests.score([Row([0, *b"ab", *ids], first=3)])
    assert answers[0][1]


def test_rolling_scores_every_token_once(model, requests):
    texts = ["short", "", "a longer text than the model's window of forty-eight tokens" * 2]
    answers = requests.rolling(texts)
    for text, logp in zip(texts, answers, strict=True):
        ids = [0, 0, *text.encode()]  # NUL is put before a text, and the prefix is NUL, too
        expected = 0.0
        for start in range(1, len(ids), 48):
            end = min(start + 48, len(ids))
            begin = max(end - 49, 0)
            expected += brute_force(model, ids[begin:end], start - begin)[0]
        np.testing.assert_allclose(logp, expected, rtol=1e-4, atol=1e-5)


def test_generation_stops_at_strings_and_ids(model, requests):
    prompts = ["one", "two words", "three", "f"]
    options = {"until": [], "max_gen_toks": 12}
    free = requests.generate([(p, options) for p in prompts])
    ids = generate(model, [[0, *p.encode()] for p in prompts], max_tokens=12, stop=(0,)).lists()
    assert free == [Tokenizer.bytes().decode(row) for row in ids]
    stop = free[1][3]
    answers = requests.generate([(p, {**options, "until": [stop]}) for p in prompts])
    assert answers == [cut(text, [stop]) for text in free]
    assert answers[1] == free[1][: free[1].index(stop)]


def test_special_tokens_end_texts_and_are_no_part_of_them(model, tmp_path):
    Tokenizer.bytes().save(tmp_path)
    inner = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    inner.add_special_tokens(["<x>", "<end>"])
    inner.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(
        '{"bos_token": "\\u0000", "eos_token": "<end>"}'
    )
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 257]}')
    requests = Requests(model, Tokenizer.load(tmp_path), max_tokens=8)
    assert requests.stop == (5, 257)
    ids = [*b"ab", 256, *b"cd", 257, *b"cab"]
    for until, text in (
        ([], "abcd"),
        (["<x>"], "ab"),
        (["cd"], "ab"),
        (["<end>", "b"], "a"),
        (["x>c", "d"], "abc"),
        (["ab\n", "bc", "ab"], ""),
    ):
        wanted = requests.settings({"until": until})
        assert requests.ended(ids, wanted.until) == (text, True), until
    assert requests.ended(ids[:5], ("<end>",)) == ("abcd", False)
    assert requests.ended([], ("<end>",)) == ("", False)


def test_requests_of_several_settings_keep_their_order(requests):
    asked = [("ab", {"max_gen_toks": n}) for n in (3, 5, 3)] + [("b", {"max_new_tokens": 5})]
    answers = requests.generate(asked)
    alone = [requests.generate([one])[0] for one in asked]
    assert answers == alone
    assert answers[1].startswith(answers[0])


def test_repeated_requests_are_drawn_apart(requests):
    asked = [("ab", {"max_gen_toks": 8, "do_sample": True, "temperature": 9.0, "top_k": 0})] * 9
    answers = requests.generate(asked)  # in three batches
    assert len(set(answers)) == 9
    assert answers == requests.generate(asked)


def test_what_the_model_asks_for_and_is_not_done_is_warned_of(model):
    beside = Beside(generation={"repetition_penalty": 1.1})
    tokenizer = Tokenizer(Tokenizer.bytes().backend, bos=0, eos=(0,), beside=beside)
    asking = Requests(model, tokenizer, batch=1, max_tokens=2)
    with pytest.warns(UserWarning, match="generation_config.json has repetition_penalty: not done"):
        asking.generate([("a", {}), ("a", {"repetition_penalty": 1.0})])
    asking.generate([("a", {"repetition_penalty": 1.0})])


def test_few_programs_are_compiled(requests):
    before = logp_and_best._cache_size()
    requests.loglikelihood([("a" * n, "b") for n in range(1, 60)])
    assert logp_and_best._cache_size() - before <= 2


def test_bad_requests_are_named(model, requests):
    with pytest.raises(ConfigError, match="'beams'"):
        requests.generate([("a", {}), ("a", {"beams": 3})])
    with pytest.raises(ConfigError, match="max_gen_toks=48"):
        requests.generate([("a", {"max_gen_toks": 48})])
    with pytest.raises(ConfigError, match=r"continuation 'w+' of 'q' has 49 tokens of its own"):
        requests.loglikelihood([("a", "b"), ("q", "w" * 49)])
    small = Decoder(DecoderConfig(**{**vars(CONFIG), "vocab": 100}), key=jax.random.key(0))
    few = Requests(small, Tokenizer.bytes(), batch=1, max_tokens=2)  # more ids than rows
    assert few.loglikelihood([("ab", "c")])[0][0] < 0
    for ask in (lambda: few.loglikelihood([("ab", "d")]), lambda: few.rolling(["abd"])):
        with pytest.raises(ConfigError, match=r"id 100, the model has ids 0\.\.99"):
            ask()


def test_rows_beyond_the_tokenizer_are_no_text(model):
    large = Decoder(DecoderConfig(**{**vars(CONFIG), "vocab": 4096}), key=jax.random.key(0))
    answers = Requests(large, Tokenizer.bytes(), batch=2, max_tokens=6)
    ids = generate(large, [[0, *b"ab"]], max_tokens=6, stop=(0,)).lists()[0]
    assert max(ids) > 255  # else the test shows nothing
    assert answers.generate([("ab", {})]) == [Tokenizer.bytes().decode([i for i in ids if i < 256])]


@pytest.mark.parametrize("name", ["llama_longrope", "llama_dynamic"])
def test_rows_of_a_batch_do_not_change_each_other_s_rotations(name, fixtures):
    model = load(fixtures / "models" / name)  # both turn otherwise from 9 tokens on
    requests = Requests(model, Tokenizer.bytes(), batch=4)
    limit = model.config.max_positions
    texts = [bytes(1 + (i * 7 + n) % 30 for i in range(n)).decode() for n in (3, 6, 3, 2)]
    texts += [bytes(1 + (i * 5 + n) % 30 for i in range(n)).decode() for n in (limit - 4, 5)]
    rows = [requests.texts.pair(text[:1], text[1:]) for text in texts]
    found = requests.score(rows)
    for row, (logp, _) in zip(rows, found, strict=True):
        logits = np.asarray(forward(model, np.asarray([row.ids[:-1]], np.int32))[0], np.float64)
        chosen = [logits[i - 1][row.ids[i]] for i in range(row.first, len(row.ids))]
        total = np.log(np.exp(logits[row.first - 1 :]).sum(axis=-1)).sum()
        np.testing.assert_allclose(logp, np.sum(chosen) - total, atol=1e-4)
    options = {"max_gen_toks": 4, "until": []}
    answers = requests.generate([(text, options) for text in texts[:-2]] + [(texts[-1], options)])
    alone = [requests.generate([(text, options)])[0] for text in (*texts[:-2], texts[-1])]
    assert answers == alone


class StubHook:
    """Records what would be cached."""

    def __init__(self):
        self.seen = []

    def add_partial(self, kind, request, answer):
        self.seen.append((kind, request, answer))


@pytest.fixture
def stub(monkeypatch):
    """The base class of models in a harness that has nothing else."""

    class LM:
        def __init__(self):
            self.cache_hook = StubHook()

    module = types.ModuleType("lm_eval.api.model")
    module.LM = LM
    monkeypatch.setitem(sys.modules, "lm_eval", types.ModuleType("lm_eval"))
    monkeypatch.setitem(sys.modules, "lm_eval.api", types.ModuleType("lm_eval.api"))
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", module)
    return LM


def test_a_stub_of_the_harness_gets_the_answers(model, requests, stub):
    adapter = harness_model(model, Tokenizer.bytes(), batch=3, max_tokens=8)
    assert isinstance(adapter, stub)

    def instances(*args):
        return [types.SimpleNamespace(args=a) for a in args]

    assert adapter.loglikelihood(instances(*PAIRS)) == requests.loglikelihood(PAIRS)
    assert adapter.loglikelihood_rolling(instances(("text",))) == requests.rolling(["text"])
    until = ("ab", {"until": ["\n"]})
    assert adapter.generate_until(instances(until)) == requests.generate([until])
    kinds = [kind for kind, _, _ in adapter.cache_hook.seen]
    assert kinds == ["loglikelihood"] * len(PAIRS) + ["loglikelihood_rolling", "generate_until"]


def test_the_harness_gets_chats(model, stub):
    template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}"
        "[{{ m.content }}]{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    )
    templates = {"default": template, "rag": "rag {{ messages[0].content }}"}
    tokenizer = Tokenizer(Tokenizer.bytes().backend, bos=0, beside=Beside(templates=templates))
    adapter = harness_model(model, tokenizer)
    system, user = ({"role": role, "content": role} for role in ("system", "user"))
    assert adapter.apply_chat_template([user]) == "[user]>"
    assert adapter.apply_chat_template([system, user]) == "[user]>"
    assert adapter.apply_chat_template([user, user], add_generation_prompt=False) == "[user][user"
    with pytest.raises(FormatError, match="TemplateError: no"):
        adapter.apply_chat_template([system])
    assert adapter.chat_template(False) is None
    assert adapter.chat_template(True) == adapter.chat_template("default") == template
    assert adapter.chat_template("rag") == templates["rag"]
    assert adapter.apply_chat_template([user]) == "rag user"
    with pytest.raises(ConfigError, match="no chat template 'tool_use'; there are: default, rag"):
        adapter.chat_template("tool_use")
    plain = harness_model(model, Tokenizer.bytes())
    assert plain.chat_template(True) is None
    with pytest.raises(ConfigError, match="no chat template"):
        plain.apply_chat_template([user])
    names = [plain.tokenizer_name, adapter.tokenizer_name]
    assert names == [f"ffnlab-{t.digest()[:16]}" for t in (Tokenizer.bytes(), tokenizer)]
    assert names[0] != names[1]


def test_without_the_harness_the_extra_is_named(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(MissingExtraError, match="eval"):
        harness_model(model, Tokenizer.bytes())
