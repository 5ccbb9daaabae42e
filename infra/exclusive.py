"""Giving a file its name unless that is taken: of all who try at once, on all machines of a file system, one succeeds.

A hard link does it in one step. Where there are none (exFAT, FAT, most FUSE mounts, BeeGFS) a second file does, made by
O_EXCL, which those have: who makes it may look and rename, and removes it. If it stays, its maker was killed in the
moment between.
"""

import errno
import os
import random
import time
from contextlib import suppress
from pathlib import Path

_NO_LINKS = {errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK}
_HELD_SECONDS = 10.0
"""Who may rename does so within a millisecond; after so long it counts as killed."""
_POLL_SECONDS = 0.01


def give_name(whole: Path, path: Path, claim: Path) -> bool:
    """Let `path` name the file that `whole` names, which is written and closed, unless `path` exists: then False.

    claim: a name in the same folder, the same for all who try. `whole` may be gone afterwards. Raises OSError.
    """
    try:
        path.hardlink_to(whole)
    except FileExistsError:
        return _same(whole, path)  # a network's file system asks again when an answer is lost, and then meets our own
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        return _rename(whole, path, claim)
    return True


def _same(whole: Path, path: Path) -> bool:
    with suppress(FileNotFoundError):  # deleted meanwhile
        return path.samefile(whole)
    return False


def _rename(whole: Path, path: Path, claim: Path) -> bool:
    waited, seen = 0.0, None
    patience = _HELD_SECONDS * random.SystemRandom().uniform(1, 2)  # or all who wait would take the claim away at once
    while not path.exists():
        try:
            os.close(os.open(claim, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            held = _identity(claim)
            waited, seen = (waited + _POLL_SECONDS if held == seen else 0.0), held
            if waited > patience:
                claim.unlink(missing_ok=True)
            time.sleep(_POLL_SECONDS)
            continue
        try:
            if path.exists():
                return False
            whole.rename(path)
            return True
        finally:
            claim.unlink(missing_ok=True)
    return False


def _identity(path: Path) -> tuple[int, int] | None:
    with suppress(FileNotFoundError):
        found = path.stat()
        return found.st_ino, found.st_mtime_ns
    return None
