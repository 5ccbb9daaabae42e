"""The one way to list what lies below a folder, whatever stands there.

Somebody else filled that folder: with links to themselves, thousands of links to each other, folders that nobody may
enter or that lie hundreds deep. Each of these costs its own place and is told; the rest is listed all the same.
"""

import os
from collections import deque
from collections.abc import Iterator
from pathlib import Path

DEEPEST = 60
"""Folders in folders that are gone into."""


def walk(
    folder: str | Path, untold: list[str], deepest: int = DEEPEST, folders: bool = False
) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """The regular files below a folder, near ones first, with their names relative to it, "/"-separated.

    Links are followed, after all else and to no folder that was listed already, so none leads in circles. Nothing if
    there is no such folder; files may come and go meanwhile. Neither pipes nor devices. folders: those too. Places that
    cannot be listed add a sentence each to `untold`; never raises OSError.
    """
    known: set[tuple[int, int]] = set()
    waiting, links = deque([("", str(folder), 0)]), deque[tuple[str, str, int]]()
    while waiting or links:
        prefix, path, depth = (waiting or links).popleft()
        try:
            status = Path(path).stat()
            if (here := (status.st_dev, status.st_ino)) in known:
                continue
            known.add(here)
            with os.scandir(path) as found:
                items = list(found)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            untold.append(f"{path}: cannot be listed ({error.strerror or error})")
            continue
        for item in items:
            name = f"{prefix}{item.name}"
            try:
                is_folder, is_file = item.is_dir(), item.is_file()
            except OSError as error:
                untold.append(f"{item.path}: cannot be read ({error.strerror or error})")
                continue
            if is_file or (folders and is_folder):
                yield name, item
            if is_folder and depth < deepest:
                (links if item.is_symlink() else waiting).append((f"{name}/", item.path, depth + 1))
            elif is_folder and deepest == DEEPEST:
                untold.append(f"{item.path}: not listed, it lies more than {DEEPEST} folders deep")
