"""A file of prompts is read as what it is, or refused by name."""

import json

import pytest

from training.data import PromptDataset, open_data, read_prompts

P = ["octopus", "red apple, flat style", "tiger"]


@pytest.fixture
def write(tmp_path):
    def write(name, content, encoding="utf-8"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode(encoding))
        return path

    return write


def objects(key, **more):
    return [{key: p} | more for p in P]


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.tsv", "Prompt\tCategory\tNote\n" + "".join(f"{p}\tAnimals\t\n" for p in P)),
        ("cut.tsv", "Prompt\tCategory\tNote\n" + "".join(f"{p}\tAnimals\n" for p in P)),
        ("a.csv", "Prompts,Category\n" + "".join(f'"{p}",Colors\n' for p in P)),
        ("b.csv", "case_number,prompt,seed\n" + "".join(f'{i},"{p}",4\n' for i, p in enumerate(P))),
        ("semicolons.csv", "id;caption\n" + "".join(f"1;{p}\n" for p in P)),
        ("one.csv", "text\n" + "".join(f'"{p}"\n' for p in P)),
        ("a.jsonl", lines(objects("text", file_name="a.png"))),
        ("b.jsonl", lines(objects("prompt", tag="x", include=[]))),
        ("c.jsonl", lines(P)),
        ("d.ndjson", lines(objects("Caption"))),
        ("array.jsonl", json.dumps(objects("prompt"))),
        ("a.json", json.dumps(P)),
        ("UPPER.JSON", json.dumps(P)),
        ("lines.json", lines(objects("prompt"))),
        ("hpd.json", json.dumps(objects("prompt", image_path=["a.jpg"], rank=[1]))),
        ("refl_data.json", json.dumps(objects("text"))),
        ("upper.json", json.dumps(objects("Prompt"))),
        ("numbers.json", json.dumps({str(i): {"prompt": p, "id": i} for i, p in enumerate(P)})),
        ("texts.json", json.dumps({str(i): p for i, p in enumerate(P)})),
        ("styles.json", json.dumps({"anime": P[:2], "photo": P[2:]})),
        ("key.json", json.dumps({"version": 1, "prompts": P})),
        ("many.json", json.dumps([{"captions": P[:2]}, {"captions": P[2:]}])),
        ("table.txt", "Prompt\tCategory\n" + "".join(f"{p}\tx\n" for p in P)),
        ("table2.txt", "id,prompt\n" + "".join(f'1,"{p}"\n' for p in P)),
        ("json.txt", json.dumps(P)),
        ("jsonl.txt", lines(objects("prompt"))),
        ("header.txt", "prompt\n" + "\n".join(P)),
        ("lines", "\n".join(P)),
        ("quoted.txt", "\n".join(f'"{p}",' for p in P)),
        ("numbered.txt", "\n".join(f"{i}. {p}" for i, p in enumerate(P, 1))),
        ("bullets.txt", "\n".join(f"- {p}" for p in P)),
        ("comments.txt", "# animals\n" + "\n".join(P) + "\n\n# the end\n"),
        ("mac.txt", "\r".join(P)),
    ],
)
def test_known_files_are_read_as_what_they_are(write, name, content):
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        assert read_prompts(write(name, content, encoding)) == P


def test_coco_captions_as_prompts_need_no_images(write):
    images = [{"id": i, "file_name": f"{i}.jpg"} for i in range(3)]
    notes = [{"image_id": i % 3, "caption": P[i % 3]} for i in range(6)]
    for name in ("captions_val2014.json", "captions.txt"):
        assert read_prompts(write(name, json.dumps({"images": images, "annotations": notes}))) == P + P


def test_karpathys_split_gives_its_test_part_as_prompts(write, capsys):
    images = [{"filename": "a.jpg", "split": s, "sentences": [{"raw": s}]} for s in ("train", "val", "test")]
    assert read_prompts(write("dataset_coco.json", json.dumps({"images": images}))) == ["test"]
    assert "of the split test; 2 images of other parts are not used" in capsys.readouterr().err


def test_quotes_in_a_tsv_need_no_partner(write):
    content = 'Prompt\tCategory\n"hello" on a sign\tText\nthe word "START"\tText\n"a ""b"" c"\tText\n"open\tText\n'
    expected = ['"hello" on a sign', 'the word "START"', 'a "b" c', '"open']
    assert read_prompts(write("parti.tsv", content)) == expected


def test_lines_that_only_look_like_something_else_stay_lines(write):
    for text in (
        "text, logo, sign\nan owl",
        "[flat style] octopus\nan owl",
        "{a, b}\nan owl",
        '"hello"\nan owl',
        "1. floor\n7. heaven",
        "3. floor\n4. heaven",
        "1. floor\nheaven",
        "#1 fan\nan owl",
        "caption",
        "a fox\u2028on\x85grass\nan owl",
    ):
        assert read_prompts(write("a.txt", text)) == text.split("\n")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "<!DOCTYPE html><html>404</html>", "a web page"),
        ("a.txt", "version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer"),
        ("a.txt", "a cat\nNegative prompt: dog\nSteps: 20\n", "line 2: settings of a generated image"),
        ("a.txt", b"a\0b", "not a UTF-8 text file"),
        ("a.yaml", "a: b\n", ".yaml files are not read as prompts"),
        ("a.md", "# Prompts\n", ".md files are not read as prompts"),
        ("a.safetensors", b"\0", ".safetensors files are not read"),
        ("a.csv", "name,label\na,b\n", "no column prompt, caption or text : it has name, label"),
        ("a.csv", "prompt,label\na cat, sitting,b\n", "line 2: 3 cells, and the header has 2"),
        ("a.tsv", "a cat\tb\nc\td\n", "no column prompt"),
        ("a.json", "[1, 2]", "entry 1: expected a list of strings"),
        ("a.json", json.dumps([*P, None]), "entry 4: expected a list of strings"),
        ("a.json", json.dumps({"name": "x", "version": "1"}), "not prompts"),
        ("a.json", json.dumps({"a": 1}), "not prompts"),
        (
            "a.json",
            json.dumps({"images": [], "annotations": [{"image_id": 1, "bbox": []}]}),
            "not a COCO captions file",
        ),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": 5}\n', "line 2: expected a list of strings"),
        ("a.jsonl", '{"prompt": "a"}\n{"tag": "b"}\n', "line 2: expected a list of strings"),
        ("a.jsonl", '{"prompt": "a"}\n{broken\n', "line 2: not a JSON object"),
        ("a.jsonl", "[" * 100_000, "line 1: not a JSON object"),
        ("a.parquet", b"PAR1", "needs pyarrow|not a readable Parquet"),
    ],
)
def test_what_is_not_prompts_is_refused_by_name(write, name, content, message):
    with pytest.raises(ValueError, match=f"{name}.*({message})") as error:
        read_prompts(write(name, content))
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="a folder; name a file of prompts"):
        read_prompts(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("(octopus:1.3), [flat]\n<lora:x:0.8> tiger\nan owl", "'(octopus:1.3)' and the like in 2 prompts: weights"),
        ("octopus --n low --w 64\nan owl --n x", "'--n' and the like in 2 prompts: settings of images"),
        ("a {red|blue} owl", "'{red|blue}': choices at random"),
        ("# animals\nan owl", "1 lines that begin with # are comments, the first: # animals"),
        ("1. owl\n2. fox", "the lines begin with numbers, which are left out"),
        ('"owl"\n"fox"', "each line stands in quotes"),
        ("Prompts\nan owl", "the first line, Prompts, is a header"),
    ],
)
def test_what_is_not_obvious_is_said_once(write, capsys, text, message):
    read_prompts(write("a.txt", text))
    (line,) = capsys.readouterr().err.splitlines()
    assert "a.txt: " in line and message in line


def test_usual_prompts_are_read_without_a_word(write, capsys):
    read_prompts(write("a.txt", "a photo (close up) of an owl: 3 of them -- at night\nan [old] e-mail"))
    assert capsys.readouterr().err == ""


def test_caption_column_names_the_column_of_prompts(write):
    path = write("a.csv", "prompt,alt\nwrong,octopus\n")
    data = open_data(str(path), 8, caption_column="alt")
    assert isinstance(data, PromptDataset) and data.prompts == ["octopus"]
    with pytest.raises(ValueError, match="--caption-column nothing: it has prompt, alt"):
        open_data(str(path), 8, caption_column="nothing")
