"""Where a training leaves what it goes on from, should it be ended: files, and nothing of a model.

Notable choices:

- A checkpoint is a folder that appears when it is whole, on disk: arrays, and beside them a file
  that says what they are, with checksums of both. What a process that is killed leaves is never
  taken for one, and what a disk has damaged is found.
- Arrays are data alone (`numpy.load` without pickles).
- Files are written by a thread, from copies: a step waits for the copy, and for the disk only where
  the checkpoint before is still being written.
"""

import concurrent.futures
import os
import pathlib
import re
import shutil
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from keras_cc.checksums import file_digest, sealed, unsealed
from keras_cc.options import count, number
from keras_cc.whole_files import whole_folder

FORMAT = 1
_NAME = re.compile(r"step-\d{10}")
_ARRAYS, _STATE = "arrays.npz", "state.json"


class Checkpoints:
    """Where `CCCausalLM.fit(resume=...)` keeps what it goes on from, and how often.

    There is one at the end of each epoch, and within epochs by steps or by time. Each is a folder
    `step-0000000120` in `folder`, which appears when it is whole; those before the newest `keep`
    are removed. It holds what trains and the optimizer's state (three times the trained weights
    for Adam), metrics, random states and the place in the data; of weights that are frozen a
    checksum alone, as they come from where the model does. Writing takes a copy of that in memory.

    Args:
        folder: path. It is made where it is not there.
        steps: int, training steps (batches) from one to the next within an epoch, or None.
        minutes: float > 0, time from one to the next within an epoch, or None: with `steps=None`,
            at the ends of epochs alone.
        keep: int, how many are kept. With 2, one is there should the other be damaged.

    Raises:
        ValueError: naming the option, what it takes and what was received.

    Example:

    ```python
    model.fit(rows, epochs=3, resume=keras_cc.Checkpoints("runs/first", steps=500))
    ```
    """

    def __init__(
        self,
        folder: "str | os.PathLike[str]",
        steps: "int | None" = None,
        minutes: "float | None" = 10.0,
        keep: int = 2,
    ) -> None:
        if not isinstance(folder, str | os.PathLike) or not os.fspath(folder):
            raise ValueError(f"`folder` must be a path. Received: folder={folder!r}")
        self.folder = pathlib.Path(folder).absolute()
        self.steps = steps if steps is None else count("steps", steps, least=1)
        self.minutes = minutes if minutes is None else number("minutes", minutes, positive=True)
        self.keep = count("keep", keep, least=1)
        self._torn: list[pathlib.Path] = []
        self._writer: concurrent.futures.ThreadPoolExecutor | None = None
        self._writing: concurrent.futures.Future[None] | None = None

    def open(self) -> None:
        """Make the folder, and remove what a killed process left unfinished in it.

        Raises:
            OSError: where nothing can be written there.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with whole_folder(self.folder / "writable"):
                pass
            (self.folder / "writable").rmdir()
        except OSError as error:
            raise _with_words(
                error, f"`resume` must be a folder that can be written to: {self.folder}"
            ) from error
        for path in self.folder.glob(".step-*"):
            shutil.rmtree(path, ignore_errors=True)

    def newest(self) -> "tuple[dict[str, Any], Mapping[str, np.ndarray]] | None":
        """What was written last and is whole: `(state, arrays)`, or None where there is nothing.

        Raises:
            ValueError: where all that is there is damaged, or of another version.
        """
        self._torn = []
        for path in reversed(self._all()):
            try:
                found = _read(path)
            except (ValueError, OSError) as error:
                self._torn.append(path)
                warnings.warn(
                    f"The checkpoint {path} is damaged ({error}): the one before it is taken.",
                    stacklevel=4,
                )
                continue
            if found[0].get("format") != FORMAT:
                raise ValueError(
                    f"`resume` must hold checkpoints of format {FORMAT}, which this version of "
                    f"keras_cc reads. Received: format={found[0].get('format')!r} in {path}"
                )
            return found
        if self._torn:
            raise ValueError(
                "`resume` must hold a checkpoint that is whole, or none: remove the folder to "
                f"begin anew. Received: {len(self._torn)} in {self.folder}, all of them damaged"
            )
        return None

    def write(self, step: int, state: dict[str, Any], arrays: Sequence[np.ndarray]) -> None:
        """Have a checkpoint written; the one before it is on disk then.

        Raises:
            OSError: of the one before it.
        """
        self.wait()
        if self._writer is None:
            self._writer = concurrent.futures.ThreadPoolExecutor(1, "keras_cc-checkpoint")
        self._writing = self._writer.submit(self._write, step, {**state, "format": FORMAT}, arrays)

    def wait(self) -> None:
        """Wait until what is being written is on disk.

        Raises:
            OSError: where it could not be written; what was there before is as it was.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def close(self) -> None:
        """Wait, and let the thread go."""
        try:
            self.wait()
        finally:
            if self._writer is not None:
                self._writer.shutdown()
            self._writer = None

    def _all(self) -> list[pathlib.Path]:
        return sorted(p for p in self.folder.glob("step-*") if _NAME.fullmatch(p.name))

    def _write(self, step: int, state: dict[str, Any], arrays: Sequence[np.ndarray]) -> None:
        path = self.folder / f"step-{step:010d}"
        try:
            with whole_folder(path) as unfinished:
                with open(unfinished / _ARRAYS, "wb") as file:
                    np.savez(file, **{f"a{n}": array for n, array in enumerate(arrays)})
                    _to_disk(file)
                state = {**state, "arrays_sha256": file_digest(unfinished / _ARRAYS)}
                with open(unfinished / _STATE, "wb") as file:
                    file.write(sealed(state))
                    _to_disk(file)
        except OSError as error:
            raise _with_words(
                error,
                f"The checkpoint of step {step} could not be written to {self.folder}: make room "
                "there, or go on in another folder with a copy of it. Those that are there are as "
                "they were",
            ) from error
        for torn in self._torn:
            if torn != path:
                shutil.rmtree(torn, ignore_errors=True)
        self._torn = []
        for old in self._all()[: -self.keep]:
            shutil.rmtree(old, ignore_errors=True)


def get(identifier: Any) -> Checkpoints:
    """`Checkpoints` from a folder, or as they are."""
    return identifier if isinstance(identifier, Checkpoints) else Checkpoints(identifier)


def _read(path: pathlib.Path) -> tuple[dict[str, Any], Mapping[str, np.ndarray]]:
    state = unsealed((path / _STATE).read_bytes())
    if state.get("arrays_sha256") != file_digest(path / _ARRAYS):
        raise ValueError("its arrays are not those that were written")
    return state, np.load(path / _ARRAYS, allow_pickle=False)


def _to_disk(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _with_words(error: OSError, words: str) -> OSError:
    return OSError(error.errno, f"{words}. Received: {error.strerror or error}")
