"""`python -m tests.support.little_room FOLDER`: what reads one sample says of a set whose first one needs more memory
than this process may have. Prints a JSON."""

import json
import re
import resource
import sys
from collections.abc import Callable
from pathlib import Path

from evaluation.coco_files import Entry, read_entry, score_image
from evaluation.images import read_image
from infra.errors import TesseraError
from infra.store import open_store
from preprocessing.coco import read_index
from preprocessing.sample import Sample, decode_image
from preprocessing.shards import ShardConfig
from preprocessing.tree import Folder
from tests.support.shard_sets import make_set
from training.batch import Example

ROOM = 150 << 20


def told(read: Callable[[], object]) -> str:
    try:
        return f"read {type(read()).__name__}"
    except TesseraError as error:
        return str(error)


def main(folder: Path) -> dict[str, object]:
    index = read_index(folder, "train2017")
    store, config = open_store(str(folder.parent / "store")), ShardConfig(grid=None, radius=8)
    make_set(open_store(str(folder.parent / "warm")), read_index(folder, "val2017"), config)  # compiles, imports
    image, mask = index.records[0].image.read(), index.records[0].masks[0]
    rows = {
        "image_id": 1,
        "file_name": mask.name,
        "segments_info": [{"id": 1, "category_id": index.labels.categories[0].dataset_id}],
    }
    entry: Entry = read_entry(rows, Path("x.json"), Folder(str(folder), {mask.name: mask}), index.labels)
    size = int(re.search(r"VmSize:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) << 10
    resource.setrlimit(resource.RLIMIT_AS, (size + ROOM, size + ROOM))
    return {
        "precompute": [str(r) for r in make_set(store, index, config, bad_share=0.9).rejected],
        "validate": [d.problem for d in index.records[0].examine(index.labels).defects if not d.usable],
        "the next one": [d.problem for d in index.records[1].examine(index.labels).defects if not d.usable],
        "predict": told(lambda: read_image(image)),
        "shard": told(lambda: decode_image(image)),
        "training": told(lambda: Example.of("1", Sample(1, "1.png", image, None, ()))),  # type: ignore[arg-type]
        "evaluate files": told(lambda: score_image(entry, entry, len(index.labels))),
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(Path(sys.argv[1]))))
