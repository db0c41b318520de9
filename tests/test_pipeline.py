"From a picture and a question to ranked masks: both families, the embedded stack, records that come back from disk."
import io
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco

import rea2seg
from rea2seg.data.sources import load_samples
from rea2seg.evaluator import load_evaluator
from rea2seg.generators import load_generator
from rea2seg.images import load_image
from rea2seg.pictures import show
from rea2seg.pipeline import Rea2Seg, Segmentation, pick_device
from rea2seg.settings import Settings
from stacks import FOLDERS, LAYERS, OPEN, QUESTIONS, picture

PARITY = Path(__file__).resolve().parents[2] / "shared" / "parity"
SHORT = dict(evaluator="attention", max_new_tokens=4)

@pytest.fixture(scope="module", autouse=True)
def one_thread():
    "The models here are tiny: a second thread only waits."
    before = torch.get_num_threads(); torch.set_num_threads(1); yield; torch.set_num_threads(before)

@pytest.fixture(scope="module")
def folders(tmp_path_factory): return {family: make(tmp_path_factory.mktemp(family) / "model") for family, make in FOLDERS.items()}

def load(folder, **changes): return Rea2Seg.from_profile("tiny", device="cpu", generator=folder, **SHORT | LAYERS | OPEN | changes)

@pytest.fixture(scope="module")
def tiny(): return Rea2Seg.from_profile("tiny", device="cpu", evaluator="attention")

@pytest.fixture(scope="module", params=["lens", "lisa", "tiny"])
def model(request, folders, tiny): return tiny if request.param == "tiny" else load(folders[request.param])

def equal(a: Segmentation, b: Segmentation):
    assert torch.equal(a.candidates.masks, b.candidates.masks) and a.candidates.sources == b.candidates.sources and a.notes == b.notes
    assert torch.allclose(a.candidates.scores, b.candidates.scores, atol=1e-5) and torch.equal(a.seeds.points_xy, b.seeds.points_xy)

def checked(result: Segmentation, H: int, W: int, settings: Settings):
    "What holds for every result."
    c = result.candidates
    assert result.image.shape == (H, W, 3) and c.masks.shape == (len(c), H, W) and c.masks.dtype == torch.bool and 1 <= len(c) <= settings.max_candidates
    assert result.mask.shape == result.initial.shape == (H, W) and result.mask.dtype == result.initial.dtype == bool
    assert np.array_equal(result.mask, c.masks[0].numpy()) and result.score == float(c.scores[0])
    assert (c.scores[:-1] >= c.scores[1:]).all() and torch.isfinite(c.scores).all()
    for source, most in (("multimask", settings.multimask_candidates), ("kcore", settings.kcore_candidates), ("amg", settings.amg_candidates), ("initial", 1)):
        assert c.sources.count(source) <= most
    boxes, points = result.grounding.token_boxes_xyxy, result.seeds.points_xy
    assert (boxes >= -1e-3).all() and (boxes[:, [0, 2]] <= W + 1e-3).all() and (boxes[:, [1, 3]] <= H + 1e-3).all()
    assert len(points) <= settings.seed_points and (points >= 0).all() and (points < torch.tensor([W, H])).all() and len(points.unique(dim=0)) == len(points)
    seen = c.points_xy[~c.points_xy.isnan().any(1)]
    assert len(seen) == c.sources.count("amg") and all((points == p).all(1).any() for p in seen)
    assert result.notes == tuple(dict.fromkeys(result.notes))

# ---- the whole path -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("shape", [(48, 80), (90, 50), (1, 1), (7, 3000), (3000, 7), (33, 1)])
def test_pictures_of_any_shape(model, shape):
    if model.generator.family == "lisa" and max(shape) > 200 * min(shape):
        with pytest.raises(ValueError, match=f"{shape[1]}x{shape[0]} pixels is too long for the CLIP tower"): model.segment(picture(*shape), QUESTIONS[0])
        shape = tuple(min(s, 1000) for s in shape)
    result = model.segment(picture(*shape), QUESTIONS[0])
    checked(result, *shape, model.settings)
    if min(shape) > 10: assert {"multimask", "kcore"} <= set(result.candidates.sources) or result.notes

def test_many_questions_are_single_ones(model):
    image = picture(60, 100)
    questions = QUESTIONS[:2] if model.generator.sam.side > 64 else QUESTIONS # the embedded model takes half a second for each
    many = list(model.segment_many(image, questions))
    assert [r.question for r in many] == questions
    for question, one in zip(questions, many, strict=True):
        alone = model.segment(image, question)
        equal(one, alone)
        assert torch.allclose(one.grounding.logits, alone.grounding.logits, atol=1e-3) and torch.allclose(one.grounding.attention, alone.grounding.attention, atol=1e-5)
    assert not torch.equal(many[0].grounding.logits, many[1].grounding.logits) # the question matters

def towers(model) -> list[tuple[str, object, str]]:
    g = model.generator
    return [("sam", g.sam, "features"), ("vision", g.tower.clip, "forward") if g.family == "lisa" else ("vision", g.model.visual, "forward")]

def test_every_model_sees_the_picture_once(model, monkeypatch):
    calls = []
    for name, owner, method in towers(model):
        def counted(*a, _real=getattr(owner, method), _name=name, **k): calls.append(_name); return _real(*a, **k)
        monkeypatch.setattr(owner, method, counted)
    assert len(list(model.segment_many(picture(), QUESTIONS))) == 3
    assert sorted(calls) == ["sam", "vision"]

def test_same_seed_same_masks(folders):
    for folder in folders.values():
        first, second = (load(folder).segment(picture(), QUESTIONS[0]) for _ in range(2))
        equal(first, second); assert json.dumps(first.to_dict()) == json.dumps(second.to_dict())
        other = load(folder, seed=7).segment(picture(), QUESTIONS[0])
        assert not torch.equal(other.seeds.points_xy, first.seeds.points_xy) and torch.equal(other.grounding.logits, first.grounding.logits)

def test_global_randomness_is_neither_used_nor_changed(tiny):
    import random
    state = lambda: (torch.random.get_rng_state().tolist(), random.getstate(), repr(np.random.get_state())) # noqa: NPY002
    before = state()
    first = tiny.segment(picture(), QUESTIONS[0])
    assert state() == before
    torch.manual_seed(3)
    equal(first, tiny.segment(picture(), QUESTIONS[0]))

def test_rotated_and_encoded_pictures(model, tmp_path):
    "An EXIF-rotated file gives the masks of the picture as a person sees it."
    upright = picture(50, 80)
    exif = Image.Exif(); exif[0x0112] = 6 # lies on its side
    path = tmp_path / "phone.png"; Image.fromarray(np.ascontiguousarray(np.rot90(upright))).save(path, exif=exif)
    expected = model.segment(upright, QUESTIONS[0])
    for source in (path, str(path), path.read_bytes(), Image.open(path))[:1 if model.generator.sam.side > 64 else 4]: equal(model.segment(source, QUESTIONS[0]), expected)
    assert model.segment(path, QUESTIONS[0]).mask.shape == (50, 80)

@pytest.mark.parametrize("size", [(256, 256), (190, 330)])
def test_masks_lie_on_what_was_asked_for(tiny, size):
    "The embedded stack on rendered scenes: some candidate is the answer, in the pixels of a picture that is no square."
    found, turned = [], []
    for sample in load_samples("sgdr-world", limit=4, seed=None, cache=False):
        put = lambda a, how: cv2.resize(a, size[::-1], interpolation=how)
        image, truth = put(sample.load_image(), cv2.INTER_AREA), torch.from_numpy(put(sample.load_mask().astype(np.uint8), cv2.INTER_NEAREST) > 0)
        c = tiny.segment(image, sample.question).candidates
        found.append(float(c.ious(truth).max())); turned.append(float(c.ious(truth.flip(1)).max()))
    assert np.mean(found) > .55 and np.mean(turned) < np.mean(found) - .2, (found, turned)

def test_caller_keeps_torchs_modes(tiny):
    "Nothing stays switched while the caller works between two results, and results can take part in training."
    for result in tiny.segment_many(picture(), QUESTIONS[:2]):
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled() and len(result.candidates)
    weight = torch.ones(1, requires_grad=True)
    (result.grounding.logits * weight).mean().backward()
    assert weight.grad is not None and not any(p.requires_grad for p in tiny.generator.sam.parameters())

def test_nothing_is_asked(tiny):
    assert list(tiny.segment_many(picture(), [])) == []
    with pytest.raises(TypeError, match="list of texts"): tiny.segment_many(picture(), "the red cube")

def test_stages_one_by_one_are_segment(tiny):
    image = picture(60, 100)
    grounding = tiny.ground(image, QUESTIONS[0])
    found = tiny.discover(image, grounding)
    ranked = tiny.rank(image, QUESTIONS[0], found, grounding)
    whole = tiny.segment(image, QUESTIONS[0])
    assert torch.equal(ranked.masks, whole.candidates.masks) and ranked.notes == whole.candidates.notes
    again = tiny.ground(image, QUESTIONS[0], embedding=grounding.embedding)
    assert torch.equal(again.logits, grounding.logits)
    with pytest.raises(ValueError, match=r"belongs to a picture of \(60, 100\) pixels, this one has \(48, 80\)"): tiny.discover(picture(), grounding)

def test_prior_weighs_the_initial_mask(tiny):
    image = picture(60, 100)
    g = tiny.ground(image, QUESTIONS[0]); found = tiny.discover(image, g)
    model = Rea2Seg(tiny.generator, tiny.evaluator, tiny.settings.with_(prior=1000.0))
    ranked = model.rank(image, QUESTIONS[0], found, g)
    assert float(ranked.ious(g.initial)[0]) == float(found.ious(g.initial).max())

def test_several_masks_of_one_answer(folders, monkeypatch):
    "LISA may write [SEG] twice: the candidates are the first one's, and the result says so."
    model = load(folders["lisa"]); g = model.generator
    said = g.tokens.encode(g.tokens.parse("a [SEG] b [SEG]", ("[SEG]",)), bos=False)
    monkeypatch.setattr(g, "_write", lambda tail, cache, most: (said, True))
    whole, result = g.ground(picture(), QUESTIONS[0]), model.segment(picture(), QUESTIONS[0])
    assert whole.n == 2 and result.grounding.n == 1 and torch.equal(result.grounding.logits, whole.logits[0])
    assert any("gave 2 masks" in n for n in result.notes)

# ---- the recorded checkpoints -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["lens-tiny-a", "lisa-tiny-a", "sesame-tiny-a"])
def test_recorded_checkpoints_through_the_whole_path(name):
    folder = PARITY / name
    if not folder.is_dir(): pytest.skip(f"{folder} is not on this machine")
    meta = json.loads((folder / "meta.json").read_text())
    gen = load_generator(folder, sam_config=meta["sam2_tiny_trunk" if "lens" in name else "sam_vit"])
    image = load_image(folder / "image.png")
    layers = getattr(gen.model.config, "text_config", gen.model.config).num_hidden_layers
    s = Settings.load("tiny", first_layer=layers - 1, last_layer=layers - 1, max_new_tokens=2, seed_points=6, **OPEN)
    result = Rea2Seg(gen, load_evaluator("predicted_iou", s), s).segment(image, "the thing")
    checked(result, *image.shape[:2], s)
    probe = gen.ground(image, "the thing", max_new_tokens=2, embedding=result.grounding.embedding)
    assert probe.attention_layers.shape[-2] == layers and torch.allclose(result.grounding.attention.flatten(), probe.attention_layers[-1])
    assert torch.equal(result.grounding.logits, probe.logits)

# ---- what is kept -----------------------------------------------------------------------------------------------------------

def test_saved_results_come_back(model, tmp_path):
    result = model.segment(picture(70, 110), QUESTIONS[1])
    folder = result.save(tmp_path / "deep" / "er")
    assert sorted(p.name for p in folder.iterdir()) == ["mask.png", "picture.png", "segmentation.json", "sheet.png"]
    kept = json.loads((folder / "segmentation.json").read_text())
    decoded = np.stack([coco.decode(c["segmentation"]) for c in kept["candidates"]]).astype(bool)
    c = result.candidates
    np.testing.assert_array_equal(decoded, c.masks.numpy())
    np.testing.assert_array_equal(coco.decode(kept["mask"]), result.mask); np.testing.assert_array_equal(coco.decode(kept["initial"]), result.initial)
    np.testing.assert_array_equal(np.asarray(Image.open(folder / "mask.png")), result.mask)
    scores = [m["score"] for m in kept["candidates"]]
    assert scores == sorted(scores, reverse=True) == c.scores.tolist() and kept["score"] == scores[0] and kept["question"] == QUESTIONS[1]
    assert [m["source"] for m in kept["candidates"]] == list(c.sources) and [m["area"] for m in kept["candidates"]] == decoded.sum((1, 2)).tolist()
    assert kept["image"] == {"height": 70, "width": 110} and kept["notes"] == list(result.notes) and kept["settings"] == model.settings.to_dict()
    for m, mask in zip(kept["candidates"], decoded, strict=True):
        if not mask.any(): continue
        (y, x), (bx, by, bw, bh) = mask.nonzero(), m["bbox"]
        assert (bx, by, bx + bw, by + bh) == (x.min(), y.min(), x.max(), y.max())
    for name in ("picture.png", "sheet.png"): assert min(load_image(folder / name).shape[:2]) > 100

def test_saving_again_replaces(model, tmp_path):
    first, second = model.segment_many(picture(), QUESTIONS[:2])
    (tmp_path / "note.txt").write_text("mine")
    first.save(tmp_path); second.save(tmp_path)
    assert json.loads((tmp_path / "segmentation.json").read_text())["question"] == QUESTIONS[1]
    assert (tmp_path / "note.txt").read_text() == "mine" and len(list(tmp_path.iterdir())) == 5

@pytest.mark.parametrize("question", ["$x_1$ and $", "<b>bold</b> & \\alpha", "图中的红色立方体在哪里？", "a " * 200, "{question} %s\nnext line"])
def test_any_text_is_drawn(tiny, question, tmp_path):
    result = tiny.segment(picture(), "the red cube")
    for figure in (show(result.image, result.mask, question), Segmentation(result.image, question, result.grounding, result.seeds, result.candidates).sheet()):
        out = io.BytesIO()
        import warnings
        with warnings.catch_warnings(): # the font has no Chinese; boxes are drawn instead
            warnings.simplefilter("ignore"); figure.savefig(out, format="png", dpi=40)
        assert Image.open(out).size[0] > 50

def test_pictures_show_the_mask(tiny):
    result = tiny.segment(picture(), "the red cube")
    def pixels(mask):
        out = io.BytesIO(); show(result.image, mask).savefig(out, format="png", dpi=60); return load_image(out.getvalue())
    empty, full = pixels(np.zeros((48, 80), bool)), pixels(np.ones((48, 80), bool))
    assert empty.shape == full.shape and (empty != full).any(-1).mean() > .2
    with pytest.raises(ValueError, match=r"bool\[48,80\] like the image, got \[80, 48\]"): show(result.image, result.mask.T)
    assert result.sheet(truth=result.mask).get_size_inches()[0] > 5

def test_a_segmentation_has_ranked_candidates(tiny):
    result = tiny.segment(picture(), "the red cube")
    found = tiny.discover(result.image, result.grounding)
    with pytest.raises(ValueError, match="ranked"): Segmentation(result.image, "q", result.grounding, result.seeds, found)
    with pytest.raises(ValueError, match="empty"): Segmentation(result.image, "q", result.grounding, result.seeds, result.candidates[:0])

# ---- loading ------------------------------------------------------------------------------------------------------------------

def test_public_names():
    assert rea2seg.Rea2Seg is Rea2Seg and rea2seg.Settings is Settings and callable(rea2seg.show)
    with pytest.raises(AttributeError, match="no attribute 'Segment'"): rea2seg.Segment # noqa: B018

def test_devices_by_name(monkeypatch):
    assert pick_device("cpu") == "cpu"
    for name in ("gpu", "cuda:x", ""):
        if name: pytest.raises(ValueError, pick_device, name).match("no device is called")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device() == pick_device("") == "cpu"
    with pytest.raises(ValueError, match="sees no CUDA device"): pick_device("cuda:1")
    with pytest.raises(ValueError, match="never tried on"): pick_device("meta")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True); monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device() == "cuda" and pick_device("cuda:1") == "cuda:1"
    with pytest.raises(ValueError, match="this machine has 2"): pick_device("cuda:2")

@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_half_precision(folders, dtype):
    for family, folder in folders.items():
        model = Rea2Seg.from_profile("tiny", "cpu", dtype, folder, **SHORT | LAYERS | OPEN)
        assert model.generator.model.dtype == torch.bfloat16, family
        result = model.segment(picture(), QUESTIONS[0])
        checked(result, 48, 80, model.settings); assert result.grounding.logits.dtype == torch.float32
