"""The ledger: what full runs of the studies claimed, kept in a repository's `results/`.

Results are written by `ffnlab run --all` (`repeat`), read back and compared (`recorded`), held
against the code they came from (`sources`), and written into tables (`tables`, `pages`);
`python -m ffnlab.studies.ledger` is `make ledger`. No study is written here.
"""
