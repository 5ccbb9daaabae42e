"""What lies below a folder, whatever somebody has put there: no entry of it ends the walk, or makes it last."""

import os
import stat
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

MOST_BYTES = 1024
"""Of a name below the folder that the walk began in: what S3 takes for a key. What lies deeper is told, not entered."""
MOST_OFTEN = 16
"""Names under which one folder is listed: a few folders full of links to each other have more than can be listed."""
_NOWHERE, _IRREGULAR = "a link that leads nowhere", "it is no regular file"
_NOTHING = (_NOWHERE, _IRREGULAR)
_Place = tuple[int, int]
_Chain = tuple[_Place, "_Chain"] | None


@dataclass(frozen=True)
class Found:
    """A regular file, or what is wrong with an entry that may hold some."""

    name: str
    """Relative to where the walk began, "/"-separated; empty for that folder itself."""
    status: os.stat_result | None = None
    """Of a file."""
    fault: str = ""
    """Why it, or what is below it, is not among the files."""


def walk(folder: Path, follows: Callable[[str], bool] = lambda name: True, nothing: bool = False) -> Iterator[Found]:
    """The files below a folder, none if there is no such folder; files may come and go meanwhile.

    Near ones come first. follows: whether a link of this name is followed; else it is a fault. Links to a folder around
    them are passed over, and so are pipes and devices, at which a reader would wait for ever, and links that lead
    nowhere; nothing: these are faults, too, for whoever was to find all that has a name. What cannot be read or
    lies too deep is a fault, and so is a folder that links lead to again and again. The time is linear in the entries.
    Raises nothing of OSError.
    """
    todo: deque[tuple[str, _Chain]] = deque([("", None)])
    often: Counter[_Place] = Counter()
    while todo:
        name, above = todo.popleft()
        try:
            here = Path(folder, name).stat()
            with os.scandir(folder / name) as listed:
                entries = [*listed]
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            yield Found(name, fault=error.strerror or str(error))
            continue
        place = here.st_dev, here.st_ino
        if _among(place, above):
            continue
        often[place] += 1
        if often[place] > MOST_OFTEN:
            yield Found(name, fault=f"links lead to this folder under more than {MOST_OFTEN} names")
            continue
        for entry in entries:
            found = _found(entry, f"{name}/{entry.name}" if name else entry.name, follows)
            if found is None or (found.fault in _NOTHING and not nothing):
                continue
            if found.status is not None and stat.S_ISDIR(found.status.st_mode):
                todo.append((found.name, (place, above)))
            else:
                yield found


def _found(entry: "os.DirEntry[str]", name: str, follows: Callable[[str], bool]) -> Found | None:
    """A file, a folder that is to be entered, or a fault; None for what is gone."""
    try:
        if entry.is_symlink() and not follows(name):
            return Found(name, fault="a link, expected the file itself")
        status = entry.stat()
    except FileNotFoundError:
        return Found(name, fault=_NOWHERE) if entry.is_symlink() else None
    except OSError as error:
        return Found(name, fault=error.strerror or str(error))
    folder = stat.S_ISDIR(status.st_mode)
    if not folder and not stat.S_ISREG(status.st_mode):
        return Found(name, fault=_IRREGULAR)
    if len(os.fsencode(name)) > MOST_BYTES:
        return Found(name, fault=f"its name is longer than {MOST_BYTES} bytes, with the folders that it lies in")
    return Found(name, status)


def _among(place: _Place, chain: _Chain) -> bool:
    while chain is not None:
        if chain[0] == place:
            return True
        chain = chain[1]
    return False
