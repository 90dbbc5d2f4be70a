"""`ffnlab bench`: which measure a command line reaches, and with which settings; none is made."""

import pytest

from ffnlab.bench import (
    analysis,
    graphs,
    learning,
    loading,
    metanetwork,
    precoding,
    quantized,
    sparse,
    summaries,
    versus,
)
from ffnlab.cli.main import main


@pytest.fixture
def asked(monkeypatch):
    """What the measures were asked for, in order."""
    calls = []
    monkeypatch.setattr(versus, "compare", lambda *a, progress: calls.append(("versus", *a)))
    monkeypatch.setattr(quantized, "compare", lambda *a, progress: calls.append(("qwix", *a)))
    monkeypatch.setattr(sparse, "compare", lambda *a, progress: calls.append(("sparse", *a)))
    monkeypatch.setattr(graphs, "compare", lambda *a, progress: calls.append(("graphs", *a)))
    monkeypatch.setattr(precoding, "compare", lambda *a: calls.append(("precoding", *a)))
    monkeypatch.setattr(summaries, "compare", lambda *a, progress: calls.append(("summaries", *a)))
    monkeypatch.setattr(analysis, "compare", lambda *a, progress: calls.append(("analysis", *a)))
    monkeypatch.setattr(learning, "compare", lambda *a, progress: calls.append(("learning", *a)))
    monkeypatch.setattr(metanetwork, "compare", lambda *a, progress: calls.append(("meta", *a)))
    monkeypatch.setattr(loading, "peaks", lambda: calls.append(("loading",)) or {"bfloat16": 1.05})
    return calls


def test_the_embedded_model_beside_transformers_is_the_default(asked):
    assert main(["bench"]) == 0
    assert main(["bench", "model", "--new", "3"]) == 0
    (_, first, settings), (_, second, shorter) = asked
    assert first == second and (first / "model.safetensors").is_file()
    assert (settings, shorter) == (versus.Settings(), versus.Settings(new=3))


def test_a_directory_may_be_named_with_or_without_the_word_model(asked, tmp_path):
    assert main(["bench", str(tmp_path)]) == main(["bench", "model", str(tmp_path)]) == 0
    assert [folder for _, folder, _ in asked] == [tmp_path, tmp_path]


def test_qwix(asked, fixtures):
    directory = str(fixtures / "models" / "llama2")
    assert main(["bench", "--vs", "qwix", "--turns", "4"]) == 0
    assert main(["bench", directory, "--vs", "qwix"]) == 0
    (_, plain), (_, shaped) = asked
    assert plain == quantized.Settings(turns=4) and shaped.d_in < plain.d_in


def test_other_benches(asked, capsys):
    assert main(["bench", "sparse", "--width", "64", "--turns", "3"]) == 0
    assert main(["bench", "loading"]) == 0
    assert main(["bench", "graphs", "--turns", "2"]) == 0
    assert main(["bench", "learning", "--together", "5", "--turns", "2"]) == 0
    assert main(["bench", "analysis", "--boxes", "3", "--turns", "2"]) == 0
    assert main(["bench", "metanetwork", "--rows", "9", "--turns", "2"]) == 0
    assert asked == [
        ("sparse", sparse.Settings(64, turns=3)),
        ("loading",),
        ("graphs", graphs.Settings(turns=2)),
        ("precoding", precoding.Settings(turns=2)),
        ("summaries", summaries.Settings(turns=2)),
        ("learning", learning.Settings(together=5, turns=2)),
        ("analysis", analysis.Settings(boxes=3, turns=2)),
        ("meta", metanetwork.Settings(rows=9, turns=2)),
    ]
    assert "from bfloat16: 1.05 times" in capsys.readouterr().out


def test_an_unknown_peer_lists_those_there_are(asked, capsys):
    with pytest.raises(SystemExit):
        main(["bench", "--vs", "torch"])
    said = capsys.readouterr().err
    assert "transformers" in said and "qwix" in said and asked == []
