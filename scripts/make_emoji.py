"""Make the emoji set that ships with dydit from the npm package emoji-datasource-google.

    npm pack emoji-datasource-google@16.0.0 && tar xzf emoji-datasource-google-16.0.0.tgz
    python scripts/make_emoji.py package dydit/assets/emoji

Every picture is put on white, halved to 32x32 by averaging 2x2 pixels, and stored as a tile of one PNG sheet, row by
row. The same package gives the same bytes with the same version of Pillow.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from PIL import Image

SIDE = 32
COLUMNS = 44
NOT_MIRRORED = ("Flags", "Symbols")
"""Categories whose pictures mean something else, or nothing, if they are mirrored."""
NO_CATEGORY = "Component"
"""Five skin tones and hair styles as pictures of their own."""


def tile(path: Path) -> Image.Image:
    """A picture on white, RGB 32x32."""
    with Image.open(path) as file:
        picture = file.convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(white, picture).convert("RGB").reduce(picture.width // SIDE)


def main(package: Path, out: Path) -> None:
    """Write `emoji.png` and `emoji.json`."""
    entries = json.loads((package / "emoji.json").read_text())
    entries = [each for each in entries if each["has_img_google"] and each["category"] != NO_CATEGORY]
    entries.sort(key=lambda each: (each["category"], each["sort_order"]))
    categories = sorted({each["category"] for each in entries})
    sheet = Image.new("RGB", (COLUMNS * SIDE, -(-len(entries) // COLUMNS) * SIDE), "white")
    for number, entry in enumerate(entries):
        where = (number % COLUMNS * SIDE, number // COLUMNS * SIDE)
        sheet.paste(tile(package / "img" / "google" / "64" / entry["image"]), where)
    out.mkdir(parents=True, exist_ok=True)
    sheet.save(out / "emoji.png", optimize=True)
    names = {
        "source": "Noto Emoji, Copyright Google, Apache License 2.0; from emoji-datasource-google 16.0.0",
        "side": SIDE,
        "columns": COLUMNS,
        "categories": categories,
        "not_mirrored": [categories.index(each) for each in NOT_MIRRORED],
        "labels": [categories.index(each["category"]) for each in entries],
        "captions": [(each["name"] or each["short_name"].replace("-", " ")).lower() for each in entries],
    }
    (out / "emoji.json").write_text(json.dumps(names, ensure_ascii=False, indent=0) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
