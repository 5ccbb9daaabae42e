"""What ablate is asked to do. Imports no Prefect, so that a job can be refused before anything starts."""

import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import AfterValidator, Field, model_validator

from evaluation.evaluate import evaluation_path
from infra.errors import TesseraError
from infra.store import open_store
from pipelines.fields import Count, Seed, Text, bounded
from pipelines.job import TrainCoco
from training.recipe import Recipe
from training.recipes.grids import GRIDS, GridRow, grid

_SEED = "train.seed"
_MOST = 1000
"""Rows of a grid."""


@dataclass(frozen=True)
class Trial:
    """One row of a grid with one seed."""

    row: GridRow
    seed: int
    job: TrainCoco
    """What train-coco would be asked to do for it: it finds the same run."""

    @property
    def name(self) -> str:
        """In logs and among the flow run's tasks."""
        return f"{self.row.title}, seed {self.seed}"

    @property
    def chosen(self) -> Recipe:
        """The recipe with all that the row changes."""
        return self.job.resolved()


class Ablate(TrainCoco):
    """Parameters of ablate: those of train-coco, from which each trial departs, and the grid."""

    grid: Text | Annotated[dict[str, list[Any] | dict[str, Any]], AfterValidator(bounded)] = Field(
        description='Lists of values by option, of which all combinations are tried: {"method.eds_distance": [0, 20]}; '
        'or rows by title: {"plain": {"method.dice": 0}, "all": {}}; or a named grid: ' + ", ".join(GRIDS) + "."
    )
    seeds: tuple[Seed, ...] = Field(
        (0,), min_length=1, max_length=1000, description="Each row is trained once with each of them."
    )
    budget: Count = Field(1, description="How many trials may run at once, each on `workers` workers.")

    @model_validator(mode="after")
    def _trials_are_possible(self) -> "Ablate":
        if self.name is not None:
            raise TesseraError(f"name {self.name!r}: the runs of a grid have none")
        if len({*self.seeds}) < len(self.seeds):
            raise TesseraError(f"seeds {[*self.seeds]}: one of them is there twice")
        self.trials()
        return self

    def rows(self) -> tuple[GridRow, ...]:
        """The lines of the table. TesseraError for an unknown name, an option without values, values beside rows."""
        if isinstance(self.grid, str):
            return grid(self.grid)
        if not self.grid:
            return (GridRow("the recipe", {}),)
        broken = next((name for name in self.grid if not name.isprintable() or not name.strip()), None)
        if broken is not None:
            raise TesseraError(f"grid: {broken!r}: expected a title or an option that can be printed on one line")
        values = {name: value for name, value in self.grid.items() if isinstance(value, list)}
        if not values:
            return tuple(GridRow(title, row) for title, row in self.grid.items() if isinstance(row, dict))
        if len(values) < len(self.grid):
            other = next(name for name in self.grid if name not in values)
            raise TesseraError(f"grid: {next(iter(values))!r} has a list of values, {other!r} is a row: one of the two")
        return tuple(_product(values))

    def trials(self) -> tuple[Trial, ...]:
        """All rows with the first seed, then with the next one. TesseraError naming the row that cannot be."""
        rows = self.rows()
        return tuple(Trial(row, seed, self._job(row, seed)) for seed in self.seeds for row in rows)

    def rows_once(self) -> tuple[Trial, ...]:
        """The trials of the first seed: whatever can be wrong with a row is wrong with these."""
        return tuple(trial for trial in self.trials() if trial.seed == self.seeds[0])

    def _job(self, row: GridRow, seed: int) -> TrainCoco:
        own = {name: getattr(self, name) for name in TrainCoco.model_fields}
        with blaming(row):
            if _SEED in self.options or _SEED in row.options:
                raise TesseraError(f"option {_SEED!r}: `seeds` says which ones")
            return TrainCoco(**own | {"options": _overlaid(self.options, row.options) | {_SEED: seed}})

    def check(self) -> None:
        """Raise TesseraError as TrainCoco.check does for any row, and for two rows that ask for the same."""
        open_store(self.storage).check()
        titles: dict[str, str] = {}
        for trial in self.rows_once():
            with blaming(trial.row):
                trial.job.check()
                result = evaluation_path(trial.chosen, trial.chosen.run_path("", self.init_path), "")
                if result in titles:
                    raise TesseraError(f"it asks for the same as row {titles[result]!r}")
                titles[result] = trial.row.title

    @property
    def at_once(self) -> int:
        """How many trials run side by side at the most."""
        return min(self.budget, len(self.trials()))

    @property
    def needs(self) -> dict[str, int]:
        """What ray_cluster.session is to make sure of: room for all trials that run at once."""
        return {kind: self.at_once * count for kind, count in super().needs.items()}


@contextmanager
def blaming(row: GridRow) -> Iterator[None]:
    """A TesseraError says which row of the grid it is about."""
    try:
        yield
    except TesseraError as error:
        raise TesseraError(f"grid row {row.title!r}: {error}") from error


def _overlaid(options: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
    """The job's options with the row's in their place: a row that takes a group out takes the job's parts of it out."""
    gone = tuple(f"{name}." for name, value in row.items() if not isinstance(value, dict))
    return {name: value for name, value in options.items() if not name.startswith(gone)} | dict(row)


def _product(values: Mapping[str, Sequence[Any]]) -> Iterator[GridRow]:
    for name, listed in values.items():
        if not listed:
            raise TesseraError(f"grid: option {name!r} has no values")
    if math.prod(map(len, values.values())) > _MOST:
        raise TesseraError(f"grid: more than {_MOST} combinations")
    last = [name.rpartition(".")[2] for name in values]
    shown = last if len({*last}) == len(last) else [*values]  # short where that is clear
    for chosen in itertools.product(*values.values()):
        title = ", ".join(f"{name}={_text(value)}" for name, value in zip(shown, chosen, strict=True))
        yield GridRow(title, dict(zip(values, chosen, strict=True)))


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
