"""`make bench`: every benchmark in a process of its own; exit code 1 if a bar is short."""

import subprocess
import sys
from pathlib import Path

if __name__ == "__main__":
    names = sorted(p.stem for p in Path(__file__).parent.glob("*.py") if p.stem not in ("__main__", "__init__", "bars"))
    codes = [subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], check=False).returncode for name in names]
    sys.exit(max(codes, default=0))
