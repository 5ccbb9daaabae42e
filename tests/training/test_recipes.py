import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from infra.errors import TesseraError
from preprocessing.geometry import Frame
from tests.support.every_recipe import every_recipe
from tests.support.examples import table
from training import methods
from training.augment import Crop
from training.methods.generalist.config import GeneralistConfig
from training.recipe import Recipe, TrainConfig, UpkeepConfig
from training.recipes import PUBLISHED, RECIPES, generalist, panoptic_deeplab, recipe
from training.recipes.generalist import debug, demo

ALL = pytest.mark.parametrize("make", every_recipe())
Make = Callable[[], Recipe]


@ALL
def test_a_recipe_says_what_to_expect_where_and_what_was_measured(make: Make):
    said = " ".join((make.__doc__ or "").split())
    for word in ("Expected: ", "Hardware: ", "Measured: "):
        assert said.partition(word)[2].strip(), word


@ALL
def test_a_recipe_is_found_by_its_own_name(make: Make):
    method, name = make().name.split("/")
    assert RECIPES[method][name] is make
    assert recipe(method, name) == make()


@ALL
def test_a_recipe_is_one_of_its_method(make: Make):
    folder = f"training.methods.{make().name.split('/')[0]}."
    assert type(make().method).__module__.startswith(folder)


def test_the_methods_that_have_recipes_are_the_folders_of_training_methods():
    folders = Path(methods.__file__).parent.iterdir()
    assert RECIPES.keys() == {folder.name for folder in folders if any(folder.glob("*.py"))}


def test_published_figures_are_those_of_recipes():
    assert PUBLISHED["generalist/base_420"] == 48.6
    assert PUBLISHED.keys() <= {make().name for named in RECIPES.values() for make in named.values()}


@ALL
def test_a_recipe_builds_without_memory(make: Make):
    with torch.device("meta"):
        method = make().build(table(5, 3))
    assert all(p.is_meta for p in method.parameters())
    assert method.grid == make().evaluated.size


@ALL
def test_batches_of_a_recipe_divide_among_1_2_4_and_8_workers(make: Make):
    made = make()
    batch, most = made.train.batch, made.train.micro_batch
    plan = made.reader.plan(batch, 1000)
    assert plan.streams == min(made.reader.streams, batch) == min(8, batch)
    for workers in (1, 2, 4, 8):
        if batch >= workers:
            shares = [plan.share(rank, workers, most) for rank in range(workers)]
            assert {share.images for share in shares} == {batch // workers}
            assert len({share.passes for share in shares}) == 1
            assert plan.told(workers, most).startswith(f"{batch} images = {workers} workers x (")


@pytest.mark.parametrize(
    ("images", "make"),
    [(118_287, recipe_of) for recipe_of in (generalist.base_420, panoptic_deeplab.coco)]
    + [(2975, panoptic_deeplab.cityscapes)],
    ids=["base_420", "coco", "cityscapes"],
)
def test_the_papers_sets_make_a_shard_for_every_reader_of_eight_workers(images: int, make: Make):
    """Each worker has reader processes of its own."""
    made = make()
    plan = made.reader.plan(made.train.batch, images // made.shards.samples)
    assert (plan.streams, plan.phases) == (8, 8)
    assert plan.share(7, 8, made.train.micro_batch).streams == (7,)


def test_an_unknown_method_is_answered_with_all_methods(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(RECIPES, "other", {"debug": debug})
    with pytest.raises(TesseraError, match=f"unknown method 'nope'; there are {', '.join(RECIPES)}$"):
        recipe("nope", "debug")


def test_an_unknown_recipe_is_answered_with_those_of_the_method():
    with pytest.raises(TesseraError) as caught:
        recipe("generalist", "nope")
    told = f"unknown recipe 'nope' of generalist; there are {', '.join(RECIPES['generalist'])}"
    assert str(caught.value) == told


def test_a_recipe_of_another_method_is_answered_with_that_method(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(RECIPES, "other", {"only": debug})
    with pytest.raises(TesseraError, match=r"unknown recipe 'only' of generalist; .*; 'only' is a recipe of other$"):
        recipe("generalist", "only")


def leaves(config: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The path of every option that is no dataclass itself."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, (*path, field.name))
        else:
            yield (*path, field.name)


GIVEN: dict[str, Any] = {
    "crop": Crop(size=(64, 64), short_side=(64, 96), long_side=128),
    "frame": Frame(size=(64, 64), keep_aspect=True),
    "check_epochs": 0.5,
}
"""What an option may be that is None."""
NEIGHBOURS = {"cosine": "poly", "alternate": "joint", "joint": "alternate", "task": "panoptic", "embedding": "direct"}


def another(value: Any) -> Any:
    """A value of the same type that a config may well accept."""
    match value:
        case bool():
            return not value
        case int():
            return 3 * value or 1
        case float():
            return 0.75 * value or 0.25
        case str() if value in NEIGHBOURS:
            return NEIGHBOURS[value]
        case str():
            return f"{value} too"
        case tuple():
            return (another(value[0]), *value[1:])
    raise AssertionError(f"how does one change {value!r}?")


def changed(config: Any, path: tuple[str, ...]) -> Any:
    value = getattr(config, path[0])
    if value is None:
        return dataclasses.replace(config, **{path[0]: GIVEN[path[0]]})
    return dataclasses.replace(config, **{path[0]: changed(value, path[1:]) if path[1:] else another(value)})


def options(base: Recipe) -> list:
    """But for weights, whose value is what the file holds, and what the other options of this recipe exclude."""
    refused = {"weights", "name", *(("encoding",) if getattr(base.method, "relative", False) else ())}
    return [pytest.param(base, p, id=f"{base.name}-{'.'.join(p)}") for p in leaves(base) if p[-1] not in refused]


@pytest.mark.parametrize(("base", "path"), options(debug()) + options(demo()) + options(panoptic_deeplab.debug_pisr()))
def test_a_runs_path_depends_on_every_option_that_changes_what_is_trained(base: Recipe, path: tuple[str, ...]):
    others = path[:2] in (("method", "decode"), ("train", "micro_batch")) or path[0] == "upkeep"
    assert (changed(base, path).run_path("set") == base.run_path("set")) == others


def test_a_runs_path_does_not_depend_on_the_recipes_name():
    assert dataclasses.replace(debug(), name="generalist/other").run_path("set") == debug().run_path("set")
    given = panoptic_deeplab.debug().changed({"method.pisr": {"instances": 5, "channels": 16}})
    assert given.run_path("set") == panoptic_deeplab.debug_pisr().run_path("set")


def test_a_runs_path_depends_on_the_train_set_and_only_on_values():
    assert debug().run_path("a") == debug().run_path("a")
    assert debug().run_path("a") != debug().run_path("b")
    assert debug().run_path("a").startswith("train/")


def test_a_runs_path_depends_on_the_methods_version(monkeypatch: pytest.MonkeyPatch):
    before = debug().run_path("a")
    monkeypatch.setattr(GeneralistConfig, "version", debug().method.version + 1)
    assert debug().run_path("a") != before


def with_weights(source: str) -> Recipe:
    method = debug().method
    backbone = dataclasses.replace(method.backbone, weights=source)
    return dataclasses.replace(debug(), method=dataclasses.replace(method, backbone=backbone))


def test_a_runs_path_depends_on_what_its_weights_hold_and_not_on_where_they_lie(tmp_path: Path):
    for name, content in (("a", b"some weights"), ("copy", b"some weights"), ("b", b"other weights")):
        (tmp_path / name).write_bytes(content)
    a, copy, b = (with_weights(str(tmp_path / name)).run_path("set") for name in ("a", "copy", "b"))
    assert a == copy
    assert len({a, b, debug().run_path("set")}) == 3


def test_a_run_whose_weights_are_missing_has_no_path(tmp_path: Path):
    with pytest.raises(TesseraError, match="nowhere"):
        with_weights(f"{tmp_path}/nowhere.pth").run_path("set")


def test_a_recipe_may_last_longer_and_its_warm_up_keeps_its_share():
    longer = debug().lasting(12)
    assert longer.train.epochs == 12
    assert dataclasses.replace(longer, train=debug().train) == debug()
    assert longer.run_path("a") != debug().run_path("a")
    for epochs in (0.01, 3, 1000):
        train = debug().lasting(epochs).train
        assert train.warmup_epochs / train.epochs == pytest.approx(0.1 / 6)
        assert dataclasses.replace(train, epochs=6, warmup_epochs=0.1) == debug().train


def test_evaluation_shards_keep_the_images_sizes_and_have_no_distances():
    assert demo().val_shards == dataclasses.replace(demo().shards, grid=None, radius=0)


@pytest.mark.parametrize(
    "options",
    [
        {"method.eds_distance": 3.0},
        {"method.eds_min": 0.5},
        {"method.frequencies": 2},
        {"method.boundaries": "panoptic"},
        {"method.void_kept": False},
        {"method.encoding": "classes", "method.relative": False, "method.half_period": False, "method.squared": False},
        {"train.seed": 5},
    ],
    ids=str,
)
def test_what_shards_do_not_depend_on_computes_none_anew(options: dict):
    changed = demo().changed(options)
    assert (changed.shards, changed.val_shards) == (demo().shards, demo().val_shards)
    assert changed.run_path("a") != demo().run_path("a")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"batch": 0}, "positive"),
        ({"micro_batch": 0}, "positive"),
        ({"epochs": 0.0}, "positive"),
        ({"lr": -1.0}, "positive"),
        ({"warmup_epochs": 2.0}, "2.0 warm-up epochs in 2"),
        ({"warmup_epochs": -0.1}, "warm-up"),
        ({"layer_decay": 0.0}, "layer_decay"),
        ({"layer_decay": 1.1}, "layer_decay"),
        ({"ema": 1.0}, "ema"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"clip": 0.0}, "clip"),
        ({"lr": float("nan")}, "lr"),
    ],
    ids=str,
)
def test_train_options_out_of_range_are_refused(change: dict, told: str):
    with pytest.raises(TesseraError, match=told):
        TrainConfig(**{"batch": 4, "epochs": 2, "lr": 1e-3, **change})


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"checkpoints": 0}, "positive"),
        ({"keep": 0}, "positive"),
        ({"check_images": 0}, "positive"),
        ({"minutes": 0.0}, "positive"),
        ({"check_epochs": 0.0}, "PQ every 0.0 epochs"),
        ({"check_epochs": float("inf")}, "PQ every inf epochs"),
        ({"check_epochs": float("nan")}, "PQ every nan epochs"),
    ],
    ids=str,
)
def test_upkeep_options_out_of_range_are_refused(change: dict, told: str):
    with pytest.raises(TesseraError, match=told):
        UpkeepConfig(**change)
