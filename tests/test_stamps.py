"""Stamps: what is read, what is missing, and how it is split; on a few items made in the form of the package's."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from attnfuse.fusion import MultimodalTransformer
from attnfuse.stamps import draw_samples, stamps
from attnfuse.stamps.features import CAPTION_DIM, SIDE, embed_caption, load_picture, load_speech, patches
from attnfuse.stamps.items import Item, find_items
from attnfuse.stamps.splits import _divide

ROOT = Path(__file__).parent.parent
RATE = 44100
HUES = {"animals": (200, 40, 40), "food": (40, 200, 40), "space": (40, 40, 200)}


def tone(path: Path, hertz: float, seconds: float, channels: int = 1) -> None:
    """A tone with silence around it."""
    time = np.arange(int(seconds * RATE)) / RATE
    wave = np.concatenate([np.zeros(RATE // 4), np.sin(2 * np.pi * hertz * time), np.zeros(RATE // 4)])
    soundfile.write(path, np.stack([wave] * channels, 1), RATE)


def paint(path: Path, hue: tuple[int, int, int], size: tuple[int, int]) -> None:
    """A coloured bar on nothing."""
    image = Image.new("RGBA", size, (*hue, 255))
    image.save(path)


def make(folder: Path) -> Path:
    """Three categories of eight stamps with every gap that the real ones have, and files that are no stamps."""
    for number, (category, hue) in enumerate(HUES.items()):
        place = folder / category / "some"
        place.mkdir(parents=True)
        for n in range(8):
            stem = place / f"thing{n}"
            if n == 1:  # a drawing that nobody rendered
                stem.with_suffix(".svg").write_text("<svg/>")
            else:
                paint(stem.with_suffix(".png"), hue, (20 + n, 10))
            if n != 2:
                caption = "A twin." if n in (4, 5) else f"A {category} thing {n}."
                stem.with_suffix(".txt").write_text(f"{caption}\nfr.utf8=Une chose {n}.\n", encoding="utf-8")
            if n not in (2, 3):  # one is a picture and nothing else
                tone(stem.with_name(f"{stem.name}_desc_fr.ogg"), 300 * (number + 1), 0.4 + 0.05 * n, 1 + n % 2)
            if n == 0:
                tone(stem.with_name(f"{stem.name}_desc.ogg"), 500, 0.3)  # English
                tone(stem.with_suffix(".ogg"), 900, 0.2)  # the noise that the thing makes is no description
                paint(stem.with_name(f"{stem.name}_mirror.png"), hue, (20, 10))
    (folder / "cartoon" / "tux").mkdir(parents=True)
    paint(folder / "cartoon" / "tux" / "tux-yes1.png", (0, 0, 0), (8, 8))
    (folder / "animals" / "some" / "thing0.dat").write_text("nomirror\n")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make(tmp_path_factory.mktemp("stamps"))


@pytest.fixture(scope="module")
def data(folder):
    return stamps(folder)


def test_each_stamp_has_what_its_files_say(folder):
    items = {item.name: item for item in find_items(folder, "fr")}
    assert len(items) == 24 and {item.category for item in items.values()} == set(HUES)
    whole, drawing, mute, silent = (items[f"food/some/thing{n}"] for n in range(4))
    assert whole.picture.name == "thing0.png" and whole.speech.name == "thing0_desc_fr.ogg"
    assert whole.caption == "A food thing 0."
    assert drawing.picture is None and drawing.speech and drawing.caption
    assert mute.caption is None and mute.speech is None and mute.picture
    assert silent.speech is None and silent.caption


def test_a_description_in_another_language_is_another_file(folder):
    items = find_items(folder, "en")
    assert sum(item.speech is not None for item in items) == 3
    assert all(item.speech is None or item.speech.name == "thing0_desc.ogg" for item in items)


def test_a_mirrored_twin_is_not_a_stamp_of_its_own(folder):
    """In the real folder there are eleven, and split from their originals they would be test answers in training."""
    assert not any("mirror" in item.name for item in find_items(folder, "fr"))


def test_splits_share_nothing_and_keep_equal_captions_together(data):
    parts = [set(split.item.tolist()) for split in (data.train, data.val, data.test)]
    assert sum(map(len, parts)) == len(set().union(*parts)) == len(data.items) == 24
    assert len(data.train) > len(data.val) >= len(data.test) > 0
    captions = [{data.items[n].caption for n in part} - {None} for part in parts]
    assert not (captions[0] & captions[1] or captions[0] & captions[2] or captions[1] & captions[2])
    for split in (data.train, data.val, data.test):
        assert set(split.label.tolist()) == {0, 1, 2}, "every category is in every split"
        assert [data.categories[n] for n in split.label] == [data.items[n].category for n in split.item]


def test_twins_are_never_told_apart():
    """Six of the real stamps are "A flower.": with one in training, the others would be no test."""
    items = [Item(f"food/{n}", "food", None, f"Thing {n // 3}.", None) for n in range(90)]
    parts = _divide(items)
    assert sorted(n for part in parts.values() for n in part) == list(range(90))
    assert [len(parts[name]) for name in ("train", "val", "test")] == [54, 18, 18]
    for part in parts.values():
        assert {3 * (n // 3) + twin for n in part for twin in range(3)} == set(part)


def test_the_split_is_the_same_every_time(folder, data):
    again = stamps(folder)
    for name in vars(data.test):
        assert torch.equal(getattr(again.test, name), getattr(data.test, name))


def test_what_is_missing_is_absent_and_holds_nothing(data):
    for split in (data.train, data.val, data.test):
        for row, n in enumerate(split.item.tolist()):
            item = data.items[n]
            there = [item.picture is not None, item.caption is not None, item.speech is not None]
            assert split.present[row].tolist() == there
            assert (split.picture[row] == 0).all() == (not there[0])
            assert (split.caption_lengths[row] == 0) == (not there[1])
            assert (split.speech_lengths[row] == 0) == (not there[2])
            assert (split.speech[row, split.speech_lengths[row] :] == 0).all()
            assert (split.caption[row, split.caption_lengths[row] :] == 0).all()
    assert {name: x.shape[2] for name, x in data.test.inputs.items()} == data.dims


def test_a_picture_keeps_its_shape_and_its_colour(tmp_path):
    """Wide on a square: the bar lies in the middle, as wide as the square, and nothing is opaque around it."""
    paint(tmp_path / "bar.png", (255, 0, 128), (64, 16))
    picture = load_picture(tmp_path / "bar.png")
    assert picture.shape == (4, SIDE, SIDE)
    inside = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    inside[12:20] = True
    assert torch.equal(picture[3] == 1, inside) and torch.equal(picture[3] == 0, ~inside)
    assert (picture[0][inside] == 1).all() and (picture[1] == 0).all() and (picture[2][inside] == 128 / 255).all()

    # transparent pixels may hold any colour; it must not show at the edge
    image = Image.new("RGBA", (64, 64), (0, 255, 0, 0))
    image.paste((255, 0, 0, 255), (0, 0, 33, 64))
    image.save(tmp_path / "half.png")
    half = load_picture(tmp_path / "half.png")
    assert (half[1] == 0).all() and torch.equal(half[0], half[3])
    assert ((half[3] > 0) & (half[3] < 1)).any(), "there is an edge"


def test_patches_are_squares_in_reading_order():
    picture = torch.zeros(1, 4, SIDE, SIDE)
    picture[0, 2, 9, 17] = 1.0  # blue, second row of patches, third column
    tokens = patches(picture)
    assert tokens.shape == (1, 16, 256)
    assert (tokens[0] != -1).nonzero().tolist() == [[1 * 4 + 2, 2 * 64 + 1 * 8 + 1]]


def test_words_that_share_letters_are_alike_and_the_same_in_every_process():
    cat, cats, house = embed_caption("Cat, cats HOUSE!")
    assert torch.equal(embed_caption("cat")[0], cat)
    alike = torch.nn.functional.cosine_similarity
    assert alike(cat, cats, dim=0) > 0.3 > alike(cat, house, dim=0).abs()
    assert embed_caption("").shape == (0, CAPTION_DIM)
    # Python's own hash() would differ from process to process, and with it the data
    assert cat.nonzero().flatten().tolist() == [40, 57, 63, 76, 92]


def test_sound_is_cut_to_the_words_whatever_the_channels(tmp_path):
    for channels in (1, 2):
        tone(tmp_path / "tone.ogg", 440, 0.5, channels)
        wave = load_speech(tmp_path / "tone.ogg")
        assert len(wave) == pytest.approx(0.5 * 11025, rel=0.03)
        assert wave.square().mean().item() == pytest.approx(1, abs=1e-3)
        peak = torch.fft.rfft(wave).abs().argmax().item() * 11025 / len(wave)
        assert peak == pytest.approx(440, abs=4)
    soundfile.write(tmp_path / "odd.wav", np.ones(16000), 16000)
    with pytest.raises(ValueError, match="16000 samples a second"):
        load_speech(tmp_path / "odd.wav")
    soundfile.write(tmp_path / "still.wav", np.zeros(RATE), RATE)
    with pytest.raises(ValueError, match="is silent"):
        load_speech(tmp_path / "still.wav")


def test_training_batches_move_pictures_and_nothing_else(data):
    generator = torch.Generator().manual_seed(0)
    seen = []
    for batch in data.train.batches(5, generator):
        for row, n in enumerate(batch.item.tolist()):
            (place,) = (data.train.item == n).nonzero().flatten().tolist()
            assert torch.equal(batch.speech[row], data.train.speech[place])
            before, after = data.train.picture[place], batch.picture[row]
            assert after.sum().item() == pytest.approx(before.sum().item(), rel=0.15)
            seen.append(torch.equal(before, after))
    assert len(seen) == len(data.train) and not all(seen)


def test_no_stamps_say_what_to_install(tmp_path, monkeypatch, folder):
    with pytest.raises(FileNotFoundError, match="apt-get install tuxpaint-stamps-default"):
        stamps(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="described in the language 'tlh'"):
        stamps(folder, language="tlh")
    monkeypatch.setitem(sys.modules, "soundfile", None)
    with pytest.raises(ImportError, match=r"pip install attnfuse\[stamps\]"):
        stamps(folder)


def test_samples_are_drawn_with_and_without_the_artwork(data, tmp_path):
    """Without, neither a pixel nor a sample of the stamps may be read: that picture can be published."""
    fusion = MultimodalTransformer(data.dims, 16, 2, 1, max_lengths=data.max_lengths).eval()
    head = torch.nn.Linear(16, 3)
    draw_samples(tmp_path / "all.png", data, data.test, fusion, head, count=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image, "open", lambda *a: pytest.fail("a picture was read"))
        patch.setattr(soundfile, "read", lambda *a, **k: pytest.fail("a sound was read"))
        draw_samples(tmp_path / "names.svg", data, data.test, fusion, head, count=3, artwork=False)
    with Image.open(tmp_path / "all.png") as picture:
        colours = {colour for _, colour in picture.convert("RGB").getcolors(1 << 24)}
    assert any(hue in colours for hue in HUES.values()), "the stamps themselves are in the picture"
    assert "<image" not in (tmp_path / "names.svg").read_text()


def test_the_commands_of_the_page_run(folder, tmp_path, monkeypatch, capsys):
    """As they stand in docs/trimodal.md, on the few stamps made here and for one epoch."""
    page = (ROOT / "docs" / "trimodal.md").read_text()
    commands = re.findall(r"^python (examples/trimodal.py.*)$", page, re.MULTILINE)
    assert commands == [*dict.fromkeys(commands)] and len(commands) == 3
    for n, command in enumerate(commands):
        script, *options = command.split()
        picture = tmp_path / f"{n}.png"
        short = ["--folder", str(folder), "--epochs", "1", "--picture", str(picture)]
        monkeypatch.setattr(sys, "argv", [script, *options, *short])
        runpy.run_path(str(ROOT / script), run_name="__main__")
        printed = capsys.readouterr().out
        assert printed.count("attention:") == 14, "a line for each subset, on validation and on test"
        assert picture.exists()
