"""The quick form of every study comes out as it was recorded."""

import json
import os
import subprocess
import sys

import pytest

from ffnlab.studies import STUDIES
from ffnlab.studies.ledger.pages import FOLDER
from ffnlab.studies.ledger.recorded import differences, read
from ffnlab.studies.result import Claim
from tests.conftest import ROOT

# `ffnlab run`, with every shape checked at the call.
PROGRAM = """
import sys
from jaxtyping import install_import_hook
install_import_hook(["ffnlab", "pallas_kernels"], "beartype.beartype")
from ffnlab.cli.main import main
sys.exit(main(sys.argv[1:]))
"""
# As the results were recorded: on one device, compiled as usual, with no data but what is shipped.
OURS_ALONE = ("XLA_FLAGS", "FFNLAB_DATA", "JAX_ENABLE_X64")


@pytest.mark.skipif(
    not (ROOT / "colab").is_dir(),
    reason="an archive of the sources has neither notebooks nor results",
)
@pytest.mark.slow
@pytest.mark.parametrize("slug", STUDIES)
def test_a_quick_study_comes_out_as_recorded(slug, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name not in OURS_ALONE}
    environment |= {"FFNLAB_STATE": str(tmp_path / "state"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PROGRAM, "run", slug, "--quick", "--out", str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "result.json").read_text())
    for name in written["pictures"]:
        assert (tmp_path / name).stat().st_size > 5000
    recorded = read(ROOT / FOLDER, slug, quick=True)
    assert recorded, f"nothing is recorded of the quick form of {slug}: ffnlab run --all --quick"
    if recorded.text != written["settings"].get("text"):
        pytest.skip(f"the library of this Python is another text than with {recorded.made_with}")
    # What rests on times depends on what else this machine does.
    old, new = (
        [claim for claim in claims if not claim.timed]
        for claims in (recorded.claims, [Claim(**claim) for claim in written["claims"]])
    )
    assert differences(old, new) == []
