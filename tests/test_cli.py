"The `rea2seg` command: what it prints, writes and returns. Faults stand in test_faults.py."
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco

import rea2seg.cli as cli
from rea2seg import doctor
from rea2seg.cli import main, parse_changes
from rea2seg.images import load_image
from rea2seg.settings import Settings, SettingsError
from stacks import FOLDERS, picture

ENV = os.environ | {"OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
WRITTEN = ["mask.png", "picture.png", "segmentation.json", "sheet.png"]

@pytest.fixture
def photo(tmp_path): Image.fromarray(picture(60, 90)).save(tmp_path / "photo.png"); return tmp_path / "photo.png"

def test_segment_from_a_shell(photo, tmp_path):
    "In a process of its own, from another folder, with a relative path for the results."
    command = Path(sys.executable).with_name("rea2seg")
    start = [str(command)] if command.exists() else [sys.executable, "-m", "rea2seg.cli"]
    done = subprocess.run([*start, "segment", str(photo), "the red cube", "--evaluator", "attention", "--device", "cpu", "--out", "some/where"],
                          capture_output=True, text=True, env=ENV, cwd=tmp_path, timeout=180)
    assert done.returncode == 0, done.stderr
    assert "candidates in" in done.stdout and "estimated IoU" in done.stdout and "written to some/where" in done.stdout and "loaded profile tiny" in done.stderr
    assert "Warning" not in done.stderr, done.stderr
    out = tmp_path / "some" / "where"
    assert sorted(p.name for p in out.iterdir()) == WRITTEN
    kept = json.loads((out / "segmentation.json").read_text())
    mask = load_image(out / "mask.png")[..., 0] > 0
    np.testing.assert_array_equal(coco.decode(kept["mask"]), mask)
    assert mask.shape == (60, 90) and f"{int(mask.sum())} pixels" in done.stdout

@pytest.mark.parametrize("family", FOLDERS)
def test_other_checkpoints_by_their_folder(family, photo, tmp_path, capsys):
    "rea2seg.json beside the weights says which SAM is inside; settings are changed by name."
    folder = FOLDERS[family](tmp_path / "model")
    assert (folder / "rea2seg.json").is_file()
    changes = ["first_layer=0", "last_layer=1", "max_new_tokens=2", "predicted_iou=0", "stability=0", "seed_points=5", "reasoning=yes"]
    status = main(["segment", str(photo), "the red cube", "--generator", str(folder), "--evaluator", "predicted_iou", "--device", "cpu", "--dtype", "float32", "--out", str(tmp_path / "out"),
                   *[word for change in changes for word in ("--set", change)]])
    out = capsys.readouterr().out
    kept = json.loads((tmp_path / "out" / "segmentation.json").read_text())
    assert status == 0 and all(f"note: {n}" in out for n in kept["notes"]) and kept["notes"]
    assert kept["settings"]["seed_points"] == 5 and kept["settings"]["reasoning"] is True and kept["settings"]["generator"] == str(folder) and len(kept["seed_points_xy"]) == 5
    assert [c["score"] for c in kept["candidates"]] == pytest.approx(sorted((min(max(c["predicted_iou"], 0), 1) for c in kept["candidates"]), reverse=True))

def test_doctor_from_a_shell(tmp_path):
    "Every package, device and profile; where the released weights are not here it says so."
    env = ENV | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-m", "rea2seg.cli", "doctor", "--json"], capture_output=True, text=True, env=env, timeout=180)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["versions"]["torch"] == torch.__version__.split("+")[0] or report["versions"]["torch"] == torch.__version__
    assert report["devices"][0]["device"] == "cpu" and report["devices"][0]["memory_gib"] > 0 and Path(report["settings"]).is_file()
    status = {p["profile"]: p for p in report["profiles"]}
    assert status["tiny"]["runs"] and not status["lens"]["runs"] and not status["sesame"]["runs"]
    reasons = " ".join(status["lens"]["reasons"])
    assert "LENS_ReasonSeg_CoT is not in the local cache, and HF_HUB_OFFLINE forbids the download" in reasons and "no CUDA device" in reasons

def test_doctor_for_a_person(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "devices", lambda: [{"device": "cpu", "name": "x", "memory_gib": 8}, {"device": "cuda:0", "name": "small", "memory_gib": 11.0}])
    monkeypatch.setattr(doctor, "versions", lambda: {"torch": "9.9", "wandb": None})
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "wandb           MISSING" in out and "cuda:0" in out and "needs about 28 GiB of GPU memory, the largest device has 11.0" in out and "no CUDA device" not in out

def test_weights_where_they_lie(tmp_path, monkeypatch):
    assert doctor.weights_status(str(tmp_path)) == (True, f"folder {tmp_path}") and doctor.weights_status("embedded:generator")[0]
    for where, says in (("embedded:none", "no weights called 'none'"), (str(tmp_path / "none"), "does not exist"), ("./none", "does not exist")):
        present, why = doctor.weights_status(where); assert not present and says in why
    import huggingface_hub
    from types import SimpleNamespace
    monkeypatch.setattr(huggingface_hub, "scan_cache_dir", lambda: SimpleNamespace(repos=[SimpleNamespace(repo_id="a/b", size_on_disk=3 * 2**30)]))
    assert doctor.weights_status("a/b") == (True, "in the local cache (3.0 GiB)")

def test_help_names_every_argument(capsys):
    for verb, words in ((["-h"], ("segment", "evaluate", "doctor")), (["segment", "-h"], ("--profile", "--device", "--dtype", "--generator", "--evaluator", "--set", "--out")), (["evaluate", "-h"], ("--data", "--limit"))):
        with pytest.raises(SystemExit) as e: main(verb)
        out = capsys.readouterr().out
        assert e.value.code == 0 and all(w in out for w in words), out

@pytest.mark.parametrize("argv", [[], ["segmnt"], ["segment"], ["segment", "a.png"], ["segment", "a.png", "q", "--nonsense"]])
def test_wrong_usage_is_status_2(argv, capsys):
    with pytest.raises(SystemExit) as e: main(argv)
    assert e.value.code == 2 and "usage: rea2seg" in capsys.readouterr().err

def test_changes_are_typed():
    assert parse_changes(["group_size=3", "chain_of_thought=no", "similarity=.5", "prompt=brief", "generator=a=b"]) == dict(group_size=3, chain_of_thought=False, similarity=.5, prompt="brief", generator="a=b")
    for pair, says in (("group_size", "NAME=VALUE"), ("=3", "no setting is called"), ("group_size=3.5", "group_size"), ("reasoning=perhaps", "expected yes or no"), ("layers=3", "no setting is called layers; there are .*first_layer")):
        with pytest.raises(SettingsError, match=says): parse_changes([pair])
    assert parse_changes([]) == {} and set(Settings.__annotations__) >= set(parse_changes(["seed=1"]))

def fail(monkeypatch, error):
    def command(args): raise error
    monkeypatch.setattr(cli, "doctor_command", command)
    return ["doctor"]

def test_how_errors_end(monkeypatch, capsys):
    assert main(fail(monkeypatch, KeyboardInterrupt())) == 130 and "interrupted" in capsys.readouterr().err
    assert main(fail(monkeypatch, ValueError("no good"))) == 2 and capsys.readouterr().err == "rea2seg: no good\n"
    for error in (torch.OutOfMemoryError("CUDA out of memory. Tried to\nmore"), MemoryError()):
        assert main(fail(monkeypatch, error)) == 2
        err = capsys.readouterr().err
        assert err.startswith("rea2seg: out of memory") and err.count("\n") == 1
    with pytest.raises(RuntimeError, match="a fault of ours"): main(fail(monkeypatch, RuntimeError("a fault of ours")))
    with pytest.raises(ValueError, match="shown"): main(["--trace", *fail(monkeypatch, ValueError("shown"))])
