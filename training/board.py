"""What the workers of a run tell its flow, and when they have tried often enough. A Ray actor; knows nothing of Ray."""

import math

from training.metrics import Row

ATTEMPTS = 3
"""With the same number of workers, to get past one checkpoint."""
CREWS = 10
"""Changes of that number meanwhile."""
STARTING, STEPPING = "starting", "stepping"


class Board:
    """A Ray actor where workers leave what the flow shows: their own output stays on their machines."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.latest: tuple[Row, int] | None = None
        self.told = -math.inf
        self.attempts, self.crews, self.reached, self.world = 0, 0, -1, 0
        self.stumbled = self.failed = ""
        self.doing = ""

    def begins(self, step: int, world: int) -> bool:
        """An attempt to go on from a step; True: there were too many of them, the run has failed.

        Another number of workers is another attempt, as nodes have come or gone, but not without end.
        """
        self.doing = STARTING
        if self.failed:
            return True
        if step > self.reached:
            self.attempts, self.crews, self.stumbled = 0, 0, ""
        elif world != self.world:
            self.attempts, self.crews = 0, self.crews + 1
        self.attempts, self.reached, self.world = self.attempts + 1, max(self.reached, step), world
        if self.attempts > ATTEMPTS or self.crews > CREWS:
            tried = f"{CREWS} changes of workers" if self.crews > CREWS else f"{ATTEMPTS} attempts"
            why = self.stumbled or "workers died, perhaps for lack of memory; see Ray's logs"
            self.failed = f"{tried} got no further than the checkpoint of step {self.reached}: {why}"
            return True
        if step or self.attempts > 1:
            where = f"from the checkpoint of step {step}" if step else "from the start"
            self.says(f"going on {where} with {world} workers (attempt {self.attempts} of {ATTEMPTS} from there)")
        return False

    def says(self, line: str) -> None:
        """A line for the flow's log."""
        self.lines.append(line)

    def row(self, row: Row, steps: int) -> None:
        """The flow's log has a line a minute, and fifty over the run."""
        due = row.step * 50 // steps > (row.step - 1) * 50 // steps or row.time > self.told + 60
        if due or row.figures:
            self.lines.append(f"step {row.step} of {steps}: {row}")
            self.told = row.time
        self.latest, self.doing = (row, steps), STEPPING

    def does(self) -> str:
        """STARTING, STEPPING, or empty while there are no workers that said so."""
        return self.doing

    def stumbles(self, problem: str) -> None:
        """Workers ended by what another attempt may get past."""
        self.stumbled, self.doing = problem, ""
        self.says(f"stopped: {problem}")

    def fails(self, problem: str, own: bool) -> None:
        """What no attempt would get past. All workers fail at once; the one at fault is to be heard."""
        if own or not self.failed:
            self.failed = problem

    def failure(self) -> str:
        """Why the run has failed; empty if it has not."""
        return self.failed

    def take(self) -> tuple[list[str], tuple[Row, int] | None]:
        """(the log's lines since the last call, the newest row with the run's steps if there is a new one)."""
        lines, self.lines = self.lines, []
        latest, self.latest = self.latest, None
        return lines, latest
