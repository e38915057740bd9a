"""The cache of the demo models: presets that were converted once.

A conversion that was interrupted leaves nothing that looks like a preset, and a manifest with the
size of every file tells a whole preset from a damaged one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

from keras_cc.whole_files import whole_folder

CACHE_VARIABLE = "KERAS_CC_CACHE"
MANIFEST = "keras_cc_manifest.json"


def cache_root(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Returns the folder of the cached presets.

    Args:
        cache_dir: A folder that wins over everything else. By default the environment variable
            `KERAS_CC_CACHE`, and without it `~/.cache/keras_cc`.

    Returns:
        The folder, which need not exist yet.
    """
    chosen = cache_dir or os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "keras_cc"
    return Path(chosen).expanduser()


def cached_preset(
    name: str,
    build: Callable[[str], None],
    *,
    version: int,
    cache_dir: str | os.PathLike[str] | None = None,
) -> str:
    """Returns a preset directory, building it first where the cache has no whole one.

    Args:
        name: The preset's folder name in the cache.
        build: Called with an empty folder; writes the preset there.
        version: The version of the conversion. A preset of another version is rebuilt.
        cache_dir: See `cache_root`.

    Returns:
        The preset directory, as KerasHub's `from_preset` takes it.
    """
    target = cache_root(cache_dir) / name
    if _is_whole(target, version):
        return str(target)
    # Another process may finish the same conversion meanwhile: then its preset is kept.
    with whole_folder(target, keeps=lambda: _is_whole(target, version)) as fresh:
        build(str(fresh))
        manifest = {"version": version, "files": _sizes(fresh)}
        (fresh / MANIFEST).write_text(json.dumps(manifest, indent=2), encoding="utf-8")
    return str(target)


def _sizes(folder: Path) -> dict[str, int]:
    files = (file for file in sorted(folder.rglob("*")) if file.is_file())
    return {
        file.relative_to(folder).as_posix(): file.stat().st_size
        for file in files
        if file.name != MANIFEST
    }


def _is_whole(folder: Path, version: int) -> bool:
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = manifest["files"]
        return manifest["version"] == version and all(
            (folder / name).stat().st_size == size for name, size in files.items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
