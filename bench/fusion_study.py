"""What helps a fusion model on AV-digits: the training aids, and every fusion layer of the library.

    python bench/fusion_study.py training      ModalityDropout and source_balance_loss: neither, each alone, both
    python bench/fusion_study.py layers        every layer of bench/fusion_layers.py on the same encoders

Each writes its measurements as CSV, draws a picture and prints the tables of docs/fusion_study.md. `--tables` makes
picture and tables from the CSV that is there, without training.

What is chosen (the rate of the dropout, the factor of the loss) is chosen on the validation split, with seeds that
the test does not use, by the mean accuracy over all conditions of the table. A training is one process on one
thread, and its time is the processor's: it means the same however many run at once.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attnfuse.bench.fusion_layers import ALONE, LAYERS, build
from attnfuse.bench.fusion_report import Row, choose, draw_layers, draw_training, picture, read, tables, write
from attnfuse.cli.demo import (
    AUDIO_RANGE,
    CONDITIONS,
    EPOCHS,
    IMAGE_RANGE,
    MODALITY_DROPOUT,
    REPEATS,
    Loss,
    cross_entropy,
    evaluate,
    fit,
)
from attnfuse.datasets import AUDIO_SNR_DB, IMAGE_NOISE, Split, av_digits
from attnfuse.fusion import FusionOutput, source_balance_loss

ROOT = Path(__file__).resolve().parents[1]


# what is trained, and on what


@dataclass(frozen=True)
class Setting:
    """Noise that training draws from, the levels of the test, and the levels at which a modality is drowned."""

    image_range: tuple[float, float]
    audio_range: tuple[float, float]
    image: float
    audio: float
    drowned_image: float
    drowned_audio: float

    def tests(self, seed: int, split: str, limit: int | None) -> dict[str, tuple[Split, tuple[bool, bool]]]:
        """condition -> the pairs, and who is present"""

        def at(image: float, audio: float) -> Split:
            found: Split = getattr(av_digits(seed, image_noise=image, audio_snr_db=audio, limit=limit), split)
            return found

        usual, both = at(self.image, self.audio), CONDITIONS["both"]
        return {name: (usual, allowed) for name, allowed in CONDITIONS.items()} | {
            "image drowned": (at(self.drowned_image, self.audio), both),
            "audio drowned": (at(self.image, self.drowned_audio), both),
        }


SETTINGS = {
    # The levels of `attnfuse demo --choose-noise`, at which either modality alone is right four times in five;
    # drowned is the worst that training draws.
    "even": Setting(IMAGE_RANGE, AUDIO_RANGE, IMAGE_NOISE, AUDIO_SNR_DB, IMAGE_RANGE[1], AUDIO_RANGE[0]),
    # Speech so clear in training that nobody needs the image; drowned is the level of the other setting.
    "audio leads": Setting(IMAGE_RANGE, (10.0, 20.0), IMAGE_NOISE, 15.0, IMAGE_RANGE[1], AUDIO_SNR_DB),
}

RATES = (0.1, 0.3, 0.5)
FACTORS = (0.1, 0.3, 1.0)
CHOICE_SEEDS = (100, 101)


@dataclass(frozen=True)
class Arm:
    """One way to train: the rate of the modality dropout and the factor of the balance loss."""

    rate: float = 0.0
    factor: float = 0.0

    @property
    def name(self) -> str:
        used = [name for name, value in (("dropout", self.rate), ("balance", self.factor)) if value]
        return used[0] if len(used) == 1 else "both" if used else "neither"


@dataclass(frozen=True)
class Job:
    """One training and its evaluation."""

    setting: str
    layer: str
    arm: Arm
    seed: int
    split: str
    epochs: int
    limit: int | None


@lru_cache(maxsize=1)
def train_split(setting: str, seed: int, limit: int | None) -> Split:
    levels = SETTINGS[setting]
    return av_digits(
        seed, image_noise=levels.image_range, audio_snr_db=levels.audio_range, repeats=REPEATS, limit=limit
    ).train


@lru_cache(maxsize=1)
def test_splits(setting: str, seed: int, split: str, limit: int | None) -> dict[str, tuple[Split, tuple[bool, bool]]]:
    return SETTINGS[setting].tests(seed, split, limit)


def balanced(factor: float, out: FusionOutput, label: Tensor, present: Tensor, epoch: int) -> Tensor:
    assert out.source_mass is not None
    return cross_entropy(out, label, present, epoch) + factor * source_balance_loss(out.source_mass, present)


def work(job: Job) -> Row:
    """Train, test, and the row of the CSV."""
    torch.set_num_threads(1)
    train = train_split(job.setting, job.seed, job.limit)
    torch.manual_seed(job.seed)
    model = build(job.layer)
    usual = LAYERS[job.layer].loss if job.layer in LAYERS else cross_entropy
    loss: Loss = partial(balanced, job.arm.factor) if job.arm.factor else usual
    began = time.process_time()
    fit(model, train, epochs=job.epochs, seed=job.seed, modality_dropout=job.arm.rate, loss=loss)
    seconds = time.process_time() - began

    tests = test_splits(job.setting, job.seed, job.split, job.limit)
    results = {name: evaluate(model, split, allowed) for name, (split, allowed) in tests.items()}
    mass = results["both"][1]
    return {
        "setting": job.setting,
        "level": LAYERS[job.layer].level if job.layer in LAYERS else "model",
        "layer": job.layer,
        "arm": job.arm.name,
        "dropout": job.arm.rate,
        "balance": job.arm.factor,
        "split": job.split,
        "seed": job.seed,
        "epochs": job.epochs,
        **{name: round(accuracy, 4) for name, (accuracy, _) in results.items()},
        "image_mass": round(mass[:, 0].mean().item(), 4) if mass.shape[1] else math.nan,
        "parameters": _count(model),
        "encoder_parameters": _count(getattr(model, "encoders", nn.Module())),
        "cpu_seconds": round(seconds, 2),
        "torch": torch.__version__,
    }


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@dataclass(frozen=True)
class Plan:
    """How much of it: what the command line says."""

    seeds: int
    processes: int
    quick: bool

    def job(self, setting: str, layer: str, arm: Arm, seed: int, split: str) -> Job:
        epochs, limit = (1, 192) if self.quick else (EPOCHS, None)
        return Job(setting, layer, arm, seed, split, epochs, limit)

    def run(self, title: str, jobs: Sequence[Job], console: Any) -> list[Row]:
        """The row of every job, in the order of the jobs."""
        from rich.progress import Progress, TimeElapsedColumn, TimeRemainingColumn

        rows: dict[int, Row] = {}
        with Progress(*Progress.get_default_columns()[:-1], TimeElapsedColumn(), "left", TimeRemainingColumn(),
                      console=console) as bar:  # fmt: skip
            task = bar.add_task(title, total=len(jobs))
            for index, row in self._finished(jobs):
                rows[index] = row
                bar.advance(task)
                if not console.is_terminal:
                    console.print(f"{title}: {len(rows)} of {len(jobs)}", highlight=False)
        return [rows[index] for index in range(len(jobs))]

    def _finished(self, jobs: Sequence[Job]) -> Iterator[tuple[int, Row]]:
        if self.processes == 1:
            yield from enumerate(map(work, jobs))
            return
        with ProcessPoolExecutor(self.processes, mp_context=multiprocessing.get_context("spawn")) as pool:
            waiting = {pool.submit(work, job): index for index, job in enumerate(jobs)}
            for future in as_completed(waiting):
                yield waiting[future], future.result()


# the studies


def training(plan: Plan, console: Any) -> dict[str, list[Row]]:
    """Choose rate and factor for each setting on validation pairs; then train the four arms and test them."""
    rates, factors, seeds = (RATES[:1], FACTORS[:1], CHOICE_SEEDS[:1]) if plan.quick else (RATES, FACTORS, CHOICE_SEEDS)
    tried = [Arm(), *(Arm(rate=rate) for rate in rates), *(Arm(factor=factor) for factor in factors)]
    jobs = [plan.job(setting, ALONE, arm, seed, "val") for setting in SETTINGS for seed in seeds for arm in tried]
    validation = plan.run("choosing on validation pairs", jobs, console)
    jobs = []
    for setting in SETTINGS:
        rate, factor = choose(validation, setting)
        arms = (Arm(), Arm(rate=rate), Arm(factor=factor), Arm(rate, factor))
        jobs += [plan.job(setting, ALONE, arm, seed, "test") for seed in range(plan.seeds) for arm in arms]
    return {"fusion_training_choice": validation, "fusion_training": plan.run("training and testing", jobs, console)}


def layers(plan: Plan, console: Any) -> dict[str, list[Row]]:
    """Every layer by the same recipe, which is that of the demo with modality dropout."""
    arm = Arm(rate=MODALITY_DROPOUT)
    jobs = [plan.job("even", layer, arm, seed, "test") for seed in range(plan.seeds) for layer in LAYERS]
    return {"fusion_layers": plan.run("training and testing", jobs, console)}


STUDIES: dict[str, Any] = {"training": (training, draw_training), "layers": (layers, draw_layers)}
FILES = {"training": ("fusion_training_choice", "fusion_training"), "layers": ("fusion_layers",)}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Fusion layers and training aids on AV-digits.")
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--seeds", type=int, help="trainings of each row of the table (default 5; of layers, 3)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes at once (default: one per core)")
    parser.add_argument("--quick", action="store_true", help="one epoch on a few pairs: that it runs, not how well")
    parser.add_argument("--out", type=Path, help="folder for CSV and picture (default bench/results and docs)")
    parser.add_argument("--tables", action="store_true", help="no training: tables and picture from the CSV in --out")
    args = parser.parse_args(argv)
    for name in ("seeds", "jobs"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    if args.quick and args.out is None:
        parser.error("--quick needs --out: its figures must not replace the real ones")
    results, pictures = (args.out, args.out) if args.out else (ROOT / "bench" / "results", ROOT / "docs")
    try:
        import matplotlib  # noqa: F401  (asked for now, not after the training)
        from rich.console import Console
    except ImportError as error:
        raise ImportError("the study needs matplotlib and rich: pip install attnfuse[demo]") from error
    study, draw = STUDIES[args.study]
    if args.tables:
        missing = [name for name in FILES[args.study] if not (results / f"{name}.csv").exists()]
        if missing:
            parser.error(f"--tables needs {missing[0]}.csv in {results}, which is not there")
        measured = {name: read(results / f"{name}.csv") for name in FILES[args.study]}
    else:
        seeds = args.seeds or (1 if args.quick else {"training": 5, "layers": 3}[args.study])
        measured = study(Plan(seeds, args.jobs, args.quick), Console(stderr=True))
        results.mkdir(parents=True, exist_ok=True)
        for name, rows in measured.items():
            write(rows, results / f"{name}.csv")
    picture(draw, measured, pictures / f"fusion_{args.study}.png")
    print("\n\n".join(tables(measured)))


if __name__ == "__main__":
    main()
