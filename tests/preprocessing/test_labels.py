import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.errors import TesseraError
from preprocessing.labels import Category, LabelTable

COCO = [
    {"id": 90, "name": "toothbrush", "isthing": 1, "color": [191, 162, 208], "supercategory": "indoor"},
    {"id": 1, "name": "person", "isthing": 1, "color": [220, 20, 60]},
    {"id": 200, "name": "rug", "isthing": 0, "color": [0, 0, 0]},
]


def test_a_table_survives_the_round_trip_through_coco():
    table = LabelTable.from_coco(COCO)
    assert LabelTable.from_coco(table.to_coco()) == table
    assert table.categories[0] == Category(90, "toothbrush", True, (191, 162, 208))


def test_contiguous_ids_follow_the_file():
    table = LabelTable.from_coco(COCO)
    assert len(table) == 3
    assert table.contiguous == {90: 0, 1: 1, 200: 2}
    assert table.is_thing.tolist() == [True, True, False]
    assert table.names == ("toothbrush", "person", "rug")
    assert table.colors.tolist() == [[191, 162, 208], [220, 20, 60], [0, 0, 0]]


def test_black_is_a_colour():
    assert LabelTable.from_coco(COCO).categories[2].color == (0, 0, 0)


def test_missing_colours_are_made_up_and_differ():
    table = LabelTable.from_coco([{"id": i, "name": str(i), "isthing": 0} for i in range(256)])
    assert len({c.color for c in table.categories}) == 256
    assert LabelTable.from_coco(table.to_coco()) == table


def test_a_repeated_id_is_named():
    with pytest.raises(TesseraError, match=r"\[90\].*more than once"):
        LabelTable.from_coco([*COCO, {"id": 90, "name": "other", "isthing": 0}])


def test_a_missing_isthing_hints_at_the_detection_json():
    with pytest.raises(TesseraError, match=r"my\.json.*'cat'.*isthing.*detection JSON"):
        LabelTable.from_coco([{"id": 5, "name": "cat", "supercategory": "animal"}], "my.json")


@pytest.mark.parametrize("name", ["id", "name"])
def test_another_missing_field_is_named_without_the_hint(name: str):
    entry = {"id": 5, "name": "cat", "isthing": 1}
    del entry[name]
    with pytest.raises(TesseraError, match=rf"my\.json.*lacks \['{name}'\]$"):
        LabelTable.from_coco([entry], "my.json")


def test_an_empty_table_is_refused():
    with pytest.raises(TesseraError, match="empty"):
        LabelTable.from_coco([])


ODD_NAMES = st.one_of(
    st.sampled_from(
        ["a", "A", "a (1)", "a (2)", "a (1) (1)", "", " ", "category", "category (1)", "void", "1e5", "<b>"]
    ),
    st.text(max_size=3),
)


@given(st.lists(ODD_NAMES, min_size=1, max_size=12), st.randoms())
def test_every_category_has_a_name_of_its_own_whatever_they_are_called(names: list[str], random):
    ids = random.sample(range(1, 15), len(names))
    table = LabelTable(tuple(Category(i, name, True, (0, 0, 0)) for i, name in zip(ids, names, strict=True)))
    unique = table.unique_names
    assert len(set(unique)) == len(unique) == len(names)
    for name, called, number in zip(names, unique, ids, strict=True):
        assert called.strip()
        assert called == name if names.count(name) == 1 and name.strip() else called.endswith(f" ({number})")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("id", wrong) for wrong in (1.9, "1", True, None, [1], float("nan"), 2.0**60)),
        *(("isthing", wrong) for wrong in (0.5, "1", None, 2, [])),
        *(("name", wrong) for wrong in (None, 1.5, True, ["cat"], "a\nb")),
        *(("color", wrong) for wrong in ([1.9, 2, 3], ["1", 2, 3], [True, 2, 3], [1, 2], [1, 2, 256], "red", 5)),
    ],
)
def test_nothing_is_cut_or_guessed(name: str, value):
    with pytest.raises(TesseraError, match=r"^my\.json: category"):
        LabelTable.from_coco([{"id": 5, "name": "cat", "isthing": 1, name: value}], "my.json")


def test_whole_floats_and_flags_are_taken():
    row = {"id": 3.0, "name": 7, "isthing": True, "color": [0.0, 1, 2.0]}
    assert LabelTable.from_coco([row]).to_coco() == [{"id": 3, "name": "7", "isthing": 1, "color": [0, 1, 2]}]


def test_colours_and_order_make_no_difference_and_all_else_does():
    table, plain = LabelTable.from_coco(COCO), [{**c, "color": None} for c in COCO]
    assert LabelTable.from_coco(plain) == table
    assert table.difference(LabelTable.from_coco(plain[::-1])) == ""
    assert LabelTable.from_coco(plain[::-1]) != table  # places in it are what arrays and weights know
    for change in ({"id": 2}, {"name": "Person"}, {"isthing": 0}):
        other = LabelTable.from_coco([plain[0], {**plain[1], **change}, plain[2]])
        assert "1 'person' (thing)" in table.difference(other)
    assert table.difference(LabelTable.from_coco(plain[:2])) == "200 'rug' (stuff) against nothing"


def test_many_categories_take_linear_time():
    many = [{"id": i, "name": str(i), "isthing": 0} for i in range(100_000)]
    assert len(LabelTable.from_coco(many)) == 100_000  # by comparing each with each: a quarter of an hour
