"""The table and the picture of all cases."""

import pickle
from pathlib import Path
from tests.chaos.judge import Outcome

def table(outcomes): return "\n".join(f"{o.case.name} {o.seconds:.0f} redone {o.redone} away {o.away:.1f} during {o.during} {o.losses:.2g} {o.weights:.2g} {o.problems}" for o in outcomes)

def write(out, outcomes):
    import dataclasses
    out.mkdir(parents=True, exist_ok=True)
    out.joinpath("o.pkl").write_bytes(pickle.dumps([dataclasses.replace(o, case=o.case.name) for o in outcomes]))
    return [out]
