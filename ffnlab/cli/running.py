"""The table `[run]` of a training file: how long, how often, on what mesh, and what is kept."""

import dataclasses

from ffnlab.errors import ConfigError, at_least, check_seed
from ffnlab.parallel import LoopOptions

__all__ = ["RunConfig"]


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """How long, how often, and from which seed.

    Attributes:
      steps: batches in all.
      seed: of the weights, and of the order of the text.
      log_every: steps between rows of metrics.
      evaluate_every: steps between measurements on the held-out text; 0 for the end alone.
      checkpoint_every: steps between checkpoints; 0 for the end alone.
      checkpoint_local: a folder on a disk of each machine, where every process saves what it holds
        of the state, without waiting for others; "" for none. A run resumes from there if all
        processes find all that they need, and from the shared folder if not.
      checkpoint_local_every: steps between those.
      dtype: of the saved parameters, "float32" or "bfloat16".
      mesh: of devices, "dp=2,fsdp=2,tp=2" (`ffnlab.parallel.parse_mesh`); "" for one device. With
        `pp` the layers are in stages, see [pipeline].
      scan: stack the layers and scan over them, so that compiling does not grow with depth.
      remat: what layers keep for the backward pass (`ffnlab.models.remat`); "" for everything.
      microbatches: parts of a batch that are computed one after the other, for less memory.
      compute: dtype that parameters are rounded to for a step, "float32" or "bfloat16"; the trained
        ones are float32.
      on_bad: a step that is not finite ends the run ("stop") or is left out ("skip").
      patience: evaluations in a row without a new lowest figure after which the run stops; 0 for
        never.
      balance: weight of the load-balance loss of a model of mixtures (`ffnlab.losses.routed`),
        where no loss is named.
    """

    steps: int
    seed: int = 0
    log_every: int = 20
    evaluate_every: int = 0
    checkpoint_every: int = 200
    checkpoint_local: str = ""
    checkpoint_local_every: int = 0
    dtype: str = "bfloat16"
    mesh: str = ""
    scan: bool = False
    remat: str = ""
    microbatches: int = 1
    compute: str = "float32"
    on_bad: str = "stop"
    patience: int = 0
    balance: float = 1e-2

    def __post_init__(self) -> None:
        at_least(1, steps=self.steps, microbatches=self.microbatches)
        check_seed(self.seed)
        for name in ("dtype", "compute"):
            if getattr(self, name) not in ("float32", "bfloat16"):
                found = getattr(self, name)
                raise ConfigError(f"{name}={found!r} is not one of 'float32', 'bfloat16'")
        self.loop("a figure")

    def loop(self, watch: str, **more: bool | int | float | None) -> LoopOptions:
        """The loop's options, of which some come from the command line; watch: what stops early."""
        return LoopOptions(
            self.log_every,
            self.evaluate_every,
            self.checkpoint_every,
            on_bad=self.on_bad,
            watch=watch,
            patience=self.patience,
            checkpoint_local=self.checkpoint_local,
            checkpoint_local_every=self.checkpoint_local_every,
            **more,
        )
