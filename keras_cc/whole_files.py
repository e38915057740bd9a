"""Files and folders that appear when they are whole. Not public.

What is written goes into a scratch folder beside the place that it is for, on the same disk, and is
renamed when nothing went wrong. A process that is killed leaves at worst a scratch folder, whose
name begins with a dot; an exception leaves nothing, and what was there before stays.
"""

import contextlib
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def whole_file(path: "str | os.PathLike[str]") -> Iterator[pathlib.Path]:
    """A path to write to; the file there becomes `path`, in place of one that is there.

    Example:

    ```python
    with whole_file("cell.json") as unfinished:
        unfinished.write_text("{}")
    ```
    """
    path = pathlib.Path(path).absolute()
    with _scratch_beside(path) as scratch:
        unfinished = scratch / path.name
        yield unfinished
        os.replace(unfinished, path)


@contextlib.contextmanager
def whole_folder(
    path: "str | os.PathLike[str]", keeps: Callable[[], bool] = lambda: False
) -> Iterator[pathlib.Path]:
    """An empty folder to write to, which becomes `path`, in place of one that is there.

    Args:
        path: the folder; those above it are made where they are not there.
        keeps: whether what is at `path` in the end, such as another process' folder, is as good
            and stays.

    Example:

    ```python
    with whole_folder("presets/tiny") as unfinished:
        causal_lm.save_to_preset(unfinished)
    ```
    """
    path = pathlib.Path(path).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    with _scratch_beside(path) as scratch:
        unfinished, replaced = scratch / path.name, scratch / "replaced"
        unfinished.mkdir()
        yield unfinished
        if keeps():
            return
        # A folder that is there cannot be renamed over, so it steps aside.
        if path.exists():
            path.rename(replaced)
        try:
            unfinished.rename(path)
        except OSError:
            if keeps():
                return
            if replaced.exists():
                replaced.rename(path)
            raise


@contextlib.contextmanager
def _scratch_beside(path: pathlib.Path) -> Iterator[pathlib.Path]:
    with tempfile.TemporaryDirectory(
        prefix=f".{path.name}-", dir=path.parent, ignore_cleanup_errors=True
    ) as scratch:
        yield pathlib.Path(scratch)
