"The embedded evaluator's own training: it reads what scoring reads, looks through masks, and its scores fall into place."
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from rea2seg.checkpoints import CheckpointError, resolve
from rea2seg.data.sources import load_samples
from rea2seg.demo import demo_sample
from rea2seg.evaluator import load_evaluator
from rea2seg.evaluator_internvl import InternvlEvaluator, Rows
from rea2seg.eyes import Eyes, EyesConfig, mask_figures
from rea2seg.generators import load_generator
from rea2seg.internvl import load_internvl, new_internvl, save_evaluator
from rea2seg.lens_files import save_generator
from rea2seg.mined import read_mined
from rea2seg.mining import mine
from rea2seg.settings import Settings, load_section
from rea2seg.train.evaluator import builder_of
from rea2seg.train.evaluator_tiny import EvaluatorShape, LookBatches, Reason, Scoring, batch_of, evaluator_from, overlaps, reasons_of
from rea2seg.train.generator import patchify
from rea2seg.train.loop import fit
from rea2seg.train.looks import LookTrainee, LookTraining, look_losses, rank_loss, soft_digits
from rea2seg.train.pack import Pack, build_pack

PROFILE = dict(evaluator_kind="internvl", prompt="bare", question_place="before", mask_view="binary", chain_of_thought=False, max_reasoning_tokens=6, scoring="expected", group_size=1, consensus=0.0)
TEXTS = ["the cube", "Which sphere is the largest one?", "Segment the table."]


@pytest.fixture(scope="module")
def pack_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pack")
    build_pack(folder, 2, ("clevr", "multistep"), "val", 7, 0, 8, workers=0, progress=False)
    return folder


@pytest.fixture(scope="module")
def pack(pack_folder): return Pack.load(pack_folder)


@pytest.fixture(scope="module")
def generator(): return load_generator("embedded:generator", layers=Settings.load("tiny").layers)


@pytest.fixture(scope="module")
def mined_folder(generator, pack_folder, tmp_path_factory):
    folder, spec = tmp_path_factory.mktemp("mined"), f"pack:{pack_folder}"
    mine(generator, Settings.load("tiny", seed_points=6), load_samples(spec, per_image=2), folder, 2, progress=False, data=dict(spec=spec, split=None, limit=None, seed=0, options=dict(per_image=2)))
    return folder


@pytest.fixture(scope="module")
def mined(mined_folder): return read_mined(mined_folder)


@pytest.fixture
def loaded(generator): return evaluator_from(generator)


@pytest.fixture
def moved(loaded):
    "Weights with which everything that can be looked at counts."
    g, eyes = torch.Generator().manual_seed(3), loaded.model.model.vision_tower
    with torch.no_grad():
        for p, std in ((eyes.look, 0.3), (eyes.outline.weight, 0.05), (eyes.figure.weight, 0.1)): p += std * torch.randn(p.shape, generator=g)
        loaded.model.lm_head.weight += 0.02 * torch.randn(loaded.model.lm_head.weight.shape, generator=g)
    return loaded


FEW = dict(masks=4, questions=2, batch_size=2, precision="no", steps=8, warmup_steps=1, log_every=1)
def settings(**changes): return load_section(LookTraining, "tiny.evaluator", **FEW | changes)
def trainee_of(loaded, **changes): return LookTrainee(loaded, settings(**changes), Settings.load("tiny", **PROFILE))


def builder_tiny(loaded): return InternvlEvaluator(loaded, Settings.load("tiny", **PROFILE)).builder


def some_masks():
    masks = torch.zeros(4, 256, 256, dtype=torch.bool)
    masks[0, 30:90, 40:100] = True; masks[1, 100:240, 20:250] = True; masks[2, 10:20, 10:20] = True; masks[3, :, :128] = True
    return masks


def test_it_begins_as_the_generator(generator, loaded):
    lm, own = loaded.model.model.language_model, generator.model
    for ours, theirs in zip(lm.layers, own.model.layers): assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values()))
    text = "Which cyan dumbbell is the farthest from the cube?"
    assert loaded.tokenizer.encode(text, add_special_tokens=False) == generator.tokenizer.plain.encode(text, add_special_tokens=False).ids
    x = torch.randn(1, 9, 256)
    theirs = own.model(inputs_embeds=x, position_ids=torch.arange(9).expand(3, 1, 9), use_cache=False).last_hidden_state
    ours = lm(inputs_embeds=x, use_cache=False).last_hidden_state
    assert torch.allclose(ours, theirs, atol=1e-4)  # plain positions: the same rope
    more = evaluator_from(generator, EvaluatorShape(13, 6, 8192, 0.03)).model.model.language_model
    assert len(more.layers) == 13 and torch.allclose(more(inputs_embeds=x, use_cache=False).last_hidden_state, theirs, atol=1e-4)  # the layers behind are silent


def test_a_place_is_read_as_image_tokens_tell_theirs(loaded):
    eyes, words, head = loaded.model.model.vision_tower, loaded.model.get_input_embeddings().weight, loaded.model.lm_head.weight
    ids = loaded.tokenizer.convert_tokens_to_ids(["<r0c0>", "<r0c15>", "<r15c0>", "<r15c15>"])
    assert len(loaded.tokenizer) == len(words) == len(head) and ids[3] - ids[0] == 255
    shifted = (eyes.position - eyes.position.mean(0))[[0, 15, 240, 255]]
    assert torch.nn.functional.cosine_similarity(words[ids], shifted).min() > 0.999 and torch.allclose(head, 0.03 * words)
    builder = builder_tiny(loaded)
    assert builder.encoder.thought(" so cube<r0c15>")[-2:] == [ids[1], builder.encoder.ids["<|im_end|>"]] and builder.encoder.places_in("<r0c0> <r99c0> <r15c15>") == ["<r0c0>", "<r15c15>"]
    assert not set(builder.opening("the cube at <r0c0>", 1)) & set(ids)  # nobody who asks can write a place


def test_it_sees_as_the_generator(generator, loaded, pack):
    image = torch.as_tensor(pack.image[:2])
    theirs = generator.model.image_tokens(*patchify(image, 16, 1, 1)).unflatten(0, (2, -1))
    pixels = torch.cat([trainee_of(loaded).builder.photo(i.numpy()) for i in image])
    with torch.no_grad():
        assert torch.allclose(loaded.model.model.vision_tower(pixel_values=pixels).last_hidden_state[:, 1:], theirs, atol=1e-4)
        projected = loaded.model.get_image_features(pixel_values=pixels, return_dict=True).pooler_output
    assert ((projected - theirs) ** 2).mean() < 0.1 * theirs.var()  # the norm inside the projector is all that differs


def test_another_shape_is_refused(generator):
    for told, layers in ((6, 5), (6, 21), (0, 10)):
        with pytest.raises(ValueError, match=f"1 <= told_layers <= text_layers <= 20 .*got told_layers {told}, text_layers {layers}"): evaluator_from(generator, EvaluatorShape(layers, told, 8192, 0.03))
    with pytest.raises(ValueError, match="opens with"): evaluator_from(generator, prompt="full")


def test_a_smaller_one_has_the_first_layers(generator, pack, tmp_path):
    small = evaluator_from(generator, EvaluatorShape(6, 4, 8192, 0.03))
    layers = small.model.model.language_model.layers
    assert len(layers) == 6 and all(torch.equal(a.mlp.up_proj.weight, b.mlp.up_proj.weight) for a, b in zip(layers, generator.model.model.layers, strict=False))
    shutil.copytree(resolve("embedded:generator"), tmp_path / "generator")
    save_evaluator(small, tmp_path / "evaluator", torch.bfloat16, shares="../generator")
    assert json.loads((tmp_path / "evaluator" / "rea2seg.json").read_text())["shares"][0]["names"] == {p: p for p in [*(f"model.language_model.layers.{k}." for k in range(6)), "model.vision_tower.tower."]}
    got = InternvlEvaluator(load_internvl(tmp_path / "evaluator"), Settings.load("tiny", **PROFILE)).score(pack.image[0].numpy(), "the cube", some_masks())
    assert len(got.ious) == len(some_masks()) and got.ious.isfinite().all()


@pytest.mark.parametrize(("change", "message"), [(dict(fullatt_block_indexes=[0]), "over the whole picture in every block"), (dict(spatial_merge_size=2), "one token a patch")])
def test_eyes_of_another_kind_are_refused(loaded, change, message):
    config = loaded.model.config.vision_config
    with pytest.raises(ValueError, match=message): Eyes(EyesConfig(hidden_size=256, image_size=[256, 256], patch_size=[16, 16], tower=config.tower | change))


def test_training_reads_what_scoring_reads(loaded, pack):
    trainee = trainee_of(loaded)
    whole = trainee.builder.group_inputs(pack.image[0].numpy(), "the cube", some_masks()[:1], [0.37]).input_ids.tolist()
    ids = [*trainee.prefix, *trainee.cut("the cube")[1], *trainee.mask_ids]
    assert whole[:len(ids)] == ids and len(whole) == len(ids) + 3  # two digits and the end


def test_what_stands_side_by_side_does_not_see_each_other(moved):
    trainee = trainee_of(moved, attention_first=4, attention_last=9).eval()
    photo, covered, figures = 3 * torch.randn(1, 256, 256), trainee.eyes.coverage(some_masks()), mask_figures(some_masks())
    with torch.no_grad():
        together = trainee.scores(photo, [TEXTS], covered.expand(1, 3, 4, 256), figures.expand(1, 3, 4, 9))
        alone = [trainee.scores(photo, [[t]], c.expand(1, 1, 1, 256), f.expand(1, 1, 1, 9)) for t in TEXTS for c, f in zip(covered, figures, strict=True)]
    assert together["tenths"].std(2).min() > 1e-4  # masks make a difference
    for k in ("tenths", "expected"): assert torch.allclose(together[k].flatten(0, 2), torch.cat([a[k].flatten(0, 2) for a in alone]), atol=2e-4), k
    assert torch.allclose(together["cover"].flatten(1, 3), torch.cat([a["cover"].flatten(1, 3) for a in alone], 1), atol=2e-4)
    rows = together["attention"]
    assert torch.allclose(rows.flatten(1, 3), torch.cat([a["attention"].flatten(1, 3) for a in alone], 1), atol=1e-5)
    assert rows.shape == (6, 1, 3, 4, 4, 256) and float(rows.sum(-1).max()) <= 1 + 1e-5
    inside, outside = ((rows[..., k, :] * (covered == c)).sum(-1) for k, c in ((0, 0), (1, 1)))
    assert float(inside.max()) < 0.05 and float(outside.max()) < 0.05  # one sees nothing outside of the mask, the other nothing inside


def test_scoring_has_the_logits_of_training(moved, pack):
    trainee, image, masks = trainee_of(moved).eval(), pack.image[0].numpy(), some_masks()
    evaluator = InternvlEvaluator(moved, Settings.load("tiny", **PROFILE))
    enc = evaluator.builder.encoder
    with torch.no_grad():
        found = trainee.scores(trainee.see(pack.image[:1], [0]), [TEXTS], trainee.eyes.coverage(masks).expand(1, 3, 4, 256), mask_figures(masks).expand(1, 3, 4, 9))
        photo, shown = evaluator._features(image, masks)
        for k, text in enumerate(TEXTS):
            ids, rows = evaluator.builder.opening(text, 1), Rows(moved.model)
            rows.photo = torch.tensor([i for i, t in enumerate(ids) if t == enc.ids["<IMG_CONTEXT>"]])
            rows.feed([evaluator._embed(ids, [(photo.bfloat16().float(), None)])[0]])  # training keeps what it saw in half precision
            rows = rows.spread(len(masks))
            rows.feed(*zip(*[evaluator._embed(trainee.mask_ids, [m]) for m in shown]))
            assert torch.allclose(rows.logits[:, trainee.digits], found["tenths"][0, k], atol=2e-4)


def test_scoring_behind_reasoning_has_the_logits_of_training(moved, pack, monkeypatch):
    trainee, image, masks, text = trainee_of(moved).eval(), pack.image[0].numpy(), some_masks(), " red cube<r3c4> so left object<r5c6>"
    def written(rows, encoder, stop, limit, active): rows.write([encoder.thought(text)[:-1]] * len(active)); return [text] * len(active)
    monkeypatch.setattr("rea2seg.evaluator_internvl.write_freely", written)
    thinks = Settings.load("tiny", **PROFILE | dict(chain_of_thought=True))
    ev = InternvlEvaluator(moved, thinks)
    reason = ev.builder.encoder.thought(text)
    with torch.no_grad():
        behind, without = (trainee.scores(trainee.see(pack.image[:1], [0]), [TEXTS], trainee.eyes.coverage(masks).expand(1, 3, 4, 256), mask_figures(masks).expand(1, 3, 4, 9), reasons) for reasons in ([[reason] * 3], None))
    assert not torch.allclose(behind["expected"], without["expected"], atol=1e-3)
    for k, question in enumerate(TEXTS):
        got, one = ev.score(image, question, masks), behind["units"][0, k].softmax(-1)[:, 1]
        assert set(got.reasoning) == {text.strip()} and all(r.startswith(text.strip() + "\n=") for r in got.raw)
        assert torch.allclose(got.ious, (1 - one) * behind["expected"][0, k] + one, atol=0.02)  # tenths against the whole distribution of digits
    again = InternvlEvaluator(moved, thinks, share=False).score(image, TEXTS[0], masks)
    assert torch.allclose(again.ious, ev.score(image, TEXTS[0], masks).ious, atol=1e-4) and again.reasoning == (text.strip(),) * 4


def test_reasoning_needs_room(moved, pack):
    with pytest.raises(ValueError, match="picture, question and reasoning take up to .* tokens, the model 8192"):
        InternvlEvaluator(moved, Settings.load("tiny", **PROFILE | dict(chain_of_thought=True, max_reasoning_tokens=9000))).score(pack.image[0].numpy(), "the cube", some_masks())
    with pytest.raises(ValueError, match="chain_of_thought is off"): InternvlEvaluator(moved, Settings.load("tiny", **PROFILE)).think(pack.image[0].numpy(), TEXTS)


@pytest.mark.parametrize("size", [1, 3])
def test_shared_or_from_the_start_masks_score_the_same(moved, pack, size):
    a, b = (InternvlEvaluator(moved, Settings.load("tiny", **PROFILE | dict(group_size=size)), share=share).score(pack.image[0].numpy(), "the cube", some_masks()) for share in (True, False))
    assert torch.allclose(a.ious, b.ious, atol=1e-4) and a.raw == b.raw
    assert a.ious.std() > 1e-4 and a.usage["tokens"] < b.usage["tokens"]


def test_masks_and_pictures_of_any_size(moved):
    image, masks = np.random.default_rng(0).integers(0, 255, (120, 200, 3), dtype=np.uint8), torch.zeros(2, 120, 200, dtype=torch.bool)
    masks[0, :60] = True
    covered = moved.model.model.vision_tower.coverage(masks).view(2, 16, 16)
    assert torch.allclose(covered[0, :8].mean(), torch.tensor(1.0), atol=0.07) and covered[0, 9:].sum() == 0 and covered[1].sum() == 0
    got = InternvlEvaluator(moved, Settings.load("tiny", **PROFILE)).score(image, "it", masks).ious
    assert torch.isfinite(got).all() and len(got) == 2  # an empty mask, too


def test_scores_fall_into_place(loaded, pack, mined, tmp_path):
    trainee = trainee_of(loaded)
    found = Scoring(mined, trainee.settings)
    batch = batch_of(found, found.scenes, [np.random.default_rng(k) for k in range(2)])
    assert batch["covered"].shape == (2, 2, 4, 256) and float(batch["iou"].max()) > 0.6
    for p in (loaded.model.lm_head, loaded.model.get_input_embeddings()): p.requires_grad_(True)   # words learn with the reasoning otherwise
    history = fit(trainee, lambda *_: batch, settings(learning_rate=2e-3, steps=12), tmp_path, cpu=True, progress=False)
    assert history[-1]["loss"] < 0.8 * history[0]["loss"] and history[-1]["digits"] < history[0]["digits"]
    loaded.model.eval()
    save_evaluator(loaded, tmp_path / "evaluator", torch.bfloat16)
    again = load_internvl(tmp_path / "evaluator")
    a, b = (InternvlEvaluator(x, Settings.load("tiny", **PROFILE)).score(pack.image[0].numpy(), "the cube", some_masks()).ious for x in (loaded, again))
    assert again.tokens_per_mask == 2 and torch.allclose(a, b, atol=0.03)  # bfloat16 on disk
    with torch.no_grad():
        found = trainee.eval().scores(trainee.see(pack.image[:1], [0]), [["the cube"]], trainee.eyes.coverage(some_masks()).expand(1, 1, 4, 256), mask_figures(some_masks()).expand(1, 1, 4, 9))
    assert torch.allclose(found["expected"][0, 0], a, atol=0.06)  # tenths against the whole distribution of digits


def test_only_what_reads_masks_learns(loaded):
    trainee = trainee_of(loaded)
    learns = {n.split(".")[-2 if n.endswith("weight") else -1] for n, p in loaded.model.named_parameters() if p.requires_grad}
    assert learns == {"norm", "look", "told", "outline", "figure"}
    (group,) = trainee.groups()
    assert {id(p) for p in group["params"]} == {id(p) for p in trainee.parameters() if p.requires_grad} and group["lr"] == trainee.settings.learning_rate


def test_what_it_reasoned_is_read_again(loaded, mined, tmp_path):
    ev = InternvlEvaluator(loaded, Settings.load("tiny", **PROFILE | dict(chain_of_thought=True)))
    found = reasons_of(ev, mined, tmp_path)
    assert len(found) == len(mined) and all(r.ids[-1] == ev.builder.encoder.ids["<|im_end|>"] for r in found)
    drawn = Scoring(mined, settings(reason_share=1.0), reasons=found).draw(f"{mined.table['folder'][0].as_py()}:{mined.image_id[0]}", np.random.default_rng(0))
    assert all(d["reason"] == found[[mined[i].question for i in range(len(mined))].index(d["question"])].ids for d in drawn)
    (file,) = tmp_path.iterdir()   # a picture's questions together, a file for some pictures
    file.write_text(json.dumps({"0": " so cube"}))  # what is there is kept, what is not is thought again
    again = reasons_of(ev, mined, tmp_path)
    assert again[0] == Reason(ev.builder.encoder.thought(" so cube"), []) and again[1:] == found[1:] and len(list(tmp_path.iterdir())) == 2
    file.write_text(json.dumps({"7": " so cube"}))
    with pytest.raises(ValueError, match="has reasoning about question 7, only 4 were mined"): reasons_of(ev, mined, tmp_path)
    with torch.no_grad(): loaded.model.model.language_model.layers[0].mlp.up_proj.weight += 0.1
    assert len(reasons_of(ev, mined, tmp_path)) == 4 and len(list(tmp_path.iterdir())) == 3  # other weights, other reasoning


def test_questions_whose_reasoning_went_astray_are_left_out(mined):
    "One answer on the target, one two patches off, one three off, one that names no place."
    scene = f"{mined.table['folder'][0].as_py()}:{mined.image_id[0]}"
    of = Scoring(mined, settings()).of[scene]
    def asked(offsets, reach):
        found = Scoring(mined, settings(reason_reach=reach, questions=8), reasons=[Reason([], [])] * len(mined))
        for i, off in zip(of, offsets, strict=True):
            ys, xs = found.candidates(i)["target"].reshape(16, 16).nonzero()
            k = xs.argmax() if xs.max() + 3 < 16 else xs.argmin()
            found.reasons[i] = Reason([], [] if off is None else [int(ys[k] * 16 + xs[k] + (off if xs.max() + 3 < 16 else -off))])
        return {d["question"] for d in found.draw(scene, np.random.default_rng(0))}
    names = [mined[i].question for i in of]
    for offsets, reach, stay in (((0, 3), 2, [0]), ((3, 2), 2, [1]), ((None, 0), 2, [1]), ((2, 3), 3, [0, 1]), ((None, 3), 2, [0, 1])):
        assert asked(offsets, reach) == {names[k] for k in stay}, (offsets, reach)


def test_what_it_reasoned_before_it_was_stopped_is_kept(loaded, mined, tmp_path, monkeypatch):
    ev = InternvlEvaluator(loaded, Settings.load("tiny", **PROFILE | dict(chain_of_thought=True)))
    whole, think, asked = reasons_of(ev, mined, tmp_path / "whole"), ev.think, []
    def stopped(image, questions):
        if asked: raise KeyboardInterrupt
        asked.extend(questions)
        return think(image, questions)
    monkeypatch.setattr(ev, "think", stopped)
    with pytest.raises(KeyboardInterrupt): reasons_of(ev, mined, tmp_path / "cut", every=1)
    assert len(list((tmp_path / "cut").iterdir())) == 1
    later = []
    monkeypatch.setattr(ev, "think", lambda image, questions: (later.extend(questions), think(image, questions))[1])
    assert reasons_of(ev, mined, tmp_path / "cut", every=1) == whole
    assert len(asked) + len(later) == len(mined) and not set(asked) & set(later)


def test_what_is_the_generators_stays_with_it(generator, loaded, pack, tmp_path):
    home = tmp_path / "weights"
    shutil.copytree(resolve("embedded:generator"), home / "generator")
    kept, layers = 7, loaded.model.model.language_model.layers
    with torch.no_grad():
        loaded.model.lm_head.weight[3] += 0.5
        for layer in layers[kept:]: layer.mlp.up_proj.weight += 0.1
    save_evaluator(loaded, home / "evaluator", torch.bfloat16, shares="../generator")
    note = json.loads((home / "evaluator" / "rea2seg.json").read_text())["shares"]
    assert [n["from"] for n in note] == ["../generator"] and list(note[0]["names"]) == sorted([*(f"model.language_model.layers.{k}." for k in range(kept)), "model.vision_tower.tower."])
    whole = save_evaluator(loaded, home / "whole", torch.bfloat16)
    a, b = load_internvl(home / "evaluator"), load_internvl(whole)
    assert all(torch.equal(x, y) for x, y in zip(a.model.state_dict().values(), b.model.state_dict().values(), strict=True))
    size = lambda folder: sum(f.stat().st_size for f in folder.iterdir())
    shared = sum(p.numel() for m in (loaded.model.model.vision_tower.tower, *layers[:kept]) for p in m.parameters())
    assert abs(size(whole) - size(home / "evaluator") - 2 * shared) < 4e4 and size(home / "evaluator") + size(home / "generator") < 45e6

    (whole / "rea2seg.json").write_text(json.dumps({"shares": note}))
    with pytest.raises(CheckpointError, match="yet it has them"): load_internvl(whole)
    other = load_generator(home / "generator")
    with torch.no_grad(): other.model.visual.blocks[0].attn.proj.weight += 0.1
    save_generator(other, home / "generator")
    with pytest.raises(CheckpointError, match="was trained with other weights than those of .*generator"): load_internvl(home / "evaluator")
    for f in (home / "generator").glob("*.safetensors"): f.unlink()
    save_file({"model.norm.weight": torch.ones(4)}, home / "generator" / "model.safetensors")
    with pytest.raises(CheckpointError, match="has neither a vision tower .* nor layers"): load_internvl(home / "evaluator")
    shutil.rmtree(home / "generator")
    with pytest.raises(CheckpointError, match="shares weights with .*generator, which is not there"): load_internvl(home / "evaluator")


def test_an_evaluator_that_kept_nothing_shares_nothing(loaded, tmp_path):
    shutil.copytree(resolve("embedded:generator"), tmp_path / "generator")
    with torch.no_grad():
        for p in loaded.model.parameters(): p += 0.1
    with pytest.raises(CheckpointError, match="nothing in the evaluator is that of"): save_evaluator(loaded, tmp_path / "evaluator", torch.bfloat16, shares="../generator")
    assert not (tmp_path / "evaluator").exists()


def test_the_two_ways_to_see_a_mask_are_not_mixed_up(loaded):
    with pytest.raises(ValueError, match="mask_view must be binary, got 'overlay'"): InternvlEvaluator(loaded, Settings.load("tiny", **PROFILE | dict(mask_view="overlay")))
    with pytest.raises(ValueError, match="together` trains it"): builder_of(loaded, Settings.load("tiny", **PROFILE))
    with pytest.raises(ValueError, match="looks at pictures of masks, not through them"): LookTrainee(new_internvl(), settings(), Settings.load("tiny", **PROFILE))
    with pytest.raises(ValueError, match="must be 5 tokens, prompt 'turns' takes"): LookTrainee(loaded, settings(), Settings.load("tiny", **PROFILE | dict(prompt="turns")))
    with pytest.raises(ValueError, match="must be layers of 4 to 9, got 3 and 8"): trainee_of(loaded, attention_first=3)


def test_figures_say_how_large_and_how_ragged_a_mask_is():
    masks = torch.zeros(4, 20, 40, dtype=torch.bool)
    masks[0, 4:12, 10:30] = True                     # 8 x 20, of whose pixels 52 are at the rim
    masks[1, 4:12:2, 10:30] = True                   # every other row of it: nothing but rim
    masks[2] = True
    found = mask_figures(masks)
    assert found[0].tolist() == pytest.approx([.2, .2 ** .5, 1 + np.log10(.2) / 4, .25, .2, .75, .6, 1, 52 / (4 * 160 ** .5)], abs=1e-5)
    assert found[1].tolist() == pytest.approx([.1, .1 ** .5, .75, .25, .2, .75, .55, 80 / 140, 80 / (4 * 80 ** .5)], abs=1e-5)
    assert found[2, [0, 2, 3, 4, 5, 6, 7]].tolist() == [1, 1, 0, 0, 1, 1, 1] and not found[3].any()


def test_a_pack_of_some_categories(tmp_path):
    build_pack(tmp_path, 1, ("clevr",), "val", 7, 0, 6, workers=0, progress=False, categories=("spatial", "geometric/size"))
    kinds = {(q["c"], q["s"]) for q in Pack.load(tmp_path).questions[0]}
    assert kinds and all(c == "spatial" or (c, s) == ("geometric", "size") for c, s in kinds)
    with pytest.raises(ValueError, match="no category 'nonsense'; there are geometric"): build_pack(tmp_path / "none", 1, ("clevr",), categories=("nonsense",))
    assert not (tmp_path / "none").exists()


def test_scenes_of_one_name_are_not_mixed_up(loaded, mined, pack):
    "Two packs may be called alike: what was seen in one is not taken for what is in the other."
    trainee, (one, two) = trainee_of(loaded), (Scoring(mined, settings()) for _ in range(2))
    scene = one.scenes[0]; two._images[scene] = 255 - one.image(scene)
    seen = [trainee.see(b["image"], b["scene"]) for b in (batch_of(s, [scene], [np.random.default_rng(0)]) for s in (one, two, one))]
    assert torch.equal(seen[0], seen[2]) and not torch.allclose(seen[0], seen[1], atol=0.1)


def test_processes_share_the_scenes(mined):
    batches = LookBatches(Scoring(mined, settings()))
    whole, parts = batches(0, 0, 1), [batches(0, r, 2) for r in (0, 1)]
    assert whole["scene"] == [s for p in parts for s in p["scene"]] and whole["questions"] == [q for p in parts for q in p["questions"]]
    assert torch.equal(whole["iou"], torch.cat([p["iou"] for p in parts]))
    with pytest.raises(ValueError, match="a batch of 2 does not divide among 4"): batches(0, 0, 4)


def test_losses_prefer_the_truth():
    assert soft_digits(torch.tensor([0.39]), 0.06)[0, [3, 4]].min() > 0.4 # nearly 0.4
    ious = torch.tensor([0.9, 0.4, 0.0])
    assert rank_loss(ious, ious, 10.0) < rank_loss(torch.full((3,), 0.5), ious, 10.0) < rank_loss(1 - ious, ious, 10.0)
    a = torch.zeros(2, 4, 4, dtype=torch.bool); a[0, :2] = True; a[1, 1:3] = True
    iou, cover = overlaps(a[:1], a)
    assert torch.allclose(iou[0], torch.tensor([1.0, 1 / 3])) and torch.allclose(cover[0, 1], torch.tensor([0.5, 0.5]))


def test_attention_losses_pull_where_the_target_is(loaded):
    "By hand: of the masks only those count that have the target inside, or some of it outside."
    s, T = settings(attention_spread=0.0), 6
    true = {"iou": torch.tensor([[[0.5, 0.0]]]), "recall": torch.tensor([[[0.5, 0.0]]]), "precision": torch.tensor([[[1.0, 0.0]]]), "target": torch.tensor([[[True, True, False, False, False, False]]])}
    attention = torch.full((2, 1, 1, 2, 4, T), 1 / T)
    found = {"units": torch.zeros(1, 1, 2, 2), "tenths": torch.zeros(1, 1, 2, 10), "expected": torch.tensor([[[0.5, 0.2]]]), "cover": torch.zeros(6, 1, 1, 2, 2), "attention": attention}
    _, log = look_losses(found, true, s)
    assert float(log["mass"]) == pytest.approx(2 / T) and float(log["inside"]) == pytest.approx(2 / T) and float(log["picked"]) == 0.5
    def loss_of(layer, mask, token):
        moved = attention.clone(); moved[layer, 0, 0, mask, token] = torch.eye(T)[0]
        return float(look_losses(found | {"attention": moved}, true, s)[0])
    still = float(look_losses(found, true, s)[0])
    assert loss_of(0, 1, 0) == pytest.approx(still, abs=1e-6)  # nothing of the target is inside of the second mask
    for layer, mask, token in ((0, 0, 0), (1, 0, 1), (0, 1, 1), (1, 1, 3)): assert loss_of(layer, mask, token) < still - 1e-3
    half, one = attention.clone(), attention.clone()                             # on both tokens of the target, or all on one
    half[:, ..., 2:, :] = torch.tensor([.5, .5, 0, 0, 0, 0]); one[:, ..., 2:, :] = torch.eye(T)[0]
    even, spread = (lambda moved, s: float(look_losses(found | {"attention": moved}, true, s)[0])), settings(attention_spread=0.3)
    assert even(half, s) == pytest.approx(even(one, s), abs=1e-3) and even(half, spread) < even(one, spread) - 0.1


def test_only_some_layers_attention_is_supervised(loaded):
    photo, covered, figures = torch.randn(1, 256, 256), torch.rand(1, 1, 1, 256), torch.rand(1, 1, 1, 9)
    with torch.no_grad(): one, two, all_ = (trainee_of(loaded, attention_first=a, attention_last=b).eval().scores(photo, [["the cube"]], covered, figures)["attention"] for a, b in ((5, 5), (5, 6), (4, 9)))
    assert (len(one), len(two), len(all_)) == (1, 2, 6) and torch.equal(one[0], two[0]) and torch.equal(two, all_[1:3])


def test_what_was_mined_is_read(loaded, pack, mined):
    s = settings(questions=2, masks=3)
    found = Scoring(mined, s)
    assert sum(len(v) for v in found.of.values()) == len(mined) == 4 and len(found.scenes) == 2
    for name in found.scenes: assert any(torch.equal(found.image(name), image) for image in pack.image)
    for d in found.draw(found.scenes[0], np.random.default_rng(0)):
        assert d["covered"].shape == (3, 256) and d["target"].shape == (256,) and d["question"] in [q["q"] for qs in pack.questions for q in qs]
        area, target = d["covered"].astype(float).sum(1) / 255, d["target"].astype(float).sum() / 255
        assert np.allclose(d["recall"] * target, d["precision"] * area, atol=1.5)  # both are the overlap, in patches
        both = d["recall"] * target
        assert np.allclose(d["iou"], both / (area + target - both), atol=0.06)
    batches = LookBatches(found)
    loss, _ = LookTrainee(loaded, s, Settings.load("tiny", **PROFILE))(batches(1, 0, 1), 0)
    assert torch.isfinite(loss)
    with pytest.raises(ValueError, match="no mined question has 250 candidates"): Scoring(mined, settings(masks=500))


def test_the_embedded_evaluator_is_small_and_says_where_it_looks():
    home = resolve("embedded:generator").parent
    assert sum(f.stat().st_size for f in home.rglob("*") if f.is_file()) < 45e6
    profile, sample = Settings.load("tiny"), demo_sample()
    evaluator, image, masks = load_evaluator(settings=profile), np.array(sample.load_image()), torch.zeros(2, 256, 256, dtype=torch.bool)
    masks[0] = torch.from_numpy(sample.load_mask()); masks[1, :60] = True # the ground truth, and the wall behind
    got = evaluator.score(image, sample.question, masks)
    assert evaluator.kind == "internvl" and got.ious[0] > got.ious[1] + 0.2 and set(got.reasoning) == {evaluator.think(image, [sample.question])[0].strip()}
    first = evaluator.builder.encoder.places_in(got.reasoning[0].rpartition("so ")[2])[0]
    row, column = (int(x) for x in first[2:-1].split("c"))
    assert masks[0, 16 * row:16 * row + 16, 16 * column:16 * column + 16].any()
