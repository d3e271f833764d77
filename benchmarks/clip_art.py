"""A second set of real images with tags: Open Clip Art, public domain, as Debian's openclipart-png and openclipart-svg have it."""

import re
from pathlib import Path
from xml.etree import ElementTree as ET

FOLDER = Path("/usr/share/openclipart")
"""Where the packages put it: pictures in png/, the same with their metadata in svg/."""
DUBLIN_CORE, RDF = "{http://purl.org/dc/elements/1.1/}", "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}"
FEWEST_TAGS = 3
MOST_PIXELS = 4_000_000
"""A few are huge."""


def clip_art(folder: Path = FOLDER) -> dict[Path, str]:
    """File of each picture and its caption: title, keywords and folders, without repeats. Of equal captions the first one is kept,
    and pictures with fewer than FEWEST_TAGS tags or more than MOST_PIXELS are left out.

    Raises: SystemExit, where it is not installed.
    """
    found: dict[str, Path] = {}
    for picture in sorted((folder / "png").rglob("*.png")):
        place = picture.relative_to(folder / "png")
        tags = _tags(folder / "svg" / place.with_suffix(".svg"))
        tags = list(dict.fromkeys([*tags, *place.parent.parts]))
        if len(tags) >= FEWEST_TAGS and _pixels(picture) <= MOST_PIXELS:
            found.setdefault(", ".join(tags), picture)
    if not found:
        raise SystemExit(f"There is no clip art in {folder}. Install openclipart-png and openclipart-svg, or name their folder.")
    return {picture: caption for caption, picture in found.items()}


def _pixels(picture: Path) -> int:
    """Of a PNG, by its header."""
    with picture.open("rb") as stream:
        head = stream.read(24)
    return int.from_bytes(head[16:20], "big") * int.from_bytes(head[20:24], "big")


def _tags(drawing: Path) -> list[str]:
    """Title and keywords in the metadata; none if it is no drawing that can be read."""
    try:
        root = ET.parse(drawing).getroot()
    except (OSError, ET.ParseError):
        return []
    titles = [element.text or "" for element in root.iter(f"{DUBLIN_CORE}title")][:1]
    keywords = [item.text or "" for subject in root.iter(f"{DUBLIN_CORE}subject") for item in subject.iter(f"{RDF}li")]
    words = [re.sub(r"[\s|,_]+", " ", text).strip().lower() for text in (*titles, *keywords)]
    return [word for word in words if word]
