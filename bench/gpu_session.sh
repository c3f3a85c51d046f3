#!/usr/bin/env bash
# Builds, proves and benchmarks attnfuse on a GPU machine that nobody watches, in under ten minutes, without a network.
#
#     bench/gpu_session.sh [--dry-run] [FOLDER]      FOLDER: $OUT, or gpu_session of the current folder
#
# Nothing need be installed: Python with torch (and its Triton), and nvcc with a C++ compiler for the CUDA kernels.
# PYTHON names another Python. Every stage has a time limit of its own and is written down as it ends, so that what comes
# late takes nothing with it. FOLDER gets eight files at most:
#
#     session.log  what was printed      stages.csv  each stage, its exit code and seconds      info.json  the machine
#     check.txt    the checks            summary.txt stages and the short table                 attnfuse_bench.csv
#     attnfuse_bench_ratios.png          attnfuse_bench_ceilings.png
#
# --dry-run takes the same way on a CPU, with small shapes: Triton interpreted, the CUDA kernels emulated.
# The exit code is 0 if every stage that must pass did.
set -uo pipefail
{ # read whole before it is run
cd "$(dirname "$0")/.." || exit 1
caller=$OLDPWD

dry=
if [ "${1:-}" = --dry-run ]; then
    dry=1
    shift
fi
out=${1:-${OUT:-gpu_session}}
case $out in /*) ;; *) out=$caller/$out ;; esac
mkdir -p "$out" || exit 1
rm -f "$out"/{session.log,stages.csv,info.json,check.txt,summary.txt,attnfuse_bench.csv}
rm -f "$out"/attnfuse_bench_{ratios,ceilings}.png
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

python=${PYTHON:-$(command -v python3 || command -v python)}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
if [ -n "$dry" ]; then
    export TRITON_INTERPRET=1 ATTNFUSE_EMULATE=1
else
    unset TRITON_INTERPRET ATTNFUSE_EMULATE
fi
if ! command -v ninja >/dev/null && ! "$python" -c 'import ninja' 2>/dev/null; then
    printf '#!/bin/sh\nexec "%s" "%s" "$@"\n' "$python" "$PWD/bench/ninja_lite.py" >"$work/ninja"
    chmod +x "$work/ninja"
    export PATH=$work:$PATH
fi

echo "stage,required,exit_code,seconds,limit" >"$out/stages.csv"
failed=0

# stage NAME LIMIT required|optional COMMAND...: run it for at most LIMIT seconds, and write down how it went
stage() {
    local name=$1 limit=$2 kind=$3 begun=$SECONDS code
    shift 3
    [ -n "$dry" ] && limit=$((4 * limit)) # a CPU that others use too is no GPU machine
    echo "== $name: $*" | tee -a "$out/session.log"
    # A shell of its own, so that a function can be given a limit too.
    timeout --kill-after=5 "$limit" bash -c '"$@"' "$name" "$@" </dev/null >>"$out/session.log" 2>&1
    code=$?
    tail -n 3 "$out/session.log"
    [ "$code" = 124 ] && echo "== $name: its $limit seconds were up" | tee -a "$out/session.log"
    echo "$name,$kind,$code,$((SECONDS - begun)),$limit" >>"$out/stages.csv"
    [ "$code" = 0 ] || [ "$kind" = optional ] || failed=1
    return "$code"
}

attnfuse() { "$python" -m attnfuse "$@"; }
export -f attnfuse
export python out dry work

build() {
    "$python" - <<'PY'
import os
from pathlib import Path

import torch

from attnfuse import build

if os.environ.get("dry"):
    print(build.build_emulation(build.emulation_dir()))
else:
    # The machine code of this card alone: that halves the time.
    major, minor = torch.cuda.get_device_capability()
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", f"{major}.{minor}")
    print(build.build_cuda(Path("build/cuda").resolve(), Path(f"attnfuse/_cuda{build.SUFFIX}").resolve()))
PY
}

info() { attnfuse info --json >"$out/info.json" && cat "$out/info.json"; }

# check BACKEND JOBS FAMILIES...: families side by side, since most of a Triton run is compiling
check() {
    local backend=$1 jobs=$2
    shift 2
    printf '%s\n' "$@" | xargs -P "$jobs" -I{} bash -c 'check_one "$@"' check_one "$backend" {}
}

check_one() {
    local said=$work/$1_$2 code
    "$python" -m attnfuse check --backend "$1" --dtype bfloat16 --family "$2" >"$said" 2>&1
    code=$?
    { echo "-- $1 $2, exit code $code"; cat "$said"; } | tee -a "$out/check.txt"
    return "$code"
}

check_others() { check_one reference plain && check_one aten plain; }

# In a dry run without the tool: the emulated machine looks for races and stray accesses itself.
sanitize() {
    local tool code=0
    for tool in memcheck racecheck; do
        [ -n "$dry" ] && [ "$tool" = racecheck ] && continue
        echo "-- ${sanitizer:-emulation} --tool $tool"
        $sanitizer ${sanitizer:+--tool "$tool" --error-exitcode 9 --print-limit 20} \
            "$python" -m attnfuse check --backend cuda --dtype bfloat16 --family plain || code=$?
    done > >(tail -n 200 | tee -a "$out/check.txt") 2>&1
    return "$code"
}

# bench LIMIT ARGUMENTS...: rows go straight into the results; it ends by itself a little before its limit
bench() {
    local limit=$1
    shift
    attnfuse bench --append --no-plots --out "$out" --time-limit "$limit" "$@"
}

summary() {
    {
        column -s, -t "$out/stages.csv" 2>/dev/null || cat "$out/stages.csv"
        echo
        if [ -f "$out/attnfuse_bench.csv" ]; then
            attnfuse bench --plot "$out/attnfuse_bench.csv" --out "$work"
        else
            echo "no row was measured"
        fi
    } >"$out/summary.txt" 2>&1
    cat "$out/summary.txt"
}
export -f build info check check_one check_others sanitize bench summary

mapfile -t families < <("$python" -c 'from attnfuse import testing; print(*dict(testing.families()), sep="\n")')
jobs=$(nproc)
if [ -n "$dry" ]; then
    families=(plain)
    small=(--gflop 0.01 --seconds 0.05)
    few=(--workload mbt-4k) second=(--workload absent-half) third=(--workload self-d64-512)
    peers=(--against torch) passes=()
else
    small=(--seconds 1)
    few=(--workload few-query --workload absent --workload padded)
    second=(--workload joint --workload cross --workload llava)
    third=(--workload self)
    last=(--workload flux-1024px --workload self-d128-4096 --workload padded-50 --workload perceiver-16k)
    peers=(--against torch --against torch-flash --against torch-cudnn --against attnfuse-cuda --against attnfuse-triton)
    peers+=(--against flash-attn --against flash-attn-3)
    passes=(--against attnfuse-triton-onepass) # it differs where rows are many
fi

sanitizer=$([ -n "$dry" ] || command -v compute-sanitizer || command -v /usr/local/cuda/bin/compute-sanitizer)
export sanitizer

# The limits add up to 590 seconds.
stage build 115 required build
stage info 20 required info
stage check_cuda 45 required check cuda "$jobs" "${families[@]}"
stage check_triton 95 required check triton "$jobs" "${families[@]}"
stage check_others 25 required check_others
stage bench_few_query 80 required bench 62 "${few[@]}" "${small[@]}" "${peers[@]}"
stage bench_models 55 required bench 40 "${second[@]}" "${small[@]}" "${peers[@]}"
stage bench_self 50 required bench 35 "${third[@]}" "${small[@]}" "${peers[@]}" "${passes[@]}"
if [ -n "$dry$sanitizer" ]; then
    stage sanitizer 40 required sanitize
else
    echo "sanitizer,optional,not installed,0,40" >>"$out/stages.csv"
fi
[ -n "$dry" ] || stage bench_flex 30 optional bench 15 "${last[@]}" "${small[@]}" --against torch --against flex
stage plots 20 optional attnfuse bench --plot "$out/attnfuse_bench.csv" --out "$out"
stage summary 15 required summary
exit "$failed"
}
