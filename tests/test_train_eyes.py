"""The vision tower learns what image tokens show, and the language model can still read them."""
import json
from dataclasses import replace

import pytest
import torch
from training_models import stack

from rea2seg.generators import load_generator
from rea2seg.settings import load_section
from rea2seg.train.eyes import READ, EyesTrainee, EyesTraining, accuracy, cell_labels, linear_reading, moved, read_pack
from rea2seg.train.generator import GeneratorTrainee, GeneratorTraining, photo_tokens
from rea2seg.train.pack import Pack, sam_batches
from rea2seg.train.tiny import main as tiny

SMALL = "batch_size=2 warmup_steps=2 precision=no save_every=20 log_every=1 probe_scenes=4 probe_steps=60 learning_rate=1e-3".split()

@pytest.fixture(scope="module")
def pack() -> Pack: return Pack.load(stack() / "train")

@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "Thirty steps on a few scenes, by the command."
    out = tmp_path_factory.mktemp("eyes")
    tiny(["eyes", "--start", "embedded:generator", "--pack", str(stack() / "train"), "--validation", str(stack() / "val"), "--out", str(out), "--device", "cpu", *(w for s in [*SMALL, "steps=30"] for w in ("--set", s))])
    return out

def test_the_command_teaches_the_eyes_alone(trained):
    rows = [r for r in map(json.loads, (trained / "run-eyes" / "log.jsonl").read_text().splitlines()) if "loss" in r]
    assert [r["step"] for r in rows] == list(range(1, 31))
    mean = lambda key, some: sum(r[key] for r in some) / len(some)
    assert mean("loss", rows[-6:]) < mean("loss", rows[:6]) - 0.3 and mean("kind", rows[-6:]) >= mean("kind", rows[:6])
    was, now = (load_generator(p).model.state_dict() for p in ("embedded:generator", trained / "generator"))
    changed = {n.split(".")[0] for n in was if not torch.equal(was[n], now[n])}
    assert changed == {"visual"}

def test_the_report_says_what_is_recognised_and_what_the_map_explains(trained):
    report = json.loads((trained / "eyes.report.json").read_text())
    assert set(report) == {"before", "after", "explained"} and set(report["after"]) == {*READ, "objects"}
    assert all(0 <= v <= 1 for when in ("before", "after") for v in report[when].values())
    assert 0.8 < report["explained"] <= 1

def test_new_tokens_are_in_the_terms_of_the_former_ones(trained, pack):
    with torch.no_grad(): was, now = (photo_tokens(load_generator(p).model, pack.image[:2])[0] for p in ("embedded:generator", trained / "generator"))
    assert (now - was).square().mean() < 0.2 * was.var() and not torch.equal(now, was)

def test_the_reading_is_fitted_to_tokens_and_stays(pack):
    model = load_generator("embedded:generator").model
    tokens, labels, owner = read_pack(model, pack, 0.25)
    known = labels[..., 0] >= 0
    reading = linear_reading(tokens[known], labels[known], 200)
    assert not any(p.requires_grad for p in reading.parameters())
    found = accuracy(reading, tokens, labels, owner)
    guess = float((labels[..., 0][known] == labels[..., 0][known].mode().values).float().mean())
    assert found["kind"] > max(0.8, 2 * guess) and found["objects"] > 0.8, (found, guess)
    trainee = EyesTrainee(model, reading, load_section(EyesTraining, "tiny.eyes", precision="no"))
    assert {n.split(".")[0] for n, p in trainee.named_parameters() if p.requires_grad} == {"visual", "cells"}
    groups = trainee.groups()
    assert [g.get("muon", False) for g in groups] == [True, False, False] and all(p.ndim == 2 for p in groups[0]["params"])
    assert sum(len(g["params"]) for g in groups) == len(list(trainee.parameters()))

def test_labels_move_with_the_picture(pack):
    image, part_map = moved(pack.image[:2], pack.part_map[:2].long(), 12, torch.Generator().manual_seed(3))
    near = replace(pack, image=image, part_map=part_map.to(torch.uint8))
    assert not torch.equal(image, pack.image[:2])
    seen = set(part_map.unique().tolist())
    assert seen <= set(pack.part_map[:2].unique().tolist()) and image.dtype == torch.uint8
    cells = cell_labels(part_map, near.part_attributes[:2].long(), (16, 16), 4)
    middle = part_map[:, 2::4, 2::4]
    wanted = torch.where(middle == 255, 0, near.part_attributes[:2].long().gather(1, middle.flatten(1)[..., None].expand(-1, -1, 9))[..., 0].view_as(middle) + 1)
    assert torch.equal(cells[..., 0].reshape(2, 16, 16, 4, 4).transpose(2, 3).reshape(2, 64, 64), wanted)

def test_eyes_alone_learn_from_questions():
    g = load_generator("embedded:generator")
    trainee = GeneratorTrainee(g.model, g.sam, [], load_section(GeneratorTraining, "tiny.generator", trained="eyes"))
    assert {n.removeprefix("model.").split(".")[0] for n, p in trainee.named_parameters() if p.requires_grad} == {"visual", "attributes"}

def test_eyes_need_a_generator(capsys):
    with pytest.raises(SystemExit): tiny(["eyes", "--pack", "x"])
    assert "eyes needs --start" in capsys.readouterr().err

def test_a_step_gives_the_same_loss_again(pack):
    "Pictures are moved alike when a killed training comes by again, and otherwise in another step."
    model = load_generator("embedded:generator").model
    reading = torch.nn.Linear(model.config.text_config.hidden_size, sum(READ.values())).requires_grad_(False)
    trainee, batch = EyesTrainee(model, reading, load_section(EyesTraining, "tiny.eyes", precision="no")), sam_batches(pack, 2, 0)(3, 0, 1)
    with torch.no_grad(): once, again, other = (float(trainee(b, 3)[0]) for b in (batch, batch, batch | {"seed": batch["seed"] + 1}))
    assert once == again != other
