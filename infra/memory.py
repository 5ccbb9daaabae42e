"""How much memory there is left, so that what would take more is refused by name instead of ending the process."""

import re
from contextlib import suppress
from pathlib import Path

_CGROUPS = tuple(  # a container's limit and use of memory, versions 2 and 1
    (f"{folder}/{limit}", f"{folder}/{use}", f"{folder}/memory.stat")
    for folder, limit, use in (
        ("/sys/fs/cgroup", "memory.max", "memory.current"),
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    )
)


def memory_left() -> int | None:
    """Bytes that this machine, or the container, can still give; None where /proc is missing."""
    try:
        told = re.search(r"MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        return None
    left = [int(told[1]) * 1024] if told else []
    for limit, use, parts in _CGROUPS:
        with suppress(OSError, ValueError):  # no cgroup, or "max": no limit
            files = re.findall(r"^(?:in)?active_file (\d+)$", Path(parts).read_text(), re.MULTILINE)  # given up at need
            left.append(int(Path(limit).read_text()) - int(Path(use).read_text()) + sum(map(int, files)))
    return max(0, min(left)) if left else None
