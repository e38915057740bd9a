"""What callbacks write for TensorBoard.

Through the `tensorboard` package itself and not `tf.summary`, which only calls it: so neither
TensorFlow nor a certain backend is needed.
"""

import os
import time
from typing import Any


class EventFile:
    """A file of events in a folder, one run in TensorBoard.

    Args:
        folder: where the file is made, new each time. A run of its own: TensorBoard reads one
            file of a folder at a time.

    Raises:
        ModuleNotFoundError: where `tensorboard` is not installed.

    Example:

    ```python
    events = EventFile("logs/gates")
    events.scalar("gate/block_0", 0.1, step=10)
    events.close()
    ```
    """

    def __init__(self, folder: "str | os.PathLike[str]") -> None:
        check_tensorboard(folder)
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._writer = EventFileWriter(os.fspath(folder))

    def scalar(self, tag: str, value: float, step: int) -> None:
        """A point of a curve."""
        from tensorboard.plugins.scalar.summary_v2 import scalar_pb

        self._add(scalar_pb(tag, float(value)), step)

    def histogram(self, tag: str, values: Any, step: int) -> None:
        """A distribution of numbers, of any shape."""
        from tensorboard.plugins.histogram.summary_v2 import histogram_pb

        self._add(histogram_pb(tag, values), step)

    def text(self, tag: str, text: str, step: int) -> None:
        """A text, shown as Markdown."""
        from tensorboard.plugins.text.summary_v2 import text_pb

        self._add(text_pb(tag, text), step)

    def flush(self) -> None:
        """Have everything on the disk."""
        self._writer.flush()

    def close(self) -> None:
        """Have everything on the disk, and write no more."""
        self._writer.close()

    def _add(self, summary, step):
        from tensorboard.compat.proto.event_pb2 import Event

        self._writer.add_event(Event(wall_time=time.time(), step=step, summary=summary))


def check_tensorboard(log_dir: Any) -> None:
    """Refuse a `log_dir` where `tensorboard` is not installed, and say the way round."""
    try:
        import tensorboard  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            '`log_dir` needs TensorBoard: `pip install tensorboard` (or "keras-cc[report]"), or '
            "leave it out and read `.history` of the callback. "
            f"Received: log_dir={str(log_dir)!r}"
        ) from error
