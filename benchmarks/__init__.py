"""One file per claim: `python -m benchmarks.NAME --json FILE` measures ours beside the named baselines in one run."""
