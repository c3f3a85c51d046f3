"""Compiling csrc: where the compilers are, what they are told, and ninja to drive them.

    build_cuda         csrc by nvcc and g++, into the extension attnfuse._cuda
    build_emulation    csrc by g++ alone, with csrc/emulation in place of csrc/device, into a module _emulated

setup.py loads this file by its path before anything is installed, so it imports neither torch nor attnfuse.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from hashlib import sha256
from pathlib import Path

CSRC = (Path(__file__).parent / "csrc").resolve()
# Machine code for Ampere and Hopper, and PTX that later cards' drivers compile.
DEFAULT_ARCHITECTURES = ("sm_80", "sm_90", "compute_90")
OLDEST = 80
# Instances with this suffix use instructions of Hopper alone; they are built where sm_90 is among the architectures.
HOPPER = "sm_90a"
HOPPER_SUFFIX = "_sm90"
USUAL_HOME = Path("/usr/local/cuda")
SUFFIX = str(sysconfig.get_config_var("EXT_SUFFIX"))


class BuildError(RuntimeError):
    """Something a build needs is missing, or a compiler said no."""


def why_not() -> str | None:
    """What keeps the CUDA extension from being built here; None if nothing does."""
    if not sys.platform.startswith("linux"):
        return f"the CUDA extension is built on Linux only, this is {sys.platform}"
    home = cuda_home()
    if home is None:
        named = _named_home()
        if named is not None:
            return f"{named[0]} is {named[1]}, which holds no bin/nvcc"
        return (
            "no nvcc was found: not by CUDA_HOME or CUDA_PATH, not on PATH, not in /usr/local/cuda, and not from the "
            "packages nvidia-cuda-nvcc, nvidia-cuda-crt, nvidia-nvvm, nvidia-cuda-cccl and nvidia-cuda-runtime"
        )
    for name, found in (("cuda_runtime.h", _include(home)), ("libcudart_static.a", _static_runtime(home))):
        if found is None:
            return f"nvcc is in {home}, but {name} is not (from PyPI it comes with nvidia-cuda-runtime)"
    return why_no_emulation()


def why_no_emulation() -> str | None:
    """What keeps csrc from being compiled for the host; None if nothing does."""
    if not sys.platform.startswith("linux"):
        return f"csrc is compiled on Linux only, this is {sys.platform}"
    if _cxx() is None:
        return f"the C++ compiler {os.environ.get('CXX') or 'g++'} was not found (CXX may name another)"
    if _ninja() is None:
        return "ninja was not found (pip install ninja)"
    if _pybind11() is None:
        return "pybind11 was not found (pip install pybind11)"
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        return f"Python.h is not in {sysconfig.get_paths()['include']} (it comes with Python's development package)"
    return None


def cuda_home() -> Path | None:
    """The root of a CUDA toolkit, with nvcc in its bin; None if there is none.

    CUDA_HOME or CUDA_PATH is taken at its word; then nvcc on PATH, which may be a script that calls the real one;
    then /usr/local/cuda; then the compiler as it is packaged on PyPI.
    """
    if not sys.platform.startswith("linux"):
        return None
    named = _named_home()
    if named is not None:
        root = Path(named[1])
        return root.resolve() if (root / "bin" / "nvcc").exists() else None
    on_path = shutil.which("nvcc")
    if on_path is not None:
        root = Path(on_path).resolve().parent.parent
        if _include(root) is not None:
            return root
        told = _told_home(on_path)
        if told is not None:
            return told
    candidates = [USUAL_HOME]
    for packages in _site_packages():
        candidates += sorted((packages / "nvidia").glob("cu[0-9]*"), reverse=True)
    for root in candidates:
        if (root / "bin" / "nvcc").exists():
            return root.resolve()
    return None


def architectures() -> tuple[str, ...]:
    """What machine code (sm_XX) and PTX (compute_XX) is made of the kernels.

    TORCH_CUDA_ARCH_LIST is read as torch reads it ("8.0;9.0a+PTX", also with spaces or commas); what is older than
    8.0 in it is left out, since the kernels use instructions of 8.0. Raises BuildError for a name it does not know, or
    if nothing is left.
    """
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip()
    if not listed:
        return DEFAULT_ARCHITECTURES
    found = []
    for name in re.split(r"[;,\s]+", listed.strip(";, ")):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", name)
        if match is None:
            raise BuildError(
                f"TORCH_CUDA_ARCH_LIST must list compute capabilities such as 8.0, 9.0a or 9.0+PTX, got {name!r} in "
                f"{listed!r}"
            )
        major, minor, family, ptx = match.groups()
        if 10 * int(major) + int(minor) < OLDEST:
            continue
        found.append(f"sm_{major}{minor}{family}")
        if ptx:
            found.append(f"compute_{major}{minor}{family}")
    if not found:
        raise BuildError(f"TORCH_CUDA_ARCH_LIST must list a compute capability of at least 8.0, got {listed!r}")
    return tuple(dict.fromkeys(found))


def build_cuda(
    build_dir: Path,
    output: Path,
    quiet: bool = False,
    names: Sequence[str] | None = None,
    jobs: int | None = None,
    told: Callable[[str], None] | None = None,
) -> Path:
    """Compile csrc for the cards of `names` into the Python extension `output`, and return it.

    One object for each of csrc/instances/*.cu, with what ptxas says of its registers in build_dir/NAME.ptxas.txt.
    names: as `architectures()` gives them, which is the default.
    jobs: compilers that run at once, unless MAX_JOBS says it; told: called after each, with what `uncompiled` calls it.
    Raises BuildError.
    """
    ninja, objects = _cuda_objects(build_dir, names)
    home = cuda_home()
    assert home is not None
    # The runtime's symbols stay inside: torch brings a CUDA runtime of its own, maybe of another version.
    libraries = [str(_static_runtime(home)), "-lrt", "-ldl", "-lpthread", "-Wl,--exclude-libs,ALL", "-s"]
    ninja.link(objects, output, libraries)
    return ninja.run(output, quiet, jobs, told)


def uncompiled(build_dir: Path, names: Sequence[str] | None = None) -> list[str]:
    """What `build_cuda` would compile in build_dir: "nvcc instances/attn_fwd_d64.cu" and the like, without the link.

    Raises BuildError.
    """
    ninja, objects = _cuda_objects(build_dir, names)
    return ninja.would_run(objects)


def _cuda_objects(build_dir: Path, names: Sequence[str] | None) -> tuple[_NinjaFile, list[str]]:
    """How csrc is compiled for `names`, and the objects that makes."""
    reason = why_not()
    if reason is not None:
        raise BuildError(f"the CUDA extension cannot be built: {reason}")
    home = cuda_home()
    assert home is not None
    include = _include(home)
    names = architectures() if names is None else names
    project = [f"-I{CSRC / folder}" for folder in ("", "device", "core")]
    nvcc = [
        str(home / "bin" / "nvcc"), f"-ccbin={_cxx()}", "-O3", "-std=c++20", "--expt-relaxed-constexpr", "-Xptxas=-v",
        "-Xcompiler=-fPIC,-fvisibility=hidden", *project,
    ]  # fmt: skip
    if len(names) > 1:
        nvcc.append("--threads=2")  # architectures side by side: the largest kernel is what all wait for
    hopper = any(name.rstrip("af") == "sm_90" for name in names)
    host = ["-O3", "-fPIC", "-fvisibility=hidden", *project, f"-isystem{include}"]
    host += ["-DATTNFUSE_SM90"] if hopper else []
    ninja = _NinjaFile(build_dir)
    ninja.rule(
        "nvcc",
        f"{_command(nvcc)} $gencode -MD -MF $out.d -c $in -o $out > $log 2>&1 || {{ cat $log; exit 1; }}",
        "nvcc $name",
    )
    objects = []
    for source in sorted((CSRC / "instances").glob("*.cu")):
        is_hopper = source.stem.endswith(HOPPER_SUFFIX)
        if is_hopper and not hopper:
            continue
        log = f"{source.stem}.ptxas.txt"
        gencode = _gencode((HOPPER,) if is_hopper else names)
        objects.append(ninja.compile("nvcc", source, CSRC, {"log": log, "gencode": _command(gencode)}))
    return ninja, objects + _host_objects(ninja, CSRC, host, "_cuda", " ".join(names))


def build_emulation(
    build_dir: Path,
    sanitize: str | None = None,
    coverage: bool = False,
    debug: bool = False,
    only: Sequence[str] | None = None,
    sources_dir: Path = CSRC,
    quiet: bool = False,
) -> Path:
    """Compile the csrc in sources_dir for the host into a Python module `_emulated` in build_dir, and return its path.

    sanitize: what -fsanitize= takes, such as "address,undefined"; see `sanitizer_preload`.
    coverage: count which lines are run (gcov); with `sanitize` those of optimised code, which are a few less.
    debug: for gdb, with every variable where the source has it.
    only: patterns of names in csrc/instances; the others are left out, and calling one ends the process.
    Raises BuildError.
    """
    reason = why_no_emulation()
    if reason is not None:
        raise BuildError(f"the emulation of the CUDA kernels cannot be built: {reason}")
    sources_dir = Path(sources_dir).resolve()
    # Products and sums are rounded one by one, as written: multiply_add is the kernels' word for the other thing.
    host = ["-fPIC", "-fvisibility=hidden", "-ffp-contract=off"]
    host += ["-DATTNFUSE_EMULATION", "-DATTNFUSE_SM90"]
    host += [f"-I{sources_dir / folder}" for folder in ("", "emulation", "core")]
    extra = []
    if sanitize is not None:
        extra += [f"-fsanitize={sanitize}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g"]
    if coverage:
        extra += ["--coverage", "-g", *([] if sanitize else ["-O0"])]
    if debug:
        extra += ["-g", "-O0"]
    host += ["-O1" if extra else "-O2", *extra]
    ninja = _NinjaFile(build_dir)
    objects = _host_objects(ninja, sources_dir, host, "_emulated", "")
    machine = sorted((sources_dir / "emulation").glob("*.cpp"))
    sources = [source for source in machine if not source.stem.startswith("selftest")]
    for source in sorted((sources_dir / "instances").glob("*.cu")):
        if only is None or any(fnmatch(source.stem, pattern) for pattern in only):
            sources.append(source)
    objects += [ninja.compile("cxx", source, sources_dir) for source in sources]
    output = build_dir.resolve() / f"_emulated{SUFFIX}"
    ninja.link(objects, output, ["-Wl,-z,lazy", *extra])
    return ninja.run(output, quiet)


def sanitizer_preload(sanitize: str) -> str:
    """What LD_PRELOAD must be for a Python that loads a module built with `sanitize`."""
    # libstdc++ too: the address sanitizer looks for the function that throws when it starts.
    names = [f"lib{short}.so" for kind, short in (("address", "asan"), ("thread", "tsan")) if kind in sanitize]
    found = [_printed([str(_cxx()), f"-print-file-name={name}"]) for name in (*names, "libstdc++.so")]
    return " ".join(found)


def emulation_dir() -> Path:
    """Where the emulation is built: in a checkout its build folder, else in the user's cache, for each installation."""
    checkout = CSRC.parent
    if (checkout / "setup.py").exists() and os.access(checkout, os.W_OK):
        return checkout / "build" / "emulation"
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "attnfuse" / f"emulation-{sha256(str(CSRC).encode()).hexdigest()[:12]}"


def _host_objects(ninja: _NinjaFile, sources_dir: Path, flags: list[str], module: str, names: str) -> list[str]:
    """The objects of csrc/*.cpp: the launchers, and the bindings, which alone see Python."""
    cxx = [str(_cxx()), "-std=c++20", *flags]
    bindings = [
        f"-DATTNFUSE_MODULE={module}", f'-DATTNFUSE_ARCHITECTURES="{names}"',
        f"-isystem{_pybind11()}", f"-isystem{sysconfig.get_paths()['include']}",
    ]  # fmt: skip
    ninja.rule("cxx", f"{_command(cxx)} -MMD -MF $out.d -x c++ -c $in -o $out", "g++ $name")
    ninja.rule("bind", f"{_command([*cxx, *bindings])} -MMD -MF $out.d -c $in -o $out", "g++ $name")
    return [
        ninja.compile("bind" if source.stem == "bindings" else "cxx", source, sources_dir)
        for source in sorted(sources_dir.glob("*.cpp"))
    ]


class _NinjaFile:
    """A build.ninja under construction, in a folder that is kept: what has not changed is not built again."""

    def __init__(self, build_dir: Path) -> None:
        self.build_dir = build_dir.resolve()
        self.lines: list[str] = []

    def rule(self, name: str, command: str, description: str) -> None:
        """A rule for one source; in `command` ninja's own variables are written as they are."""
        self.lines += [
            f"rule {name}", f"  command = {command}", f"  description = {description}", "  depfile = $out.d",
            "  deps = gcc",
        ]  # fmt: skip

    def compile(self, rule: str, source: Path, sources_dir: Path, variables: dict[str, str] | None = None) -> str:
        """An edge from `source` to its object, which is returned."""
        name = source.relative_to(sources_dir)
        target = str(name.with_suffix(".o"))
        self.lines.append(f"build {_escaped(target)}: {rule} {_escaped(source)}")
        self.lines += [f"  {key} = {value}" for key, value in {"name": str(name), **(variables or {})}.items()]
        return target

    def link(self, objects: list[str], output: Path, flags: list[str]) -> None:
        """The edge from all objects to the shared library `output`."""
        self.lines += [
            "rule link", f"  command = {_command([str(_cxx()), '-shared', '-o'])} $out $in {_command(flags)}",
            f"  description = link {_escaped(output.name)}",
            f"build {_escaped(output.resolve())}: link {' '.join(map(_escaped, objects))}",
        ]  # fmt: skip

    def run(
        self, output: Path, quiet: bool, jobs: int | None = None, told: Callable[[str], None] | None = None
    ) -> Path:
        """Have ninja bring `output` up to date. MAX_JOBS bounds the compilers that run at once, as in torch."""
        self.build_dir.mkdir(parents=True, exist_ok=True)
        output = output.resolve()
        output.parent.mkdir(parents=True, exist_ok=True)
        bound = os.environ.get("MAX_JOBS") or jobs
        command = [*self._command(), *(["-j", str(bound)] if bound else []), str(output)]
        with _locked(self.build_dir):
            self._write()
            said, failed = "", False
            if not quiet:
                failed = subprocess.run(command).returncode != 0
            else:
                said, failed = _followed(command, told)
        if failed:
            said = f":\n{said}" if quiet else ", see above"
            raise BuildError(f"{output.name} could not be built in {self.build_dir}{said}")
        return output

    def would_run(self, objects: Sequence[str]) -> list[str]:
        """The descriptions of what ninja would run for `objects`; it runs nothing."""
        self.build_dir.mkdir(parents=True, exist_ok=True)
        with _locked(self.build_dir):
            self._write()
            said, failed = _followed([*self._command(), "-n", *objects])
        if failed:
            raise BuildError(f"ninja cannot tell what is to be built in {self.build_dir}:\n{said}")
        return _STATUS.findall(said)

    def _command(self) -> list[str]:
        return [str(_ninja()), "-C", str(self.build_dir)]

    def _write(self) -> None:
        (self.build_dir / "build.ninja").write_text("\n".join(self.lines) + "\n")


# What ninja prints for each command when it has ended, and before it what NINJA_STATUS asks for.
_STATUS = re.compile(r"^\[done\] (.*)$", re.MULTILINE)


def _followed(command: Sequence[str], told: Callable[[str], None] | None = None) -> tuple[str, bool]:
    """What a ninja prints, and whether it failed; told: called with each description as its command ends."""
    environment = {**os.environ, "NINJA_STATUS": "[done] "}
    said = []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as running:
        assert running.stdout is not None
        for line in running.stdout:
            said.append(line)
            ended = _STATUS.match(line)
            if told is not None and ended is not None:
                told(ended[1])
    return "".join(said), running.returncode != 0


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time builds in `folder`."""
    import fcntl  # not on Windows, where importing this module must work

    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _command(words: Sequence[str]) -> str:
    return shlex.join(words).replace("$", "$$")


def _escaped(path: Path | str) -> str:
    return re.sub(r"([$ :])", r"$\1", str(path))


def _gencode(names: Sequence[str]) -> list[str]:
    return [f"-gencode=arch=compute_{name.split('_')[1]},code={name}" for name in names]


def _named_home() -> tuple[str, str] | None:
    """The environment variable that names a toolkit, and what it says."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        value = os.environ.get(variable)
        if value:
            return variable, value
    return None


def _told_home(nvcc: str) -> Path | None:
    """The root that nvcc itself gives when asked what it would do."""
    match = re.search(r"^#\$ TOP=(.+)$", _printed([nvcc, "--dryrun", "-c", "x.cu"]), re.MULTILINE)
    root = Path(match[1].strip()).resolve() if match else None
    return root if root is not None and (root / "bin" / "nvcc").exists() else None


def _printed(command: list[str]) -> str:
    """What a command prints; nothing if it cannot be run."""
    try:
        return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True).stdout.strip()
    except OSError:
        return ""


def _include(home: Path) -> Path | None:
    """The folder of cuda_runtime.h."""
    folders = [home / "include", *sorted(home.glob("targets/*/include"))]
    return next((folder for folder in folders if (folder / "cuda_runtime.h").exists()), None)


def _static_runtime(home: Path) -> Path | None:
    machine = sysconfig.get_config_var("MULTIARCH") or ""
    folders = [home / "lib64", home / "lib", *sorted(home.glob("targets/*/lib")), home / "lib" / machine]
    return next((path for folder in folders if (path := folder / "libcudart_static.a").exists()), None)


def _site_packages() -> list[Path]:
    """Where packages are installed, for an isolated build too: pip hides the environment's own from sys.path."""
    folders = [Path(entry) for entry in sys.path if entry] + [Path(sysconfig.get_paths()["purelib"])]
    return list(dict.fromkeys(folders))


def _cxx() -> str | None:
    return shutil.which(os.environ.get("CXX") or "g++")


def _ninja() -> str | None:
    """The ninja of the package, or on PATH."""
    if importlib.util.find_spec("ninja") is not None:
        import ninja

        packaged = shutil.which("ninja", path=ninja.BIN_DIR)
        if packaged is not None:
            return packaged
    return shutil.which("ninja")


def _pybind11() -> Path | None:
    """The folder of pybind11's headers: the package's, or the copy that torch ships."""
    if importlib.util.find_spec("pybind11") is not None:
        import pybind11

        return Path(pybind11.get_include())
    torch = importlib.util.find_spec("torch")
    for folder in (torch.submodule_search_locations or ()) if torch else ():
        include = Path(folder) / "include"
        if (include / "pybind11" / "pybind11.h").exists():
            return include
    return None
