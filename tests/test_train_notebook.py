"""The training notebooks at their smallest size, as papermill runs them: offline, without W&B, on a CPU."""
import json
import os
import sys
from pathlib import Path

import nbformat
import papermill
import pytest

from rea2seg.evaluator import load_evaluator
from rea2seg.generators import load_generator
from rea2seg.mined import read_mined

ROOT = Path(__file__).resolve().parents[1] / "nbs"

@pytest.fixture
def run_notebook(tmp_path, monkeypatch):
    "Runs a notebook at smoke size; gives its folder, its provenance and how many pictures it shows."
    def run(name: str, into: str = "run", **parameters) -> tuple[Path, dict, int]:
        for key, value in dict(WANDB_MODE="disabled", HF_HUB_OFFLINE="1", MPLBACKEND="agg", CUDA_VISIBLE_DEVICES="").items(): monkeypatch.setenv(key, value)
        monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
        out = tmp_path / into
        papermill.execute_notebook(ROOT / name, tmp_path / "out.ipynb", dict(size="smoke", device="cpu", out=str(out), **parameters), progress_bar=False, cwd=tmp_path)
        cells = nbformat.read(tmp_path / "out.ipynb", 4).cells
        return out, json.loads((out / "notebook.json").read_text()), sum("image/png" in o.get("data", {}) for c in cells for o in c.get("outputs", []))
    return run

def test_the_generators_notebook_runs(run_notebook):
    out, run, pictures = run_notebook("02_train_generator.ipynb")
    assert pictures >= 4 and (out / "pictures" / "answer-0.png").stat().st_size > 5000
    assert load_generator(out / "generator").family == "lens"
    assert run["size"] == "smoke" and set(run["report"]["iou"]) >= {"overall", "geometric"} and run["versions"]["torch"]
    for log in ("run", "run-sam"): assert len((out / log / "log.jsonl").read_text().splitlines()) >= 4

def test_the_evaluators_notebook_runs(run_notebook):
    out, run, pictures = run_notebook("03_train_evaluator.ipynb")
    assert pictures >= 4 and (out / "pictures" / "scored-0.png").stat().st_size > 5000
    assert load_evaluator(out / "evaluator").kind == "internvl" and len(read_mined(out / "mined-val")) >= 2 and len(read_mined(out / "mined")) >= 2
    assert run["size"] == "smoke" and 0 <= run["report"]["val_giou"] <= run["report"]["val_oracle"] <= 1 and "all" in run["categories"] and run["versions"]["torch"]
    assert len((out / "run-together" / "log.jsonl").read_text().splitlines()) >= 3
    there = dict(pack=str(out / "pack"), held_pack=str(out / "val"), mined=str(out / "mined"), held=str(out / "mined-val"))   # table 4's other rows are parameters
    small, _, _ = run_notebook("03_train_evaluator.ipynb", "small", start="embedded:evaluator", layers=8, **there)
    assert load_evaluator(small / "evaluator").loaded.model.config.text_config.num_hidden_layers == 8 and (small / "reasons").is_dir()
    plain, run, _ = run_notebook("03_train_evaluator.ipynb", "plain", traces=False, **there)
    assert not (plain / "reasons").exists() and "words" not in (plain / "run-together" / "log.jsonl").read_text() and 0 <= run["report"]["val_giou"] <= 1

@pytest.mark.parametrize("name", ["02_train_generator.ipynb", "03_train_evaluator.ipynb"])
def test_parameters_are_plain_and_nothing_is_exported(name):
    cells = nbformat.read(ROOT / name, 4).cells
    tagged, values = [c for c in cells if "parameters" in c.metadata.get("tags", [])], {}
    exec(tagged[0].source, values)
    assert "skip_exec: true" in cells[0].source and len(tagged) == 1 and all(isinstance(v, (str, int, float, bool)) for k, v in values.items() if k != "__builtins__")
    assert not any("#| export" in c.source for c in cells) and not any(c.get("outputs") for c in cells)
