"""AV-digits, the demo and the example: what they promise, on a few samples."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn", reason="needs attnfuse[demo]")
pytest.importorskip("espeakng_loader", reason="needs attnfuse[demo]")
pytest.importorskip("matplotlib", reason="needs attnfuse[demo]")

from attnfuse import datasets
from attnfuse.cli import demo

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    """The tests neither trust nor touch the user's cache."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        patch.setattr(datasets, "_memory", [])
        yield folder


@pytest.fixture(scope="module")
def data(own_cache):
    return datasets.av_digits()


def splits(data):
    return data.train, data.val, data.test


def test_shapes_and_lengths(data):
    for split in splits(data):
        n = len(split)
        assert split.image.shape == (n, 8, 8)
        assert split.audio.shape[::2] == (n, 2 * datasets.NUM_BANDS)
        assert split.label.unique().tolist() == list(range(10))
        assert split.audio_lengths.unique().numel() > 5, "padding should be in use"
        assert split.audio_lengths.min() > 0 and split.audio_lengths.max() <= split.audio.shape[1]
        padded = torch.arange(split.audio.shape[1]) >= split.audio_lengths[:, None]
        assert split.audio[padded].abs().max() == 0
        assert split.audio[~padded].abs().amax(-1).min() > 0
        assert all(x.isfinite().all() for x in split.inputs.values())


def test_splits_share_neither_voice_nor_scan(data):
    for attribute in ("scan", "speaker"):
        groups = [set(getattr(split, attribute).tolist()) for split in splits(data)]
        assert sum(map(len, groups)) == len(set.union(*groups)), attribute
    assert {data.speakers[i] for i in data.test.speaker.tolist()} == set(datasets.SPEAKERS["test"])


def test_a_pair_is_one_digit(data):
    from sklearn.datasets import load_digits

    target = torch.tensor(load_digits().target)
    for split in splits(data):
        assert torch.equal(target[split.scan], split.label)


def test_same_seed_same_data_also_from_the_cache(data, own_cache, monkeypatch):
    (cached,) = own_cache.rglob("av_digits-*.npz")
    monkeypatch.setattr(datasets, "_memory", [])
    again = datasets.av_digits()
    for one, other in zip(splits(data), splits(again), strict=True):
        assert all(torch.equal(getattr(one, name), getattr(other, name)) for name in one.__dataclass_fields__)
    assert list(own_cache.rglob("*.npz")) == [cached], "an unfinished file was left behind"
    moved = datasets.av_digits(seed=1, limit=64)
    assert not torch.equal(moved.test.audio[:, :5], data.test.audio[:64, :5])
    assert torch.equal(moved.test.scan, data.test.scan[:64]), "a seed must not move scans between splits"


def test_speech_is_the_same_in_every_process(data, own_cache, tmp_path):
    """espeak-ng seeds its breath and roughness from the clock unless told otherwise."""
    (cached,) = own_cache.rglob("av_digits-*.npz")
    script = "from attnfuse.datasets import av_digits; av_digits(limit=8)"
    subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=_environment(tmp_path), check=True, timeout=60
    )
    (other,) = tmp_path.rglob("av_digits-*.npz")
    assert other.read_bytes() == cached.read_bytes()


def test_a_broken_cache_is_written_anew(own_cache, data, tmp_path, monkeypatch):
    (cached,) = own_cache.rglob("av_digits-*.npz")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(datasets, "_memory", [])
    broken = tmp_path / "attnfuse" / cached.name
    broken.parent.mkdir()
    broken.write_bytes(cached.read_bytes()[:1000])
    fresh = datasets.av_digits(limit=8).test
    monkeypatch.setattr(datasets, "_memory", [])
    assert torch.equal(datasets.av_digits(limit=8).test.audio, fresh.audio)


def test_noise_has_the_level_asked_for():
    clean = datasets.av_digits(image_noise=0.0, limit=256).test
    noisy = datasets.av_digits(image_noise=0.5, limit=256).test
    assert (noisy.image - clean.image).std().item() / 2 == pytest.approx(0.5, rel=0.02)
    drawn = datasets.av_digits(image_noise=(0.0, 1.0), limit=256).test
    spread = (drawn.image - clean.image).flatten(1).std(1) / 2
    assert spread.min() < 0.1 and spread.max() > 0.8


def test_missing_extras_say_what_to_install(monkeypatch):
    monkeypatch.setattr(datasets, "_memory", [])
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(ImportError, match=r"pip install attnfuse\[demo\]"):
        datasets.av_digits(limit=8)


def _arguments(*argv):
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    return parser.parse_args(argv)


def test_quick_demo_measures_and_draws(tmp_path, capsys):
    assert demo.run(_arguments("--quick", "--json", "--out", str(tmp_path / "new"))) == 0
    result = json.loads(capsys.readouterr().out)
    seen = [(row["level"], row["fusion"], row["modality_dropout"]) for row in result["rows"]]
    assert len(set(seen)) == len(seen) == 2 * len(demo.FUSIONS)
    assert {level for level, _, _ in seen} == {"feature", "model", "decision"}
    for row in result["rows"]:
        assert set(row["accuracy"]) == {"both", "image", "audio"}
        assert all(0 <= accuracy <= 1 for accuracy in row["accuracy"].values())
    for point in result["sweep"]:
        assert point["image_mass"] + point["audio_mass"] == pytest.approx(1, abs=1e-4)
        assert point["image_mass_p10"] <= point["image_mass_p90"]
    picture = Path(result["picture"])
    assert picture == tmp_path / "new" / "av_digits.png"
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_demo_prints_a_table(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "FUSIONS", {demo.WATCHED: demo.FUSIONS[demo.WATCHED]})
    monkeypatch.setenv("COLUMNS", "120")
    assert demo.run(_arguments("--quick", "--out", str(tmp_path))) == 0
    printed = capsys.readouterr().out
    assert demo.WATCHED in printed and "standard error" in printed and "training took" in printed


def test_one_modality_of_a_classifier_does_not_see_the_other(data):
    """`image only` must be that: what the sound holds, NaN included, changes nothing."""
    split = data.test[:16]
    poisoned = datasets.Split(**{**vars(split), "audio": torch.full_like(split.audio, float("nan"))})
    for name, (_, build) in demo.FUSIONS.items():
        model = build().eval()
        present = torch.tensor([[True, False]]).repeat(len(split), 1)
        with torch.no_grad():
            clean, other = (model(s.inputs, s.mask, present).logits for s in (split, poisoned))
        assert torch.equal(clean, other), name


def test_bad_epochs(tmp_path):
    with pytest.raises(ValueError, match="--epochs must be at least 1, got 0"):
        demo.run(_arguments("--epochs", "0", "--out", str(tmp_path)))


def test_example_runs(own_cache):
    script = [sys.executable, "examples/av_digits.py", "--epochs", "1"]
    done = subprocess.run(
        script, cwd=ROOT, env=_environment(own_cache), check=True, timeout=900, capture_output=True, text=True
    )
    assert done.stdout.count("accuracy") == 3


def _environment(cache: Path) -> dict[str, str]:
    return {**os.environ, "XDG_CACHE_HOME": str(cache), "PYTHONPATH": str(ROOT)}
