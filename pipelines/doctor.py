"""What is wrong with an installation, and what to do, before days are spent on it; no server needed.

python -m pipelines.doctor          storage and Ray as TESSERA_STORAGE and TESSERA_RAY say
python -m pipelines.doctor JOB      JOB is the flow's parameter as JSON: {"storage": "s3://...", "ray": "auto"}

Looks from here and from every node of the cluster. The exit code is 1 where something is bad.
"""

import sys
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from logging import getLogger

from prefect import flow
from prefect.artifacts import create_markdown_artifact
from pydantic import Field, ValidationError

from infra import ray_health
from infra.errors import TesseraError
from infra.health import Demands, Place, Row, Verdict, examine
from infra.store import open_store
from infra.text import SENTENCE, markdown
from pipelines import server_health
from pipelines.fields import Gigabytes, Seconds, told
from pipelines.jobs import StoredJob
from pipelines.logs import flow_logs

log = getLogger("tessera.flow")


class Doctor(StoredJob):
    """Parameters of doctor."""

    least_free_gb: Gigabytes = Field(
        5.0, description="GB that must be free for temporary files, TESSERA_CACHE and a folder store, on each node."
    )
    seconds: Seconds = Field(60.0, description="How long Ray, and then each of its nodes, may take to answer.")


@flow(name="doctor")
def doctor(job: Doctor = Doctor()) -> dict[str, int]:  # noqa: B008 (frozen)
    """What is wrong with the installation as this flow's worker and Ray's nodes see it, as a table.

    Fails if something is bad. Returns how many checks came out ok, warn and bad.
    """
    with flow_logs():
        rows = check(job)
        create_markdown_artifact(to_markdown(rows), key="doctor", description="What is wrong with the installation")
        log.info("\n%s", to_text(rows))
        bad = [row for row in rows if row.verdict is Verdict.BAD]
        if bad:
            first = f"{bad[0].what} ({bad[0].where}): {bad[0].found}"
            raise TesseraError(f"{ending(rows)}; the first: {first}; the artifact `doctor` has all")
    return {str(verdict): sum(row.verdict is verdict for row in rows) for verdict in Verdict}


def check(job: Doctor) -> list[Row]:
    """Look everywhere; what cannot be reached is a row, and the others are checked all the same."""
    storage = open_store(job.storage).url  # absolute: nodes stand elsewhere
    driver = Place("driver", ray_health.gather(storage, None, gpus=False, seconds=job.seconds))
    nodes: list[Place] = []
    try:
        with ray_health.connected(job.ray, job.seconds), _marked(storage, driver) as mark:
            nodes = ray_health.look(storage, mark, job.gpus, job.seconds)
            ray = Row("Ray", job.ray, Verdict.OK, ray_health.summary())
    except TesseraError as error:
        found, _, todo = ray_health.masked(str(error)).partition("; ")
        ray = Row("Ray", job.ray, Verdict.BAD, found, todo or "see `ray status` on its head")
    demands = Demands(storage, job.gpus, job.least_free_gb)
    return [ray, *examine(driver, nodes, demands), *server_health.judge(server_health.ask())]


@contextmanager
def _marked(storage: str, driver: Place) -> Iterator[str | None]:
    """A key that lies on the driver's store meanwhile; None where that store is no use."""
    if driver.facts is None or driver.facts.store.problem:
        yield None
        return
    store, key = open_store(storage), f"{ray_health.PROBES}/{uuid.uuid4().hex}"
    store.write(key, b"")
    try:
        yield key
    finally:
        with suppress(TesseraError):  # it was there a moment ago, and each node has said how it is now
            store.delete(key)


def ending(rows: Sequence[Row]) -> str:
    """`all well`, or how many things to do."""
    todo, bad = sum(row.verdict is not Verdict.OK for row in rows), sum(row.verdict is Verdict.BAD for row in rows)
    return f"things to do: {todo}, of which bad: {bad}" if todo else "all well"


def to_text(rows: Sequence[Row]) -> str:
    """Aligned columns; what to do stands below what was found."""
    wide = [max(len(getattr(row, name)) for row in rows) for name in ("verdict", "what", "where")]
    lines = []
    for row in rows:
        cells = zip((row.verdict, row.what, row.where), wide, strict=True)
        lines.append("  ".join([*(cell.ljust(width) for cell, width in cells), row.found]))
        if row.todo:
            lines.append(f"{' ' * (sum(wide) + 6)}-> {row.todo}")
    return "\n".join([*lines, ending(rows)])


def to_markdown(rows: Sequence[Row]) -> str:
    """The same as a table in Markdown."""
    lines = [f"### {ending(rows)}", "", "| | check | where | found | what to do |", "|---|---|---|---|---|"]
    for row in rows:
        cells = (row.verdict, row.what, row.where, row.found, row.todo)
        lines.append(f"| {' | '.join(markdown(cell, SENTENCE) for cell in cells)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    """Print the table. Returns the exit code."""
    if arguments[:1] in (["-h"], ["--help"]):
        sys.stdout.write(__doc__ or "")
        return 0
    try:
        if len(arguments) > 1:
            raise TesseraError(f"{' '.join(arguments)}: expected one JOB; see --help")
        rows = check(Doctor.model_validate_json(arguments[0] if arguments else "{}"))
    except ValidationError as error:
        sys.stderr.write(f"error: {told(error)}\n")
        return 1
    except TesseraError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 130
    sys.stdout.write(f"{to_text(rows)}\n")
    return int(any(row.verdict is Verdict.BAD for row in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
