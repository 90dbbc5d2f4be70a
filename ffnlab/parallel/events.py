"""TensorBoard event files, written in the run's own thread.

`SummaryWriter` of tensorboardX writes in a thread behind a short queue: where the disk is full the
thread dies, and the run waits for room in the queue for ever. Here the error is the run's.
"""

import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path

from ffnlab.errors import require
from ffnlab.storage.files import naming

__all__ = ["Events"]


class Events:
    """A TensorBoard event file in a folder; needs the extra "log".

    What an interrupted run wrote after its checkpoint is hidden from the viewer.

    Attributes:
      path: of the file; None writes nothing.
    """

    def __init__(self, folder: Path | None, position: int):
        self.path: Path | None = None
        if folder is None:
            return
        require("tensorboardX", extra="log")
        self._protocol = require("tensorboardX.proto.event_pb2", extra="log")
        self._sum = require("tensorboardX.record_writer", extra="log").masked_crc32c
        self.path = folder / f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}"
        folder.mkdir(parents=True, exist_ok=True)
        self._add(file_version="brain.Event:2")
        start = self._protocol.SessionLog(status=self._protocol.SessionLog.START)
        self._add(step=position + 1, session_log=start)

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """Adds the figures of one step."""
        if self.path is not None:
            values = [{"tag": name, "simple_value": value} for name, value in figures.items()]
            self._add(step=step, summary={"value": values})

    def _add(self, **content: object) -> None:
        """Appends a record of the format TFRecord: length, its sum, content, its sum."""
        event = self._protocol.Event(wall_time=time.time(), **content).SerializeToString()
        length = struct.pack("<Q", len(event))
        sums = [struct.pack("<I", self._sum(part)) for part in (length, event)]
        with naming(self.path), self.path.open("ab") as file:
            file.write(length + sums[0] + event + sums[1])
