"A smaller evaluator: which layers go, what stays as it was, and how little its checkpoint holds."
import json
import shutil

import numpy as np
import pytest
import torch

from rea2seg.checkpoints import CheckpointError, resolve
from rea2seg.evaluator_internvl import InternvlEvaluator
from rea2seg.generators import load_generator
from rea2seg.internvl import load_internvl, new_internvl, save_evaluator
from rea2seg.settings import Settings, load_section
from rea2seg.train.evaluator_tiny import evaluator_from
from rea2seg.train.pack import Pack, build_pack
from rea2seg.train.prune import keep_layers, least_needed, main
from rea2seg.train.reasons import ReasonBatches, ReasonTrainee, ReasonTraining
from rea2seg.train.reasons import main as train_reasons

PROFILE = Settings.load("tiny", max_reasoning_tokens=12)
HALF = [0, 2, 5, 7, 8]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "The shipped weights, side by side as in the package."
    home = tmp_path_factory.mktemp("weights")
    for name in ("generator", "evaluator"): shutil.copytree(resolve(f"embedded:{name}"), home / name)
    return home


@pytest.fixture(scope="module")
def pack_folder(tmp_path_factory): return build_pack(tmp_path_factory.mktemp("pack"), 2, ("clevr", "multistep"), "val", 7, 0, 8, workers=0, progress=False)


@pytest.fixture(scope="module")
def large(home): return load_internvl(home / "evaluator")


def scores(loaded, image):
    masks = np.zeros((3, 256, 256), bool)
    for k in range(3): masks[k, 40 * k:40 * k + 60, 60:140] = True
    return InternvlEvaluator(loaded, PROFILE).score(image, "the cube", torch.from_numpy(masks)).ious


def size(folder): return sum(f.stat().st_size for f in folder.iterdir())


def test_all_layers_are_the_same_evaluator(large, pack_folder):
    image = Pack.load(pack_folder).image[0].numpy()
    again = keep_layers(large, range(10))
    assert all(torch.equal(a.bfloat16(), b.bfloat16()) for a, b in zip(large.model.state_dict().values(), again.model.state_dict().values(), strict=True))
    assert torch.allclose(scores(large, image), scores(again, image), atol=0.05)


def test_some_layers_are_those_of_the_larger(large, pack_folder):
    small = keep_layers(large, HALF[::-1])
    for k, layer in zip(HALF, small.model.model.language_model.layers, strict=True):
        assert all(torch.equal(a.bfloat16(), b.bfloat16()) for a, b in zip(layer.parameters(), large.model.model.language_model.layers[k].parameters(), strict=True))
    assert [torch.equal(t.bfloat16(), large.model.model.vision_tower.told[k - 4].bfloat16()) for t, k in zip(small.model.model.vision_tower.told, HALF[2:], strict=True)] == [True] * 3
    assert small.model.config.vision_config.looks == 3 and large.model.config.text_config.num_hidden_layers == 10
    assert scores(small, Pack.load(pack_folder).image[0].numpy()).isfinite().all()


@pytest.mark.parametrize(("layers", "message"), [([], "different numbers from 0 to 9"), ([1, 1, 8], "different numbers"), ([4, 10], "different numbers"), ([-1, 8], "different numbers"), ([0, 1, 2, 3], "told of masks, must stay")])
def test_layers_that_cannot_be_kept(large, layers, message):
    with pytest.raises(ValueError, match=message): keep_layers(large, layers)


def test_an_evaluator_that_looks_at_pictures_of_masks_keeps_its_layers():
    with pytest.raises(ValueError, match="looks at pictures of masks"): keep_layers(new_internvl(), [0])


def test_the_layer_without_which_the_loss_is_least_goes(large, pack_folder):
    before, pack, free = {n: p.clone() for n, p in large.model.state_dict().items()}, Pack.load(pack_folder).first(1), (2, 4, 9)
    kept, rows = least_needed(large, pack, 9, PROFILE, stay=set(range(10)) - set(free), progress=False)
    def loss(layers):  # of an evaluator that has only these
        s = load_section(ReasonTraining, "tiny.reasons", rank=1, attention_first=5, attention_last=6)
        trainee = ReasonTrainee(keep_layers(large, layers), s, PROFILE)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16): log = trainee(ReasonBatches(pack, trainee, s)(0, 0, 1), 0)[1]
        return float(log["words"] + log["place"])
    alone = {out: loss([k for k in range(10) if k != out]) for out in free}
    assert rows[0]["left out"] is None and rows[0]["loss"] == pytest.approx(loss(range(10)), rel=0.02)
    assert rows[1]["left out"] == min(alone, key=alone.get) and rows[1]["loss"] == pytest.approx(min(alone.values()), rel=0.02) and kept == [k for k in range(10) if k != rows[1]["left out"]]
    assert all(torch.equal(p, before[n]) for n, p in large.model.state_dict().items())
    assert least_needed(large, pack, 9, PROFILE, stay=range(1, 10), progress=False)[0] == list(range(1, 10))   # whatever the loss
    with pytest.raises(ValueError, match=r"layers are 0 to 9, got \[10\] to stay"): least_needed(large, pack, 9, PROFILE, stay=[8, 10])
    for count, stay in ((0, ()), (11, ()), (1, (7, 8))):
        with pytest.raises(ValueError, match=f"can stay, got {count}"): least_needed(large, pack, count, PROFILE, stay=stay)


def test_the_checkpoint_holds_what_differs(home, large, tmp_path):
    shutil.copytree(home, tmp_path, dirs_exist_ok=True)
    small = keep_layers(large, HALF)
    with torch.no_grad(): small.model.lm_head.weight[5] += 0.5
    save_evaluator(small, tmp_path / "small", torch.bfloat16, shares="../evaluator")
    note, = json.loads((tmp_path / "small" / "rea2seg.json").read_text())["shares"]
    assert note["names"]["model.language_model.layers.1."] == "model.language_model.layers.2." and note["names"]["model.language_model.layers.4."] == "model.language_model.layers.8."
    assert "lm_head.weight" not in note["names"] and "model.vision_tower.told" not in note["names"] and size(tmp_path / "small") < 1116 * 256 * 2 + 2e5
    again = load_internvl(tmp_path / "small")
    assert all(torch.equal(again.model.state_dict()[n], p.bfloat16().float()) for n, p in small.model.state_dict().items())
    with pytest.raises(CheckpointError, match="cannot share its own weights"): save_evaluator(small, tmp_path / "small", torch.bfloat16, shares="../small")
    with torch.no_grad(): large_again = load_internvl(tmp_path / "evaluator"); large_again.model.model.language_model.layers[2].mlp.up_proj.weight += 0.1
    large_again.lora = None
    save_evaluator(large_again, tmp_path / "evaluator", torch.bfloat16)
    with pytest.raises(CheckpointError, match="other weights than those of .*evaluator"): load_internvl(tmp_path / "small")


def test_two_checkpoints_can_be_shared(home, tmp_path):
    shutil.copytree(home, tmp_path, dirs_exist_ok=True)
    plain = evaluator_from(load_generator("embedded:generator", layers=PROFILE.layers))
    trainee = ReasonTrainee(plain, load_section(ReasonTraining, "tiny.reasons", rank=2), PROFILE)
    with torch.no_grad():
        for m in trainee.changed.values(): m.parametrizations.weight[0].b.normal_(std=0.02)
    plain.lora = trainee.settle(torch.bfloat16)
    plain.model.eval()
    for n, shares in enumerate((["../generator"], ["../generator", "../evaluator"])): save_evaluator(plain, tmp_path / str(n), torch.bfloat16, shares)
    notes = json.loads((tmp_path / "1" / "rea2seg.json").read_text())["shares"]
    assert [len(n["names"]) for n in notes] == [11, 3] and "model.multi_modal_projector.linear_1.weight" in notes[1]["names"]   # what neither has learnt
    assert 3.5e5 < size(tmp_path / "0") - size(tmp_path / "1") < 4.5e5
    a, b = (load_internvl(tmp_path / n) for n in "01")
    assert all(torch.equal(x, y) for x, y in zip(a.model.state_dict().values(), b.model.state_dict().values(), strict=True))
    with pytest.raises(CheckpointError, match="do not make the evaluator's weights of those it shares"): save_evaluator(plain, tmp_path / "2", torch.bfloat16, ["../evaluator"])


def test_the_command_leaves_layers_out_and_training_goes_on(home, pack_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    shutil.copytree(home / "generator", tmp_path / "generator"); shutil.copytree(home / "evaluator", tmp_path / "large")
    main(["--start", str(tmp_path / "large"), "--layers", "9", "--pack", str(pack_folder), "--scenes", "1", "--out", str(tmp_path / "cut"), "--shares", "../../large", "--device", "cpu"])
    said = capsys.readouterr().out
    kept, reads = [int(k) for k in said.split("kept")[1].splitlines()[0].split()], said.split("[tiny.reasons]")[1].splitlines()[0].split()   # and the numbers that layers have now
    assert f"attention_first={kept.index(7)} attention_last={kept.index(8)}" in said and "all layers" in said and len(kept) == 9 and {7, 8} <= set(kept) and size(tmp_path / "cut" / "evaluator") < 2e5
    few = dict(batch_size=1, precision="no", steps=2, warmup_steps=1, questions=2, rank=2, energy=1.0, words_rate=0, head_rate=0)
    train_reasons(["--start", str(tmp_path / "cut" / "evaluator"), "--pack", str(pack_folder), "--out", str(tmp_path), "--shares", "../large", "--device", "cpu", *(x for c in [*(f"{k}={v}" for k, v in few.items()), *reads] for x in ("--set", c))])
    note, = json.loads((tmp_path / "evaluator" / "rea2seg.json").read_text())["shares"]
    assert "lm_head.weight" in note["names"] and len([n for n in note["names"] if ".layers." in n]) == 9 and size(tmp_path / "evaluator") < 6e5
    trained, before = load_internvl(tmp_path / "evaluator"), load_internvl(tmp_path / "cut" / "evaluator")
    assert not all(torch.equal(a, b) for a, b in zip(trained.model.state_dict().values(), before.model.state_dict().values(), strict=True)) and len(trained.lora) == 9 * 7 * 2
