"""Which trials a grid has, and what is refused before anything is computed."""

import itertools
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from infra.errors import TesseraError
from pipelines.ablate_job import Ablate
from pipelines.job import TrainCoco
from training.recipes import RECIPES
from training.recipes.grids import GRIDS, GridRow

VALUES = st.lists(st.integers(0, 9), min_size=1, max_size=3, unique=True)


@given(VALUES, VALUES, VALUES)
def test_lists_of_values_are_tried_in_all_combinations_with_all_seeds(distances: list, clips: list, seeds: list):
    clips = [clip + 1 for clip in clips]
    grid = {"method.eds_distance": distances, "train.clip": clips}
    trials = Ablate(recipe="base_420", grid=grid, seeds=seeds).trials()
    tried = [(t.seed, t.job.options["method.eds_distance"], t.job.options["train.clip"]) for t in trials]
    assert tried == [*itertools.product(seeds, distances, clips)]
    assert len({t.name for t in trials}) == len(trials)


def test_a_trial_is_what_train_coco_would_do():
    common = {"recipe": "debug", "workers": 2, "epochs": 3, "bad_share": 0.5}
    job = Ablate(**common, options={"train.clip": 2}, grid={"method.dice": [0, 1]}, seeds=[4], budget=9)
    assert [t.job for t in job.trials()] == [
        TrainCoco(**common, options={"train.clip": 2, "method.dice": dice, "train.seed": 4}) for dice in (0, 1)
    ]
    assert [t.name for t in job.trials()] == ["dice=0, seed 4", "dice=1, seed 4"]


def test_one_more_value_adds_its_own_trials_and_changes_no_other():
    before = Ablate(recipe="debug", grid={"method.dice": [0, 1]}, seeds=[0, 1]).trials()
    after = Ablate(recipe="debug", grid={"method.dice": [0, 1, 2]}, seeds=[0, 1]).trials()
    paths = [{t.chosen.run_path("precompute/x"): t.name for t in trials} for trials in (before, after)]
    assert paths[0].items() <= paths[1].items()
    assert sorted({*paths[1].values()} - {*paths[0].values()}) == ["dice=2, seed 0", "dice=2, seed 1"]


def test_rows_have_titles_and_their_own_options():
    rows = {"plain": {"method.dice": 0, "method.total_variation": 0}, "all": {}}
    job = Ablate(recipe="debug", grid=rows)
    assert job.rows() == tuple(GridRow(title, options) for title, options in rows.items())
    assert job.trials()[1].chosen == TrainCoco(recipe="debug").resolved()


def test_a_grid_without_options_repeats_the_recipe():
    trials = Ablate(recipe="debug", grid={}, seeds=[3, 5]).trials()
    assert [t.chosen.train.seed for t in trials] == [3, 5]


def test_options_are_told_by_their_last_name_where_that_is_clear():
    grid = {"method.eds_distance": [4], "method.decode.grid": [9]}
    assert Ablate(recipe="debug", grid=grid).rows()[0].title == "eds_distance=4, grid=9"
    grid = {"method.decode.grid": [9], "shards.grid": [[32, 32]]}
    assert Ablate(recipe="debug", grid=grid).rows()[0].title == "method.decode.grid=9, shards.grid=[32, 32]"


def test_a_row_that_takes_a_group_out_takes_the_jobs_options_of_it_out():
    common = {"method": "panoptic_deeplab", "recipe": "debug", "options": {"method.pisr.instances": 7}}
    with_it, without = Ablate(**common, grid={"with": {}, "without": {"method.pisr": None}}).trials()
    assert with_it.chosen.method.pisr.instances == 7
    assert without.chosen.method.pisr is None


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("recipe", RECIPES["generalist"])
def test_a_named_grid_goes_with_every_recipe_of_the_method(name: str, recipe: str, tmp_path: Path, monkeypatch):
    monkeypatch.setattr("training.recipe.fingerprint", str)  # of weights that are not here
    job = Ablate(recipe=recipe, grid=name, storage=str(tmp_path))
    job.check()
    assert len({t.chosen.run_path("x") for t in job.trials()}) == len(GRIDS[name]())


ABOUT = {  # what rows of a named grid may differ in
    "paper_table_2": {"method.eds_distance", "method.void_kept"},
    "paper_table_3": {"method.encoding", "method.frequencies", "method.cells", "method.squared"},
    "relative_table_3": {"method.encoding", "method.frequencies"},
    "ours": {"method.relative", "method.half_period"},
    "ours_by_backbone": {"method.relative", "method.half_period", "method.backbone"},
}


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("recipe", RECIPES["generalist"])
def test_rows_differ_in_what_their_grid_is_about_on_every_recipe(name: str, recipe: str):
    """The recipe's own additions must not stand on one side of a comparison alone."""
    methods = [asdict(trial.chosen.method) for trial in Ablate(recipe=recipe, grid=name).trials()]
    differ = {f"method.{option}" for option, value in methods[0].items() if any(m[option] != value for m in methods)}
    assert differ <= ABOUT[name]


def test_the_papers_best_rows_are_its_recipe():
    """Base at 420 x 420 as table 1 has it."""
    for name, title in (("paper_table_2", "EDS, void kept"), ("paper_table_3", "embedding, L = 4")):
        (trial,) = [t for t in Ablate(recipe="base_420", grid=name).trials() if t.row.title == title]
        assert trial.chosen == RECIPES["generalist"]["base_420"]()


@pytest.mark.parametrize(
    ("job", "told"),
    [
        ({"grid": "paper_table_9"}, "unknown grid .paper_table_9.; there are paper_table_2, paper_table_3, "),
        ({"grid": {"train.lr": [1e-3, 1e-2, "fast"]}}, "grid row 'lr=fast': option 'train.lr': 'fast': .*number"),
        ({"grid": {"train.lr": [1e-3], "train.lrr": [1]}}, "grid row 'lr=0.001, lrr=1': option 'train.lrr': there is"),
        ({"grid": {"train.lr": [1e-3, -1]}}, "grid row 'lr=-1': train config: .* must be positive"),
        ({"grid": {"a": {}, "b": {"method.relatif": True}}}, "grid row 'b': option 'method.relatif': there is none"),
        ({"grid": {"a\nb": {}}}, r"a\\nb', expected at most 1000 printable characters"),
        ({"grid": {}, "seeds": [-1]}, "should be greater than or equal to 0"),
        ({"grid": {"train.lr": []}}, "grid: option 'train.lr' has no values"),
        ({"grid": {"train.lr": [1], "b": {}}}, "grid: 'train.lr' has a list of values, 'b' is a row: one of the two"),
        ({"grid": {"train.seed": [1, 2]}}, "grid row 'seed=1': option 'train.seed': `seeds` says which ones"),
        ({"grid": {}, "options": {"train.seed": 1}}, "option 'train.seed': `seeds` says which ones"),
        ({"grid": {}, "seeds": [1, 2, 1]}, r"seeds \[1, 2, 1\]: one of them is there twice"),
        ({"grid": {}, "name": "mine"}, "name 'mine': the runs of a grid have none"),
        ({"grid": "ours", "method": "panoptic_deeplab"}, "grid row 'neither': option 'method.half_period': there is"),
        ({"grid": {"shards.radius": [10, 5]}}, "grid row 'radius=5': .* the method needs distances up to 10 px"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_with_its_row(job: dict, told: str):
    with pytest.raises((TesseraError, ValidationError), match=told):
        Ablate.model_validate({"recipe": "debug"} | job)


@pytest.mark.parametrize(
    "job", [{}, {"grid": 3}, {"grid": {"a": 1}}, {"grid": {}, "seeds": []}, {"grid": {}, "budget": 0}]
)
def test_fields_of_the_wrong_type_are_refused(job: dict):
    with pytest.raises(ValidationError):
        Ablate.model_validate(job)


@pytest.mark.parametrize(
    ("grid", "told"),
    [
        ({"train.lr": [1, 1.0]}, "grid row 'lr=1.0': it asks for the same as row 'lr=1'"),
        ({"a": {"train.micro_batch": 2}, "b": {}}, "grid row 'b': it asks for the same as row 'a'"),
    ],
)
def test_rows_that_ask_for_the_same_are_refused(grid: dict, told: str, tmp_path: Path):
    with pytest.raises(TesseraError, match=f"^{told}$"):
        Ablate(recipe="debug", grid=grid, storage=str(tmp_path)).check()


def test_rows_that_differ_in_decoding_are_two(tmp_path: Path):
    job = Ablate(recipe="debug", grid={"method.decode.grid": [20, 40]}, storage=str(tmp_path))
    job.check()
    assert len({t.chosen.run_path("x") for t in job.trials()}) == 1


def test_a_row_that_the_workers_cannot_share_is_refused(tmp_path: Path):
    job = Ablate(recipe="debug", grid={"train.batch": [4, 2]}, workers=4, storage=str(tmp_path))
    with pytest.raises(TesseraError, match=r"^grid row 'batch=2': 4 training workers cannot share a batch of 2"):
        job.check()


def test_the_cluster_is_asked_for_what_runs_at_once():
    common = {"recipe": "debug", "grid": {"method.dice": [0, 1]}, "seeds": [0, 1]}
    assert Ablate(**common).needs == {"cpus": 1}
    assert Ablate(**common, budget=3, workers=2).needs == {"cpus": 6}
    assert Ablate(**common, budget=9, gpus=True).needs == {"gpus": 4}
