"""docs/gallery.md: its lines run as they stand, and the neutral outputs it states are what the layers give."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import torch

import attnfuse.fusion as af
import attnfuse.nn as an

DOCS = Path(__file__).parent.parent / "docs"
PAGE = (DOCS / "gallery.md").read_text()


def parts() -> tuple[list[str], dict[str, str]]:
    """What stands under headings of the first two levels, and heading -> text for those of the third."""
    pieces = re.split(r"^(#{1,3}) (.+)$", PAGE, flags=re.MULTILINE)[1:]
    common, entries = [], {}
    for level, heading, text in zip(pieces[::3], pieces[1::3], pieces[2::3], strict=True):
        if level == "###":
            entries[heading] = text
        else:
            common.append(text)
    return common, entries


def code(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


COMMON, ENTRIES = parts()
FUSION = [name for name in ENTRIES if name in af.__all__]


def run(heading: str) -> dict[str, object]:
    """The variables after the page's common lines and the three of this entry."""
    torch.manual_seed(0)
    variables: dict[str, object] = {}
    (lines,) = code(ENTRIES[heading])
    for block in [*(block for text in COMMON for block in code(text)), lines]:
        exec(block, variables)
    return variables


def test_every_public_layer_has_an_entry():
    spoken_of = {word for heading in ENTRIES for word in heading.split(" and ")}
    # what a module returns, and the loss of EvidentialFusion, whose entry uses it
    assert set(af.__all__) - {"FusionOutput", "evidential_loss"} <= spoken_of
    assert set(an.__all__) <= spoken_of
    assert "evidential_loss" in ENTRIES["EvidentialFusion"]


@pytest.mark.parametrize("heading", ENTRIES)
def test_three_lines_run_as_written(heading):
    (lines,) = code(ENTRIES[heading])
    assert lines.count("\n") == 3
    run(heading)


@pytest.mark.parametrize("heading", ENTRIES)
def test_each_entry_names_where_it_comes_from(heading):
    text = re.sub(r"```.*?```", "", ENTRIES[heading], flags=re.DOTALL)
    assert re.search(r"\b(19|20)\d\d\b|no paper", text)


# `fused` = `expression`, or: the output = `expression`
STATED = re.compile(r"(?:`(\w+)`|the (?:(first|second) )?output) = `([^`]+)`")


@pytest.mark.parametrize("heading", [*FUSION, "CrossAttention"])
def test_the_neutral_output_is_what_the_page_says(heading):
    (call, claims), = re.findall(r"^All absent, `([^`]+)`: (.+)$", ENTRIES[heading], re.MULTILINE)
    stated = STATED.findall(claims)
    assert stated and claims.count(" = `") == len(stated)
    variables = run(heading)
    for name in ("text", "image", "audio", "media", "mass"):
        if isinstance(variables.get(name), torch.Tensor) and f"= `{name}`" not in claims:
            variables[name] = torch.full_like(variables[name], torch.nan)  # what an absent input holds is not seen
    output = eval(call, variables)
    for field, place, expression in stated:
        actual = getattr(output, field) if field else output
        if place:
            actual = actual[("first", "second").index(place)]
        assert actual.isfinite().all() if actual.is_floating_point() else True
        torch.testing.assert_close(actual, eval(expression, variables).expand_as(actual))


def drawing():
    spec = importlib.util.spec_from_file_location("draw_gallery", DOCS / "draw_gallery.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def words(picture: Path) -> list[str]:
    return re.findall(r"<(?:text|tspan)[^>]*>([^<]+)<", picture.read_text())


def test_pictures_are_those_that_the_script_draws(tmp_path):
    """By what is written in them: lines may move with the version of matplotlib."""
    module = drawing()
    module.main(tmp_path)
    modules = [name for name in FUSION if isinstance(getattr(af, name), type)]
    assert list(module.DIAGRAMS) == modules
    for name in modules:
        assert f"](gallery/{name}.svg)" in ENTRIES[name]
        shown = DOCS / "gallery" / f"{name}.svg"
        assert words(shown) == words(tmp_path / shown.name) != []
        assert shown.stat().st_size < 20_000
    assert sorted(x.stem for x in (DOCS / "gallery").iterdir()) == sorted(modules)
