"""Training of the mask evaluator: what is learnt and what stands still, killed and shared-out runs, bad data."""
import json
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from evaluator_models import LORA, PROFILE, curve, groups, settings, small, squares, train
from safetensors.torch import load_file

from rea2seg.checkpoints import CheckpointError
from rea2seg.cli import main
from rea2seg.data.reader import DataError
from rea2seg.data.samples import Sample
from rea2seg.data.sources import Listed, register_source
from rea2seg.evaluator import load_evaluator
from rea2seg.evaluator_internvl import InternvlEvaluator
from rea2seg.internvl import save_evaluator
from rea2seg.mined import read_mined
from rea2seg.settings import load_section
from rea2seg.train.evaluator import EvaluatorTrainee, builder_of, load_base, score_mined, spearman, summary_of, train_evaluator
from rea2seg.train.groups import EvaluatorTraining, GroupBatches, GroupJob, group_of, open_groups
from rea2seg.train.loop import NaNLoss, Tracker, latest_checkpoint

HERE = Path(__file__).parent
ENV = os.environ | {"WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
LONG, SHORT = dict(steps=40, batch_size=2, save_every=5, lora_dropout=.1) | LORA, dict(steps=3)
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

@pytest.fixture(scope="module")
def mined(tmp_path_factory): return squares(tmp_path_factory.mktemp("mined") / "squares")

@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads(); torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

def scores(evaluator, mined, i=0):
    m = read_mined(mined)
    return evaluator.score(m.picture(i), m[i].question, torch.from_numpy(m[i].masks())).ious

def expected(loaded): return InternvlEvaluator(loaded, PROFILE.with_(scoring="expected"))

# ---- processes ------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def children(mined, tmp_path_factory):
    "Two trainings at once: one by two processes, one that is killed with no warning between two checkpoints."
    folder = tmp_path_factory.mktemp("children")
    script = str(HERE / "evaluator_models.py")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    start = lambda command, name: subprocess.Popen(command, env=ENV, cwd=HERE, stdout=(folder / f"{name}.out").open("wb"), stderr=subprocess.STDOUT)
    both = start([*launch, script, str(mined), str(folder / "both"), json.dumps(SHORT)], "both")
    killed = start([sys.executable, script, str(mined), str(folder / "killed"), json.dumps(LONG)], "killed")
    log, limit = folder / "killed" / "run" / "log.jsonl", time.time() + 600
    while time.time() < limit and killed.poll() is None and not (log.exists() and log.read_text().count("\n") >= 13): time.sleep(0.005)
    os.kill(killed.pid, signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL, (folder / "killed.out").read_text()[-2000:]
    assert both.wait(timeout=600) == 0, (folder / "both.out").read_text()[-3000:]
    return folder

def test_a_killed_run_continues_on_the_same_curve(children, mined, tmp_path):
    last = latest_checkpoint(children / "killed" / "run")
    assert last is not None and int(last.name.split("-")[1]) < LONG["steps"], "the run ended before it was killed"
    rest = train(mined, children / "killed", **LONG)
    assert 0 < len(rest) < LONG["steps"]
    train(mined, tmp_path, **LONG)
    whole, joined = curve(tmp_path), curve(children / "killed")
    assert [r["step"] for r in joined] == list(range(1, LONG["steps"] + 1)) and joined == whole

def test_two_processes_have_the_loss_of_one(children, mined, tmp_path):
    train(mined, tmp_path, **SHORT)
    assert sorted(p.name for p in (children / "both").glob("process-*")) == ["process-0-of-2", "process-1-of-2"]
    one, two = curve(tmp_path), curve(children / "both")
    assert len(one) == len(two) == SHORT["steps"]
    for a, b in zip(one, two, strict=True):
        for key in ("loss", "lr", "grad_norm"): assert b[key] == pytest.approx(a[key], rel=1e-4, abs=1e-6), key
    a, b = (load_file(f / "evaluator" / "model.safetensors") for f in (tmp_path, children / "both"))
    assert a.keys() == b.keys() and max((a[k] - b[k]).abs().max().item() for k in a) < 1e-3

# ---- what is learnt -------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def full(mined, tmp_path_factory):
    "A full training on eight groups; the model as it was in memory, and the folder."
    folder, loaded = tmp_path_factory.mktemp("full"), small()
    train(mined, folder, loaded, held=mined, steps=24, save_every=12, learning_rate=4e-3)
    return folder, loaded

def test_the_loss_falls_on_eight_groups(full):
    rows = curve(full[0])
    assert len(rows) == 24 and rows[-1]["loss"] < .5 * rows[0]["loss"]
    assert all(0 <= r["iou_error"] <= 1 and 0 <= r["pairs_right"] <= 1 for r in rows)
    measured = [r for r in map(json.loads, (full[0] / "run" / "log.jsonl").read_text().splitlines()) if "val_giou" in r]
    assert [r["step"] for r in measured] == [12, 24] and all(r["val_oracle"] == 1 and r["val_initial"] == pytest.approx(.6) and 0 <= r["val_giou"] <= 1 and -1 <= r["val_spearman"] <= 1 for r in measured)

def test_the_whole_model_loads_back_and_scores_the_same(full, mined):
    again = load_evaluator(full[0] / "evaluator", PROFILE.with_(scoring="expected"))
    a, b = scores(again, mined), scores(expected(full[1]), mined)
    assert torch.allclose(a, b, atol=1e-6) and not torch.allclose(b, scores(expected(small()), mined), atol=1e-3)

def test_a_measure_is_the_mean_over_samples(mined):
    m, wrong = read_mined(mined), iter([[0, .1, .9, 0, 0, 0], [.9, .8, .3, .5, 0, 0], [0] * 6, [1, .6, 1 / 3, .5, 0, 0]])
    evaluator = type("E", (), {"score": lambda self, *a: type("S", (), {"ious": torch.tensor(next(wrong), dtype=torch.float64)})})()
    records = score_mined(evaluator, m, range(4))
    found, t = summary_of(records), [s.ious for s in m]
    assert found["val_giou"] == pytest.approx(np.mean([t[0][2], t[1][0], t[2][0], t[3][0]])) and found["val_initial"] == pytest.approx(.6) and found["val_oracle"] == 1
    said = [r["said"] for r in records]
    assert found["val_iou_error"] == pytest.approx(np.mean([abs(a - b) for x, y in zip(said, t, strict=True) for a, b in zip(x, y, strict=True)]))
    assert found["val_spearman"] == pytest.approx(np.mean([spearman(x, y) for x, y in zip(said, t, strict=True) if len(set(x)) > 1]))

@pytest.fixture(scope="module")
def adapted(mined, tmp_path_factory):
    "Two steps of LoRA on a saved base; folder, the model in memory, the base's weights."
    folder = tmp_path_factory.mktemp("lora")
    save_evaluator(small(), folder / "base")
    s = settings(steps=2, **LORA)
    loaded, adapter, base = load_base(folder / "base", s)
    assert adapter is None
    train_evaluator(loaded, PROFILE, groups(mined, s, loaded), folder, s, base=base, progress=False)
    return folder, loaded

def test_only_the_adapters_learn(adapted):
    folder, loaded = adapted
    state, base = load_file(folder / "evaluator" / "adapter_model.safetensors"), load_file(folder / "base" / "model.safetensors")
    assert len(state) == 2 * 2 * 7  # A and B, two layers, seven projections
    for layer in range(2):
        for t in TARGETS:
            a, b = (next(v for k, v in state.items() if f"layers.{layer}." in k and f".{t}.lora_{x}." in k) for x in "AB")
            assert a.shape[0] == b.shape[1] == 8 and a.abs().max() > 0 and b.abs().max() > 0
    config = json.loads((folder / "evaluator" / "adapter_config.json").read_text())
    assert config["r"] == 8 and config["lora_alpha"] == 16 and config["base_model_name_or_path"] == str(folder / "base")
    now = {k.replace(".base_layer", ""): v for k, v in loaded.model.state_dict().items() if ".lora_" not in k}
    kept = load_evaluator(folder / "base", PROFILE).model.state_dict()
    assert now.keys() == kept.keys() and all(torch.equal(now[k], kept[k]) for k in now)
    run = load_file(latest_checkpoint(folder / "run") / "model.safetensors")
    assert len(run) == 28 and all(".lora_" in k for k in run) and sum(v.numel() for v in run.values()) < sum(v.numel() for v in base.values())

def test_an_adapter_loads_back_and_scores_the_same(adapted, mined):
    folder, loaded = adapted
    profile = PROFILE.with_(scoring="expected")
    a, b, plain = (scores(e, mined) for e in (load_evaluator(folder / "evaluator", profile), expected(loaded), load_evaluator(folder / "base", profile)))
    assert torch.allclose(a, b, atol=1e-5) and not torch.allclose(a, plain, atol=1e-4)

def test_the_second_stage_goes_on_with_the_adapter(adapted, mined, tmp_path):
    folder, loaded = adapted
    s = settings(steps=1, **LORA)
    second, adapter, base = load_base(folder / "evaluator", s)
    assert adapter == folder / "evaluator" and base == str(folder / "base")
    batch = GroupBatches(groups(mined, s, loaded), builder_of(loaded, PROFILE), s, 0)(0, 0, 1)
    with torch.no_grad(): before = float(EvaluatorTrainee(loaded)(batch, 0)[0])
    train_evaluator(second, PROFILE, groups(mined, s, second), tmp_path, s, adapter=adapter, base=base, progress=False)
    assert curve(tmp_path)[0]["loss"] == pytest.approx(before, rel=1e-5)
    assert json.loads((tmp_path / "evaluator" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(folder / "base")
    assert 0 <= scores(load_evaluator(tmp_path / "evaluator", PROFILE), mined).min()
    with pytest.raises(CheckpointError, match="adapter of rank 8, alpha 16; the settings say 4, 16"): load_base(folder / "evaluator", replace(s, lora_rank=4))

def test_the_papers_numbers():
    for stage in (1, 2):
        s = load_section(EvaluatorTraining, f"lens.evaluator.{stage}")
        assert (s.lora_rank, s.lora_alpha, list(s.targets), s.checkpointing) == (128, 256, TARGETS, True)
    assert 0 < s.reasoning_share < 1 and not s.text_roles
    assert load_section(EvaluatorTraining, "lens.evaluator.1").text_roles == ("region", "vqa")

def test_checkpointing_and_accumulation_change_nothing(mined, tmp_path):
    def losses(name, **changes):
        train(mined, tmp_path / name, **(dict(steps=2) | changes))
        return [r["loss"] for r in curve(tmp_path / name)]
    plain = losses("plain")
    assert losses("checkpointing", checkpointing=True) == pytest.approx(plain, rel=1e-5)
    assert losses("accumulation", batch_size=4, accumulation=2) == pytest.approx(plain, rel=1e-4)
    assert losses("lora", checkpointing=True, **LORA) == pytest.approx(losses("lora-plain", **LORA), rel=1e-5)

def test_adapters_around_bfloat16_weights(mined, tmp_path):
    loaded = small()
    loaded.model.bfloat16()
    log = train(mined, tmp_path, loaded, held=mined, steps=2, precision="bf16", checkpointing=True, **LORA)
    assert all(np.isfinite(r["loss"]) for r in log)
    assert all(v.dtype == torch.float32 for v in load_file(tmp_path / "evaluator" / "adapter_model.safetensors").values())

# ---- data -----------------------------------------------------------------------------------------------------------------

def test_every_candidate_is_in_one_group_a_time(mined):
    loaded, s = small(), settings()
    mixture = groups(mined, s, loaded)
    assert len(mixture) == 8
    seen = [mixture[k][1] for k in range(24)]
    for turn in range(3):
        for at in range(4): assert sorted(i for j in seen[8 * turn:8 * turn + 8] if j.at == at for i in j.members(5, s.seed, 6)) == list(range(6))
    assert len({tuple(j.members(5, s.seed, 6)) for j in seen if j.at == 0 and j.group == 0}) == 3
    builder = builder_of(loaded, PROFILE)
    for k in (0, 5):
        name, inputs, ious = group_of(builder, mixture[k][1], s)
        which = mixture[k][1].members(5, s.seed, 6)
        assert ious == [pytest.approx(read_mined(mined)[mixture[k][1].at].ious[i]) for i in which]
        assert [loaded.tokenizer.decode(inputs.input_ids[a:b]) for a, b in inputs.numbers] == [f"{v:.2f}" for v in ious]

@pytest.mark.parametrize("share,low,high", [(0., 0, 0), (1., 40, 40), (.5, 12, 28)])
def test_reasoning_is_mixed_in(tmp_path, share, low, high):
    why, loaded = "Because it is red.", small()
    s = settings(reasoning_share=share)
    mixture, builder = groups(squares(tmp_path / "m", reasoning=why), s, loaded), builder_of(loaded, PROFILE)
    texts = [loaded.tokenizer.decode(group_of(builder, mixture[k][1], s)[1].labels.clamp(min=0)) for k in range(40)]
    assert low <= sum(why in t for t in texts) <= high

def test_roles_can_be_left_out(mined, tmp_path):
    loaded, s = small(), settings()
    open_ = lambda **kw: open_groups([str(mined), f"reasonseg={squares(tmp_path / 'other', 2)}"], [], s, builder_of(loaded, PROFILE), 1024, **kw)
    assert {r: len(x) for r, x in open_().roles.items()} == {"reasoning": 8, "reasonseg": 4}
    assert {r: len(x) for r, x in open_(without=["reasoning"]).roles.items()} == {"reasonseg": 4}
    with pytest.raises(DataError, match="no role dreams to leave out"): open_(without=["dreams"])
    with pytest.raises(DataError, match="no data is left"): open_(without=["reasoning", "reasonseg"])

def test_conversations_and_regions_are_learnt(mined, tmp_path, monkeypatch):
    from rea2seg.data import sources
    from rea2seg.masks import to_rle
    monkeypatch.setattr(sources, "_kinds", dict(sources._kinds))
    mask = np.zeros((32, 48), bool); mask[4:9, 4:9] = True
    talk = [Sample(f"t{i}", np.zeros((32, 48, 3), np.uint8), "What is this?", to_rle(mask) if i % 2 else None, reasoning="A square.") for i in range(4)]
    register_source("talk", lambda where, split=None, limit=None, seed=None: Listed("talk", talk, limit), needs_where=False)
    loaded, s = small(), settings(steps=2, mixture="referring:1, vqa:1", text_only="vqa")
    builder = builder_of(loaded, PROFILE)
    mixture = open_groups([str(mined)], ["vqa=talk"], s, builder, 1024)
    batch = GroupBatches(mixture, builder, s, 0)(0, 0, 1)
    kinds = [len(n) for n in batch["numbers"]]
    assert kinds.count(0) == 4 and all(loaded.tokenizer.decode(row[row >= 0]) == "A square.<|im_end|>" for row, n in zip(batch["labels"], kinds, strict=True) if not n)
    pictures = [(row == builder.encoder.ids["<img>"]).sum().item() for row in batch["input_ids"]]
    assert sorted(p for p, n in zip(pictures, kinds, strict=True) if not n) == [1, 1, 2, 2]
    log = train_evaluator(loaded, PROFILE, mixture, tmp_path, s, progress=False)
    assert np.isfinite(log[-1]["loss"])
    talk[0] = replace(talk[0], reasoning=None)
    with pytest.raises(DataError, match="1 of 4 samples of talk cannot be trained on: t0: has no answer in words"): open_groups([], ["vqa=talk"], s, builder, 1024)
    with pytest.raises(DataError, match="must be ROLE=KIND:WHERE"): open_groups([], ["talk"], s, builder, 1024)

def change(mined: Path, folder: Path, row: int, **changes) -> Path:
    "The same mined folder with one bad row."
    folder.mkdir()
    table = pq.read_table(mined / "part-0of1-00000.parquet"); rows = table.to_pylist(); rows[row] |= changes
    pq.write_table(table.from_pylist(rows, schema=table.schema), folder / "part-0of1-00000.parquet")
    (folder / "run.json").write_text((mined / "run.json").read_text())
    return folder

@pytest.mark.parametrize("changes,said", [(dict(candidates=[], ious=[]), "s02: has no candidate masks"), (dict(height=31), "s02: a mask is damaged or of another size than 31x48"),
                                          (dict(ious=[.5]), "s02: has 6 masks but 1 IoUs"), (dict(ious=[.1, .2, .3, .4, .5, float("nan")]), "s02: IoUs must lie in"),
                                          (dict(question="q7? " * 400), "s02: a group takes .* tokens, the model's context is 1024")])
def test_a_bad_row_is_named_before_the_first_step(mined, tmp_path, capsys, changes, said):
    bad, loaded = change(mined, tmp_path / "bad", 2, **changes), small()
    with pytest.raises(DataError, match=f"1 of 4 samples of .*bad cannot be trained on: {said}"): groups(bad, settings(), loaded)
    assert len(groups(bad, settings(), loaded, skip_bad=True)) == 6 and "s02" in capsys.readouterr().out

def test_the_longest_group_is_known_without_its_picture(tmp_path):
    from rea2seg.train.groups import group_length
    loaded = small()
    for profile in (PROFILE, PROFILE.with_(prompt="turns", question_place="repeated"), PROFILE.with_(prompt="full", question_place="after")):
        m, s = read_mined(squares(tmp_path / profile.prompt, 1, reasoning="It is on the left.")), settings(reasoning_share=1.)
        builder = builder_of(loaded, profile)
        made = [len(group_of(builder, GroupJob(m, 0, g), s)[1].input_ids) for g in range(2)]
        assert group_length(builder, m[0], s) == max(made)

def test_a_picture_that_is_gone_or_of_another_size(mined, tmp_path):
    s, loaded = settings(), small()
    for name, image, said in (("gone", "nowhere.png", "nowhere.png"), ("other", str(HERE / "other.png"), "its masks are 32x48, its picture is 8x8 now")):
        if name == "other":
            from PIL import Image
            image = str(tmp_path / "other.png"); Image.new("RGB", (8, 8)).save(image)
        bad = mined
        for row in range(4): bad = change(bad, tmp_path / f"{name}{row}", row, image=image, image_id="x")
        with pytest.raises((ValueError, OSError), match=said): train_evaluator(small(), PROFILE, groups(bad, s, loaded), tmp_path / "run", s, progress=False)

# ---- faults ---------------------------------------------------------------------------------------------------------------

def test_nan_stops_with_the_batch_saved(mined, tmp_path):
    loaded = small()
    with torch.no_grad(): loaded.model.model.language_model.layers[0].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(NaNLoss, match="step 0"): train(mined, tmp_path, loaded)
    batch = torch.load(next((tmp_path / "run").glob("nan-batch-*.pt")), weights_only=True)
    assert sorted(set(batch["names"])) == ["s00", "s01", "s02", "s03"] and batch["input_ids"].shape == batch["labels"].shape and not (tmp_path / "evaluator").exists()

def test_a_full_disk_leaves_the_former_result_whole(mined, tmp_path):
    train(mined, tmp_path, steps=1)
    before = scores(load_evaluator(tmp_path / "evaluator", PROFILE.with_(scoring="expected")), mined)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    loaded = small(seed=1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(Exception) as e: save_evaluator(loaded, tmp_path / "evaluator")
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert any(w in str(e.value).lower() for w in ("too large", "os error", "write")), e.value
    assert torch.equal(scores(load_evaluator(tmp_path / "evaluator", PROFILE.with_(scoring="expected")), mined), before) and sorted(p.name for p in tmp_path.iterdir()) == ["evaluator", "run"]

# ---- tracking and the command ----------------------------------------------------------------------------------------------

def test_tracking_gets_a_table_of_groups(mined, tmp_path, monkeypatch):
    sent = []
    class Table:
        def __init__(self, columns): self.columns, self.rows = columns, []
        def add_data(self, *row): self.rows.append(row)
    monkeypatch.setitem(sys.modules, "wandb", type("W", (), {"Table": Table, "Image": staticmethod(lambda f: f)}))
    tracker = Tracker(enabled=False); tracker.run = type("Run", (), {"log": lambda self, values, step: sent.append((step, values))})()
    loaded, s = small(), settings(steps=2, save_every=1)
    train_evaluator(loaded, PROFILE, groups(mined, s, loaded), tmp_path, s, read_mined(mined), tracker=tracker, progress=False)
    tables = [(step, v["scored groups"]) for step, v in sent if "scored groups" in v]
    assert [step for step, _ in tables] == [1, 2] and len(tables[0][1].rows) == 4
    row = dict(zip(tables[0][1].columns, tables[0][1].rows[0], strict=True))
    assert row["name"] == "s00" and row["is"].startswith("1.00, 0.60") and len(row["picture"].axes) == 5
    keys = {k for _, v in sent for k in v}
    assert {"loss", "iou_error", "pairs_right", "val_giou", "val_spearman", "lr"} <= keys

def test_the_verb_trains_and_continues(mined, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    save_evaluator(small(positions=4096), tmp_path / "start")
    command = ["train", "evaluator", "--profile", "tiny", "--stage", "2", "--mined", str(mined), "--validation", str(mined), "--base", str(tmp_path / "start"), "--device", "cpu", "--out", str(tmp_path / "out"),
               *[x for kv in ("epochs=2", "batch_size=4", "warmup_steps=1", "log_every=1", "learning_rate=3e-3", "prompt=brief", "mask_view=overlay", "group_size=5") for x in ("--set", kv)]]
    assert main(command) == 0, capsys.readouterr().err
    rows = curve(tmp_path / "out")
    assert [r["step"] for r in rows] == [1, 2, 3, 4] and rows[-1]["loss"] < rows[0]["loss"]
    note = json.loads((tmp_path / "out" / "training.json").read_text())
    assert note["steps"] == 4 and note["groups"] == {"reasoning": 8} and note["profile"]["prompt"] == "brief" and note["settings"]["epochs"] == 2
    assert load_evaluator(tmp_path / "out" / "evaluator").kind == "internvl"
    assert main(command) == 0 and curve(tmp_path / "out") == rows
    assert main([*command, "--without", "reasoning"]) == 2 and "no data is left" in capsys.readouterr().err
    assert main([*command[:7], str(tmp_path), *command[8:]]) == 2 and "holds nothing that rea2seg mine wrote" in capsys.readouterr().err
    assert main([*command, "--set", "epoch=1"]) == 2 and "no setting is called epoch" in capsys.readouterr().err
