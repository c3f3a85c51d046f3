"""Enough of ninja to run the files attnfuse/build.py writes, for a machine without ninja and without a network.

    python bench/ninja_lite.py [-C FOLDER] [-j JOBS] TARGET

Rules, one source or several an edge, variables of an edge; no dependencies but those written down, and nothing is
taken as up to date: every edge runs, compilations side by side, then what needs their objects.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Edge:
    target: str
    rule: str
    sources: list[str]
    variables: dict[str, str] = field(default_factory=dict)


def parse(text: str) -> tuple[dict[str, dict[str, str]], list[Edge]]:
    """The rules by name, and the edges in order."""
    rules: dict[str, dict[str, str]] = {}
    edges: list[Edge] = []
    held: dict[str, str] = {}
    for line in text.splitlines():
        if line.startswith("rule "):
            held = rules.setdefault(line.split()[1], {})
        elif line.startswith("build "):
            words = [_plain(word) for word in re.split(r"(?<!\$) ", line.removeprefix("build "))]
            edges.append(Edge(words[0].removesuffix(":"), words[1], words[2:]))
            held = edges[-1].variables
        elif line.startswith("  "):
            name, _, value = line.strip().partition(" = ")
            held[name] = value
    return rules, edges


def _plain(word: str) -> str:
    """A path without ninja's escapes."""
    return re.sub(r"\$([$ :])", r"\1", word)


def command(edge: Edge, rules: dict[str, dict[str, str]]) -> str:
    """The edge's shell command."""
    known = {"in": " ".join(edge.sources), "out": edge.target} | edge.variables
    return re.sub(r"\$(\$|\w+)", lambda m: "$" if m[1] == "$" else known[m[1]], rules[edge.rule]["command"])


def run(text: str, jobs: int) -> int:
    """Run every edge; 0, or the first failure's exit code."""
    rules, edges = parse(text)
    made = {edge.target for edge in edges}

    def one(edge: Edge) -> int:
        Path(edge.target).parent.mkdir(parents=True, exist_ok=True)
        print(f"{edge.rule} {edge.target}", flush=True)
        return subprocess.run(command(edge, rules), shell=True).returncode

    # What is built from what is built comes last; build.py writes no longer chain.
    for stage in (lambda e: not made & set(e.sources), lambda e: bool(made & set(e.sources))):
        with ThreadPoolExecutor(jobs) as pool:
            failed = [code for code in pool.map(one, filter(stage, edges)) if code]
        if failed:
            return failed[0]
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description="Enough of ninja to build attnfuse's extension.")
    parser.add_argument("-C", dest="folder", default=".")
    parser.add_argument("-j", dest="jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("target")
    args = parser.parse_args()
    os.chdir(args.folder)
    return run(Path("build.ninja").read_text(), args.jobs)


if __name__ == "__main__":
    sys.exit(main())
