"Scores and reasons in one step: each loss is what it is alone, both fall, and what is stored is what was learnt."
import json
import shutil

import pytest
import torch

from rea2seg.checkpoints import resolve
from rea2seg.data.sources import load_samples
from rea2seg.evaluator_internvl import InternvlEvaluator
from rea2seg.generators import load_generator
from rea2seg.internvl import load_internvl, save_evaluator
from rea2seg.mined import read_mined
from rea2seg.mining import mine
from rea2seg.settings import Settings, load_section
from rea2seg.train.evaluator_tiny import LookBatches, Scoring, evaluator_from
from rea2seg.train.looks import LookTrainee, LookTraining
from rea2seg.train.loop import fit
from rea2seg.train.pack import Pack, build_pack
from rea2seg.train.reasons import ReasonBatches, ReasonTrainee, ReasonTraining, train_reasons
from rea2seg.train.together import Together, main

PROFILE = Settings.load("tiny", evaluator_kind="internvl", chain_of_thought=True, max_reasoning_tokens=12, seed_points=6)
LOOP = dict(batch_size=2, precision="no", steps=10, warmup_steps=1, log_every=1, save_every=100)
LOOKS, REASONS = dict(LOOP, questions=2, masks=4, learning_rate=4e-3, reason_scenes=2), dict(batch_size=2, questions=4, rank=8, energy=1.0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    "A pack, what was mined in it, a generator and an evaluator that shares its weights and has begun to reason."
    home = tmp_path_factory.mktemp("together")
    build_pack(home / "pack", 2, ("clevr", "multistep"), "val", 7, 0, 8, workers=0, progress=False)
    generator, spec = load_generator("embedded:generator", layers=PROFILE.layers), f"pack:{home / 'pack'}"
    mine(generator, PROFILE, load_samples(spec, per_image=2), home / "mined", 2, progress=False, data=dict(spec=spec, split=None, limit=None, seed=0, options=dict(per_image=2)))
    shutil.copytree(resolve("embedded:generator"), home / "generator")
    train_reasons(evaluator_from(generator), Pack.load(home / "pack"), home, profile=PROFILE, device="cpu", shares="../generator", **LOOP | REASONS | dict(steps=1))
    return home


def parts(folders):
    loaded, looks, reasons = load_internvl(folders / "evaluator"), load_section(LookTraining, "tiny.evaluator", **LOOKS), load_section(ReasonTraining, "tiny.reasons", **REASONS)
    trainee = Together(loaded, looks, reasons, PROFILE)
    scores, traces = LookBatches(Scoring(read_mined([folders / "mined"]), looks)), ReasonBatches(Pack.load(folders / "pack"), trainee.reasoner, reasons)
    return loaded, trainee, {"scores": scores(0, 0, 1), "reasons": traces(0, 0, 1)}


def test_each_loss_is_what_it_is_alone(folders):
    loaded, trainee, batch = parts(folders)
    with torch.no_grad(): together, log = trainee(batch, 0)
    trainee.settle(torch.float32)
    with torch.no_grad():
        alone = LookTrainee(loaded, trainee.looks.settings, PROFILE)
        alone.cover.load_state_dict(trainee.looks.cover.state_dict())   # read recall and precision off, begin at random
        scores, found = alone(batch["scores"], 0)
        reasons, said = ReasonTrainee(load_internvl(folders / "evaluator"), trainee.reasoner.settings, PROFILE)(batch["reasons"], 0)
    for k, v in said.items(): assert float(log[k]) == pytest.approx(float(v), abs=1e-4), k
    for k, v in found.items(): assert float(log[f"score_{k}" if k in said else k]) == pytest.approx(float(v), abs=1e-4), k
    assert float(together) == pytest.approx(float(scores + reasons), abs=1e-3)


def test_both_fall_and_are_stored(folders, tmp_path):
    loaded, trainee, batch = parts(folders)
    learns = {n for n, p in trainee.named_parameters() if p.requires_grad}
    assert any("original" in n for n, _ in trainee.named_parameters()) and not any("original" in n for n in learns) and any(n.endswith("lm_head.weight") for n in learns)
    grouped = [id(p) for g in trainee.groups() for p in g["params"]]
    assert len(grouped) == len(set(grouped)) == len(learns)
    tower = {n: p.clone() for n, p in loaded.model.model.vision_tower.tower.state_dict().items()}
    history = fit(trainee, lambda *_: batch, trainee.looks.settings, tmp_path / "run", trainee.groups(), cpu=True, progress=False)
    for name in ("words", "place", "digits", "rank"): assert history[-1][name] < history[0][name], name
    assert all(torch.equal(p, tower[n]) for n, p in loaded.model.model.vision_tower.tower.state_dict().items())
    loaded.lora = trainee.settle(torch.bfloat16); loaded.model.eval()
    shutil.copytree(folders / "generator", tmp_path / "generator")
    save_evaluator(loaded, tmp_path / "evaluator", torch.bfloat16, shares="../generator")
    assert len(json.loads((tmp_path / "evaluator" / "rea2seg.json").read_text())["shares"][0]["names"]) == 11
    m, again = read_mined([folders / "mined"])[0], load_internvl(tmp_path / "evaluator")
    a, b = (InternvlEvaluator(x, PROFILE).score(batch["scores"]["image"][0].numpy(), m.question, torch.from_numpy(m.masks())).ious for x in (loaded, again))
    assert torch.allclose(torch.as_tensor(a), torch.as_tensor(b), atol=0.05)


def test_a_lower_rank_is_refused(folders):
    with pytest.raises(ValueError, match="have rank 8, the settings say 5"): Together(load_internvl(folders / "evaluator"), load_section(LookTraining, "tiny.evaluator"), load_section(ReasonTraining, "tiny.reasons", rank=5), PROFILE)


def test_the_command_trains_and_goes_on_from_what_it_wrote(folders, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    few = [x for k, v in dict(LOOKS, steps=1).items() for x in ("--set", f"{k}={v}")] + [x for k, v in REASONS.items() for x in ("--set-reasons", f"{k}={v}")]
    shutil.copytree(folders / "generator", tmp_path / "generator")
    common = ["--pack", str(folders / "pack"), "--mined", str(folders / "mined"), "--device", "cpu", "--shares", "../generator", *few]
    main([*common, "--start", str(folders / "evaluator"), "--validation", str(folders / "mined"), "--out", str(tmp_path)])
    assert "val_spearman" in (tmp_path / "run-together" / "log.jsonl").read_text()
    shutil.copytree(tmp_path / "generator", tmp_path / "b" / "generator")
    main([*common, "--start", str(tmp_path / "evaluator"), "--out", str(tmp_path / "b")])
    first, second = (load_internvl(p / "evaluator") for p in (tmp_path, tmp_path / "b"))
    assert first.lora.keys() == second.lora.keys() and not all(torch.equal(first.lora[k], second.lora[k]) for k in first.lora)


def test_without_a_pack_it_learns_no_reasoning(folders, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    few = [x for k, v in dict(LOOKS, steps=3).items() for x in ("--set", f"{k}={v}")] + ["--set-reasons", "rank=4"]
    shutil.copytree(folders / "generator", tmp_path / "generator")
    common = ["--mined", str(folders / "mined"), "--device", "cpu", "--shares", "../generator", "--out", str(tmp_path), *few]
    main(common)
    history = [json.loads(line) for line in (tmp_path / "run-together" / "log.jsonl").read_text().splitlines()]
    assert "digits" in history[-1] and "words" not in history[-1] and not (tmp_path / "reasons").exists()
    assert {len(v) for k, v in load_internvl(tmp_path / "evaluator").lora.items() if "lora_A" in k} <= {1, 2, 3, 4}
    with pytest.raises(SystemExit): main([*common, "--pack", str(folders / "pack")])
    assert "reasoning goes on from --start" in capsys.readouterr().err
    with pytest.raises(ValueError, match="has its shape; text_layers is for an evaluator that begins"): main([*common, "--start", str(tmp_path / "evaluator"), "--set-shape", "text_layers=6"])
