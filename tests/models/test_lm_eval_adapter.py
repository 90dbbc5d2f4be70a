"""The adapter for lm-evaluation-harness: its answers by brute force, with a stub of the harness,
and within the harness itself where it is installed."""

import json
import sys
import types

import jax
import numpy as np
import pytest

from ffnlab.errors import ConfigError, MissingExtraError
from ffnlab.models import Decoder, DecoderConfig, Tokenizer, generate
from ffnlab.models.lm_eval_adapter import Requests, Row, cut, harness_model, logp_and_best

CONFIG = DecoderConfig(
    vocab=256, width=16, hidden=16, layers=1, heads=2, kv_heads=1, head_dim=8, max_positions=48
)
PAIRS = [
    ("ab", "c"),
    ("", "hello"),
    ("the cat ", "sat"),
    ("x" * 60, "yz"),
    ("q", "w" * 60),
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
        first = max(1 + len(stripped.encode()), len(ids) - 48)
        expected, expected_best = brute_force(model, ids, first)
        # Float32 logits.
        np.testing.assert_allclose(logp, expected, rtol=1e-4, atol=1e-5)
        assert best == expected_best


def test_the_most_likely_continuation_is_greedy(model, requests):
    ids = generate(model, [[0, *b"ab"]], max_tokens=4).lists()[0]
    tokens = np.zeros((1, 33), np.int32)
    tokens[0, :7] = [0, *b"ab", *ids]
    _, best = logp_and_best(model, tokens)
    assert np.asarray(best)[0, 2:6].all()
    answers = requests.score([Row([0, *b"ab", *ids], first=3)])
    assert answers[0][1]


def test_rolling_scores_every_token_once_in_windows_that_do_not_overlap(model, requests):
    texts = ["short", "", "a longer text than the model's window of forty-eight tokens" * 2]
    answers = requests.rolling(texts)
    for text, logp in zip(texts, answers, strict=True):
        ids = [0, *text.encode()]
        pieces = [ids[i : i + 49] for i in range(0, len(ids) - 1, 48)]
        expected = sum(brute_force(model, piece, 1)[0] for piece in pieces)
        np.testing.assert_allclose(logp, expected, rtol=1e-4, atol=1e-5)
    assert answers[1] == 0.0


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


def test_requests_of_several_settings_keep_their_order(requests):
    asked = [("ab", {"max_gen_toks": n}) for n in (3, 5, 3)] + [("b", {"max_new_tokens": 5})]
    answers = requests.generate(asked)
    alone = [requests.generate([one])[0] for one in asked]
    assert answers == alone
    assert answers[1].startswith(answers[0])


def test_drawing_options(requests):
    assert requests.settings({}).sampling.is_greedy
    assert requests.settings({"temperature": 0.7, "do_sample": False}).sampling.is_greedy
    drawn = requests.settings({"do_sample": True, "top_k": 3, "until": "\n"})
    assert (drawn.sampling.temperature, drawn.sampling.top_k) == (1.0, 3)
    assert (drawn.until, drawn.max_tokens) == (("\n",), 8)


def test_few_programs_are_compiled(requests):
    before = logp_and_best._cache_size()
    requests.loglikelihood([("a" * n, "b") for n in range(1, 60)])
    assert logp_and_best._cache_size() - before <= 2


def test_bad_requests_are_named(model, requests):
    with pytest.raises(ConfigError, match="'beams'"):
        requests.generate([("a", {"beams": 3})])
    with pytest.raises(ConfigError, match="max_gen_toks=48"):
        requests.generate([("a", {"max_gen_toks": 48})])
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


class StubHook:
    """Records what would be cached."""

    def __init__(self):
        self.seen = []

    def add_partial(self, kind, request, answer):
        self.seen.append((kind, request, answer))


def test_a_stub_of_the_harness_gets_the_answers(model, requests, monkeypatch):
    class LM:
        def __init__(self):
            self.cache_hook = StubHook()

    stub = types.ModuleType("lm_eval.api.model")
    stub.LM = LM
    monkeypatch.setitem(sys.modules, "lm_eval", types.ModuleType("lm_eval"))
    monkeypatch.setitem(sys.modules, "lm_eval.api", types.ModuleType("lm_eval.api"))
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", stub)
    adapter = harness_model(model, Tokenizer.bytes(), batch=3, max_tokens=8)
    assert isinstance(adapter, LM)

    def instances(*args):
        return [types.SimpleNamespace(args=a) for a in args]

    assert adapter.loglikelihood(instances(*PAIRS)) == requests.loglikelihood(PAIRS)
    assert adapter.loglikelihood_rolling(instances(("text",))) == requests.rolling(["text"])
    until = ("ab", {"until": ["\n"]})
    assert adapter.generate_until(instances(until)) == requests.generate([until])
    kinds = [kind for kind, _, _ in adapter.cache_hook.seen]
    assert kinds == ["loglikelihood"] * len(PAIRS) + ["loglikelihood_rolling", "generate_until"]


def test_without_the_harness_the_extra_is_named(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(MissingExtraError, match="eval"):
        harness_model(model, Tokenizer.bytes())


CHOICE = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: " "
metric_list: [{{metric: acc}}]
"""
ROLLING = """
task: tiny_rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list: [{{metric: byte_perplexity}}]
"""
UNTIL = """
task: tiny_until
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{generated}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 6, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""


@pytest.mark.parity
# The harness's own dependencies warn.
@pytest.mark.filterwarnings("default")
def test_the_harness_runs_local_tasks(model, requests, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval", reason="lm_eval is not installed (extra `eval`)")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    import lm_eval
    from lm_eval.tasks import TaskManager

    docs = [
        {"question": "one two", "choices": ["three", "zebra"], "answer": 0},
        {"question": "a b c", "choices": ["q", "d", "longer one"], "answer": 1},
    ]
    until = {"until": ["\n"], "max_gen_toks": 6, "do_sample": False}
    answers = requests.generate([(doc["question"], until) for doc in docs])
    for doc, generated in zip(docs, [answers[0], answers[1] + "?"], strict=True):
        doc["generated"] = generated
    data = tmp_path / "docs.jsonl"
    data.write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    for name, text in (("choice", CHOICE), ("rolling", ROLLING), ("until", UNTIL)):
        (tmp_path / f"{name}.yaml").write_text(text.format(file=data.as_posix()))
    results = lm_eval.simple_evaluate(
        model=harness_model(model, Tokenizer.bytes(), batch=2),
        tasks=["tiny_choice", "tiny_rolling", "tiny_until"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
    )["results"]
    pairs = [(d["question"], f" {c}") for d in docs for c in d["choices"]]
    scores = iter(logp for logp, _ in requests.loglikelihood(pairs))
    right = [np.argmax([next(scores) for _ in d["choices"]]) == d["answer"] for d in docs]
    assert results["tiny_choice"]["acc,none"] == np.mean(right)
    texts = [d["question"] for d in docs]
    nats = -sum(requests.rolling(texts)) / sum(len(t) for t in texts)
    # Batches of another size add up in another order.
    found = results["tiny_rolling"]["byte_perplexity,none"]
    np.testing.assert_allclose(found, np.exp(nats), rtol=1e-5)
    assert answers[0] and results["tiny_until"]["exact_match,none"] == 0.5
