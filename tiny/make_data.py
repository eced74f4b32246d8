"""Pack the emoji of the tiny base, 64 concepts by four designers, into one PNG atlas.

    npm install emoji-datasource-google@16.0.0 emoji-datasource-twitter@16.0.0 fluentui-emoji@1.3.0
    python tiny/make_data.py --packages node_modules

Rows of the atlas are concepts, columns are styles (noto, twemoji, flat, modern), each cell is 64x64 RGBA. `emoji.json`
names the rows and columns. Takes ten seconds. Needs cairosvg (requirements-dev.txt).
"""

import argparse
import io
import json
from pathlib import Path

from PIL import Image

CELL = 64
STYLES = {  # style -> package, licence
    "noto": ("emoji-datasource-google", "Apache-2.0"),
    "twemoji": ("emoji-datasource-twitter", "CC-BY-4.0"),
    "flat": ("fluentui-emoji", "MIT"),
    "modern": ("fluentui-emoji", "MIT"),
}
# Concepts recognisable at 64 pixels: distinct outlines or colours, similar enough across all four designers.
# "name in captions = Unicode name / Fluent file"; the last two only where they differ from the first.
CONCEPTS = """
octopus; tiger = tiger face; cat = cat face; dog = dog face; pig = pig face; mouse = mouse face; cow = cow face;
rabbit = rabbit face; monkey = monkey face; fox = fox face / fox; panda = panda face / panda; frog = frog face /
frog; bear = bear face / bear; lion = lion face / lion; koala; penguin; chick = front-facing baby chick; owl;
ladybug = lady beetle; bee = honeybee; butterfly; turtle; snail; whale = spouting whale; tropical fish; crab;
unicorn = unicorn face / unicorn; red apple; green apple; banana; strawberry; cherries; watermelon; pineapple;
lemon; tangerine; grapes; peach; carrot; broccoli; hamburger; pizza = slice of pizza / pizza; doughnut; ice
cream = soft ice cream; lollipop; french fries; cactus; tulip; sunflower; palm tree; clover = four leaf clover;
maple leaf; mushroom; balloon; soccer ball; rocket; car = automobile; star = white medium star / star; heart =
heavy black heart / red heart; pumpkin = jack-o-lantern; christmas tree; ghost; gem = gem stone; cool face =
smiling face with sunglasses
"""


def concepts() -> list[tuple[str, str, str]]:
    """(caption name, Unicode name, Fluent file name without suffix) of each concept."""
    rows = []
    for entry in CONCEPTS.replace("\n", " ").split(";"):
        name, _, rest = entry.strip().partition(" = ")
        unicode_name, _, fluent = (rest or name).partition(" / ")
        rows.append((name, unicode_name, (fluent or unicode_name).replace(" ", "-")))
    return rows


def load_png(package: Path, folder: str, unicode_name: str) -> Image.Image:
    entries = json.loads((package / "emoji.json").read_text())
    entry = next((e for e in entries if e["name"].lower() == unicode_name), None)
    if entry is None:
        raise ValueError(f"{package.name} has no emoji named '{unicode_name}'")
    return Image.open(package / "img" / folder / "64" / entry["image"]).convert("RGBA")


def load_svg(path: Path) -> Image.Image:
    import cairosvg

    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; check --packages")
    return Image.open(io.BytesIO(cairosvg.svg2png(url=str(path), output_width=4 * CELL, output_height=4 * CELL)))


def fit(image: Image.Image) -> Image.Image:
    """Trim the transparent margin, then scale and centre the drawing, so all designers' emoji have the same size."""
    image = image.crop(image.getbbox())
    scale = CELL / max(image.size)
    size = [max(1, round(side * scale)) for side in image.size]
    cell = Image.new("RGBA", (CELL, CELL))
    cell.paste(image.resize(size, Image.Resampling.LANCZOS), ((CELL - size[0]) // 2, (CELL - size[1]) // 2))
    return cell


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, default=Path("node_modules"), help="folder of the npm packages")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "data", help="folder to write to")
    args = parser.parse_args()

    rows = concepts()
    atlas = Image.new("RGBA", (CELL * len(STYLES), CELL * len(rows)))
    for row, (_, unicode_name, fluent) in enumerate(rows):
        icons = args.packages / "fluentui-emoji" / "icons"
        drawings = [
            load_png(args.packages / "emoji-datasource-google", "google", unicode_name),
            load_png(args.packages / "emoji-datasource-twitter", "twitter", unicode_name),
            load_svg(icons / "flat" / f"{fluent}.svg"),
            load_svg(icons / "modern" / f"{fluent}.svg"),
        ]
        for column, drawing in enumerate(drawings):
            atlas.paste(fit(drawing), (CELL * column, CELL * row))
    args.output.mkdir(parents=True, exist_ok=True)
    atlas.save(args.output / "emoji.png", optimize=True)
    names = {"cell": CELL, "concepts": [name for name, *_ in rows], "styles": list(STYLES)}
    (args.output / "emoji.json").write_text(json.dumps(names, indent=1) + "\n")
    print(f"{len(rows)} concepts x {len(STYLES)} styles -> {args.output / 'emoji.png'}")


if __name__ == "__main__":
    main()
