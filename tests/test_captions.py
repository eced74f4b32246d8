"""Captioned images in the layouts that people have: each caption stays with its image, and nothing is lost in silence.

The image of caption "red" is red, so that a wrong pairing shows.
"""

import csv
import json
import unicodedata

import pytest
from PIL import Image, ImageColor

from training.data import ImageDataset, PromptDataset, describe, open_data, read_coco

COLOURS = ["red", "green", "blue", "yellow"]
ROWS = [{"file_name": f"{c}.png", "text": c} for c in COLOURS]


def add_images(folder, colours=COLOURS, suffix="png"):
    folder.mkdir(parents=True, exist_ok=True)
    for colour in colours:
        Image.new("RGB", (72, 64), colour).save(folder / f"{colour}.{suffix}")


def lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def pairs(path, **options):
    """(colour, caption) of each item, as training gets them."""
    data = open_data(str(path), 64, **options)
    names = {ImageColor.getrgb(colour): colour for colour in COLOURS}
    items = [data[i] for i in range(len(data))]
    return [(names[tuple(((image[:, 0, 0] + 1) * 127.5).round().int().tolist())], text) for image, text in items]


RIGHT = [(c, c) for c in COLOURS]


@pytest.fixture
def folder(tmp_path):
    add_images(tmp_path)
    return tmp_path


# ---------------------------------------------------------------------------------------------------- tables


@pytest.mark.parametrize(
    "content",
    [
        lines(ROWS).encode(),
        lines(ROWS).replace("\n", "\r\n").encode("utf-8-sig"),
        lines(ROWS).encode("utf-16"),
        lines(ROWS).replace("\n", "\r").encode(),
        lines(ROWS).replace("\n", "\n\n  \n").encode(),
        json.dumps(ROWS).encode(),
        "\n".join(json.dumps(row, indent=2) for row in ROWS).encode(),
        lines({"caption": r["text"], "image": r["file_name"]} for r in ROWS).encode(),
        lines({"Prompt": r["text"], "File_Name": r["file_name"]} for r in ROWS).encode(),
        lines(row | {"score": float("nan"), "tags": ["a"]} for row in ROWS).encode(),
        lines(row | {"file_name": row["file_name"].upper()} for row in ROWS).encode(),
    ],
    ids=[
        "plain",
        "BOM, CRLF",
        "UTF-16",
        "CR",
        "blank lines",
        "array",
        "indented",
        "image, caption",
        "Prompt",
        "more",
        "A",
    ],
)
def test_metadata_jsonl_is_read_however_it_was_written(folder, content):
    (folder / "metadata.jsonl").write_bytes(content)
    assert pairs(folder) == RIGHT


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.tsv", "metadata.json"])
@pytest.mark.parametrize("place", [".", "train"])
def test_other_metadata_files_are_read(tmp_path, name, place):
    add_images(tmp_path / place)
    with open(tmp_path / place / name, "w", newline="") as file:
        if name.endswith("json"):
            json.dump(ROWS, file)
        else:
            writer = csv.writer(file, "excel-tab" if name.endswith("tsv") else "excel")
            writer.writerows(
                [["id", "text", "file_name"], *([i, f'{c}, "so"', f"{c}.png"] for i, c in enumerate(COLOURS))]
            )
    expected = RIGHT if name.endswith("json") else [(c, f'{c}, "so"') for c in COLOURS]
    assert pairs(tmp_path) == pairs(tmp_path / place) == expected


def test_a_csv_of_another_country_has_semicolons(folder):
    (folder / "metadata.csv").write_text("file_name;text\n" + "".join(f"{c}.png;{c}\n" for c in COLOURS), "utf-8-sig")
    assert pairs(folder) == RIGHT


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("file_name,text\nred.png,a cat, sitting\n", "line 2: 3 cells, and the header has 2"),
        ("file_name,text\nred.png,a cat\nsitting\n", "line 3: 1 cells"),
        ('file_name,text\nred.png,"a cat\ngreen.png,b\n', "not a CSV table"),
        ("file_name,text,text\nred.png,a,b\n", "there are two columns named text"),
        ("file_name,label\nred.png,3\n", "not a row with file_name and text.*--caption-column"),
        ("file_name,text\n", "empty, so there is nothing to train on"),
        ("file_name,text\nhttp://localhost/red.png,red\n", "is an address; download"),
    ],
)
def test_a_csv_never_loses_text_in_silence(folder, content, message):
    (folder / "metadata.csv").write_text(content)
    with pytest.raises(ValueError, match=message):
        open_data(str(folder), 64)


def test_parquet_is_read_or_says_what_it_needs(folder):
    (folder / "metadata.parquet").write_bytes(b"PAR1")
    with pytest.raises(
        ValueError, match="metadata.parquet: (needs pyarrow: pip install pyarrow|not a readable Parquet)"
    ):
        open_data(str(folder), 64)
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    columns = {key: [row[key] for row in ROWS] for key in ("file_name", "text")} | {"n": [1, 2, 3, 4]}
    parquet.write_table(pyarrow.table(columns), folder / "metadata.parquet")
    assert pairs(folder) == RIGHT
    parquet.write_table(pyarrow.table({"image": [{"bytes": b"x"}], "text": ["a"]}), folder / "metadata.parquet")
    with pytest.raises(ValueError, match="inside the table"):
        open_data(str(folder), 64)


def test_caption_column_chooses_and_the_start_line_says_what_was_chosen(folder):
    rows = [row | {"Long Text": f"a {row['text']} square", "caption": "x"} for row in ROWS]
    (folder / "metadata.jsonl").write_text(lines(rows))
    assert pairs(folder) == RIGHT
    assert "captions are from the column text, not caption" in describe(open_data(str(folder), 64))
    assert pairs(folder, caption_column="Long Text") == [(c, f"a {c} square") for c in COLOURS]
    with pytest.raises(ValueError, match="--caption-column alt: it has file_name, text, Long Text, caption"):
        open_data(str(folder), 64, caption_column="alt")


def test_several_captions_an_image(folder):
    rows = [{"file_name": f"{c}.png", "text": [c, f"a {c} one"]} for c in COLOURS]
    (folder / "metadata.jsonl").write_text(lines(rows))
    assert pairs(folder) == [(c, text) for c in COLOURS for text in (c, f"a {c} one")]
    assert describe(open_data(str(folder), 64)) == f"4 images, 8 captions, from {folder / 'metadata.jsonl'}"


def test_empty_captions_are_counted(folder):
    (folder / "metadata.jsonl").write_text(lines(row | {"text": "  " if i % 2 else "a"} for i, row in enumerate(ROWS)))
    assert describe(open_data(str(folder), 64)).endswith("; 2 captions are empty")


def test_names_of_another_system_are_found(tmp_path):
    """Backslashes; an accent in two forms; the folder's own name; not one of two files that differ in case."""
    name = unicodedata.normalize("NFD", "café.png")
    add_images(tmp_path / "train" / "sub", ["red"])
    (tmp_path / "train" / "sub" / "red.png").rename(tmp_path / "train" / "sub" / name)
    row = {"file_name": "sub\\" + unicodedata.normalize("NFC", "café.png"), "text": "red"}
    (tmp_path / "train" / "metadata.jsonl").write_text(lines([row]), encoding="utf-8")
    assert pairs(tmp_path) == [("red", "red")]
    (tmp_path / "train" / "metadata.jsonl").write_text(lines([{"file_name": f"train/sub/{name}", "text": "red"}]))
    assert pairs(tmp_path) == [("red", "red")]
    add_images(tmp_path / "two", ["red", "blue"])
    (tmp_path / "two" / "red.png").rename(tmp_path / "two" / "A.png")
    (tmp_path / "two" / "blue.png").rename(tmp_path / "two" / "a.png")
    (tmp_path / "two" / "metadata.jsonl").write_text(lines([{"file_name": "a.PNG", "text": "red"}]))
    if len(list((tmp_path / "two").glob("*.png"))) == 2:  # a file system that tells them apart
        with pytest.raises(FileNotFoundError, match="no image"):
            open_data(str(tmp_path / "two"), 64)


def test_two_names_that_differ_in_case_are_not_given_one_image(folder):
    """As after unpacking on a file system that keeps only one of them."""
    rows = [{"file_name": "./red.png", "text": "red"}, *ROWS]
    (folder / "metadata.jsonl").write_text(lines(rows))
    assert len(pairs(folder)) == 5
    (folder / "metadata.jsonl").write_text(lines([*rows, {"file_name": "RED.png", "text": "another one"}]))
    with pytest.raises(ValueError, match="red.png and RED.png are the same file on this disk"):
        open_data(str(folder), 64)


def test_missing_images_are_counted_and_left_out_only_when_few_or_allowed(folder):
    rows = [{"file_name": "red.png", "text": "red"}, {"file_name": "x" * 300 + ".png", "text": "x"}]
    (folder / "metadata.jsonl").write_text(lines(rows))
    with pytest.raises(FileNotFoundError, match="line 2: no image .*; 1 of 2 images are missing.*--allow-missing"):
        open_data(str(folder), 64)
    assert pairs(folder, allow_missing=True) == [("red", "red")]
    assert "; 1 of 2 images are missing and left out, the first: xxx" in describe(
        open_data(str(folder), 64, None, None, True)
    )
    for i in range(200):
        Image.new("RGB", (8, 8)).save(folder / f"{i}.png")
    many = [{"file_name": f"{i}.png", "text": "a"} for i in range(202)]
    (folder / "metadata.jsonl").write_text(lines(many))
    with pytest.raises(FileNotFoundError, match="200.png; 2 of 202 images are missing"):  # a table may lack none
        open_data(str(folder), 8)
    coco = {"images": [{"id": i, "file_name": f"{i}.png"} for i in range(202)]}
    coco["annotations"] = [{"image_id": i, "caption": "a"} for i in range(202)]
    (folder / "captions_mine.json").write_text(json.dumps(coco))
    few = open_data(str(folder / "captions_mine.json"), 8, str(folder))
    assert len(few) == 200 and "2 of 202 images are missing and left out, the first: 200.png" in describe(few)
    (folder / "metadata.jsonl").write_text(lines(rows[1:]))
    with pytest.raises(FileNotFoundError, match="1 of 1 images are missing; --images names their folder$"):
        open_data(str(folder), 64, allow_missing=True)


def test_images_names_another_folder(tmp_path):
    add_images(tmp_path / "pictures")
    (tmp_path / "table.csv").write_text("image,caption\n" + "".join(f"{c}.png,{c}\n" for c in COLOURS))
    assert pairs(tmp_path / "table.csv", images=str(tmp_path / "pictures")) == RIGHT
    with pytest.raises(FileNotFoundError, match="table.csv, line 2: no image .*4 of 4 images are missing; --images"):
        open_data(str(tmp_path / "table.csv"), 64)
    with pytest.raises(FileNotFoundError, match="--images nowhere: no such folder"):
        open_data(str(tmp_path / "table.csv"), 64, images="nowhere")


@pytest.mark.parametrize("options", [{"images": "."}, {"caption_column": "text"}, {"allow_missing": True}])
def test_a_flag_that_would_do_nothing_is_refused(tmp_path, options):
    with pytest.raises(ValueError, match=f"--{next(iter(options)).replace('_', '-')} goes with --data"):
        open_data(None, 64, **options)


@pytest.mark.parametrize(
    "content",
    [
        {f"{c}.png": c for c in COLOURS},
        {f"{c}.png": [c] for c in COLOURS},
        {f"{c}.png": {"caption": c, "tags": "x"} for c in COLOURS},
        [{"image": f"{c}.png", "caption": c, "image_id": f"coco_{c}"} for c in COLOURS],
    ],
)
def test_a_json_file_of_names_and_captions(folder, content):
    (folder / "list.json").write_text(json.dumps(content))
    assert pairs(folder / "list.json") == RIGHT


# --------------------------------------------------------------------------------------- text beside the images


@pytest.mark.parametrize("name", ["{}.txt", "{}.caption", "{}.TXT", "{}.png.txt"])
def test_text_beside_the_images(folder, name):
    for colour in COLOURS:
        (folder / name.format(colour)).write_text(colour + "\n", encoding="utf-8-sig")
    assert pairs(folder) == sorted(RIGHT)
    assert describe(open_data(str(folder), 64)) == f"4 images, 4 captions, from {folder}"


def test_text_beside_images_in_sub_folders_with_what_is_left_out(tmp_path):
    add_images(tmp_path / "10_square")
    add_images(tmp_path / "__MACOSX", ["red"])
    for colour in COLOURS[:3]:
        (tmp_path / "10_square" / f"{colour}.txt").write_text(f"{colour}\na {colour} square\n")
    (tmp_path / "10_square" / "._red.png").write_bytes(b"not an image")
    (tmp_path / "10_square" / "notes.txt").write_text("no image")
    expected = [(c, text) for c in ("blue", "green", "red") for text in (c, f"a {c} square")]
    assert pairs(tmp_path) == expected
    line = describe(open_data(str(tmp_path), 64))
    assert line.startswith("3 images, 6 captions")
    assert f"1 images have no caption and are left out, the first: {tmp_path}/10_square/yellow.png" in line
    assert "the number in folder names such as 10_square is not used" in line


def test_two_captions_beside_one_image_are_not_chosen_from(folder):
    (folder / "red.txt").write_text("red")
    (folder / "red.caption").write_text("a red square")
    with pytest.raises(ValueError, match="red.png: has two captions, red.txt and red.caption"):
        open_data(str(folder), 64)


# ------------------------------------------------------------------------------------- what has to be converted


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["data-00000-of-00001.arrow", "state.json"], "saved by datasets.save_to_disk; docs/data.md"),
        (["data/train-00000-of-00001.parquet"], "Parquet files that contain the images"),
        (["00000.tar"], "unpack its archives"),
        (["metadata.json1"], "metadata.json1 looks like it"),
        (["annotations/captions_train2017.json"], "name the captions file: .*captions_train2017.json"),
        (["a/metadata.jsonl", "b/metadata.csv"], "name one of its folders, a, b"),
        (["a.png"], "or a .txt beside each image"),
    ],
)
def test_a_folder_that_is_not_read_says_what_to_do(tmp_path, files, message):
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"{}")
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        open_data(str(tmp_path), 64)


def test_an_archive_says_how_to_unpack_it_and_is_then_read(folder):
    (folder / "shard.tar").write_bytes(bytes(1024))
    with pytest.raises(ValueError, match="mkdir shard && tar -xf shard.tar -C shard"):
        open_data(str(folder / "shard.tar"), 64)
    with pytest.raises(ValueError, match="red.png: an image"):
        open_data(str(folder / "red.png"), 64)


# ------------------------------------------------------------------------------------------------------- COCO

IMAGES = [{"id": i + 1, "file_name": f"{c}.png"} for i, c in enumerate(COLOURS)]
NOTES = [{"id": k, "image_id": k % 4 + 1, "caption": COLOURS[k % 4]} for k in range(8)]


def coco(folder, images=IMAGES, notes=NOTES, place="train2017", kept=COLOURS, file="captions_train2017.json"):
    path = folder / "annotations" / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"images": images, "annotations": notes}), encoding="utf-8-sig")
    add_images(folder / place, kept)
    return path


@pytest.mark.parametrize("place", ["train2017", "images/train2017", "images", "annotations", "train2017/images", "."])
def test_coco_images_are_found_in_the_usual_places(tmp_path, place):
    assert pairs(coco(tmp_path, place=place)) == 2 * RIGHT


def test_coco_file_named_from_its_own_folder(tmp_path, monkeypatch):
    path = coco(tmp_path)
    monkeypatch.chdir(path.parent)
    assert pairs(path.name) == 2 * RIGHT


def test_coco_of_two_splits(tmp_path):
    path = coco(tmp_path, kept=COLOURS[:2], file="captions_trainval2017.json")
    add_images(tmp_path / "val2017", COLOURS[2:])
    assert pairs(path) == 2 * RIGHT


def test_coco_names_with_folders_and_addresses(tmp_path):
    images = [im | {"file_name": f"train2017/{im['file_name']}"} for im in IMAGES]
    assert pairs(coco(tmp_path, images)) == 2 * RIGHT
    images = [{"id": im["id"], "coco_url": f"http://localhost/train2017/{im['file_name']}"} for im in IMAGES]
    assert pairs(coco(tmp_path, images)) == 2 * RIGHT


@pytest.mark.parametrize("kind", [str, float, "{:012d}".format])
def test_coco_ids_of_another_type(tmp_path, kind):
    assert pairs(coco(tmp_path, notes=[note | {"image_id": kind(note["image_id"])} for note in NOTES])) == 2 * RIGHT


def test_coco_images_of_another_split_are_not_taken_for_these(tmp_path):
    """train/1.png is missing, val/1.png is another image."""
    path = coco(tmp_path, place="train2017", kept=COLOURS[:1])
    add_images(tmp_path / "val2017")
    with pytest.raises(FileNotFoundError, match="annotation 2: no image .*green.png; 3 of 4 images are missing"):
        open_data(str(path), 64)


def test_coco_with_images_missing_stops_unless_told_to_go_on(tmp_path):
    path = coco(tmp_path, kept=COLOURS[:1])
    with pytest.raises(FileNotFoundError, match="3 of 4 images are missing.*--images.*--allow-missing"):
        open_data(str(path), 64)
    assert pairs(path, allow_missing=True) == 2 * [("red", "red")]
    line = describe(open_data(str(path), 64, allow_missing=True))
    assert line.startswith(f"1 images, 2 captions, from {path}; 3 of 4 images are missing and left out")
    add_images(tmp_path / "elsewhere")
    assert pairs(path, images=str(tmp_path / "elsewhere")) == 2 * RIGHT
    add_images(tmp_path / "parent" / "train2017")
    assert pairs(path, images=str(tmp_path / "parent")) == 2 * RIGHT


def test_coco_captions_of_no_image_are_left_out_and_counted(tmp_path):
    path = coco(tmp_path, notes=[{"image_id": 777, "caption": "of no image"}, *NOTES])
    assert pairs(path) == 2 * RIGHT
    assert describe(open_data(str(path), 64)).endswith("1 of 9 captions belong to no image and are left out")
    path = coco(tmp_path, notes=[note | {"image_id": f"x{note['image_id']}"} for note in NOTES])
    with pytest.raises(ValueError, match="8 of 8 captions belong to no image"):
        open_data(str(path), 64)


def test_coco_files_that_cannot_be_right_are_refused(tmp_path):
    with pytest.raises(ValueError, match="two images have the same id"):
        read_coco(coco(tmp_path, images=[*IMAGES, {"id": 1, "file_name": "blue.png"}]))
    instances = [{"id": 1, "image_id": 1, "category_id": 3, "bbox": [0, 0, 9, 9]}]
    with pytest.raises(ValueError, match="not a COCO captions file .*; captions are in captions_"):
        open_data(str(coco(tmp_path, notes=instances, file="instances_train2017.json")), 64)


def test_karpathys_split_gives_its_training_part(tmp_path):
    images = [
        {
            "filepath": "train2014",
            "filename": f"{c}.png",
            "split": split,
            "sentences": [{"raw": c}, {"raw": f"a {c} one"}],
        }
        for c, split in zip(COLOURS, ["train", "val", "restval", "test"], strict=True)
    ]
    path = tmp_path / "dataset_coco.json"
    path.write_text(json.dumps({"images": images, "dataset": "coco"}))
    with pytest.raises(FileNotFoundError, match="image 1: no image .*red.png; 2 of 2 images are missing; --images"):
        open_data(str(path), 64)
    add_images(tmp_path / "train2014")
    expected = [("red", "red"), ("red", "a red one"), ("blue", "blue"), ("blue", "a blue one")]
    assert pairs(path) == pairs(path, images=str(tmp_path)) == expected
    assert pairs(path, images=str(tmp_path / "train2014")) == expected
    line = describe(open_data(str(path), 64))
    assert (
        line.startswith("2 images, 4 captions")
        and "of the split train and restval; 2 images of other parts are not used" in line
    )


# -------------------------------------------------------------------------------------------- captions without images


def test_captions_alone_need_no_images(tmp_path):
    """ReFL reads no image, so none has to be there; the order is that of the rows with images."""
    path = coco(tmp_path)
    with_images = [text for _, text in open_data(str(path), 64).rows]
    for image in (tmp_path / "train2017").iterdir():
        image.unlink()
    (tmp_path / "train2017").rmdir()
    data = open_data(str(path), 64, captions_only=True)
    assert isinstance(data, PromptDataset) and data.prompts == with_images
    assert describe(data) == f"8 prompts, from {path}"
    (tmp_path / "metadata.jsonl").write_text(lines(ROWS))
    assert open_data(str(tmp_path), 64, captions_only=True).prompts == COLOURS


def test_the_start_line_of_the_other_data_sets(tmp_path):
    assert describe(open_data(None, 64)) == "65,536 images, 65,536 captions, composed from the embedded emoji"
    (tmp_path / "a.txt").write_text("a\nb\n")
    assert describe(open_data(str(tmp_path / "a.txt"), 64)) == f"2 prompts, from {tmp_path / 'a.txt'}"
    assert isinstance(ImageDataset([(tmp_path, "a")], 8), ImageDataset)
