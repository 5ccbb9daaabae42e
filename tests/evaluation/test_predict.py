"""A finished run on users' files: what is written, what is told, and what is left alone."""

import json
import logging
import shutil
import uuid
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from evaluation import predict_files
from evaluation.images import read_image
from evaluation.predict import Predictor
from infra.errors import TesseraError
from infra.store import open_store
from pipelines.predict import main
from preprocessing.labels import LabelTable
from preprocessing.sample import decode_image
from tests.support.finished_run import finished_run
from tests.support.odd_images import encoded, readable, rotated_jpeg, scene, unreadable, write
from tests.support.predicted import check_listing
from training.methods.base import Method
from training.run import open_run


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("run")
    return finished_run(folder, str(folder / "store"))


@pytest.fixture(autouse=True)
def told(caplog, monkeypatch):
    """Everything that the command says; one thread, as elsewhere."""
    caplog.set_level(logging.INFO)
    predict_files.load_predictor.cache_clear()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield caplog
    torch.set_num_threads(threads)


def predictor_of(run: str, device: str | None = "cpu") -> Predictor:
    storage, _, name = run.rpartition("/train/")
    return Predictor.load(storage, f"train/{name}", device)


def test_three_lines_of_python(run):
    predictor = predictor_of(run)
    prediction = predictor(rotated_jpeg())
    assert prediction.panoptic.size == prediction.image_HW3.shape[:2] == (40, 30)
    assert prediction.overlay().shape == (40, 30, 3)
    assert prediction.overlay(longest=20).shape == (20, 15, 3)


def test_a_plain_picture_is_seen_as_evaluation_sees_it(run):
    data, method = readable()["plain.jpg"], predictor_of(run).method
    expected = method.segment(method.inputs([decode_image(data)]), [(30, 40)])[0]
    assert expected.segments
    found = predictor_of(run)(data).panoptic
    np.testing.assert_array_equal(found.ids, expected.ids)
    assert found.segments == expected.segments


def test_a_batch_gives_what_each_gives_alone(run):
    predictor, images = predictor_of(run), [read_image(data) for data in readable().values()]
    for image, found in zip(images, predictor.batch(images), strict=True):
        alone = predictor.batch([image])[0]
        np.testing.assert_array_equal(found.panoptic.ids, alone.panoptic.ids)


def test_a_folder_of_odd_files_is_done_and_the_rest_named(run, tmp_path, told):
    bad = {name: data for name, (data, _) in unreadable().items() if not name.endswith(".eps")}
    others = {"notes.txt": b"hello", ".hidden.jpg": b"", "__MACOSX/._plain.jpg": b"x"}
    source, output = write(tmp_path / "in", readable() | bad | others), tmp_path / "out"
    assert main([run, str(source), str(output), "--device", "cpu"]) == 1
    listing = check_listing(output)
    assert {image["file_name"] for image in listing["images"]} == readable().keys()
    sizes = {image["file_name"]: (image["height"], image["width"]) for image in listing["images"]}
    assert sizes["turned.JPG"] == (40, 30)
    assert sizes["sub folder/wide.png"] == (2, 9000)
    problems = json.loads((output / "problems.json").read_text())
    assert {entry["file_name"] for entry in problems["failed"]} == bad.keys()
    for entry in problems["failed"]:
        assert unreadable()[entry["file_name"]][1] in entry["why"]
    assert problems["ignored"] == [".hidden.jpg", "notes.txt"]
    assert problems["outputs"] == []
    assert any("turned upright" in str(entry["notes"]) for entry in problems["notes"])
    assert len(list((output / "overlays").rglob("*.jpg"))) == len(readable())
    assert "FAILED empty.jpg: the file is empty" in told.text
    assert "Traceback" not in told.text


def test_a_second_call_does_only_what_is_new_or_changed(run, tmp_path, told):
    files = {f"{i}.jpg": encoded(scene(20 + i, 30), "JPEG") for i in range(1, 5)}
    source, output = write(tmp_path / "in", files), tmp_path / "out"
    call = [run, str(source), str(output)]
    assert main(call) == 0
    before = {path: path.stat().st_mtime_ns for path in (output / "predictions").iterdir()}
    listing = check_listing(output)
    assert [image["id"] for image in listing["images"]] == [1, 2, 3, 4]
    assert main(call) == 0
    assert {path: path.stat().st_mtime_ns for path in (output / "predictions").iterdir()} == before
    write(source, {"2.jpg": encoded(scene(60, 60), "JPEG"), "7.jpg": files["1.jpg"]})
    (output / "predictions/3.png").unlink()
    (output / "overlays/4.jpg").unlink()
    told.clear()
    assert main(call) == 0
    assert "5 images done, 4 of them now" in told.text
    again = check_listing(output)
    assert [(image["id"], image["height"]) for image in again["images"]] == [
        (1, 21),
        (2, 60),
        (3, 23),
        (4, 24),
        (7, 21),
    ]


def test_options_of_decoding_are_taken_and_what_was_done_with_others_is_done_anew(run, tmp_path, told):
    source = write(tmp_path / "in", {"scene.png": encoded(scene(), "PNG")})
    command = [run, str(source), str(tmp_path / "out"), "--no-overlays"]
    counts = []
    for options in ('{"method.decode.min_stuff_area": 0.99, "method.decode.min_area": 0.99}', "{}", "{}"):
        told.clear()
        assert main([*command, "--options", options]) == 0
        counts.append(len(check_listing(tmp_path / "out")["annotations"][0]["segments_info"]))
        assert ("1 of them now" in told.text) == (len(counts) < 3)
    assert counts[0] == 0 < counts[1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ('{"method.frequencies": 2}', "of a finished run only method.decode can be changed"),
        ('{"method.decode.grit": 2}', "there is none; there are grid"),
    ],
)
def test_options_that_a_finished_run_cannot_take_are_refused(run, tmp_path, told, options, words):
    source = write(tmp_path / "in", {"scene.png": encoded(scene(), "PNG")})
    assert main([run, str(source), str(tmp_path / "out"), "--options", options]) == 2
    assert words in told.text


def test_single_files_add_up_and_no_two_share_a_png(run, tmp_path):
    names = ["a.jpg", "a.png", "a.png.jpg", "a"]
    source, output = write(tmp_path / "in", dict.fromkeys(names, readable()["plain.jpg"])), tmp_path / "out"
    for name in names:
        assert main([run, str(source / name), str(output), "--no-overlays"]) == 0
    listing = check_listing(output)
    assert sorted(image["file_name"] for image in listing["images"]) == sorted(names)
    assert len({entry["file_name"] for entry in listing["annotations"]} | {i["id"] for i in listing["images"]}) == 8
    assert not (output / "overlays").exists()


def test_an_output_inside_the_input_is_told_and_not_predicted(run, tmp_path, told):
    plain = readable()["plain.jpg"]
    source = write(tmp_path / "in", {"plain.jpg": plain})
    for _ in range(2):
        assert main([run, str(source), str(source / "out")]) == 0
    assert [i["file_name"] for i in check_listing(source / "out")["images"]] == ["plain.jpg"]
    assert json.loads((source / "out/problems.json").read_text())["outputs"] == [str(source / "out")]
    assert f"left out: what an earlier predict wrote into {source}/out" in told.text
    assert main([run, str(source), str(source)]) == 2
    write(source / "out", {"mine.jpg": plain, "sub/mine.jpg": plain})  # put beside what was written there
    assert main([run, str(source), str(tmp_path / "other")]) == 0
    names = {i["file_name"] for i in check_listing(tmp_path / "other")["images"]}
    assert names == {"plain.jpg", "out/mine.jpg", "out/sub/mine.jpg"}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"null",
        b"{}",
        b'{"run": 1, "input": "", "predictions": "x"}',
        b'{"run": "", "input": "", "predictions": ""}',
    ],
)
def test_a_file_named_like_a_claim_hides_no_image(run, tmp_path, content):
    source = write(tmp_path / "in", {"a/tessera-predict.json": content, "a/1.jpg": readable()["plain.jpg"]})
    assert main([run, str(source), str(tmp_path / "out"), "--no-overlays"]) == 0
    assert [i["file_name"] for i in check_listing(tmp_path / "out")["images"]] == ["a/1.jpg"]
    assert json.loads((tmp_path / "out/problems.json").read_text())["ignored"] == ["a/tessera-predict.json"]


def test_numbered_names_keep_their_numbers_beside_others(run, tmp_path):
    names = ["000000000139.jpg", "COCO_val2014_000000000042.jpg", "photo.jpg", "a/7.jpg", "b/7.jpg", "img_5.jpg"]
    source = write(tmp_path / "in", dict.fromkeys(names, readable()["plain.jpg"]))
    assert main([run, str(source), str(tmp_path / "out"), "--no-overlays"]) == 0
    ids = {i["file_name"]: i["id"] for i in check_listing(tmp_path / "out")["images"]}
    assert (ids["000000000139.jpg"], ids["COCO_val2014_000000000042.jpg"]) == (139, 42)
    assert len({*ids.values()}) == len(names)
    assert not {7, 5} & {*ids.values()}


def test_an_image_whose_name_has_no_place_is_lost_alone(run, tmp_path):
    plain = readable()["plain.jpg"]
    long = "x" * 250 + ".jpg"
    source = write(
        tmp_path / "in",
        {"1.jpg": plain, long: plain, "line\nbreak.jpg": plain, "a.jpg": plain, "a.jpg.json/b.jpg": plain},
    )
    assert main([run, str(source), str(tmp_path / "out"), "--no-overlays"]) == 1
    done = {i["file_name"] for i in check_listing(tmp_path / "out")["images"]}
    problems = json.loads((tmp_path / "out/problems.json").read_text())
    assert {"1.jpg"} <= done
    assert {entry["file_name"] for entry in problems["failed"]} == {
        long,
        "line\nbreak.jpg",
        "a.jpg",
        "a.jpg.json/b.jpg",
    } - done
    assert len(done) == 2  # of two of which one is the folder of the other, one is done


def test_what_cannot_begin_is_refused_and_leaves_nothing(run, tmp_path, told):
    source = write(tmp_path / "in", {"plain.jpg": readable()["plain.jpg"], "x/notes.txt": b""})
    output = tmp_path / "out"
    refused = [
        ([run + "0", str(source), str(output)], "no finished run"),
        (["/", str(source), str(output)], "expected the URL of what is finished"),
        (["s3://bucket", str(source), str(output)], "expected the URL of what is finished"),
        ([run, str(tmp_path / "nowhere"), str(output)], "no such file, nor a folder"),
        ([run, str(source / "x"), str(output)], "no images found; 1 files are none by their names, as 'notes.txt'"),
        ([run, str(source), str(output), "--device", "cuda:99"], "device 'cuda:99' is not to be had here"),
        ([run, str(source), str(output), "--device", "gpu"], "device 'gpu' is not to be had here"),
        ([run, str(source), str(output), "--algorithm", "a/b"], "algorithm: String should match"),
        ([run, str(source), str(output), "--images", str(source / "x/notes.txt")], "no list of images"),
        ([run, str(source), str(source / "plain.jpg/out")], "choose a folder"),
    ]
    for call, why in refused:
        told.clear()
        assert main(call) == 2
        assert why in told.text
        assert len(told.records) == 1
    assert not output.exists()
    with pytest.raises(SystemExit, match="2"):
        main([run])


def test_predictions_of_another_input_are_not_overwritten(run, tmp_path, told):
    files = {"plain.jpg": readable()["plain.jpg"]}
    output = tmp_path / "out"
    assert main([run, str(write(tmp_path / "a", files)), str(output)]) == 0
    assert main([run, str(write(tmp_path / "b", files)), str(output)]) == 2
    assert f"holds the predictions of input {tmp_path}/a; choose another OUTPUT" in told.text


def coco_list(folder: Path, sizes: dict[str, tuple[int, int]]) -> str:
    rows = [
        {"id": 100 + i, "file_name": name, "height": height, "width": width}
        for i, (name, (height, width)) in enumerate(sizes.items())
    ]
    path = folder / "image_info_test-dev2017.json"
    path.write_text(json.dumps({"images": rows, "categories": []}))
    return str(path)


def test_a_submission_has_the_form_that_the_server_takes(run, tmp_path):
    files = {f"{i:012d}.jpg": encoded(scene(20, 20 + i), "JPEG") for i in range(3)}
    files["000000000007.jpg"] = rotated_jpeg()  # COCO's sizes are of the pixels as stored
    source, output = write(tmp_path / "in", files | {"000000000099.jpg": b"not in the list"}), tmp_path / "out"
    sizes = {f"{i:012d}.jpg": (20, 20 + i) for i in range(3)} | {"000000000007.jpg": (30, 40)}
    call = [run, str(source), str(output), "--images", coco_list(tmp_path, sizes), "--algorithm", "ours"]
    assert main(call) == 0
    name = "panoptic_test-dev2017_ours_results"
    with zipfile.ZipFile(output / f"{name}.zip") as archive:
        archive.extractall(tmp_path / "server")
        assert sorted(archive.namelist()) == sorted([f"{name}.json", *(f"{name}/{n[:-4]}.png" for n in sizes)])
    listing = check_listing(tmp_path / "server", name)
    assert {i["file_name"]: i["id"] for i in listing["images"]} == {n: 100 + i for i, n in enumerate(sizes)}


def test_a_submission_that_lacks_images_is_not_zipped(run, tmp_path, told):
    source = write(tmp_path / "in", {"1.jpg": encoded(scene(), "JPEG"), "2.jpg": encoded(scene(), "JPEG")})
    listed = coco_list(tmp_path, {"1.jpg": (30, 40), "2.jpg": (31, 40), "3.jpg": (30, 40)})
    assert main([run, str(source), str(tmp_path / "out"), "--images", listed]) == 1
    problems = json.loads((tmp_path / "out/problems.json").read_text())
    assert {entry["file_name"]: entry["why"] for entry in problems["failed"]} == {
        "3.jpg": "the list has it, the input does not",
        "2.jpg": "the image is 40x30, the list says 40x31",
    }
    assert not list((tmp_path / "out").glob("*.zip"))


def test_an_empty_result_says_why(run, tmp_path, told, monkeypatch):
    storage, _, name = run.rpartition("/train/")
    spoiled = open_run(storage, f"train/{name}")[0].changed(
        {"method.decode": {"min_area": 0.99, "min_stuff_area": 0.99}}
    )
    strict = finished_run(tmp_path, str(tmp_path / "store"), spoiled)
    picture = write(tmp_path / "in", {"a.jpg": np_noise()})
    predictor = predictor_of(strict)
    prediction = predictor((picture / "a.jpg").read_bytes())
    assert not prediction.panoptic.segments
    assert "min_stuff_area 0.99" in prediction.empty
    assert "min_stuff_area 0.0 would give" in prediction.empty
    assert predictor.method.config.decode.min_stuff_area == 0.99
    assert main([strict, str(picture), str(tmp_path / "out")]) == 0
    assert "1 without a segment" in told.text
    check_listing(tmp_path / "out")
    assert json.loads((tmp_path / "out/problems.json").read_text())["empty"][0]["why"] == prediction.empty
    monkeypatch.setattr(type(predictor.method.config.decode), "candidates", {})
    assert "the network itself sees nothing here" in predictor((picture / "a.jpg").read_bytes()).empty


def np_noise() -> bytes:
    return encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)), "JPEG")


def test_only_the_image_on_which_the_network_fails_is_lost(run, tmp_path, monkeypatch):
    whole, errors = Method.segment, {41: TesseraError("not finite"), 43: RuntimeError("can't allocate memory: 8 bytes")}

    def fails_on_some(self, inputs, sizes):
        for fault in (errors[width] for _, width in sizes if width in errors):
            raise fault
        return whole(self, inputs, sizes)

    monkeypatch.setattr(Method, "segment", fails_on_some)
    source = write(tmp_path / "in", {f"{w}.png": encoded(scene(20, w), "PNG") for w in range(38, 45)})
    assert main([run, str(source), str(tmp_path / "out")]) == 1
    assert [i["id"] for i in check_listing(tmp_path / "out")["images"]] == [38, 39, 40, 42, 44]
    assert "not enough memory" in (tmp_path / "out/problems.json").read_text()


def test_everything_on_s3(tmp_path, s3_env, told):
    root = f"s3://{s3_env.bucket}/{uuid.uuid4().hex}"
    run = finished_run(tmp_path, f"{root}/store")
    photos = open_store(f"{root}/photos")
    for name in ("plain.jpg", "sub folder/wide.png", "turned.JPG"):
        photos.write(name, readable()[name])
    photos.write("text.jpg", b"no picture")
    assert main([run, photos.url, f"{root}/out"]) == 1
    output = open_store(f"{root}/out")
    for entry in output.list():
        write(tmp_path / "got", {entry.key: output.read(entry.key)})
    assert len(check_listing(tmp_path / "got")["images"]) == 3
    told.clear()
    photos.delete("text.jpg")
    assert main([run, photos.url, f"{root}/out"]) == 0
    assert "3 images done, 0 of them now" in told.text
    assert main([run, f"{photos.url}/plain.jpg", f"{root}/single"]) == 0
    assert isinstance(LabelTable.from_coco(json.loads(output.read("predictions.json"))["categories"]), LabelTable)


def test_a_run_whose_data_set_is_gone_is_refused(run, tmp_path, told):
    storage, _, name = run.rpartition("/train/")
    shutil.copytree(Path(storage) / "train", tmp_path / "train")
    source = write(tmp_path / "in", {"plain.jpg": readable()["plain.jpg"]})
    assert main([str(tmp_path / "train" / name), str(source), str(tmp_path / "out")]) == 2
    assert "has no manifest any more" in told.text


def test_a_run_of_another_version_is_refused(tmp_path, told):
    run = finished_run(tmp_path, str(tmp_path / "store"))
    (manifest,) = (tmp_path / "store/precompute").rglob("manifest.json")
    manifest.write_text(json.dumps(json.loads(manifest.read_text().replace('"records"', '"rows"'))))
    assert main([run, str(write(tmp_path / "in", {"a.jpg": np_noise()})), str(tmp_path / "out")]) == 2
    assert "manifest.json: lacks 'shards.0.records', as Tessera writes it" in told.text


def test_a_png_that_was_cut_is_made_again_and_one_that_was_changed_gets_into_no_zip(run, tmp_path, told):
    source = write(tmp_path / "in", {"1.jpg": encoded(scene(), "JPEG")})
    listed = coco_list(tmp_path, {"./in/1.jpg": (30, 40)})
    call = [run, str(source), str(tmp_path / "out"), "--images", listed]
    assert main(call) == 0
    (png,) = (tmp_path / "out").rglob("1.png")
    whole = png.read_bytes()
    png.write_bytes(whole[:30])
    assert main(call) == 0
    assert png.read_bytes() == whole
    png.write_bytes(whole[:-1] + b"x")
    assert main(call) == 1
    assert f"{png}: damaged since it was written" in told.text


@pytest.mark.parametrize("number", [-1, 1 << 63, "7", True, 1.5])
def test_a_list_with_ids_that_are_none_is_refused(run, tmp_path, told, number):
    source = write(tmp_path / "in", {"1.jpg": encoded(scene(), "JPEG")})
    listed = Path(coco_list(tmp_path, {"1.jpg": (30, 40)}))
    content = json.loads(listed.read_text())
    content["images"][0]["id"] = number
    listed.write_text(json.dumps(content))
    assert main([run, str(source), str(tmp_path / "out"), "--images", str(listed)]) == 2
    assert "no list of images" in told.text


def test_a_link_that_leads_nowhere_is_a_failure(run, tmp_path):
    source = write(tmp_path / "in", {"1.jpg": encoded(scene(), "JPEG")})
    (source / "2.jpg").symlink_to("/moved/away.jpg")
    assert main([run, str(source), str(tmp_path / "out"), "--no-overlays"]) == 1
    (failed,) = json.loads((tmp_path / "out/problems.json").read_text())["failed"]
    assert failed == {"file_name": "2.jpg", "why": "a link that leads nowhere"}
