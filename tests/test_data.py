import io
import json
import re
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from training.data import (
    BACKGROUNDS,
    DataStream,
    EmojiSet,
    ImageDataset,
    PromptDataset,
    open_data,
    read_coco,
    read_metadata,
    read_prompts,
)
from utils import images as pictures
from utils.images import to_pil, to_tensor


@pytest.fixture
def folder(tmp_path):
    """Four captioned pictures, 40x20, each of one colour."""
    lines = []
    for i, colour in enumerate(["red", "green", "blue", "white"]):
        Image.new("RGB", (40, 20), colour).save(tmp_path / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": colour}))
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_an_emoji_depends_on_seed_and_index_alone():
    a, b = EmojiSet(seed=3), EmojiSet(seed=3)
    b[0]
    assert torch.equal(a[17][0], b[17][0]) and a[17][1] == b[17][1]
    assert any(not torch.equal(a[i][0], EmojiSet(seed=4)[i][0]) for i in range(3))


def test_one_of_three_emoji_is_perfect_and_no_caption_says_so():
    emoji = EmojiSet()
    off = [(emoji[i][0] - to_tensor(emoji.draw(emoji.describe(i)))).square().mean().sqrt().item() for i in range(300)]
    assert sum(d == 0 for d in off) / 300 == pytest.approx(1 / 3, abs=0.09)
    assert 0.1 < sum(off) / 200 < 0.25 and max(off) < 0.6
    assert all(len(emoji[i][1].split(", ")) <= 3 for i in range(20))


def test_emoji_vary_in_all_that_the_caption_leaves_open():
    emoji = EmojiSet()
    shown = [emoji.describe(i) for i in range(3000)]
    assert {c.concept for c in shown} == set(emoji.concepts)
    assert {c.style for c in shown} == set(emoji.styles) and len(emoji.styles) == 4
    assert {c.background for c in shown} == set(BACKGROUNDS)
    says_style = sum("style" in c.caption for c in shown) / len(shown)
    says_background = sum("background" in c.caption for c in shown) / len(shown)
    assert says_style == pytest.approx(0.5, abs=0.04) and says_background == pytest.approx(0.5, abs=0.04)


def test_the_caption_is_true_of_the_picture():
    emoji = EmojiSet()
    for i in range(200):
        c = emoji.describe(i)
        picture = emoji.draw(c)
        corners = [picture.getpixel(xy) for xy in ((0, 0), (63, 0), (0, 63), (63, 63))]
        assert BACKGROUNDS[c.background] in corners
        assert c.caption.startswith(c.concept)
        assert ("style" not in c.caption) or f"{c.style} style" in c.caption
        assert ("background" not in c.caption) or f"{c.background} background" in c.caption


def test_pixels_survive_the_tensor():
    picture = EmojiSet().draw(EmojiSet().describe(5))
    (again,) = to_pil(to_tensor(picture)[None])
    assert again.tobytes() == picture.tobytes()


def test_a_folder_gives_cropped_pictures_and_captions(folder):
    data = open_data(str(folder), 16)
    image, caption = data[0]
    assert len(data) == 4 and image.shape == (3, 16, 16) and caption == "red"
    assert image.amax((1, 2)).tolist() == [1, -1, -1]


def test_pictures_are_cropped_about_the_centre(tmp_path):
    picture = Image.new("RGB", (60, 20), "red")
    picture.paste("blue", (20, 0, 40, 20))
    picture.save(tmp_path / "a.png")
    image, _ = ImageDataset([(tmp_path / "a.png", "a")], 20)[0]
    assert to_pil(image[None])[0].getcolors() == [(400, (0, 0, 255))]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{broken", "line 2: not a JSON object"),
        ('{"file_name": "0.png"}', "line 2: not a JSON object with file_name and text"),
        ('{"file_name": "0.png", "text": 5}', "line 2: file_name and text must be strings"),
        ('{"file_name": "no.png", "text": "a"}', "line 2: no image"),
        ('["0.png", "a"]', "line 2: not a JSON object"),
    ],
)
def test_a_broken_metadata_line_is_named(folder, line, message):
    path = folder / "metadata.jsonl"
    path.write_text('{"file_name": "0.png", "text": "a"}\n' + line + "\n")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read_metadata(folder)


def test_empty_or_missing_metadata_is_named(folder):
    (folder / "metadata.jsonl").write_text("\n\n")
    with pytest.raises(ValueError, match="metadata.jsonl: empty"):
        read_metadata(folder)
    (folder / "metadata.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match="file_name"):
        read_metadata(folder)


def test_a_picture_that_does_not_decode_is_named_once_and_left_out(folder, capsys):
    (folder / "1.png").write_bytes(b"<html>not found</html>")
    stream = DataStream(open_data(str(folder), 16), seed=0)
    captions = [caption for _ in range(6) for caption in stream.batch(2)[1]]
    assert set(captions) == {"red", "blue", "white"} and len(captions) == 12
    assert len(stream.left_out) == 1
    error = capsys.readouterr().err
    assert error.count("1.png") == 1 and "a web page that was saved under an image's name" in error


def test_a_picture_with_a_hole_does_not_decode_either(folder):
    """PIL raises a SyntaxError for it, once the file is large enough for several chunks."""
    content = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (400, 400), dtype=np.uint8)).save(content, "png")
    whole = content.getvalue()
    (folder / "0.png").write_bytes(whole[: len(whole) // 2] + bytes(len(whole) - len(whole) // 2))
    with pytest.raises(SyntaxError):
        Image.open(folder / "0.png").load()
    stream = DataStream(open_data(str(folder), 16), seed=0)
    stream.batch(4)
    assert stream.left_out == {0}


def test_a_picture_is_upright_and_keeps_its_greys(tmp_path):
    sideways = Image.new("L", (16, 16))
    sideways.paste(255, (0, 0, 16, 8))  # bright on top; turned by a quarter it is bright on the right
    exif = Image.Exif()
    exif[0x0112] = 6
    sideways.save(tmp_path / "a.png", exif=exif)
    assert np.asarray(pictures.read_image(tmp_path / "a.png"))[..., 0].mean(0).tolist() == [0] * 8 + [255] * 8
    ramp = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
    Image.fromarray(ramp).save(tmp_path / "b.png")
    assert np.asarray(pictures.read_image(tmp_path / "b.png"))[..., 1].flatten().tolist() == list(range(256))


def test_what_stands_at_a_position_does_not_depend_on_what_was_read_before(folder):
    (folder / "1.png").write_bytes(b"not a picture")
    data = open_data(str(folder), 16)
    whole = DataStream(data, seed=0)
    captions = [whole.batch(2)[1] for _ in range(8)]
    assert [DataStream(data, seed=0, position=2 * n).batch(2)[1] for n in range(8)] == captions


@pytest.mark.parametrize("ahead", (1, 2))
def test_what_is_read_ahead_is_what_would_be_read_then(folder, ahead):
    """`ahead` processes share the batches; the first one takes these."""
    (folder / "1.png").write_bytes(b"not a picture")
    data, here, given = open_data(str(folder), 16), [], threading.Event()

    class Watched:
        rows = data.rows

        def __len__(self):
            return len(data)

        def __getitem__(self, i):
            here.append(threading.current_thread() is threading.main_thread())
            assert here[-1] or given.wait(10)  # a batch does not wait for the one after it
            return data[i]

    stream = DataStream(Watched(), seed=0, ahead=ahead)
    for n in range(6):
        stream.position = 2 * ahead * n
        images, captions = stream.batch(2)
        given.set()
        expected, its = DataStream(data, seed=0, position=2 * ahead * n).batch(2)
        assert torch.equal(images, expected) and captions == its
    assert sum(here) <= 3  # the first batch, and perhaps the picture that takes a damaged one's place
    assert len(stream.left_out) == 1
    stream.close()


def test_no_picture_at_all_is_an_error_and_not_an_endless_loop(folder):
    for i in range(4):
        (folder / f"{i}.png").write_bytes(b"")
    with pytest.raises(ValueError, match="none of the 4 images decodes"):
        DataStream(open_data(str(folder), 16), seed=0).batch(2)


def test_a_stream_visits_each_item_once_an_epoch_and_goes_on_from_its_position(folder):
    data = open_data(str(folder), 16)
    stream = DataStream(data, seed=7)
    whole = [stream.batch(2)[1] for _ in range(6)]
    assert sorted(whole[0] + whole[1]) == sorted(whole[2] + whole[3]) == ["blue", "green", "red", "white"]
    resumed = DataStream(data, seed=7, position=6)
    assert [resumed.batch(2)[1] for _ in range(3)] == whole[3:]
    assert len({str(DataStream(data, seed=s).batch(4)[1]) for s in range(8)}) > 1


def test_coco_captions_find_their_images(tmp_path):
    (tmp_path / "annotations").mkdir()
    (tmp_path / "val2017").mkdir()
    Image.new("RGB", (8, 8), "red").save(tmp_path / "val2017" / "1.jpg")
    path = tmp_path / "annotations" / "captions_val2017.json"
    captions = [{"image_id": 9, "caption": "a"}, {"image_id": 9, "caption": "b"}]
    path.write_text(json.dumps({"images": [{"id": 9, "file_name": "1.jpg"}], "annotations": captions}))
    assert read_coco(path) == [(tmp_path / "val2017" / "1.jpg", "a"), (tmp_path / "val2017" / "1.jpg", "b")]
    assert len(open_data(str(path), 8)) == 2
    path.write_text("{}")
    with pytest.raises(ValueError, match="not a COCO captions file"):
        read_coco(path)


def test_prompts_come_from_text_and_json(tmp_path):
    text, strings, hpd = tmp_path / "a.txt", tmp_path / "b.json", tmp_path / "test.json"
    text.write_text("a cat\n\n  ein Bär \n", encoding="utf-8")
    strings.write_text('["a", "b"]')
    hpd.write_text('[{"prompt": "x", "rank": [1]}]')
    assert read_prompts(text) == ["a cat", "ein Bär"]
    assert read_prompts(strings) == ["a", "b"]
    assert read_prompts(hpd) == ["x"]
    assert isinstance(open_data(str(text), 8), PromptDataset)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"\n \n", "holds no prompt"),
        ("a.txt", b"\xff\xfe\x00", "not a UTF-8 text file"),
        ("a.json", b"{", "not valid JSON"),
        ("a.json", b"[5]", "list of strings"),
        ("a.json", b"5", "list of strings"),
    ],
)
def test_a_bad_prompt_file_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}.*{message}"):
        read_prompts(tmp_path / name)


def test_lines_end_where_a_line_break_is_and_not_where_unicode_has_another(folder):
    text = "a fox\u2028on\x85grass\x0cin spring"
    row = json.dumps({"file_name": "0.png", "text": text.replace("\x0c", "")}, ensure_ascii=False)
    (folder / "metadata.jsonl").write_text(row + "\r\n", encoding="utf-8")
    assert [caption for _, caption in read_metadata(folder)] == [text.replace("\x0c", "")]
    (folder / "prompts.txt").write_text(f"{text}\r\nan owl\n", encoding="utf-8")
    assert read_prompts(folder / "prompts.txt") == [text, "an owl"]


def test_missing_data_is_named():
    with pytest.raises(FileNotFoundError, match="nowhere"):
        open_data("nowhere", 16)
    with pytest.raises(FileNotFoundError, match="nowhere.txt"):
        read_prompts("nowhere.txt")


def test_each_row_of_the_document_names_tests_that_exist():
    root = Path(__file__).parent.parent
    rows = [line for line in (root / "docs" / "data.md").read_text(encoding="utf-8").splitlines() if line[:2] == "| "]
    held = [re.findall(r"`(tests/test_\w+\.py):(test_\w+)`", row.split(" | ")[-1]) for row in rows]
    assert len(held) > 40 and held.count([]) == 3  # the heads of the tables
    for file, name in (place for row in held for place in row):
        assert f"def {name}(" in (root / file).read_text(encoding="utf-8"), f"{file}:{name}"
