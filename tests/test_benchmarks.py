"Benchmarks of what the project promises run on what is here now; how fast it was is not tested."
import csv
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(("name", "options", "shows"), [
    ("evaluator", ["--size", "tiny", "--masks", "6", "--runs", "1"], {"size": "tiny", "masks": "6"}),     # equal scores, or it fails
    ("sweep", ["--samples", "1", "--least", "0", "--rows", "8"], {"samples": "1", "rows": "8", "evaluator": "internvl"})])            # equal records, likewise
def test_it_runs_and_both_ways_agree(name, options, shows, tmp_path):
    done = subprocess.run([sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), *options, "--out", str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    row = next(csv.DictReader((tmp_path / f"{name}.csv").open()))
    assert {k: row[k] for k in shows} == shows and float(row["speedup"]) > 0
