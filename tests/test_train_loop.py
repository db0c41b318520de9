"""The training loop when things go wrong: kills, full disks, NaN, several processes, checkpoints from strangers."""
import json
import os
import pickle
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn
from training_models import curve, lens, settings, squares, train

from rea2seg.data.reader import DataError
from rea2seg.train.families import train_samples
from rea2seg.train.loop import LoopSettings, NaNLoss, Tracker, fit, latest_checkpoint, linear_schedule
from rea2seg.train.samples import Mixture

HERE = Path(__file__).resolve().parent
ENV = os.environ | {"OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
LONG, SHORT = dict(steps=60, save_every=6, batch_size=4), dict(steps=3, batch_size=4)

@pytest.fixture(autouse=True)
def one_thread():
    "Sums are in one order only with one thread."
    before = torch.get_num_threads(); torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

class Line(nn.Module):
    "A regression; its loss is NaN where the data is."
    def __init__(self): super().__init__(); torch.manual_seed(0); self.w = nn.Linear(64, 64)
    def forward(self, batch, step): error = (self.w(batch) - batch.roll(1, -1)).pow(2).mean(); return error, {"half": error.detach() / 2}

def draws(i, rank, world): return torch.randn(8, 64, generator=torch.Generator().manual_seed(i))[rank::world]
def line(**changes): return LoopSettings(**{**dict(learning_rate=0.01, warmup_steps=5, steps=30, batch_size=8, accumulation=2, weight_decay=0.0, clip_norm=1.0, precision="no",
                                                   save_every=10, log_every=1, seed=0), **changes})
def run(folder, batch_at=draws, **o): return fit(Line(), batch_at, line(**o.pop("settings", {})), folder, cpu=True, progress=False, **o)

# ---- processes ------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def children(tmp_path_factory):
    "Two trainings at once: one by two processes, one that is killed with no warning between two checkpoints."
    folder = tmp_path_factory.mktemp("children")
    script = str(HERE / "training_models.py")
    # with --cpu accelerate starts a single process unless MPI is there; --multi_gpu is its torchrun, and the training stays on the CPU
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    start = lambda command, name: subprocess.Popen(command, env=ENV, cwd=HERE, stdout=(folder / f"{name}.out").open("wb"), stderr=subprocess.STDOUT)
    both = start([*launch, script, str(folder / "both"), json.dumps(SHORT)], "both")
    killed = start([sys.executable, script, str(folder / "killed"), json.dumps(LONG)], "killed")
    log, limit = folder / "killed" / "run" / "log.jsonl", time.time() + 120
    while time.time() < limit and killed.poll() is None and not (log.exists() and log.read_text().count("\n") >= 15): time.sleep(0.005)
    os.kill(killed.pid, signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL, (folder / "killed.out").read_text()[-2000:]
    assert both.wait(timeout=120) == 0, (folder / "both.out").read_text()[-3000:]
    return folder

def test_a_killed_run_continues_on_the_same_curve(children, tmp_path):
    last = latest_checkpoint(children / "killed" / "run")
    assert last is not None and int(last.name.split("-")[1]) < LONG["steps"], "the run ended before it was killed"
    rest = train(str(children / "killed"), **LONG)
    assert 0 < len(rest) < LONG["steps"]
    train(str(tmp_path / "whole"), **LONG)
    whole, joined = curve(tmp_path / "whole"), curve(children / "killed")
    assert [r["step"] for r in joined] == list(range(1, LONG["steps"] + 1))
    assert joined == whole
    assert whole[-1]["loss"] < whole[0]["loss"] - 0.1

@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["term", "int"])
def test_a_stopped_run_leaves_the_step_it_was_in(tmp_path, number, capfd):
    "Between two checkpoints, in the first of a step's two micro-steps; nothing is validated on the way out."
    before = signal.getsignal(number)
    def stopped(i, rank, world):
        if i == 2 * 13: signal.raise_signal(number)
        return draws(i, rank, world)
    with pytest.raises(KeyboardInterrupt, match=r"stopped at step 14 of 30; the same call goes on from .*step-0000014"): run(tmp_path / "a", stopped, validate=lambda m, step: pytest.fail("validated") if step == 14 else {})
    assert signal.getsignal(number) is before and "stopping after this step" in capfd.readouterr().err
    run(tmp_path / "a"); run(tmp_path / "b")
    log = lambda name: [{k: v for k, v in json.loads(l).items() if k != "seconds"} for l in (tmp_path / name / "log.jsonl").read_text().splitlines() if "loss" in l]
    assert log("a") == log("b") and len(log("a")) == 30

def test_the_second_signal_stops_at_once(tmp_path):
    before = signal.getsignal(signal.SIGINT)  # of jobs in the background SIG_IGN
    def stopped(i, rank, world):
        if i == 26: signal.raise_signal(signal.SIGINT); signal.raise_signal(signal.SIGINT)
        return draws(i, rank, world)
    with pytest.raises(KeyboardInterrupt): run(tmp_path, stopped)
    assert latest_checkpoint(tmp_path).name == "step-0000010" and signal.getsignal(signal.SIGINT) is before

def test_all_processes_stop_together(tmp_path):
    "One of two processes gets the signal; both leave, and the checkpoint is whole."
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    done = subprocess.run([*launch, str(HERE / "training_models.py"), str(tmp_path), json.dumps(LONG), "stopped"], env=ENV, cwd=HERE, capture_output=True, text=True, timeout=240)
    assert done.returncode != 0 and done.stderr.count("KeyboardInterrupt: stopped at step 2 of 60") == 2, done.stderr[-3000:]
    assert latest_checkpoint(tmp_path / "run").name == "step-0000002"

def test_two_processes_have_the_loss_of_one(children, tmp_path):
    train(str(tmp_path), **SHORT)
    assert sorted(p.name for p in (children / "both").glob("process-*")) == ["process-0-of-2", "process-1-of-2"]
    one, two = curve(tmp_path), curve(children / "both")
    assert len(one) == len(two) == SHORT["steps"]
    for a, b in zip(one, two, strict=True):
        for key in ("loss", "text", "bce", "dice", "lr", "grad_norm"): assert b[key] == pytest.approx(a[key], rel=1e-4, abs=1e-6), key
    from safetensors.torch import load_file
    a, b = (load_file(f / "generator" / "model.safetensors") for f in (tmp_path, children / "both"))
    assert a.keys() == b.keys() and max((a[k] - b[k]).abs().max().item() for k in a) < 1e-3

# ---- what can go wrong ----------------------------------------------------------------------------------------------------

def test_a_full_disk_leaves_the_former_checkpoint_whole(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    def fills_up(i, rank, world):
        if i == 30: resource.setrlimit(resource.RLIMIT_FSIZE, (6000, hard))  # no file may grow beyond this from here on
        return draws(i, rank, world)
    try:
        with pytest.raises(Exception) as e: run(tmp_path, fills_up)
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert any(w in str(e.value).lower() for w in ("too large", "os error", "write", "pytorchstreamwriter")), e.value
    assert [p.name for p in tmp_path.glob("step-*")] == ["step-0000010"] and not list(tmp_path.glob(".writing*"))
    rest = run(tmp_path)
    assert rest[0]["step"] == 11 and [r["loss"] for r in rest] == [r["loss"] for r in run(tmp_path / "whole")][10:]

def test_nan_stops_with_the_batch_saved(tmp_path):
    model, s = lens(), settings(steps=4)
    with torch.no_grad(): model.model.proj_to_sam[2].bias[0] = torch.nan
    data = Mixture({"referring": squares(8)}, s.weights)
    with pytest.raises(NaNLoss, match="step 0"): train_samples(model, data, tmp_path / "a", s, progress=False)
    batch = torch.load(next((tmp_path / "a" / "run").glob("nan-batch-*.pt")), weights_only=True)
    assert {one["name"] for one in batch} == {f"squares{i}" for i in range(8)} and not (tmp_path / "a" / "generator").exists()
    def bad(i, rank, world): return draws(i, rank, world) * (torch.nan if i >= 30 else 1)
    with pytest.raises(NaNLoss, match="step 15.*the newest checkpoint is .*step-0000010"): run(tmp_path / "b", bad)
    saved, = (tmp_path / "b").glob("nan-batch-*.pt")
    assert torch.load(saved, weights_only=True).isnan().all()

class Evil:
    def __init__(self, path): self.path = path
    def __reduce__(self): return (open, (str(self.path), "w"))

@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("name", ["optimizer.bin", "random_states_0.pkl"])
def test_a_checkpoint_never_runs_code(tmp_path, name):
    run(tmp_path / "run", stop_after=3)
    last = latest_checkpoint(tmp_path / "run")
    assert sorted(p.name for p in last.iterdir()) == ["model.safetensors", "optimizer.bin", "random_states_0.pkl", "step.json"]
    (last / name).write_bytes(pickle.dumps(Evil(tmp_path / "was-run")))
    if name == "optimizer.bin":
        with pytest.raises(pickle.UnpicklingError, match="Unsupported"): run(tmp_path / "run")
    else: run(tmp_path / "run")  # accelerate goes on without random states, with a warning
    assert not (tmp_path / "was-run").exists()

def test_torn_checkpoints_are_not_read(tmp_path):
    run(tmp_path, stop_after=4)
    (tmp_path / ".writing-0000008").mkdir(); (tmp_path / ".writing-0000008" / "model.safetensors").write_bytes(b"half")
    assert run(tmp_path)[0]["step"] == 5 and not list(tmp_path.glob(".writing*"))
    assert run(tmp_path) == [] and latest_checkpoint(tmp_path).name == "step-0000030"

@pytest.mark.parametrize("steps,warmup", [(30, 5), (30, 0), (7, 7)])
def test_learning_rate_is_a_function_of_the_step(tmp_path, steps, warmup):
    rates = [r["lr"] for r in run(tmp_path, settings=dict(steps=steps, warmup_steps=warmup))]
    assert rates == pytest.approx([0.01 * linear_schedule(i, warmup, steps) for i in range(steps)])
    assert max(rates) <= 0.01 and rates[-1] < 0.01 / max(steps - warmup, 1) * 1.5 or warmup == steps

# ---- tracking -------------------------------------------------------------------------------------------------------------

def test_tracking_is_optional(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline"); monkeypatch.setitem(sys.modules, "wandb", None)
    absent = Tracker(folder=tmp_path)
    assert absent.run is None
    run(tmp_path, tracker=absent, validate=lambda m, step: {"val_giou": 0.5, "pictures": ["a"]})
    absent.finish()
    found = [json.loads(l) for l in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in found if "val_giou" in r] == [10, 20, 30] and not any("pictures" in r for r in found)

def test_tracking_gets_losses_rate_and_pictures(tmp_path, monkeypatch):
    class Run:
        def __init__(self): self.rows = []
        def log(self, values, step): self.rows.append((step, values))
    class Wandb:
        Image = staticmethod(lambda figure: ("image", figure))
    monkeypatch.setitem(sys.modules, "wandb", Wandb)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    tracker = Tracker(folder=tmp_path); tracker.run = Run()
    run(tmp_path, tracker=tracker, validate=lambda m, step: {"val_giou": 0.5, "pictures": [f"overlay{i}" for i in range(60)]})
    keys = {k for _, v in tracker.run.rows for k in v}
    assert {"loss", "half", "lr", "grad_norm", "val_giou", "val_pictures"} <= keys
    assert [len(v["val_pictures"]) for _, v in tracker.run.rows if "val_pictures" in v] == [49] * 3
    monkeypatch.setenv("WANDB_MODE", "offline"); monkeypatch.setenv("RANK", "1")
    assert Tracker(folder=tmp_path).run is None

def test_wandb_offline_writes_a_run(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline"); monkeypatch.delenv("WANDB_API_KEY", raising=False)
    tracker = Tracker(name="t", folder=tmp_path)
    run(tmp_path / "run", tracker=tracker, settings=dict(steps=3), validate=lambda m, step: {"val_giou": 0.5})
    tracker.finish()
    assert list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))

def test_an_empty_mixture_is_refused():
    with pytest.raises(DataError, match="no sample to train on"): Mixture({"referring": []}, {"referring": 1})

def test_figures_reach_the_tracker_without_pyplot(tmp_path, monkeypatch):
    "wandb asks matplotlib for its pyplot as soon as anything of matplotlib is loaded; drawing here needs no pyplot."
    import sys

    import matplotlib
    import wandb
    from matplotlib.figure import Figure

    from rea2seg.train.loop import Tracker
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False); monkeypatch.delattr(matplotlib, "pyplot", raising=False)
    sent = []
    tracker = Tracker(enabled=False); tracker.run = type("Run", (), {"log": lambda self, values, step: sent.append((values, step))})()
    figure = Figure(figsize=(1, 1)); figure.add_subplot().plot([0, 1])
    tracker.images("pictures", [figure, Figure(figsize=(1, 1))] * 30, 7)
    (values, step), = sent
    assert step == 7 and len(values["pictures"]) == 49 and isinstance(values["pictures"][0], wandb.Image)

def test_muon_trains_matrices_beside_adamw_and_resumes(tmp_path):
    def go(folder, **o):
        model = Line()
        groups = [dict(params=[model.w.weight], lr=0.01, muon=True), dict(params=[model.w.bias], lr=0.005)]
        rows = fit(model, draws, line(steps=20, save_every=5, warmup_steps=1), folder, groups, cpu=True, progress=False, **o)
        return model, rows
    _, whole = go(tmp_path / "whole")
    assert whole[-1]["loss"] < whole[0]["loss"] - 0.1
    go(tmp_path / "parts", stop_after=7); _, rest = go(tmp_path / "parts")
    assert len(rest) == 13 and [r["loss"] for r in rest] == [r["loss"] for r in whole[7:]]
    model, _ = go(tmp_path / "one", stop_after=1)
    change = torch.linalg.svdvals((model.w.weight - Line().w.weight).detach())
    assert change[0] < 2 * change[11] and float((model.w.bias - Line().w.bias).detach().abs().max()) == pytest.approx(0.005, rel=0.01), "Muon moves in all directions alike, AdamW each number by its rate"
