"""The small SAM's training: its command, what its prompts and IoU estimates have seen, its files."""
import json
import shutil

import numpy as np
import pytest
import torch
from training_models import SAM2, stack

from rea2seg.sam2_model import Sam2
from rea2seg.settings import load_section
from rea2seg.train.pack import Pack, sam_batches
from rea2seg.train.sam import NONE, SamTrainee, SamTraining, _Scene, mask_losses, masks_of, object_rows, one_hot_rows, region_tokens, sample_pixels
from rea2seg.train.tiny import measure_sam, read_sam, save_sam, train_sam

@pytest.fixture(scope="module")
def pack() -> Pack: return Pack.load(stack() / "train")

def small(**changes) -> SamTraining:
    return load_section(SamTraining, "tiny.sam", **{**dict(steps=4, batch_size=2, plain_steps=0, precision="no", clicks=3, floor_clicks=2, regions=3, refinements=2, log_every=1, warmup_steps=1), **changes})

def one_step(pack, seed=0, **changes):
    "Losses and log of one step of a very small SAM."
    s = small(**changes)
    model = SamTrainee(Sam2.random(SAM2, trainable=True), s)
    return model, *model(sam_batches(pack, 2, seed)(0, 0, 1), 10)

def test_the_command_lowers_the_loss():
    rows = [json.loads(l) for l in (stack() / "one" / "run-sam" / "log.jsonl").read_text().splitlines()]
    losses = [r["loss"] for r in rows if "loss" in r]
    assert len(losses) == 6 and np.mean(losses[-2:]) < np.mean(losses[:2]) - 0.2, losses
    assert {"val_object_best3", "val_part_best3", "val_spearman", "val_clicks"} <= rows[-1].keys()

def test_saved_sam_is_the_trained_one():
    sam = read_sam(stack() / "one" / "sam")
    assert sam.side == 512 and not any(p.requires_grad for p in sam.parameters()) and not sam.training
    report = json.loads((stack() / "one" / "sam" / "rea2seg.json").read_text())["report"]
    assert report["scenes"] == 5 and len(report["pack"]) == 16
    again = measure_sam(sam, Pack.load(stack() / "val"))
    assert again == pytest.approx({k: report[k] for k in again}, nan_ok=True)

def test_every_kind_of_prompt_is_trained(pack):
    model, loss, log = one_step(pack)
    assert torch.isfinite(loss) and {"click_iou0", "click_single", "region_iou0", "refine_iou0", "click_iou_error"} <= log.keys()
    loss.backward()
    parts, grad = model.sam.parts, lambda p: p.grad is not None and bool(p.grad.abs().sum() > 0)
    for p in (parts.points[1].weight, parts.points[2].weight, parts.mask_tokens.weight, parts.no_mask.weight, next(parts.mask_embed.parameters()), *(h.weight for h in parts.iou_head.layers)):
        assert grad(p), "a part of the prompt encoder or the decoder learns nothing"

def test_clicks_fall_on_the_floor_too(pack):
    s = small(clicks=2, floor_clicks=3)
    model = SamTrainee(Sam2.random(SAM2, trainable=True), s)
    seen = []
    def spy(*a, **k): seen.append((a, k)); return forward(*a, **k)
    forward, model.sam.forward_prompts = model.sam.forward_prompts, spy
    batch = sam_batches(pack, 2, 0)(0, 0, 1)
    model(batch, 10)
    xy = seen[0][0][2].reshape(2, -1, 2) * 256 / model.sam.side
    on = [[int(batch["part_map"][b, min(int(y), 255), min(int(x), 255)]) for x, y in xy[b].tolist()] for b in range(2)]
    assert all(row.count(NONE) >= 3 and len([v for v in row if v != NONE]) >= 2 for row in on), on

def test_most_clicks_find_parts_of_objects_that_show_several(pack):
    "The clicks that are asked for fall on parts beside which the same object shows another one."
    batch = sam_batches(pack, 2, 0)(0, 0, 1)
    maps, owner = batch["part_map"].long(), batch["part_object"].long()
    scene = _Scene(maps, owner, 12, 32)
    for b in range(2):
        seen = [p for p in range(255) if int((maps[b] == p).sum()) >= 12]
        several = {p for p in seen if sum(int(owner[b, q]) == int(owner[b, p]) for q in seen) > 1}
        wanted = several or set(seen)
        assert set(scene.part_weight[b].nonzero().flatten().tolist()) == wanted
    assert scene.several.any(), "the pack has no object of several parts; the test says nothing"
    model, seen = SamTrainee(Sam2.random(SAM2, trainable=True), small(clicks=0, part_clicks=9, floor_clicks=0)), []
    forward = model.sam.forward_prompts
    model.sam.forward_prompts = lambda *a, **k: seen.append(a) or forward(*a, **k)
    model(batch, 10)
    xy = (seen[0][2].reshape(2, 9, 2) * 256 / model.sam.side).long()
    for b in range(2): assert all(scene.part_weight[b, maps[b, y, x]] > 0 for x, y in xy[b].tolist())

def test_shares_are_what_a_picture_shrinks_to(pack):
    batch = sam_batches(pack, 2, 0)(0, 0, 1)
    maps, owner = batch["part_map"].long(), batch["part_object"].long()
    scene = _Scene(maps, owner, 12, 32)
    rows = torch.cat([object_rows(owner, torch.tensor([[0, 1]] * 2)), one_hot_rows(torch.tensor([[0]] * 2))], 1)
    wanted = torch.nn.functional.adaptive_avg_pool2d(masks_of(rows, maps).float(), 32).flatten(2)
    assert torch.allclose(scene.small(rows), wanted, atol=1e-6)
    near = scene.near(rows, .5)
    assert torch.allclose(near.sum(-1), torch.ones(2, 3), atol=1e-5)
    whole = scene.small(object_rows(owner, owner[:, :1])) > 0
    assert (near[:, 2:][whole] > 2 * near[:, 2:].amin()).all(), "the object of a part weighs more than the rest of the picture"
    logits, target = torch.randn(1, 8, 8), torch.rand(1, 8, 8)
    even = torch.full((1, 8, 8), 1 / 64)
    assert torch.allclose(mask_losses(logits, target, 2., 1.), mask_losses(logits, target, 2., 1., even))

def test_the_encoder_is_asked_for_parts_everywhere(pack):
    "The reading learns at once, its gradient reaches all three levels, and it is not part of the SAM."
    s = small(map_weight=5.0)
    model = SamTrainee(Sam2.random(SAM2, trainable=True), s)
    optimizer, batch, right = torch.optim.Adam(model.part_map.parameters(), 3e-2), sam_batches(pack, 2, 0)(0, 0, 1), []
    for _ in range(12):
        loss, log = model(batch, 10)
        optimizer.zero_grad(); loss.backward(); optimizer.step(); right.append(float(log["map_kind"]))
    assert right[-1] > right[0] + .2, right
    assert all(c.weight.grad.abs().sum() > 0 for c in (model.part_map.coarse, model.part_map.middle, model.part_map.fine))
    assert not any("part_map" in k for k in model.sam.state_dict()) and SamTrainee(model.sam, small(map_weight=0.0)).part_map is None

def test_a_compiled_decoder_says_the_same(pack):
    if not shutil.which("g++"): pytest.skip("torch.compile needs a C++ compiler")
    batch = sam_batches(pack, 2, 0)(0, 0, 1)
    def step(compiled):
        model = SamTrainee(Sam2.random(SAM2, trainable=True), small(compiled=compiled, plain_steps=20))
        loss, _ = model(batch, 10)
        loss.backward()
        return float(loss.detach()), torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in model.sam.parameters()])
    (a, grad), (b, again) = step(False), step(True)
    assert a == pytest.approx(b, rel=1e-4) and torch.nn.functional.cosine_similarity(grad, again, 0) > .999

def test_estimates_of_iou_are_taught_by_bad_clicks(pack):
    "With the weight of the estimates alone, their error falls, floor clicks included."
    s = small(bce_weight=0.0, dice_weight=0.0, spread_weight=0.0, iou_weight=10.0)
    model = SamTrainee(Sam2.random(SAM2, trainable=True), s)
    head = [p for n, p in model.sam.named_parameters() if "iou_prediction" in n]
    optimizer, batch, errors = torch.optim.Adam(head, 1e-2), sam_batches(pack, 2, 0)(0, 0, 1), []
    for _ in range(20):
        loss, log = model(batch, 10)
        optimizer.zero_grad(); loss.backward(); optimizer.step(); errors.append(float(log["click_iou_error"]))
    assert errors[-1] < 0.85 * errors[0], errors

def test_the_same_step_is_the_same(pack):
    (_, a, _), (_, b, _), (_, c, _) = one_step(pack), one_step(pack), one_step(pack, seed=1)
    assert a.item() == b.item() != c.item()

def test_region_token_of_one_pixel_is_a_click(pack):
    sam = Sam2.random(SAM2)
    mask = torch.zeros(1, 1, 64, 64); mask[0, 0, 20, 30] = 1
    token = region_tokens(sam, mask)[0]
    from rea2seg.sam_core import embed_points
    click = embed_points(sam.parts, torch.tensor([[[30., 20.]]]) * sam.side / 64, torch.ones(1, 1, dtype=torch.int64), sam.side, False)[0]
    assert torch.allclose(token, click, atol=1e-5)

def test_masks_are_what_rows_say(pack):
    maps, owner = pack.part_map[:2].long(), pack.part_object[:2].long()
    found = masks_of(object_rows(owner, torch.zeros(2, 1, dtype=torch.long)), maps)[:, 0]
    for b in range(2): assert torch.equal(found[b], torch.isin(maps[b], torch.nonzero(owner[b] == 0)))
    xy, there = sample_pixels(found[:, None], 5, torch.Generator().manual_seed(0))
    assert all(found[b, y, x] for b in range(2) for (x, y), ok in zip(xy[b, 0].tolist(), there[b, 0].tolist(), strict=True) if ok)
    assert one_hot_rows(torch.tensor([[3]]))[0, 0].nonzero().tolist() == [[3]]

def test_a_picture_without_objects_is_no_trouble(pack):
    batch = sam_batches(pack, 2, 0)(0, 0, 1)
    batch["part_map"][0] = NONE; batch["part_object"][0] = -1
    loss, _ = SamTrainee(Sam2.random(SAM2, trainable=True), small())(batch, 10)
    assert torch.isfinite(loss)

def test_saving_and_continuing(pack, tmp_path):
    folder = save_sam(Sam2.random(SAM2), tmp_path / "start")
    sam = train_sam(pack, tmp_path / "on", start=folder, steps=1, batch_size=2, precision="no", plain_steps=0, warmup_steps=1)
    assert sam.config == Sam2.random(SAM2).config
    same = [torch.equal(p, q) for p, q in zip(sam.parameters(), read_sam(folder).parameters(), strict=True)]
    assert not all(same)
    for a, b in zip(sam.parts.points, read_sam(folder).parts.points, strict=True): assert torch.equal(a.weight, b.weight), "a generator's prompts would lose their meaning"
    (shutil.copytree(folder, tmp_path / "bad") / "model.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError): read_sam(tmp_path / "bad")
