"""The AMG part against SAM 2's own generator and transformers' mask generation; the candidate set and its fallbacks."""
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from sam2.automatic_mask_generator import SAM2AutomaticMaskGenerator
from sam2.build_sam import build_sam2
from sam2.utils.amg import MaskData, mask_to_rle_pytorch, rle_to_mask
from transformers import SamImageProcessor

from rea2seg.candidates import amg_candidates, clean_regions, decode_points, discover, filter_masks, measure, remove_small_regions
from rea2seg.masks import boxes_xyxy, pairwise_iou, stability_score
from rea2seg.records import Grounding
from rea2seg.sam import load_sam2
from rea2seg.sam1_model import Sam1
from rea2seg.sam2_model import Sam2
from rea2seg.settings import Settings

TRUNK = dict(embed_dim=16, num_heads=1, stages=[1, 1, 2, 1], global_att_blocks=[3], window_pos_embed_bkg_spatial_size=[4, 4], window_spec=[8, 4, 8, 4])
S = Settings.load("lens", amg_candidates=90)


def liven(sam, offset):
    "Random masks that are sharp, sparse, follow the point, and whose predicted IoUs spread: so that every filter has something to do."
    p = sam.parts
    with torch.no_grad():
        for layer in p.layers:
            layer.to_tokens.q_proj.weight.mul_(2); layer.to_tokens.k_proj.weight.mul_(2); layer.to_tokens.out_proj.weight.mul_(8)
        for mlp in p.hyper:
            last = mlp.layers[-1] if sam.family == "sam2" else mlp.proj_out
            last.weight.mul_(40); last.bias.sub_(offset)
        last = p.iou_head.layers[-1] if sam.family == "sam2" else p.iou_head.proj_out
        last.weight.mul_(8 if sam.family == "sam2" else .2)
        if sam.family == "sam": last.bias.add_(.5) # no sigmoid there
    return sam


@cache
def pair(seed):
    "The same random weights in our SAM 2 and in the sam2 package's model."
    ours = Sam2.random(dict(TRUNK, image_size=256), seed)
    with torch.no_grad():
        for conv in ours.image_encoder.neck.convs: conv.conv.weight.mul_(.1)
    liven(ours, (36, 36, 46)[seed])
    extra = [f"++model.image_encoder.trunk.{k}={v}".replace(" ", "") for k, v in TRUNK.items()]
    official = build_sam2("configs/sam2.1/sam2.1_hiera_t.yaml", None, device="cpu",
                          hydra_overrides_extra=[*extra, "++model.image_size=256", "++model.image_encoder.neck.backbone_channel_list=[128,64,32,16]"])
    missing, surplus = official.load_state_dict(ours.state_dict(), strict=False)
    assert not surplus and all(k.startswith(("memory_", "maskmem", "no_mem_pos", "no_obj", "obj_ptr", "mask_downsample")) for k in missing)
    return load_sam2(official.state_dict(), dict(TRUNK, image_size=256), resizer="torchvision"), official


def picture(H, W, seed=0):
    torch.manual_seed(seed)
    small = torch.rand(1, 3, 12, 16)
    return torch.nn.functional.interpolate(small, (H, W), mode="bicubic").clamp(0, 1)[0].permute(1, 2, 0).mul(255).byte().numpy(), torch.stack(
        [torch.randint(W, (30,)), torch.randint(H, (30,))], 1).float()


def generator(official, points, size_hw, settings, **kw):
    H, W = size_hw
    amg = SAM2AutomaticMaskGenerator(official, points_per_side=None, point_grids=[points.double().numpy() / [W, H]], points_per_batch=settings.points_per_batch,
                                     pred_iou_thresh=settings.predicted_iou, stability_score_thresh=settings.stability, box_nms_thresh=settings.box_nms_iou, **kw)
    amg.predictor._bb_feat_sizes = [(64, 64), (32, 32), (16, 16)] # hard-coded for 1024 pixels
    return amg


def quantiles(sam, embedding, points, q_iou, q_stability):
    "Thresholds in the widest gap near a quantile, so that rounding cannot decide."
    d = decode_points(sam, embedding, points, 64)
    def gap(values, q):
        v = values.sort().values
        at = range(max(1, int(q * len(v)) - 6), min(len(v) - 1, int(q * len(v)) + 6))
        i = max(at, key=lambda i: v[i] - v[i - 1])
        return float(v[i] + v[i - 1]) / 2
    iou = gap(d.ious, q_iou) if q_iou else 0.0
    left = d.logits[d.ious > iou]
    return iou, gap(stability_score(sam.upscale(left, embedding), 1.0), q_stability) if q_stability else 0.0


@pytest.mark.parametrize("seed,size", [(0, (90, 120)), (1, (256, 256)), (2, (333, 150))])
@pytest.mark.parametrize("q_iou,q_stability", [(0, 0), (.5, 0), (0, .5), (.4, .4), (.9, .6)])
def test_same_masks_as_sam2(seed, size, q_iou, q_stability):
    sam, official = pair(seed)
    image, points = picture(*size, seed)
    embedding = sam.encode(image)
    iou, stability = quantiles(sam, embedding, points, q_iou, q_stability)
    s = S.with_(predicted_iou=iou, stability=stability, points_per_batch=64 if q_iou else 7)
    want = generator(official, points, size, s).generate(image)
    got = amg_candidates(sam, embedding, points, s)
    assert len(got) == len(want) > 0
    masks = torch.from_numpy(np.stack([w["segmentation"] for w in want]))
    diagonal = pairwise_iou(got.masks, masks, empty=1.0).diagonal()
    assert (diagonal >= .999).all()
    assert torch.allclose(got.predicted_ious, torch.tensor([w["predicted_iou"] for w in want]), atol=1e-4)
    assert torch.allclose(got.stability, torch.tensor([w["stability_score"] for w in want]).nan_to_num(0), atol=5e-3)
    assert torch.allclose(got.points_xy, torch.tensor([w["point_coords"][0] for w in want]).float(), atol=1e-3)
    # stopping early gives the head of the same list
    few = amg_candidates(sam, embedding, points, s.with_(amg_candidates=3))
    assert torch.equal(few.masks, got.masks[:3]) and torch.equal(few.predicted_ious, got.predicted_ious[:3])


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_filters_bite(seed):
    "The comparison above means something: each filter removes some masks and leaves several."
    sam, _ = pair(seed)
    image, points = picture(256, 256, seed)
    e = sam.encode(image)
    iou, stability = quantiles(sam, e, points, .4, .4)
    d = decode_points(sam, e, points, 64)
    n = lambda **kw: len(filter_masks(sam, e, d, S.with_(**{**dict(predicted_iou=0., stability=0., box_nms_iou=1.), **kw}))[0])
    assert n() == 90 and 20 < n(predicted_iou=iou) < 80 and 20 < n(predicted_iou=iou, stability=stability) < n(predicted_iou=iou)
    assert 3 < n(box_nms_iou=.7) < 80 and 2 < n(predicted_iou=iou, stability=stability, box_nms_iou=.7) < n(predicted_iou=iou, stability=stability)


def test_nothing_passes():
    sam, official = pair(0)
    image, points = picture(90, 120)
    got = amg_candidates(sam, sam.encode(image), points, S.with_(predicted_iou=1.0))
    assert len(got) == 0 and got.masks.shape == (0, 90, 120) and got.points_xy.shape == (0, 2)
    assert generator(official, points, (90, 120), S.with_(predicted_iou=1.0)).generate(image) == []
    assert len(amg_candidates(sam, sam.encode(image), torch.zeros(0, 2), S)) == 0


@pytest.mark.parametrize("min_area", [4, 30, 400])
def test_small_regions_like_the_official_ones(min_area):
    sam, _ = pair(1)
    image, points = picture(90, 120, 1)
    e = sam.encode(image)
    s = S.with_(predicted_iou=0., stability=0.)
    plain = amg_candidates(sam, e, points, s)
    got = amg_candidates(sam, e, points, s.with_(min_region_area=min_area))
    data = MaskData(rles=mask_to_rle_pytorch(plain.masks), boxes=plain.boxes_xyxy, iou_preds=plain.predicted_ious)
    want = SAM2AutomaticMaskGenerator.postprocess_small_regions(data, min_area, s.box_nms_iou)
    assert torch.equal(got.masks, torch.from_numpy(np.stack([rle_to_mask(r) for r in want["rles"]])))
    assert torch.equal(got.predicted_ious, want["iou_preds"]) and not torch.equal(got.masks, plain.masks[:len(got)])
    top = amg_candidates(sam, e, points, s.with_(min_region_area=min_area, amg_candidates=2))
    assert torch.equal(top.masks, got.masks[:2])
    assert remove_small_regions(plain.masks[:0], 5, .7)[0].shape == (0, 90, 120) and not clean_regions(np.zeros((5, 5), bool), 3)[0].any()


@pytest.mark.parametrize("size", [(90, 120), (130, 70)])
@pytest.mark.parametrize("q_iou,q_stability", [(0, 0), (.5, .4)])
def test_same_masks_as_transformers_mask_generation_for_sam1(size, q_iou, q_stability):
    torch.manual_seed(0)
    sam = Sam1.random(dict(encoder_embed_dim=32, encoder_depth=2, encoder_num_heads=2, encoder_global_attn_indexes=(1,), window_size=7, image_size=256), 3)
    with torch.no_grad(): sam.model.vision_encoder.neck.layer_norm2.weight.mul_(.1)
    liven(sam, 36)
    image, points = picture(*size, 3)
    e = sam.encode(image)
    iou, stability = quantiles(sam, e, points, q_iou, q_stability)
    got = amg_candidates(sam, e, points, S.with_(predicted_iou=iou, stability=stability))
    # what transformers' "mask-generation" pipeline does with SamModel's outputs
    processor = SamImageProcessor(pad_size=dict(height=256, width=256), mask_pad_size=dict(height=64, width=64), size=dict(longest_edge=256))
    H, W = size
    scaled = points * torch.tensor([e.input_hw[1] / W, e.input_hw[0] / H])
    with torch.no_grad():
        out = sam.model(image_embeddings=e.features, input_points=scaled[None, :, None], input_labels=torch.ones(1, 30, 1, dtype=torch.int), multimask_output=True)
    big = processor.post_process_masks(out.pred_masks, [size], [e.input_hw], binarize=False)[0]
    rles, scores, boxes = processor.filter_masks(big, out.iou_scores[0], size, [0, 0, W, H], iou, stability, 0, 1)
    masks, scores, _, _ = processor.post_process_for_mask_generation(rles, scores, boxes, .7)
    assert len(got) == len(masks) > 10
    assert (pairwise_iou(got.masks, torch.from_numpy(np.stack(masks)), empty=1.0).diagonal() >= .999).all()
    assert torch.allclose(got.predicted_ious, scores, atol=1e-4)


def test_measure():
    torch.manual_seed(0)
    for shape in ((5, 1, 1), (3, 7, 1), (6, 40, 33)):
        logits = torch.randn(shape) * 2
        logits[0] = -5
        stability, boxes = measure(logits, 1.0)
        assert torch.allclose(stability, stability_score(logits, 1.0)) and torch.equal(boxes, boxes_xyxy(logits > 0))


def test_equal_predicted_ious_keep_the_decoders_order():
    sam, _ = pair(0)
    image, points = picture(90, 120)
    e = sam.encode(image)
    d = decode_points(sam, e, points, 64)
    kept, _ = filter_masks(sam, e, replace(d, ious=torch.full_like(d.ious, .5)), S.with_(predicted_iou=0., stability=0., box_nms_iou=1.))
    assert kept.tolist() == list(range(90))


def grounding(sam, H=90, W=120, seed=0):
    image, _ = picture(H, W, seed)
    e = sam.encode(image)
    torch.manual_seed(seed)
    prompt = torch.randn(1, 1, sam.dim)
    low = sam.decode(e, prompt_embed=prompt, multimask=False).logits
    y, x = torch.meshgrid(torch.arange(6), torch.arange(8), indexing="ij")
    cells = torch.stack([x * W / 8, y * H / 6, (x + 1) * W / 8, (y + 1) * H / 6], -1).view(-1, 4).float()
    return Grounding(prompt, low, torch.rand(1, 48).softmax(-1), sam.upscale(low, e)[0, 0], cells, (6, 8), e, notes=("from ground",))


OPEN = Settings.load("lens", predicted_iou=0.0, stability=0.0, similarity=0.5)


def test_discover_is_three_and_three_and_nine():
    sam, _ = pair(2)
    g = grounding(sam)
    found = discover(sam, g, OPEN)
    assert found.sources == ("multimask",) * 3 + ("kcore",) * 3 + ("amg",) * (len(found) - 6) and 6 < len(found) <= 15
    assert found.notes == ("from ground",) and found.masks.shape[1:] == (90, 120)
    assert torch.isfinite(found.predicted_ious).all() and ((found.stability >= 0) & (found.stability <= 1)).all()
    assert found.points_xy[:6].isnan().all() and found.points_xy[6:].isfinite().all()
    out = sam.decode(g.embedding, prompt_embed=g.prompt_embed)
    logits = sam.upscale(out.logits[0], g.embedding)
    assert torch.equal(found.masks[:3], logits > 0) and torch.equal(found.predicted_ious[:3], out.ious[0])
    assert torch.allclose(found.stability[:3], stability_score(logits, 1.0))
    again = discover(sam, g, OPEN)
    assert torch.equal(found.masks, again.masks)
    for part in ("multimask", "kcore", "amg"):
        assert torch.equal(discover(sam, g, OPEN, parts=(part,)).masks, found.of(part).masks)
    assert len(discover(sam, g, OPEN.with_(max_candidates=5))) == 5


def test_image_is_not_encoded_again():
    sam, _ = pair(2)
    g = grounding(sam)
    real, calls = sam.decode, []
    sam_calls = dict(encode=sam.image_encoder.forward)
    try:
        sam.image_encoder.forward = lambda *a, **k: pytest.fail("the image was encoded again")
        object.__setattr__(sam, "decode", lambda *a, **k: calls.append(len(a[1]) if len(a) > 1 else 1) or real(*a, **k))
        discover(sam, g, OPEN)
    finally:
        object.__delattr__(sam, "decode"); sam.image_encoder.forward = sam_calls["encode"]
    assert calls == [1, 1, 30] # prompt token, refinement, all seeds at once


def test_fallbacks():
    sam, _ = pair(2)
    g = grounding(sam)
    strict = OPEN.with_(predicted_iou=1.0, similarity=1.0)
    found = discover(sam, g, strict)
    assert found.sources == ("multimask",) * 3 and len(found.notes) == 3 and any("no mask of 30 seed points passes" in n for n in found.notes)
    left = discover(sam, g, strict, parts=("kcore", "amg"))
    assert left.sources == ("initial",) and torch.equal(left.masks[0], g.initial) and any("initial mask stands in" in n for n in left.notes)
    assert torch.equal(left.predicted_ious, sam.decode(g.embedding, prompt_embed=g.prompt_embed, multimask=False).ious[0])
    assert left.notes[0] == "from ground" and len(left.notes) == 4
    outside = replace(g, token_boxes_xyxy=g.token_boxes_xyxy + 1000)
    assert any("no seed points" in n for n in discover(sam, outside, OPEN).notes)
    assert discover(sam, outside, OPEN, parts=("amg",)).sources == ("initial",)
    empty = replace(g, logits=torch.full_like(g.logits, -9.))
    assert "and is empty itself" in discover(sam, empty, strict, parts=("amg",)).notes[-1]
    assert discover(sam, g, OPEN, parts=()).sources == ("initial",)


def test_bad_input():
    sam, _ = pair(2)
    g = grounding(sam)
    with pytest.raises(ValueError, match="no SAM embedding"): discover(sam, replace(g, embedding=None), OPEN)
    with pytest.raises(ValueError, match="parts are"): discover(sam, g, OPEN, parts=("boxes",))
    two = Grounding(torch.zeros(2, 1, 8), torch.zeros(2, 1, 8, 8), torch.ones(2, 1, 4), torch.zeros(2, 8, 8), torch.zeros(4, 4), (2, 2))
    with pytest.raises(ValueError, match="one by one"): discover(sam, two, OPEN)
    with pytest.raises(TypeError, match=r"float\[K,2\]"): amg_candidates(sam, g.embedding, torch.zeros(3), OPEN)


@pytest.mark.parametrize("where", ["mask_tokens", "iou_head"])
def test_nan_is_named(where):
    sam = Sam2.random(dict(TRUNK, image_size=256), 0)
    g = grounding(sam)
    with torch.no_grad(): (sam.parts.mask_tokens.weight if where == "mask_tokens" else sam.parts.iou_head.layers[-1].bias).fill_(torch.nan)
    for parts in (("multimask",), ("kcore",), ("amg",)):
        with pytest.raises(ValueError, match="NaN"): discover(sam, g, OPEN.with_(similarity=-1.0), parts=parts)


@pytest.mark.parametrize("size", [(1, 1), (3, 200), (31, 17)])
def test_odd_picture_sizes(size):
    sam, official = pair(1)
    found = discover(sam, grounding(sam, *size), OPEN)
    assert found.masks.shape[1:] == size and 1 <= len(found) <= 15
