"""The study of bench/: that its commands run, choose on validation pairs only, and made the tables of docs/."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("sklearn", reason="needs attnfuse[demo]")
pytest.importorskip("espeakng_loader", reason="needs attnfuse[demo]")
pytest.importorskip("matplotlib", reason="needs attnfuse[demo]")

from torch import nn

import attnfuse.fusion
from attnfuse import datasets
from attnfuse.bench import fusion_report, fusion_study

ROOT = Path(__file__).resolve().parents[1]
CSV = {"training": ["fusion_training_choice", "fusion_training"], "layers": ["fusion_layers"]}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        # The tests neither trust nor touch the user's cache. Another process fills theirs: a synthesiser that has
        # spoken in this one may speak otherwise the next time, and other tests compare what it says.
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("PYTHONPATH", str(ROOT))
        script = "from attnfuse.datasets import av_digits; av_digits(limit=8)"
        subprocess.run([sys.executable, "-c", script], check=True, timeout=600)
        patch.setattr(datasets, "_memory", [])
        yield fusion_study


@pytest.fixture(scope="module")
def report(study):
    return fusion_report


@pytest.fixture(scope="module")
def made(study, tmp_path_factory):
    """The folder that both commands filled, and what they printed."""
    folder, printed = tmp_path_factory.mktemp("study"), {}
    for name in CSV:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("builtins.print", lambda text, name=name: printed.setdefault(name, text))
            study.main([name, "--quick", "--jobs", "1", "--out", str(folder)])
    return folder, printed


@pytest.mark.parametrize("name", CSV)
def test_the_command_measures_writes_and_draws(study, report, made, name):
    folder, printed = made
    assert (folder / f"fusion_{name}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    rows = report.read(folder / f"{CSV[name][-1]}.csv")
    for row in rows:
        assert all(0 <= row[condition] <= 1 for condition in report.TESTED)
        assert math.isnan(row["image_mass"]) or 0 < row["image_mass"] <= 1
    if name == "layers":
        assert report.distinct(rows, "layer") == list(study.LAYERS)
    else:
        assert [row["arm"] for row in rows] == ["neither", "dropout", "balance", "both"] * len(study.SETTINGS)
        for setting in study.SETTINGS:  # an arm that trained like another would measure nothing
            assert len({row["image_mass"] for row in report.select(rows, setting=setting)}) == 4
    assert all(label in printed[name] for label in report.HEADER)


@pytest.mark.parametrize("name", CSV)
def test_tables_come_from_the_csv_alone(study, made, name, capsys, monkeypatch):
    folder, printed = made
    monkeypatch.setattr(study, "fit", None)
    study.main([name, "--tables", "--out", str(folder)])
    assert capsys.readouterr().out.strip() == printed[name].strip()


def test_nothing_is_chosen_on_the_test_split(report, made):
    folder, _ = made
    tried, tested = (report.read(folder / f"{name}.csv") for name in CSV["training"])
    assert {row["split"] for row in tried} == {"val"} and {row["split"] for row in tested} == {"test"}
    assert not {row["seed"] for row in tried} & {row["seed"] for row in tested}


def test_the_best_on_validation_is_chosen(report):
    def row(arm, value, accuracy):
        aids = {"dropout": 0.0, "balance": 0.0} | ({arm: value} if arm != "neither" else {})
        return {"setting": "even", "arm": arm} | aids | dict.fromkeys(report.TESTED, accuracy)

    rows = [row("neither", 0.0, 0.9)]
    rows += [row("dropout", rate, score) for rate, score in ((0.1, 0.5), (0.3, 0.7), (0.5, 0.6), (0.1, 0.8))]
    rows += [row("balance", factor, score) for factor, score in ((0.1, 0.4), (1.0, 0.3))]
    assert report.choose(rows, "even") == (0.3, 0.1)


def test_every_fusion_layer_is_in_the_table(study):
    exported = {name: getattr(attnfuse.fusion, name) for name in attnfuse.fusion.__all__}
    layers = {name for name, x in exported.items() if isinstance(x, type) and issubclass(x, nn.Module)}
    assert {name.split(",")[0] for name in study.LAYERS} == layers - {"ModalityDropout"}  # it makes no representation


@pytest.mark.parametrize("name", CSV)
def test_the_tables_of_the_docs_are_those_of_the_csv(report, name):
    page = (ROOT / "docs" / "fusion_study.md").read_text()
    measured = {csv: report.read(ROOT / "bench" / "results" / f"{csv}.csv") for csv in CSV[name]}
    for table in report.tables(measured):
        assert table in page
    assert f"fusion_{name}.png" in page and (ROOT / "docs" / f"fusion_{name}.png").stat().st_size < 200_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["layer"], "invalid choice: 'layer'"),
        (["layers", "--seeds", "0"], "--seeds must be at least 1, got 0"),
        (["training", "--jobs", "-1"], "--jobs must be at least 1, got -1"),
        (["layers", "--quick"], "--quick needs --out"),
        (["training", "--tables", "--out", "nowhere"], "--tables needs fusion_training_choice.csv in nowhere"),
    ],
)
def test_wrong_arguments_get_a_sentence(study, arguments, message, capsys):
    with pytest.raises(SystemExit) as raised:
        study.main(arguments)
    assert raised.value.code == 2 and message in capsys.readouterr().err
