"""What a cluster needs, from what one machine shows: `python -m benchmarks.sizing` prints the tables of docs/sizing.md.

First the inputs, all measured here within five minutes: one loader process of base_420 on coco_mini, the store, index
and manifest, evaluation, checkpoint, Ray's head and Prefect's server. Then the plan, which is arithmetic on them; a
GPU's images/s are benchmarks.scaling's assumption about an H100. `--quick` only shows that it works.
"""

import io
import itertools
import json
import os
import pickle
import sqlite3
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import httpx
import psutil
import ray
import torch

from benchmarks.model_size import COCO
from benchmarks.scaling import PER_NODE, Inputs
from benchmarks.train_step import flops_per_image
from evaluation import coco_format
from evaluation.evaluate import ShardScore, gather
from evaluation.measures import Score, measure_image
from infra import artifacts, processes, ray_cluster
from infra.seaweed import seaweed
from infra.store import Store, open_store
from pipelines.server import prefect_server
from preprocessing.layouts import read_index
from preprocessing.shard_reading import read_shard_samples
from preprocessing.shards import Shard, ShardConfig, ShardSet, commit, compute_shard, plan, read_set, write_set
from preprocessing.source import read_sample
from preprocessing.synthetic import SyntheticConfig
from preprocessing.synthetic import write_set as write_scenes
from training.reader import BatchStream, epoch_part, load_batches
from training.recipes.generalist import base_420

COCO_MINI = Path(__file__).parents[2] / "shared" / "data" / "coco_mini"
RECIPE, IMAGES, SHARD, HUGE = base_420(), 118_287, 128, 100_000_000
SCALE = 0.02 if "--quick" in sys.argv else 1.0
known: dict[str, float] = {}


def tell(name: str, value: float, unit: str) -> None:
    """One measured input, kept for the plan."""
    known[name] = value
    print(f"| {name} | {value:,.4g} | {unit} |", flush=True)


def fresh(function: Callable[..., dict[str, float]], name: str, images: int, *more: Any) -> None:
    """Tell what the function finds for so many images, each figure an image, in a process whose memory is its own."""
    with ProcessPoolExecutor(1, get_context("fork")) as pool:  # nothing here has threads yet
        for what, value in pool.submit(function, images, *more).result().items():
            tell(f"{name}, {what}", value / images, f"an image, of {images:,}")


def memory(field: str = "VmRSS") -> int:
    """Bytes that this process holds; VmHWM: held at most since `start`."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) * 1024


def start() -> tuple[float, int]:
    """(the clock, the memory) from which `spent` counts."""
    Path("/proc/self/clear_refs").write_text("5")
    return time.perf_counter(), memory()


def spent(what: str, began: tuple[float, int]) -> dict[str, float]:
    seconds, held, most = time.perf_counter() - began[0], memory() - began[1], memory("VmHWM") - began[1]
    return {f"us to {what}": 1e6 * seconds, f"B held then to {what}": held, f"B at most to {what}": most}


def precompute(store: Store, scratch: Path) -> ShardSet:
    """coco_mini's train images as base_420 wants them, in shards of 20 so that there are some."""
    index, config = read_index(COCO_MINI, "train2017"), replace(RECIPE.shards, samples=20)
    planned, images = plan(store, index, config), len(index.records)
    again = tuple(replace(record, image_id=i * images + j) for i in range(30) for j, record in enumerate(index.records))
    began = time.perf_counter()
    many = plan(open_store(str(scratch)), replace(index, records=again), RECIPE.shards)
    tell("plan", 1e3 * (time.perf_counter() - began) / len(again), f"ms an image, by the clock, of {len(again):,}")
    began = time.perf_counter()
    deque((record.fingerprint() for record in again), maxlen=0)
    tell("fingerprint", 1e3 * (time.perf_counter() - began) / len(again), "ms an image, one after the other")
    job = replace(many.jobs[0], records=many.jobs[0].records[:images])  # no image twice
    tell("task", len(ray.cloudpickle.dumps(job)) / images * SHARD / 1e3, "kB of a task's argument, a shard of 128")
    compute_shard(str(scratch / "warm"), planned.jobs[0])
    began = time.process_time()
    shards = [compute_shard(store.url, job) for job in planned.jobs]
    tell("precompute", 1e3 * (time.process_time() - began) / images, "CPU ms an image, with its upload")
    made = commit(store, planned, index, config, shards, 0.0)
    tell("sample", sum(shard.bytes for shard in made.shards) / made.samples / 1e3, "kB an image on the store")
    return made


def loader(store: Store, shards: ShardSet) -> None:
    """One loader process of one of eight training workers: 2048 / 8 samples in its buffer, 32 a step, from S3."""
    config = replace(RECIPE.reader, streams=1, workers=1, shuffle=RECIPE.reader.shuffle // 8)
    batches, count = load_batches(BatchStream(shards, store.url, config, 32)), max(3, int(40 * SCALE))
    deque(itertools.islice(batches, 9), maxlen=0)
    process = max(psutil.Process().children(recursive=True), key=lambda child: sum(child.cpu_times()[:2]))
    cpu, began = sum(process.cpu_times()[:2]), time.perf_counter()
    deque(itertools.islice(batches, count), maxlen=0)
    rate = 32 * count / (time.perf_counter() - began)
    tell("loader", rate, "images/s of one loader process, by the clock")
    tell("loader CPU", 1e3 * (sum(process.cpu_times()[:2]) - cpu) / (32 * count), "ms an image, of that process")
    tell("loader memory", process.memory_full_info().uss / 1e6, "MB of its own")
    del batches
    cpu = time.process_time()
    deque(itertools.chain.from_iterable(read_shard_samples(store.url, s) for s in shards.shards * 5), maxlen=0)
    tell("skip", 1e3 * (time.process_time() - cpu) / (5 * shards.samples), "CPU ms an image that a restart passes over")


def fetch(url: str, keys: list[str], begin: float, seconds: float) -> tuple[float, float]:
    """Requests/s and bytes/s of one reader, for so many seconds from `begin` on."""
    store, count, size = open_store(url), 0, 0
    time.sleep(max(0.0, begin - time.time()))
    while time.time() < begin + seconds:
        size += len(store.read(keys[count % len(keys)]))
        count += 1
    return count / (time.time() - begin), size / (time.time() - begin)


def gets(store: Store) -> None:
    """GETs of shards of 128 and of 32 samples and of records, by 1, 2 and 4 processes beside the server."""
    with ProcessPoolExecutor(4, get_context("spawn")) as pool:
        for samples, size in ((SHARD, known["sample"] * SHARD), (32, known["sample"] * 32), (0, 2)):
            keys = [f"bytes/{samples}-{number}" for number in range(12)]
            for key in keys:
                store.write(key, os.urandom(int(size * 1e3)))
            for number in (1, 2, 4):
                begin, seconds = time.time() + (4 if samples == SHARD else 0.1), 0.3 + 1.2 * SCALE
                tasks = [pool.submit(fetch, store.url, keys[i:] + keys[:i], begin, seconds) for i in range(number)]
                asked, read = map(sum, zip(*(task.result() for task in tasks), strict=True))
                what = f"MB/s, {asked:,.0f} requests/s, objects of {size / 1e3:,.3g} MB"
                tell(f"GET {samples or 'record'}, {number} readers", read / 1e6, what)


def imagined(images: int, same_ids: bool = False) -> ShardSet:
    """A set of so many images in shards of 128; one with the same ids in all takes less memory than a real one."""
    first, starts = tuple(range(SHARD)), range(0, images, SHARD)
    ids = [first[: images - i] if same_ids else tuple(range(i + 10**8, min(i + SHARD, images) + 10**8)) for i in starts]
    shards = [Shard(f"precompute/shards/{i:016x}.tar", x, x, 24_000_000, f"{i:064x}", ()) for i, x in enumerate(ids)]
    return ShardSet("precompute/a/b", COCO, ShardConfig(), tuple(shards), ())


def cuts() -> None:
    """What streams fetch of COCO's shards, over what there is; and what an epoch's order takes with 100 million."""
    shards = imagined(IMAGES, same_ids=True).shards
    for streams in (64, 256, 512, 768):
        parts = [len(epoch_part(shards, 0, 0, stream, streams)) for stream in range(streams)]
        unit = f"GETs for each of {len(shards)} shards, {min(parts)} to {max(parts)} an epoch and stream"
        tell(f"cut {streams}", sum(parts) / len(shards), unit)
    shards = imagined(int(HUGE * SCALE), same_ids=True).shards
    began = time.perf_counter()
    epoch_part(shards, 0, 0, 5, 512)
    tell("epoch", (time.perf_counter() - began) / SCALE, f"s of one stream at the begin of an epoch, {HUGE:,} images")


def written(images: int, url: str) -> dict[str, float]:
    store, made = open_store(url), imagined(images)
    began = start()
    write_set(store, made, ())
    return spent("write", began) | {"B": len(store.read(f"{made.path}/{artifacts.MANIFEST}"))}


def opened(images: int, url: str) -> dict[str, float]:
    """As every training worker does."""
    began = start()
    made = read_set(open_store(url), "precompute/a/b")
    figures = spent("read", began)
    assert made is not None
    Path(url, "handed").write_bytes(pickle.dumps(BatchStream(made, url, RECIPE.reader, images)))
    return figures


def handed(images: int, url: str) -> dict[str, float]:
    """As a DataLoader hands it to each of its processes."""
    data, began = Path(url, "handed").read_bytes(), start()
    stream = pickle.loads(data)
    assert sum(len(shard.image_ids) for shard in stream.shards) == images
    return spent("hand over", began)


def index(images: int, scratch: str) -> dict[str, float]:
    """Reading the annotations of so many images: coco_mini's rows again and again, with empty files."""
    root, name = Path(scratch, f"index-{images}"), "annotations/panoptic_train2017"
    content = json.loads((COCO_MINI / f"{name}.json").read_text())
    for kind, key, ending, folder in (("images", "id", "jpg", "train2017"), ("annotations", "image_id", "png", name)):
        (root / folder).mkdir(parents=True)
        content[kind] = [{**content[kind][i % 100], key: i, "file_name": f"{i:012d}.{ending}"} for i in range(images)]
        for row in content[kind]:
            (root / folder / row["file_name"]).touch()
    (root / f"{name}.json").write_text(json.dumps(content))
    del content
    began = start()
    read = read_index(root, "train2017")
    figures = spent("index", began) | {"B of JSON": (root / f"{name}.json").stat().st_size}
    assert len(read.records) == images
    return figures


def merging(images: int) -> dict[str, float]:
    """What the driver of an evaluation holds and does: coco_mini's val images, found without a fault, many times."""
    read = read_index(COCO_MINI, "val2017")
    truths = [read_sample(record, read.labels)[1] for record in read.records]
    scores = [measure_image(truth, truth, read.labels) for truth in truths]
    rows = tuple(coco_format.annotation(truth, read.labels, 0, f"{0:012d}.png") for truth in truths)
    one = ShardScore(sum(scores, Score.zero(len(read.labels))), {i: s.pq for i, s in enumerate(scores)}, rows)
    data, parts, began = pickle.dumps(one), list[ShardScore](), start()  # tasks' results come pickled
    for first in range(0, images, len(scores)):
        copy: ShardScore = pickle.loads(data)
        parts.append(replace(copy, by_image={first + i: stats for i, stats in copy.by_image.items()}))
    figures = spent("receive", began)
    began = start()
    gather(parts, replace(imagined(0), labels=read.labels, shards=(Shard("", (), tuple(range(images)), 0, "", ()),)))
    return figures | spent("merge", began)


def checkpoint(store: Store) -> None:
    """A quarter of base_420's: weights and two moments, as training.checkpoints writes and reads it."""
    with torch.device("meta"):
        weights = sum(p.numel() for p in RECIPE.build(COCO).parameters())
    tell("weights", weights, "of base_420, 12 bytes each in a checkpoint")
    state, buffer = {str(i): torch.randn(int(weights * SCALE) // 4) for i in range(3)}, io.BytesIO()
    began = time.perf_counter()
    torch.save(state, buffer)
    store.write("checkpoint", buffer.getvalue())
    tell("checkpoint", len(buffer.getvalue()) / (time.perf_counter() - began) / 1e6, "MB/s to pack and write")
    began = time.perf_counter()
    torch.load(io.BytesIO(store.read("checkpoint")), weights_only=True)
    tell("restore", len(buffer.getvalue()) / (time.perf_counter() - began) / 1e6, "MB/s to read and unpack")


def head() -> None:
    """Ray's head and driver: tasks that only make a 0, then the same while map_tasks believes in a larger cluster."""
    with ray_cluster.session():
        ray_cluster.map_tasks(int, [()] * 100, lambda _: None)
        before, began, count = ray_memory(), time.perf_counter(), int(10_000 * SCALE)
        ray_cluster.map_tasks(int, [()] * count, lambda _: None)
        tell("tasks", count / (time.perf_counter() - began), f"empty tasks/s of map_tasks, {count:,} of them")
        for name, held in ray_memory().items():
            tell(f"{name} memory", held / 1e6, f"MB, {(held - before[name]) / count:,.0f} B more for each of the tasks")
        began = time.perf_counter()
        deque((ray.cluster_resources() for _ in range(100)), maxlen=0)
        tell("resources", 10 * (time.perf_counter() - began), "ms of ray.cluster_resources(), one node")
        for cpus in (32, 512, 4096):
            window(cpus)


def window(cpus: int) -> None:
    """Tasks/s while 2 tasks for each of `cpus` CPUs are in flight, of which this machine has two."""
    done, seconds, before, held = list[float](), 0.5 + 2.5 * SCALE, memory(), list[int]()

    def arguments() -> Iterator[tuple[()]]:
        while not done or time.perf_counter() < done[0] + seconds:
            yield ()

    def note(_: int) -> None:
        done.append(time.perf_counter())
        held.append(memory()) if len(done) == 1 else None

    with mock.patch.object(ray, "cluster_resources", return_value={"CPU": cpus}):
        ray_cluster.map_tasks(int, arguments(), note)
    rate = sum(moment < done[0] + seconds for moment in done) / seconds
    pending = (held[0] - before) / (2 * cpus) / 1e3
    tell(f"tasks, {cpus} CPUs", rate, f"empty tasks/s with {2 * cpus} in flight, {pending:,.3g} kB of the driver each")


def ray_memory() -> dict[str, float]:
    """Bytes of this process and of the two that are Ray's head."""
    driver = psutil.Process()
    servers = [p for p in driver.children(recursive=True) if p.name() in ("gcs_server", "raylet")]
    return {"driver": memory(), **{process.name(): process.memory_info().rss for process in servers}}


def prefect(scratch: Path) -> None:
    """Rows and bytes of two runs of train-coco, the second of which finds all done; and what the server takes."""
    scenes, home = write_scenes(scratch, SyntheticConfig(train=24, val=10, size=(48, 48))), scratch / "prefect"
    job = json.dumps({"data": str(scenes), "storage": str(scratch / "runs"), "recipe": "debug"})
    with prefect_server(home):
        before = database(home)
        for which in ("first", "repeated"):
            environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
            command = [sys.executable, "-m", "pipelines.embedded", job]
            run = processes.start(command, environment, scratch, scratch / "log")
            assert run.wait() == 0, (scratch / "log").read_text()
            time.sleep(4)  # events come late
            before, (rows, size) = database(home), before
            tell(f"{which} run", before[0] - rows, f"rows of train-coco, {(before[1] - size) / 1e3:.0f} kB")
        requests(os.environ["PREFECT_API_URL"], home)


def database(home: Path) -> tuple[int, int]:
    """(rows in all tables, bytes)."""
    with closing(sqlite3.connect(home / "prefect.db")) as base:
        base.execute("pragma wal_checkpoint(truncate)")
        tables = [name for (name,) in base.execute("select name from sqlite_master where type = 'table'")]
        rows = sum(base.execute(f'select count(*) from "{table}"').fetchone()[0] for table in tables)
        return rows, (home / "prefect.db").stat().st_size


def requests(url: str, home: Path) -> None:
    """Flow runs made one after the other and 50 at once, and lines of log."""
    login = tuple(os.environ["PREFECT_API_AUTH_STRING"].split(":"))
    with httpx.Client(base_url=url, timeout=60, auth=login, limits=httpx.Limits(max_connections=50)) as client:
        run = {"flow_id": client.post("/flows/", json={"name": "none"}).json()["id"]}
        began, count = time.perf_counter(), max(5, int(100 * SCALE))
        codes = [client.post("/flow_runs/", json=run).status_code for _ in range(count)]
        tell("flow runs", count / (time.perf_counter() - began), f"/s made in turn, {codes.count(503)} answered 503")
        with ThreadPoolExecutor(50) as pool:
            codes = [*pool.map(lambda _: client.post("/flow_runs/", json=run).status_code, range(50))]
        tell("burst", codes.count(503), "of 50 flow runs asked for at once were answered 503")
        line = "train2017: shard 100000 of 781250, 128 samples, 24.4 MB, 2.1 s CPU, worker's peak 480.0 MB"
        row = {"name": "tessera.precompute", "level": 20, "message": line, "timestamp": "2026-01-01T00:00:00Z"}
        before, began, count = database(home), time.perf_counter(), max(1, int(20 * SCALE))
        for _ in range(count):
            client.post("/logs/", json=[row] * 250).raise_for_status()
        tell("log lines", 250 * count / (time.perf_counter() - began), "lines/s, 250 a request")
        tell("log line", (database(home)[1] - before[1]) / (250 * count), "B in the database")


def needs(gpus: int, images: int, processes: int) -> dict[str, str]:
    """What a set of images on so many GPUs needs, with `processes` loader processes a GPU."""
    inputs, each = Inputs(), RECIPE.train.batch / gpus
    compute = each * flops_per_image(RECIPE) / (inputs.flops * inputs.used)
    moved = 2 * (gpus - 1) / gpus * 4 * known["weights"]
    rate = each / max(compute, moved / (inputs.inside if gpus <= PER_NODE else inputs.between))
    streams, shards, nodes = gpus * processes, -(-images // SHARD), gpus // PER_NODE
    cut = known[f"cut {streams}"] if images == IMAGES else 1.0
    fetched, states = rate * gpus * known["sample"] * 1e3 * cut, 12 * known["weights"]
    ids = images * known["manifest, B held then to hand over"]
    return {
        "images/s, in all": f"{rate * gpus:,.0f}",
        "minutes an epoch": f"{images / rate / gpus / 60:,.1f}",
        "loader processes a GPU, needed of": f"{rate / known['loader']:.1f} of {processes}",
        "cores a node for loaders": f"{PER_NODE * rate * known['loader CPU'] / 1e3:.0f}",
        "memory a node for loaders, GB": f"{PER_NODE * processes * known['loader memory'] / 1e3:.0f}",
        "GB/s from the store, a node; in all": f"{fetched / nodes / 1e9:.2f}; {fetched / 1e9:.2f}",
        "GET/s, in all": f"{rate * gpus * cut / SHARD:.0f}",
        "train shards": f"{shards:,}",
        "train shards, TB": f"{images * known['sample'] / 1e9:,.3f}",
        "precompute, core-hours": f"{images * known['precompute'] / 3.6e6:,.1f}",
        "planning in the driver, hours": f"{images * known['plan'] / 3.6e6:,.2f}",
        "index in the driver, GB": f"{images * known['index, B held then to index'] / 1e9:,.1f}",
        "manifest, GB": f"{images * known['manifest, B'] / 1e9:,.2f}",
        "manifest in memory, GB a process; a node": f"{ids / 1e9:.3f}; {ids * PER_NODE * (processes + 1) / 1e9:,.1f}",
        "read again by a restart in mid-epoch, TB": f"{images / 2 * known['sample'] / 1e9:,.3f}",
        "checkpoint, GB; s to write": f"{states / 1e9:.2f}; {states / 1e6 / known['checkpoint']:.0f}",
        "Ray: nodes, training actors, tasks": f"{nodes}, {gpus}, {shards:,}",
        "Prefect: log lines of precompute, MB": f"{shards:,}, {shards * known['log line'] / 1e6:,.1f}",
    }


def main() -> None:
    if not COCO_MINI.exists():
        print(f"{COCO_MINI} is not there: nothing to measure")
        return
    torch.set_num_threads(1)
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores\n\n| input | measured | |\n|---|---:|---|")
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        for images in (10_000, 100_000, 1_000_000):
            for step in (written, opened, handed):
                fresh(step, "manifest", int(images * SCALE), str(scratch / f"manifest-{images}"))
        for images in (10_000, 30_000):
            fresh(index, "index", int(images * SCALE), str(scratch))
        fresh(merging, "evaluation", 5000)
        with seaweed(scratch / "s3", "sizing") as server:
            os.environ.update(server.environ())
            store = open_store("s3://sizing/bench")
            loader(store, precompute(store, scratch))
            gets(store)
            checkpoint(store)
        cuts()
        head()
        prefect(scratch)
    columns = [needs(*case) for case in ((8, IMAGES, 8), (64, IMAGES, 8), (256, IMAGES, 3), (64, HUGE, 8))]
    print("\n| | 8 GPUs | 64 GPUs | 256 GPUs | 100M images, 64 GPUs |\n|---|---:|---:|---:|---:|")
    for name in columns[0]:
        print(f"| {name} | {' | '.join(column[name] for column in columns)} |")


if __name__ == "__main__":
    main()
