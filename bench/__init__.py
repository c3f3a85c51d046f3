"""What `attnfuse bench` runs: workloads, peers, checks, measurements and pictures.

    workloads.py   the shapes, and where each comes from
    peers.py       what attnfuse is measured against
    checks.py      no row without a passing check of that very case
    measure.py     time, peak memory, and the machine's own ceilings
    runner.py      all of it together, row by row into a CSV file
    plots.py       pictures of such a file
"""
