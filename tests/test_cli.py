"""The command line: what it prints, what it exits with, and that `check` cannot pass a broken backend."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import attnfuse
from attnfuse import dispatch, reference
from attnfuse.cli.main import COMMANDS, main

ROOT = Path(__file__).parent.parent
BACKENDS = ("reference", "aten", "triton")


def command(*args: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-m", "attnfuse", *args], env=clean | {"PYTHONPATH": path}, capture_output=True, text=True
    )


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert all(name in text for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code == 0
    assert "--json" in capsys.readouterr().out


def test_info_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["attnfuse"] == attnfuse.__version__
    assert found["torch"] == torch.__version__
    assert set(found["backends"]) == set(dispatch.BACKENDS)
    assert found["backends"]["reference"] is None
    assert found["cores"] == os.cpu_count()


def test_info_says_why_a_backend_is_not_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(dispatch.BACKENDS["triton"], "available", lambda: "triton has gone fishing")
    assert main(["info"]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "backend triton triton has gone fishing" in lines


def test_check_passes_and_is_plain_when_piped() -> None:
    # A process of its own, without TRITON_INTERPRET: check must set it in time by itself.
    done = command("check", "--family", "plain", "--family", "softcap", "--dtype", "float32")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "\x1b" not in done.stdout and "│" not in done.stdout
    lines = [line.split() for line in done.stdout.splitlines()]
    status = {(line[0], line[1]): line[2] for line in lines if line[0] in BACKENDS}
    assert status == {
        ("reference", "plain"): "ok", ("aten", "plain"): "ok", ("triton", "plain"): "ok",
        ("reference", "softcap"): "ok", ("aten", "softcap"): "skipped", ("triton", "softcap"): "ok",
    }  # fmt: skip
    assert "skipped aten, 2 cases: aten: torch's CPU flash kernel has no softcap" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("passed: ")


def test_check_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--backend", "aten", "--family", "lengths", "--dtype", "bfloat16", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (line,) = found["lines"]
    assert found["passed"] and line["status"] == "ok"
    assert line["checks"] > 0 and 0 < line["worst"] <= 1


@pytest.mark.parametrize("fault", ["scaled", "nan", "raises"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_check_fails_on_a_planted_fault(
    backend: str, fault: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = dispatch.BACKENDS[backend]
    honest = module.forward

    def broken(problem: Any) -> Any:
        out, lse, mass = honest(problem)
        if out.dtype == torch.float64:  # the oracle stays as it is: the fault is the backend's own
            return out, lse, mass
        if fault == "raises":
            raise RuntimeError("the kernel was not in the mood")
        return (out * (1 + 1e-4) if fault == "scaled" else torch.where(out > 1, float("nan"), out)), lse, mass

    monkeypatch.setattr(module, "forward", broken)
    assert main(["check", "--backend", backend, "--family", "plain", "--dtype", "float32"]) == 1
    text = capsys.readouterr().out
    assert f"FAILED {backend}: plain-square float32" in text
    assert text.splitlines()[-1].startswith("FAILED: ")


@pytest.mark.parametrize("backend", ["aten", "triton"])
def test_check_fails_on_a_wrong_gradient(
    backend: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = dispatch.BACKENDS[backend]
    honest = module.backward

    def broken(*args: Any) -> Any:
        found = honest(*args)
        key, value, *rest = found.sources[0]
        return found._replace(sources=[(-key, value, *rest), *found.sources[1:]])

    monkeypatch.setattr(module, "backward", broken)
    assert main(["check", "--backend", backend, "--family", "plain", "--dtype", "float32"]) == 1
    assert f"FAILED {backend}: plain-square float32: dkey0 is off by" in capsys.readouterr().out


def test_a_wrong_oracle_is_noticed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    # Wrong in every precision alike, the reference agrees with itself; the backends do not agree with it.
    honest = reference.forward

    def broken(problem: Any, **options: Any) -> Any:
        out, lse, mass = honest(problem, **options)
        return out * 1.01, lse, mass

    monkeypatch.setattr(reference, "forward", broken)
    monkeypatch.setattr(dispatch.BACKENDS["reference"], "forward", broken)
    assert main(["check", "--backend", "reference", "--backend", "aten", "--family", "plain", "--quick"]) == 1
    assert "FAILED aten: plain-square" in capsys.readouterr().out


def test_nothing_run_is_no_pass(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--backend", "aten", "--family", "softcap"]) == 1
    assert "FAILED: nothing was checked" in capsys.readouterr().out


def test_a_named_backend_that_is_not_there_is_no_pass(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(dispatch.BACKENDS["triton"], "available", lambda: "triton is not installed")
    asked = ["check", "--family", "plain", "--dtype", "float32"]
    assert main([*asked, "--backend", "aten", "--backend", "triton"]) == 1
    assert "not run triton: triton is not installed" in capsys.readouterr().out
    assert main(asked) == 0  # not asked for by name, it is only reported
    assert "not run triton: triton is not installed" in capsys.readouterr().out


@pytest.mark.parametrize(
    "args, words",
    [
        ([], "required: command"),
        (["bake"], "invalid choice: 'bake'"),
        (["check", "--dtype", "int8"], "invalid choice: 'int8'"),
        (["check", "--backend", "cudnn"], "--backend must be one of"),
        (["check", "--family", "weather"], "--family must be one of plain, "),
        (["demo", "--epochs", "0"], "--epochs must be at least 1, got 0"),
    ],
)
def test_bad_arguments(args: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = main(args)
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    errors = capsys.readouterr().err
    assert words in errors and "Traceback" not in errors
