"""Runs of `ffnlab train` in processes of their own, for tests that kill them."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Documents of unequal lengths, so that packed rows predict unequal numbers of tokens.
TEXT = "\0".join("the cat sat on the mat; "[: 3 + 7 * i % 21] * (i % 9 + 1) for i in range(100))
CONFIG = """
[model]
vocab = 256
width = 8
hidden = 16
layers = 1
heads = 1
kv_heads = 1
head_dim = 8

[data]
text = ["{text}"]
batch = 8
length = 16
stride = 8
packed = true

[optimizer]
name = "sgd"
rate = {rate}
warmup = 5

[run]
steps = {steps}
microbatches = 2
log_every = 1
evaluate_every = 30
checkpoint_every = 10
"""
FLAGS = "--xla_force_host_platform_device_count=1 --xla_backend_optimization_level=0"
PATIENCE = 200  # seconds for anything at all


def write_config(folder: Path, steps: int, rate: float = 0.05) -> Path:
    """A configuration of a tiny run, with its text beside it."""
    (folder / "text.txt").write_text(TEXT)
    path = folder / "tiny.toml"
    text = (folder / "text.txt").as_posix()
    path.write_text(CONFIG.format(text=text, steps=steps, rate=rate))
    return path


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def start(config: Path, out: Path, *more: str, **environment: str) -> subprocess.Popen:
    """Starts `ffnlab train` on one device; standard error goes to a file beside `out`."""
    variables = os.environ | {"XLA_FLAGS": FLAGS} | environment
    command = [sys.executable, "-m", "ffnlab", "train", "--config", str(config), "--out", str(out)]
    with open(f"{out}-{len(list(out.parent.glob('*.log')))}.log", "w") as log:
        process = subprocess.Popen([*command, *more], env=variables, stdout=log, stderr=log)
    process.log = Path(log.name)
    return process


def start_all(count: int, config: Path, out: Path, *more: str) -> list[subprocess.Popen]:
    """Starts that many processes of one run on loopback."""
    where = ["--coordinator", f"127.0.0.1:{free_port()}", "--num-processes", str(count)]
    return [start(config, out, *where, "--process-id", str(i), *more) for i in range(count)]


def start_slurm(count: int, config: Path, out: Path, *more: str) -> list[subprocess.Popen]:
    """Starts that many processes as Slurm does: nothing but its variables tells them apart."""
    last = 2**12  # a job's number modulo this is the coordinator's port from the top of all
    job = {"SLURM_JOB_ID": str(os.getpid() % last), "SLURM_STEP_NODELIST": "127.0.0.1"}
    tasks = [{"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)} for i in range(count)]
    job |= {"SLURM_NTASKS": str(count), "SLURM_STEP_NUM_NODES": "1"}
    return [start(config, out, "--coordinator", "auto", *more, **job, **task) for task in tasks]


def script(name: str, *arguments: str, devices: int = 1) -> None:
    """Runs a module of this folder, and fails with what it and its runs wrote."""
    flags = FLAGS.replace("device_count=1", f"device_count={devices}")
    done = subprocess.run(
        [sys.executable, "-m", f"tests.parallel.{name}", *arguments],
        env=os.environ | {"XLA_FLAGS": flags},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    logs = "".join(file.read_text() for file in Path(arguments[1]).glob("*.log"))
    assert done.returncode == 0, done.stderr + logs


def rows(out: Path) -> list[dict]:
    """What has been logged so far; a line cut off is left out."""
    try:
        lines = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines if line.endswith("}\n")]


def measured(out: Path) -> list[dict]:
    """The rows without what depends on the time."""
    timed = ("seconds", "tokens_per_second", "mfu")
    return [{name: row[name] for name in row if name not in timed} for row in rows(out)]


def losses(out: Path) -> dict[int, float]:
    """Loss by step."""
    return {row["step"]: row["loss"] for row in rows(out) if "loss" in row}


def wait_for_step(process: subprocess.Popen, out: Path, step: int) -> None:
    """Waits until a step is logged."""
    deadline = time.monotonic() + PATIENCE
    while not any(row["step"] >= step for row in rows(out)):
        assert process.poll() is None and time.monotonic() < deadline, process.log.read_text()
        time.sleep(0.02)
