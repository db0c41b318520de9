"""Frozen SAM and SAM 2: the reference's recorded outputs, the official predictors, batches, gradients, bad input."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

from rea2seg.checkpoints import CheckpointError
from rea2seg.sam import Sam1, Sam2, TokenMasks, load_sam1, load_sam2
from rea2seg.sam2_model import SAM2_SIZES
from rea2seg.sam_core import normalise
from rea2seg.sam_decoder import grid_positions, run_decoder

PARITY = Path(__file__).resolve().parents[2] / "shared" / "parity"
needs_fixtures = pytest.mark.skipif(not PARITY.is_dir(), reason="the reference's recorded outputs are not here")

TINY2 = dict(embed_dim=16, num_heads=1, stages=[1, 1, 2, 1], global_att_blocks=[3], window_pos_embed_bkg_spatial_size=[4, 4], window_spec=[8, 4, 8, 4],
             image_size=256, dim=64, decoder_heads=4, decoder_mlp=96)
TINY3 = TINY2 | dict(stages=[1, 1, 2], window_spec=[8, 4, 8])
TINY1 = dict(encoder_embed_dim=16, encoder_depth=2, encoder_num_heads=2, encoder_global_attn_indexes=[1], window_size=7, image_size=256, dim=64, decoder_heads=4, decoder_mlp=96)
BUILD = {"sam2": lambda **k: Sam2.random(TINY2, seed=3, **k), "sam2-3": lambda **k: Sam2.random(TINY3, seed=3, **k), "sam": lambda **k: Sam1.random(TINY1, seed=3, **k)}
kinds = pytest.mark.parametrize("kind", BUILD)

def picture(h=100, w=140, seed=0): return np.random.default_rng(seed).integers(0, 256, (h, w, 3), dtype=np.uint8)
def gap(a, b): return (a.float() - b.float()).abs().max().item()

# ---------------------------------------------------------------- the reference's recorded outputs

def fixture(name):
    folder = PARITY / f"{name}-tiny-a"
    meta = json.loads((folder / "meta.json").read_text())
    state, out = load_file(folder / "model.safetensors"), load_file(folder / "outputs.safetensors")
    sam = load_sam2(state, meta["sam2_tiny_trunk"]) if name == "lens" else load_sam1(state, meta["sam_vit"])
    read = lambda file: np.asarray(Image.open(folder / file).convert("RGB"))
    return sam, read("image.png"), read("sam_image_u8.webp"), out

def seen(name):
    sam, image, u8, out = fixture(name)
    return sam, image, u8, out, sam.encode(image)

@pytest.fixture(scope="module")
def lens(): return seen("lens")

@pytest.fixture(scope="module", params=["lisa", "sesame"])
def lisa(request): return seen(request.param)

def lens_gaps(sam, e, out):
    "Largest difference to each recorded output that depends on SAM alone."
    a, b = (sam.decode_tokens(e, prompt_embed=out[k]) for k in ("prompt_embed", "alt_prompt_embed"))
    sub = lambda t: t[..., ::4, ::4]
    pairs = dict(embed=(e.features[..., ::8, ::8], out["sam_image_embed_sub"]), s0=(e.high_res[0][..., ::32, ::32], out["sam_high_res_s0_sub"]),
                 s1=(e.high_res[1][..., ::16, ::16], out["sam_high_res_s1_sub"]), dense_pe=(grid_positions(sam.parts.gaussian, 64).T.view(1, -1, 64, 64)[..., ::16, ::16], out["sam_dense_pe_sub"]),
                 all_iou=(a.ious, out["all_iou"]), token0=(sub(a.logits[:, :1]), out["token0_low_res_sub4"]), multi=(sub(a.multi.logits), out["multimask_low_res_sub4"]),
                 multi_iou=(a.multi.ious, out["multimask_iou"]), objects=(a.object_logits, out["object_score_logits"]), single=(a.single.logits, out["low_res_masks"]),
                 single_iou=(a.single.ious, out["low_res_iou"]), alt=(sub(b.single.logits), out["alt_low_res_masks_sub4"]), alt_iou=(b.single.ious, out["alt_low_res_iou"]),
                 alt_all_iou=(b.ious, out["alt_all_iou"]), batch=(sub(sam.decode(e, prompt_embed=out["batch2_prompt_embed"], multimask=False).logits), out["batch2_low_res_masks_sub4"]))
    if a.fallback: pairs |= dict(stability=(a.stability, out["stability_score"]), alt_stability=(b.stability, out["alt_stability_score"]))
    wrong = int(((sam.upscale(a.single.logits, e)[0, 0] > 0) != out["pred_mask"].bool().view(e.orig_hw)).sum())
    return {k: gap(*v) for k, v in pairs.items()}, wrong

@needs_fixtures
def test_lens_outputs(lens):
    sam, image, u8, out, e = lens
    assert (sam.resize(image) == u8).all()
    gaps, wrong = lens_gaps(sam, e, out)
    assert max(gaps.values()) < 2e-4, gaps
    assert wrong <= 5

def lisa_gaps(sam, e, out):
    a = sam.decode_tokens(e, prompt_embed=out["pred_embedding"][:, None])
    return dict(embed=gap(e.features[..., ::8, ::8], out["sam_image_embed_sub"]), dense_pe=gap(grid_positions(sam.parts.gaussian, 64).T.view(1, -1, 64, 64)[..., ::16, ::16], out["sam_dense_pe_sub"]),
                iou=gap(a.single.ious, out["low_res_iou"]), multi_iou=gap(a.multi.ious, out["multimask_iou"])), \
           dict(low_res=gap(a.single.logits, out["low_res_masks"]), multi=gap(a.multi.logits[..., ::4, ::4], out["multimask_low_res_sub4"]), masks=gap(sam.upscale(a.single.logits, e)[:, 0], out["pred_masks"]))

@needs_fixtures
def test_lisa_outputs(lisa):
    sam, image, u8, out, e = lisa
    assert sam.resize(image).shape == u8.shape and (sam.resize(image) == u8).all()
    others, masks = lisa_gaps(sam, e, out)
    assert max(others.values()) < 1e-4, others
    assert max(masks.values()) < 5e-4, masks
    if "batch2_pred_embedding" in out:
        found = sam.decode(e, prompt_embed=out["batch2_pred_embedding"][:, None], multimask=False)
        assert gap(found.logits[..., ::4, ::4], out["batch2_low_res_masks_sub4"]) < 5e-4

# ---------------------------------------------------------------- every trap of the fixtures, walked into on purpose

def _no_memory(sam, patch): patch.setattr(sam.no_mem_embed, "data", torch.zeros_like(sam.no_mem_embed))
def _no_mask_embed(sam, patch): patch.setattr(sam.parts.no_mask.weight, "data", torch.zeros_like(sam.parts.no_mask.weight))
def _no_fallback(sam, patch): patch.setattr(sam, "fallback", None)
def _other_delta(sam, patch): patch.setattr(sam, "fallback", (1.0, .98))
def _always_first(sam, patch): patch.setattr(sam, "fallback", (.05, 0.))
def _never_first(sam, patch): patch.setattr(sam, "fallback", (.05, 1.1))
def _no_sigmoid(sam, patch): patch.setattr(sam.parts.iou_head, "sigmoid_output", False)
def _train(sam, patch): patch.setattr(sam, "training", True)
def _pil(sam, patch): patch.setattr(sam, "resize", lambda image: np.asarray(Image.fromarray(image).resize((1024, 1024), Image.Resampling.BILINEAR)))
def _half_pixel(sam, patch): patch.setattr("rea2seg.sam_decoder.grid_positions", lambda g, n: grid_positions(g, n).roll(1, 0))

@needs_fixtures
@pytest.mark.parametrize("mutate, what, least", [
    (_no_memory, "single", 1), (_no_mask_embed, "single", 1), (_no_fallback, "alt", 1), (_other_delta, "stability", .01), (_always_first, "alt", 1), (_never_first, "single", .1),
    (_no_sigmoid, "all_iou", .05), (_train, "alt", 1), (_pil, "single", .01), (_half_pixel, "single", .01)])
def test_lens_traps_are_caught(lens, monkeypatch, mutate, what, least):
    sam, image, _, out, e = lens
    mutate(sam, monkeypatch)
    assert lens_gaps(sam, sam.encode(image) if mutate in (_no_memory, _pil) else e, out)[0][what] > least

@needs_fixtures
def test_lens_padding_point_is_caught(lens):
    sam, _, _, out, e = lens
    padded = sam.decode(e, [[[0., 0.]]], [[-1]], prompt_embed=out["prompt_embed"], multimask=False, pad_point=False)
    assert gap(padded.logits, out["low_res_masks"]) > 1

def _pad_first(sam, patch):
    def prepare(image):
        small = sam.resize(image)
        h, w = small.shape[:2]
        return normalise(np.pad(small, ((0, 1024 - h), (0, 1024 - w), (0, 0)))), (h, w)
    patch.setattr(sam, "prepare", prepare)
def _no_crop(sam, patch): patch.setattr(sam, "upscale_to", lambda l, orig, inp: F.interpolate(F.interpolate(l, (1024, 1024), mode="bilinear"), orig, mode="bilinear"))
def _one_step(sam, patch): patch.setattr(sam, "upscale_to", lambda l, orig, inp: F.interpolate(l[..., :round(inp[0] / 4), :round(inp[1] / 4)], orig, mode="bilinear"))
def _sigmoid(sam, patch): patch.setattr(sam.parts.iou_head, "sigmoid_output", True)
def _stretch(sam, patch): patch.setattr(sam, "resize", lambda image: np.asarray(Image.fromarray(image).resize((1024, 1024), Image.Resampling.BILINEAR)))
def _fall_back(sam, patch): patch.setattr(sam, "fallback", (.05, 1.1))

@needs_fixtures
@pytest.mark.parametrize("mutate, what, least", [(_pad_first, "masks", 1), (_no_crop, "masks", 1), (_one_step, "masks", .1), (_sigmoid, "iou", .01), (_stretch, "embed", .1), (_fall_back, "low_res", .1),
                                                 (_no_mask_embed, "low_res", .1)])
def test_lisa_traps_are_caught(lisa, monkeypatch, mutate, what, least):
    sam, image, _, out, e = lisa
    mutate(sam, monkeypatch)
    others, masks = lisa_gaps(sam, sam.encode(image) if mutate in (_pad_first, _stretch) else e, out)
    assert (others | masks)[what] > least

# ---------------------------------------------------------------- the official predictors, same weights

@pytest.fixture(scope="module")
def official():
    "The sam2 package's own model and predictor at a small size, and ours from its state dict."
    from sam2.build_sam import build_sam2
    from sam2.sam2_image_predictor import SAM2ImagePredictor
    trunk = dict(embed_dim=16, num_heads=1, stages=[1, 1, 2, 1], global_att_blocks=[3], window_pos_embed_bkg_spatial_size=[4, 4], window_spec=[8, 4, 8, 4])
    over = [f"++model.image_encoder.trunk.{k}={str(v).replace(' ', '')}" for k, v in trunk.items()]
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = build_sam2("configs/sam2.1/sam2.1_hiera_t.yaml", None, device="cpu", hydra_overrides_extra=over + ["++model.image_size=256", "++model.image_encoder.neck.backbone_channel_list=[128,64,32,16]"])
        for p in model.sam_mask_decoder.parameters(): p.data += .05 * torch.randn_like(p)
    predictor = SAM2ImagePredictor(model)
    predictor._bb_feat_sizes = [(64, 64), (32, 32), (16, 16)]
    return predictor, load_sam2(model.state_dict(), trunk | dict(image_size=256), resizer="torchvision")

@pytest.mark.parametrize("shape", [(90, 130), (256, 256), (300, 41)])
def test_sam2_equals_official_predictor(official, shape):
    predictor, sam = official
    image, rng = picture(*shape), np.random.default_rng(1)
    predictor.set_image(image)
    e = sam.encode(image)
    assert gap(e.features, predictor.get_image_embedding()) < 1e-5
    mask = torch.tensor(rng.normal(size=(1, 64, 64)) * 20).float()
    for points, labels, prior, multi in [(1, [1], None, True), (1, [1], None, False), (3, [1, 0, 1], None, True), (2, [1, 0], mask, True), (40, [1] * 40, mask, False), (0, None, mask, True)]:
        xy = rng.uniform(0, min(shape), (points, 2)).astype(np.float32) if points else None
        masks, ious, low = predictor.predict(xy, None if labels is None else np.array(labels), mask_input=None if prior is None else prior.numpy(), multimask_output=multi, return_logits=True)
        ours = sam.decode(e, None if xy is None else xy[None], None if labels is None else [labels], mask_logits=None if prior is None else prior[None], multimask=multi)
        assert gap(sam.mask_prompt(ours.logits)[:, 0], torch.tensor(low)) < 1e-4
        assert gap(ours.ious[0], torch.tensor(ious)) < 1e-5
        assert gap(sam.upscale(ours.logits, e)[0], torch.tensor(masks)) < 1e-4

def test_sam2_mask_prompt_is_clamped(official):
    _, sam = official
    assert sam.mask_prompt(torch.full((2, 3, 64, 64), 99.)).shape == (6, 1, 64, 64)
    assert sam.mask_prompt(torch.full((2, 3, 64, 64), -99.)).unique().tolist() == [-32]
    assert BUILD["sam"]().mask_prompt(torch.full((1, 64, 64), 99.)).max() == 99

@pytest.mark.parametrize("shape", [(256, 160), (100, 256)])
def test_sam1_equals_transformers(shape):
    from transformers import SamImageProcessor, SamProcessor
    sam, image = BUILD["sam"](), picture(*shape)
    processor = SamProcessor(SamImageProcessor(size={"longest_edge": 256}, pad_size={"height": 256, "width": 256}))
    points, labels = [[[[30., 40.], [50., 9.]], [[3., 90.], [7., 8.]]]], [[[1, 0], [1, 1]]]
    inputs = processor(image, input_points=points, input_labels=labels, return_tensors="pt")
    with torch.no_grad(): theirs = sam.model(**{k: v.float() if v.is_floating_point() else v for k, v in inputs.items() if k in ("pixel_values", "input_points", "input_labels")})
    e = sam.encode(image)
    ours = sam.decode(e, points[0], labels[0])
    assert gap(ours.logits, theirs.pred_masks[0]) < 1e-4 and gap(ours.ious, theirs.iou_scores[0]) < 1e-5
    big = processor.image_processor.post_process_masks(theirs.pred_masks, inputs["original_sizes"], inputs["reshaped_input_sizes"], binarize=False)[0]
    assert gap(sam.upscale(ours.logits, e), big) < 1e-4

@pytest.fixture(scope="module", params=["sam2", "sam"])
def decoder_pair(request):
    "Our decoder run and the package's own, on the same modules."
    sam = BUILD[request.param]()
    grid, pe = sam.grid, grid_positions(sam.parts.gaussian, sam.grid).T.reshape(1, sam.dim, sam.grid, sam.grid)
    def theirs(image, high, prompts):
        n = len(prompts) // len(image)
        rep = lambda t: t.repeat_interleave(n, 0)
        if request.param == "sam":
            a, b = sam.model.mask_decoder(rep(image), pe.expand(len(prompts), -1, -1, -1), prompts[:, None], torch.zeros(1, sam.dim, grid, grid), False), \
                   sam.model.mask_decoder(rep(image), pe.expand(len(prompts), -1, -1, -1), prompts[:, None], torch.zeros(1, sam.dim, grid, grid), True)
            return torch.cat([a[0], b[0]], 2)[:, 0], torch.cat([a[1], b[1]], 2)[:, 0]
        return sam.sam_mask_decoder.predict_masks(rep(image), pe, prompts, torch.zeros(1, sam.dim, grid, grid), False, [rep(t) for t in high])[:2]
    return sam, theirs

@settings(max_examples=25, deadline=None)
@given(images=st.integers(1, 3), each=st.integers(1, 3), tokens=st.integers(0, 24), seed=st.integers(0, 2**31))
def test_decoder_equals_the_packages(decoder_pair, images, each, tokens, seed):
    sam, theirs = decoder_pair
    make, g = torch.Generator().manual_seed(seed), sam.grid
    rand = lambda *s: torch.randn(*s, generator=make)
    image, prompts = rand(images, sam.dim, g, g), rand(images * each, tokens, sam.dim)
    high = (rand(images, sam.dim // 8, 4 * g, 4 * g), rand(images, sam.dim // 4, 2 * g, 2 * g)) if sam.family == "sam2" else ()
    with torch.no_grad(): ours, (masks, ious) = run_decoder(sam.parts, image, high, prompts), theirs(image, high, prompts)
    assert gap(ours[0], masks) < 2e-4 and gap(ours[1], ious) < 1e-4

# ---------------------------------------------------------------- batches

@kinds
def test_a_batch_is_its_prompts_one_by_one(kind):
    sam = BUILD[kind]()
    e, make = sam.encode(picture()), torch.Generator().manual_seed(0)
    points, labels = torch.rand(5, 3, 2, generator=make) * 90, torch.tensor([[1, 0, 1], [1, 1, -1], [0, 0, 0], [1, -1, -1], [0, 1, 1]])
    embed, masks = torch.randn(5, 1, sam.dim, generator=make), torch.randn(5, 1, sam.mask_side, sam.mask_side, generator=make)
    for p, m in ((None, None), (embed, None), (None, masks), (embed, masks), (embed[:1], masks[:1])):
        at = lambda t, i: None if t is None else t if len(t) == 1 else t[i:i + 1]
        for multi in (True, False):
            whole = sam.decode(e, points, labels, p, m, multimask=multi)
            parts = [sam.decode(e, points[i:i + 1], labels[i:i + 1], at(p, i), at(m, i), multimask=multi) for i in range(5)]
            assert gap(whole.logits, torch.cat([d.logits for d in parts])) < 1e-4
            assert gap(whole.ious, torch.cat([d.ious for d in parts])) < 1e-5
    assert whole.logits.shape == (5, 1, sam.mask_side, sam.mask_side)

@kinds
def test_each_prompt_part_matters(kind):
    sam = BUILD[kind]()
    e = sam.encode(picture())
    point, embed, mask = torch.tensor([[[30., 40.]]]), torch.randn(1, 1, sam.dim, generator=torch.Generator().manual_seed(0)), torch.randn(1, 1, sam.mask_side, sam.mask_side) * 5
    base = sam.decode(e, point, [[1]], embed, mask).logits
    for other in (dict(points_xy=point + 40), dict(labels=[[0]]), dict(prompt_embed=-embed), dict(mask_logits=-mask), dict(mask_logits=None), dict(pad_point=False)):
        assert gap(sam.decode(e, **dict(points_xy=point, labels=[[1]], prompt_embed=embed, mask_logits=mask) | other).logits, base) > 1e-3, other

@kinds
def test_points_are_in_the_pictures_pixels(kind):
    sam, small = BUILD[kind](), picture(64, 128)
    seen = sam.resize(small) # as SAM sees it: encoding this one needs no resizing
    (h, w), e = seen.shape[:2], sam.encode(small)
    assert e.input_hw == (h, w) and max(h, w) == 256
    points = torch.tensor([[[30., 20.], [101., 60.]]])
    a = sam.decode(e, points, [[1, 0]])
    b = sam.decode(sam.encode(seen), points * torch.tensor([w / 128, h / 64]), [[1, 0]])
    assert gap(a.logits, b.logits) < 1e-4
    direct = sam.forward_prompts(e.features, e.high_res, e.to_input(points), torch.tensor([[1, 0]])).multi
    assert gap(a.logits, direct.logits) < 1e-5 and gap(a.logits, sam.decode(e, points.flip(-1), [[1, 0]]).logits) > 1e-3

@kinds
def test_pictures_times_prompts(kind):
    "Training's batch: three pictures, two prompts each, with and without a mask prompt per prompt."
    sam = BUILD[kind]()
    make = torch.Generator().manual_seed(1)
    pixels = torch.cat([sam.prepare(picture(seed=s))[0] for s in range(3)])
    points, labels, masks = torch.rand(6, 2, 2, generator=make) * 200, torch.tensor([[1, 0]] * 6), torch.randn(6, 1, sam.mask_side, sam.mask_side, generator=make)
    with torch.no_grad():
        features, high = sam.features(pixels)
        for m in (None, masks):
            whole = sam.forward_prompts(features, high, points, labels, mask_logits=m)
            for i in range(6):
                own = sam.forward_prompts(features[i // 2:i // 2 + 1], tuple(t[i // 2:i // 2 + 1] for t in high), points[i:i + 1], labels[i:i + 1], mask_logits=None if m is None else m[i:i + 1])
                assert gap(whole.logits[i], own.logits[0]) < 1e-4
    with pytest.raises(ValueError, match="4 prompts cannot be shared out evenly among 3"): sam.forward_prompts(features, high, points[:4], labels[:4])

@kinds
def test_batched_encoding(kind):
    sam = BUILD[kind]()
    images = [picture(seed=1), picture(50, 140, seed=2)]
    prepared = [sam.prepare(im) for im in images]
    both = sam.encode_batch(torch.cat([p for p, _ in prepared]), [im.shape[:2] for im in images], [hw for _, hw in prepared])
    for im, e in zip(images, both):
        alone = sam.encode(im)
        assert gap(e.features, alone.features) < 1e-5 and e.orig_hw == alone.orig_hw and e.input_hw == alone.input_hw

# ---------------------------------------------------------------- gradients

@kinds
def test_frozen_by_default_and_learning_through_it(kind):
    sam = BUILD[kind]()
    assert not sam.training and not any(p.requires_grad for p in sam.parameters())
    e = sam.encode(picture())
    assert not sam.decode(e, [[[3., 4.]]], [[1]]).logits.requires_grad
    embed = torch.randn(1, 1, sam.dim, requires_grad=True)
    sam.decode(e, prompt_embed=embed).logits.sum().backward()
    assert embed.grad.abs().sum() > 0

@kinds
def test_trainable(kind):
    sam = BUILD[kind](trainable=True)
    pixels = torch.cat([sam.prepare(picture(seed=s))[0] for s in range(2)])
    target = torch.zeros(4, 1, sam.mask_side, sam.mask_side); target[..., :20, :] = 1
    optimiser, losses = torch.optim.AdamW(sam.parameters(), 1e-3), []
    for _ in range(6):
        found = sam.forward_prompts(*sam.features(pixels), torch.full((4, 1, 2), 9.), torch.ones(4, 1, dtype=torch.long), mask_logits=torch.zeros(1, 1, sam.mask_side, sam.mask_side))
        assert found.fallback is None
        loss = F.binary_cross_entropy_with_logits(found.logits, target.expand_as(found.logits)) + found.ious.square().mean()
        optimiser.zero_grad(); loss.backward(); optimiser.step(); losses.append(loss.item())
    assert losses[-1] < losses[0]
    still = [n for n, p in sam.named_parameters() if p.grad is None]
    # what this loss cannot reach; a bias of the keys has no effect on a softmax over them
    unused = ("point_embed", "no_mask_embed", "obj_score", "positional", "to_image.k_proj.bias")
    assert not [n for n in still if not any(u in n for u in unused)], still

# ---------------------------------------------------------------- pictures of all shapes, dtypes

@kinds
@pytest.mark.parametrize("shape", [(1, 1), (1, 700), (700, 1), (3, 2000), (256, 256), (257, 255)])
def test_extreme_pictures(kind, shape):
    sam = BUILD[kind]()
    e = sam.encode(picture(*shape))
    found = sam.decode(e, [[[0., 0.]]], [[1]])
    assert sam.upscale(found.logits, e).shape == (1, 3, *shape) and min(e.input_hw) >= 1 and max(e.input_hw) == 256

@kinds
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(kind, dtype):
    exact, sam = BUILD[kind](), BUILD[kind]().to(dtype)
    e = sam.encode(picture())
    assert sam.dtype == e.features.dtype == dtype and sam.parts.gaussian.dtype == torch.float32
    mask = torch.randn(1, 1, sam.mask_side, sam.mask_side)
    found = sam.decode(e, [[[30., 40.]]], [[1]], torch.ones(1, 1, sam.dim), mask)
    reference = exact.decode(exact.encode(picture()), [[[30., 40.]]], [[1]], torch.ones(1, 1, sam.dim), mask)
    assert found.logits.dtype == found.ious.dtype == sam.upscale(found.logits.to(dtype), e).dtype == torch.float32
    assert gap(found.logits, reference.logits) < (.2 if dtype == torch.bfloat16 else .05) * reference.logits.abs().max()

@kinds
def test_upscale_takes_any_number_of_masks(kind):
    sam = BUILD[kind]()
    e, s = sam.encode(picture(30, 50)), sam.mask_side
    logits = torch.randn(20, 3, s, s)
    whole = sam.upscale(logits, e)
    assert whole.shape == (20, 3, 30, 50) and gap(whole[7, 1], sam.upscale(logits[7, 1], e)) == 0 and gap(whole.flatten(0, 1), sam.upscale(logits.flatten(0, 1), e, batch=7)) == 0
    assert sam.upscale(logits[:0], e).shape == (0, 3, 30, 50)

# ---------------------------------------------------------------- bad input

@kinds
@pytest.mark.parametrize("prompt, error, message", [
    (dict(), TypeError, "a prompt needs points"),
    (dict(points_xy=[[[1., 2.]]]), TypeError, "come together"),
    (dict(points_xy=[[1., 2.]], labels=[1]), TypeError, r"points_xy must be float\[B,P,2\].*got float32\[1, 2\]"),
    (dict(points_xy=[[[1., 2.]]], labels=[[1, 1]]), TypeError, "labels must be int"),
    (dict(points_xy=[[[1., 2.]]], labels=[[1.]]), TypeError, "labels must be int"),
    (dict(points_xy=[[[1., 2.]]], labels=[[3]]), ValueError, "labels are 1 .* got"),
    (dict(points_xy=[[[1., float("nan")]]], labels=[[1]]), ValueError, "points_xy has NaN"),
    (dict(prompt_embed=torch.ones(1, 1, 7)), TypeError, r"prompt_embed must be float\[B,T,C\].*got float32\[1, 1, 7\]"),
    (dict(prompt_embed=torch.full((1, 1, 64), float("inf"))), ValueError, "prompt_embed has NaN"),
    (dict(mask_logits=torch.zeros(1, 64, 64)), TypeError, r"mask_logits must be"),
    (dict(mask_logits=torch.zeros(1, 1, 32, 32)), TypeError, r"mask_logits must be.*got float32\[1, 1, 32, 32\]"),
    (dict(points_xy=torch.zeros(3, 1, 2), labels=torch.ones(3, 1).long(), mask_logits=torch.zeros(2, 1, 64, 64)), ValueError, "same number of rows"),
    (dict(prompt_embed=torch.ones(1, 1, 64), pad_point=True), ValueError, "padding point needs points")])
def test_bad_prompts(kind, prompt, error, message):
    sam = BUILD[kind]()
    with pytest.raises(error, match=message): sam.decode(sam.encode(picture()), **prompt)

@kinds
def test_bad_pictures_and_embeddings(kind):
    sam = BUILD[kind]()
    for image in (np.zeros((4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4, 3)), np.zeros((0, 4, 3), np.uint8)):
        with pytest.raises(TypeError, match=r"image must be uint8\[H,W,3\]"): sam.encode(image)
    with pytest.raises(TypeError, match="pixels must be float"): sam.encode_pixels(torch.zeros(1, 3, 99, 256), (9, 9))
    with pytest.raises(TypeError, match="logits must be float"): sam.upscale(torch.zeros(1, 9, 9), sam.encode(picture()))
    other = BUILD["sam" if sam.family == "sam2" else "sam2"]()
    with pytest.raises(ValueError, match="is not of this"): sam.decode(other.encode(picture()), [[[1., 2.]]], [[1]])

def test_nan_logits_are_an_error():
    sam = BUILD["sam2"]()
    sam.parts.iou_head.layers[-1].bias.data[1] = float("nan")
    with pytest.raises(ValueError, match="NaN"): sam.decode(sam.encode(picture()), [[[1., 2.]]], [[1]])

def test_fallback_of_empty_masks_and_ties():
    flat = TokenMasks(torch.full((1, 4, 8, 8), -9.), torch.tensor([[.1, .5, .5, .2]]), fallback=(.05, .98))
    assert flat.stability.tolist() == [[1.] * 4] and flat.single.ious.item() == pytest.approx(.1)

# ---------------------------------------------------------------- files

def test_upstream_file_folder_and_name(tmp_path):
    sam = BUILD["sam2"]()
    memory = {"memory_attention.layers.0.norm1.weight": torch.ones(2), "maskmem_tpos_enc": torch.ones(1), "no_obj_embed_spatial": torch.ones(1), "obj_ptr_tpos_proj.weight": torch.ones(1)}
    torch.save({"model": sam.state_dict() | memory}, tmp_path / "sam2_hiera_large.pt")
    e = sam.encode(picture())
    for source in (tmp_path / "sam2_hiera_large.pt", tmp_path, str(tmp_path)):
        assert gap(load_sam2(source, TINY2).encode(picture()).features, e.features) == 0
    with pytest.raises(CheckpointError, match="wrong shape"): load_sam2(tmp_path) # the name says Hiera-L
    torch.save({"model": sam.state_dict() | {"surprise": torch.ones(1)}}, tmp_path / "sam2_hiera_large.pt")
    with pytest.raises(CheckpointError, match="1 unexpected: surprise"): load_sam2(tmp_path, TINY2)

def test_hub_id_names_file_and_size(monkeypatch, tmp_path):
    asked = {}
    def fake(name, patterns=None, revision=None): asked.update(name=name, patterns=patterns); return tmp_path
    monkeypatch.setattr("rea2seg.sam.resolve", fake)
    torch.save({"model": BUILD["sam2"]().state_dict()}, tmp_path / "sam2_hiera_tiny.pt")
    monkeypatch.setitem(SAM2_SIZES, "hiera_t", TINY2) # what the file's name selects
    assert load_sam2("facebook/sam2-hiera-tiny").side == 256
    assert asked["name"] == "facebook/sam2-hiera-tiny" and "*.pt" in asked["patterns"] and not any(p.endswith((".py", "*")) for p in asked["patterns"])

def test_sam1_takes_transformers_names(tmp_path):
    sam = BUILD["sam"]()
    save_file({k: v.clone() for k, v in sam.model.state_dict().items()}, tmp_path / "model.safetensors")
    for dtype in (torch.float32, torch.bfloat16):
        again = load_sam1(tmp_path, TINY1, dtype=dtype)
        assert again.dtype == dtype and again.parts.gaussian.dtype == torch.float32 and not any(p.is_meta for p in again.parameters())
    assert gap(load_sam1(tmp_path, TINY1).encode(picture()).features, sam.encode(picture()).features) == 0

def test_two_sams_in_one_checkpoint_are_refused():
    state = {f"{p}{k}": v for p in ("a.", "b.") for k, v in BUILD["sam2"]().state_dict().items()}
    with pytest.raises(CheckpointError, match="more than one SAM"): load_sam2(state, TINY2)

@pytest.mark.parametrize("name", SAM2_SIZES)
def test_released_sizes_equal_the_packages(name, monkeypatch):
    "Key names and shapes of the sam2 package's own image encoders."
    for kind in (torch.nn.Linear, torch.nn.Conv2d): monkeypatch.setattr(kind, "reset_parameters", lambda self: None)
    from hydra import compose
    from hydra.utils import instantiate
    import sam2.build_sam # noqa: F401, registers the configs
    cfg = compose(config_name=f"configs/sam2.1/sam2.1_{name}.yaml").model.image_encoder
    theirs = instantiate(cfg, _recursive_=True)
    ours = Sam2(name).image_encoder
    assert {k: v.shape for k, v in theirs.state_dict().items()} == {k: v.shape for k, v in ours.state_dict().items()}
    assert [b.window_size for b in theirs.trunk.blocks] == [b.window_size for b in ours.trunk.blocks]
    assert [b.attn.num_heads for b in theirs.trunk.blocks] == [b.attn.num_heads for b in ours.trunk.blocks]
    assert (theirs.neck.fpn_top_down_levels, theirs.neck.fpn_interp_model, theirs.scalp) == (ours.neck.fpn_top_down_levels, ours.neck.fpn_interp_model, ours.scalp)

def test_random_weights_are_reproducible_and_leave_the_global_state():
    torch.manual_seed(1); a = torch.rand(1)
    torch.manual_seed(1); sam = BUILD["sam2"](); assert torch.rand(1) == a
    assert all(torch.equal(x, y) for x, y in zip(sam.state_dict().values(), BUILD["sam2"]().state_dict().values()))

@kinds
def test_random_weights_leave_nothing_uninitialised(kind):
    sam = BUILD[kind]()
    for name, m in sam.named_modules():
        if "norm" in type(m).__name__.lower(): assert (m.weight == 1).all() and (m.bias == 0).all(), name
    assert all(torch.isfinite(p).all() and p.abs().max() < 50 for p in sam.parameters())
