"""`ffnlab launch`: a training run in several processes, which goes on when some of them die."""

import shlex
import sys

from ffnlab.errors import ConfigError

__all__ = ["launch"]


def launch(command: tuple[str, ...], /, *, processes: int | None = None, min: int = 1) -> int:
    """Starts a run in several processes, and again with those that are left when one dies.

    By `ffnlab launch -n 4 --min 2 -- train --config run.toml --out DIR` four processes start on
    this machine; within an allocation of Slurm (`sbatch`), one per host. Their output is passed on,
    each line with its rank. When one dies, the survivors are started again, on the mesh that still
    fits (mesh = "dp=-1" always does), from the newest checkpoint; steps and the order of the data
    stay those of a run that nothing disturbed. A signal to stop is passed on: all save, and end.
    Processes on one machine share its GPUs evenly; of a machine without any each has one device,
    unless XLA_FLAGS says more.

    Args:
      command: behind "--", a command of ffnlab that runs in several processes: train.
      processes: how many; under Slurm all hosts when it is not given.
      min: processes with which the run still goes on.
    Returns:
      0 where the run finished, or was stopped with its checkpoint saved; else 1, or what the
      command returns when it refuses.
    Raises:
      ConfigError: another command, an argument that is set here, or processes that there is no
        place for.
    """
    from ffnlab.parallel.launch import launch as start
    from ffnlab.parallel.launch import places

    if not command or command[0] != "train":
        said = shlex.join(command) or "nothing"
        raise ConfigError(f"the command behind -- is {said!r}; `train` runs in several processes")
    for flag in ("--coordinator", "--num-processes", "--process-id"):
        if any(word == flag or word.startswith(f"{flag}=") for word in command):
            raise ConfigError(f"{flag} is set by `ffnlab launch`; leave it out")
    return start([sys.executable, "-m", "ffnlab", *command], places(processes), min)
