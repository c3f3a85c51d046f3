"""Which stamps there are, and which parts each of them has."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

FOLDER = Path("/usr/share/tuxpaint/stamps")

# Six poses of a penguin without a caption: the folder tells how they are drawn and not what they show.
_LEFT_OUT = "cartoon"


@dataclass(frozen=True)
class Item:
    """One stamp; a part that the folder does not have is None.

    category: the folder it lies in, under the stamps' own
    picture:  a PNG file; drawings that exist as SVG only count as missing
    caption:  a line of English
    speech:   a recording of the description in the language asked for
    """

    name: str
    category: str
    picture: Path | None
    caption: str | None
    speech: Path | None


def find_items(folder: Path, language: str) -> list[Item]:
    """Every stamp under `folder`, in the order of its path. Raises FileNotFoundError if there is none."""
    stems = sorted({path.with_suffix("") for path in folder.rglob("*") if path.suffix in (".png", ".svg")})
    # x.png beside x_mirror.png is one stamp seen from the other side
    stems = [stem for stem in stems if not _is_variant(stem, set(stems))]
    found = [_item(stem, folder, language) for stem in stems if len(stem.relative_to(folder).parts) > 1]
    items = [item for item in found if item.category != _LEFT_OUT]
    if not items:
        raise FileNotFoundError(
            f"there are no stamps in {folder}: install them with `apt-get install tuxpaint-stamps-default` (Debian, "
            "Ubuntu), or give the folder they are in"
        )
    if not any(item.speech for item in items):
        raise FileNotFoundError(f"no stamp in {folder} is described in the language {language!r}; \"fr\" has the most")
    return items


def _is_variant(stem: Path, stems: set[Path]) -> bool:
    for ending in ("_mirror", "_flip", "_mirror_flip"):
        if stem.name.endswith(ending) and stem.with_name(stem.name.removesuffix(ending)) in stems:
            return True
    return False


def _item(stem: Path, folder: Path, language: str) -> Item:
    def there(suffix: str) -> Path | None:
        path = stem.with_name(stem.name + suffix)
        return path if path.is_file() else None

    text = there(".txt")
    # the first line is English, the others are translations
    lines = text.read_text(encoding="utf-8", errors="replace").splitlines() if text else []
    caption = lines[0].strip() if lines and ".utf8=" not in lines[0] else ""
    ending = "_desc" if language == "en" else f"_desc_{language}"
    return Item(
        name=stem.relative_to(folder).as_posix(),
        category=stem.relative_to(folder).parts[0],
        picture=there(".png"),
        caption=caption or None,
        speech=there(f"{ending}.ogg") or there(f"{ending}.wav"),
    )
