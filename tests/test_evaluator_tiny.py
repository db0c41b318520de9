"The embedded evaluator's own training: rows made of the tokens that scoring reads, eyes that learn, scores that fall into place."
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from rea2seg.checkpoints import CheckpointError, resolve
from rea2seg.evaluator_internvl import InternvlEvaluator
from rea2seg.eyes import Eyes, EyesConfig
from rea2seg.generators import load_generator
from rea2seg.internvl import load_internvl, save_evaluator
from rea2seg.lens_files import save_generator
from rea2seg.settings import Settings, load_section
from rea2seg.train.evaluator_tiny import EvaluatorShape, OverlayBatches, Pool, PromptedPool, evaluator_from, overlaps, pool_of, question_masks
from rea2seg.train.generator import patchify
from rea2seg.train.loop import fit
from rea2seg.train.overlays import OverlayTrainee, OverlayTraining, group_row, overlay_losses, rank_loss, single_row, soft_digits
from rea2seg.train.pack import Pack, build_pack

PROFILE = dict(evaluator_kind="internvl", prompt="terse", question_place="after", mask_view="overlay", chain_of_thought=False, scoring="expected")


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pack")
    build_pack(folder, 2, ("clevr", "multistep"), "val", 7, 0, 8, workers=0, progress=False)
    return Pack.load(folder)


@pytest.fixture(scope="module")
def generator(): return load_generator("embedded:generator")


@pytest.fixture
def loaded(generator): return evaluator_from(generator)


@pytest.fixture
def pool(pack):
    "The answers themselves, grown ones and wrong ones, as if they had been mined."
    masks, found_for = {}, {}
    for scene in range(len(pack)):
        qs = list(range(min(4, len(pack.questions[scene]))))
        truth = question_masks(pack, scene, qs).numpy()
        own = np.concatenate([truth, np.roll(truth, 12, 2), np.roll(truth, 90, 1)])
        masks[scene], found_for[scene] = np.packbits(own.reshape(len(own), -1), axis=1), np.array(qs * 3)
    return Pool(masks, found_for, (256, 256))


def settings(**changes): return load_section(OverlayTraining, "tiny.evaluator", **dict(dict(masks=3, questions=4, batch_size=1, precision="no", steps=8, warmup_steps=1, log_every=1), **changes))


def test_it_begins_as_the_generator(generator, loaded):
    lm, own = loaded.model.model.language_model, generator.model
    for mine, theirs in zip(lm.layers, own.model.layers): assert all(torch.equal(a, b) for a, b in zip(mine.state_dict().values(), theirs.state_dict().values()))
    text = "Which cyan dumbbell is the farthest from the cube?"
    assert loaded.tokenizer.encode(text, add_special_tokens=False) == generator.tokenizer.plain.encode(text, add_special_tokens=False).ids
    x = torch.randn(1, 9, 256)
    theirs = own.model(inputs_embeds=x, position_ids=torch.arange(9).expand(3, 1, 9), use_cache=False).last_hidden_state
    mine = lm(inputs_embeds=x, use_cache=False).last_hidden_state
    assert len(lm.layers) == len(own.model.layers) and torch.allclose(mine, theirs, atol=1e-4)  # plain positions: the same rope


def test_it_sees_as_the_generator(generator, loaded, pack):
    image = torch.as_tensor(pack.image[:2])
    theirs = generator.model.image_tokens(*patchify(image, 16, 1, 1)).unflatten(0, (2, -1))
    pixels = torch.cat([OverlayTrainee(loaded, settings(), Settings.load("tiny", **PROFILE)).builder.photo(i.numpy()) for i in image])
    with torch.no_grad():
        assert torch.allclose(loaded.model.model.vision_tower(pixel_values=pixels).last_hidden_state[:, 1:], theirs, atol=1e-4)
        projected = loaded.model.get_image_features(pixel_values=pixels, return_dict=True).pooler_output
    assert ((projected - theirs) ** 2).mean() < 0.1 * theirs.var()  # the norm inside the projector is all that differs


def test_another_shape_is_refused(generator):
    with pytest.raises(ValueError, match="text_layers is 99, the generator has"): evaluator_from(generator, EvaluatorShape(99, 8192))
    with pytest.raises(ValueError, match="opens with"): evaluator_from(generator, prompt="full")


@pytest.mark.parametrize(("change", "message"), [(dict(fullatt_block_indexes=[0]), "over the whole picture in every block"), (dict(spatial_merge_size=2), "one token a patch")])
def test_eyes_of_another_kind_are_refused(loaded, change, message):
    config = loaded.model.config.vision_config
    with pytest.raises(ValueError, match=message): Eyes(EyesConfig(hidden_size=256, image_size=[256, 256], patch_size=[16, 16], tower=config.tower | change))


def test_group_rows_are_what_scoring_reads(loaded, pack):
    trainee = OverlayTrainee(loaded, settings(), Settings.load("tiny", **PROFILE))
    masks, ious = question_masks(pack, 0, [0, 1, 2]), [0.12, 0.5, 0.99]
    whole = trainee.builder.group_inputs(pack.image[0].numpy(), "the cube", masks, ious)
    row = group_row(trainee.builder, "the cube", [0, 1, 2], [0, 1, 2], [trainee.tokens_of(v) for v in ious])
    assert whole.input_ids.tolist()[:len(row.ids)] == row.ids and len(whole.input_ids) == len(row.ids) + 1
    assert [s[0] + 1 for s in row.scores] == [n[0] for n in whole.numbers]
    alone = single_row(trainee.builder, ["the cube"], [0], [0], [trainee.tokens_of(0.12)])
    assert alone.ids == row.ids[:len(alone.ids)] and alone.scores[0] == row.scores[0]


def test_questions_side_by_side_do_not_see_each_other(loaded, pack):
    trainee = OverlayTrainee(loaded, settings(), Settings.load("tiny", **PROFILE))
    features = 3 * torch.randn(1, 256, 256)
    texts = ["the cube", "Which sphere is the largest one?", "Segment the table."]
    written = [trainee.tokens_of(v) for v in (0.1, 0.52, 0.9)]
    with torch.no_grad():
        together = trainee.scores(features, [single_row(trainee.builder, texts, [0], [0, 1, 2], written)], attention=True)
        apart = [trainee.scores(features, [single_row(trainee.builder, [t], [0], [0], [w])], attention=True) for t, w in zip(texts, written)]
    for k in ("tenths", "first", "last", "expected"): assert torch.allclose(together[k], torch.cat([a[k] for a in apart]), atol=2e-4), k
    assert torch.allclose(together["attention"], torch.cat([a["attention"] for a in apart], 1), atol=1e-5)
    assert together["attention"].shape == (2, 3, 2, 8, 256) and float(together["attention"].sum(-1).max()) <= 1 + 1e-5


def test_the_expectation_is_the_evaluators(loaded, pack):
    "Tenths with five hundredths against the whole distribution of digits."
    profile = Settings.load("tiny", **PROFILE)
    trainee = OverlayTrainee(loaded.model.eval() and loaded, settings(), profile)
    masks = question_masks(pack, 0, [0])
    with torch.no_grad():
        features = trainee.model.get_image_features(pixel_values=trainee.builder.masks(pack.image[0].numpy(), masks)[0], return_dict=True).pooler_output
        found = trainee.scores(features, [group_row(trainee.builder, "the cube", [0], [0], [trainee.tokens_of(0.3)])])
    got = InternvlEvaluator(loaded, profile).score(pack.image[0].numpy(), "the cube", masks).ious
    one = found["first"][:, :2].softmax(-1)[:, 1]  # the chance of 1.00
    assert abs(float(one + (1 - one) * found["expected"]) - float(got)) < 0.05


def test_scores_fall_into_place(loaded, pack, pool, tmp_path):
    trainee = OverlayTrainee(loaded, settings(group_from=2.0), Settings.load("tiny", **PROFILE))
    batches = OverlayBatches(pack, pool, trainee)
    batch = batches(0, 0, 1)
    assert len(batch["rows"]) == 3 and len(batch["truths"].ious) == 12 and float(batch["truths"].ious.max()) > 0.9
    history = fit(trainee, lambda *_: batch, settings(group_from=2.0, steps=8, learning_rate=1e-3), tmp_path, cpu=True, progress=False)
    assert history[-1]["loss"] < 0.6 * history[0]["loss"] and history[-1]["digits"] < history[0]["digits"]
    save_evaluator(loaded, tmp_path / "evaluator", torch.bfloat16)
    again = load_internvl(tmp_path / "evaluator")
    masks = pool.of(0)[:7]
    a, b = (InternvlEvaluator(x, Settings.load("tiny", **PROFILE)).score(pack.image[0].numpy(), "the cube", masks).ious for x in (loaded, again))
    assert torch.allclose(a, b, atol=0.03) and len(a) == 7  # bfloat16 on disk


def test_what_is_the_generators_stays_with_it(generator, loaded, pack, tmp_path):
    home = tmp_path / "weights"
    shutil.copytree(resolve("embedded:generator"), home / "generator")
    kept, layers = load_section(OverlayTraining, "tiny.evaluator").frozen_layers, loaded.model.model.language_model.layers
    with torch.no_grad():
        loaded.model.lm_head.weight[3] += 0.5
        for layer in layers[kept:]: layer.mlp.up_proj.weight += 0.1
    save_evaluator(loaded, home / "evaluator", torch.bfloat16, shares="../generator")
    note = json.loads((home / "evaluator" / "rea2seg.json").read_text())["shares"]
    assert note["names"] == sorted([*(f"model.language_model.layers.{k}." for k in range(kept)), "model.vision_tower.tower."])
    whole = save_evaluator(loaded, home / "whole", torch.bfloat16)
    a, b = load_internvl(home / "evaluator"), load_internvl(whole)
    assert all(torch.equal(x, y) for x, y in zip(a.model.state_dict().values(), b.model.state_dict().values(), strict=True))
    size = lambda folder: sum(f.stat().st_size for f in folder.iterdir())
    shared = sum(p.numel() for m in (loaded.model.model.vision_tower.tower, *layers[:kept]) for p in m.parameters())
    assert abs(size(whole) - size(home / "evaluator") - 2 * shared) < 2e4 and size(home / "evaluator") + size(home / "generator") < 45e6

    (whole / "rea2seg.json").write_text(json.dumps({"shares": note}))
    with pytest.raises(CheckpointError, match="yet it has them"): load_internvl(whole)
    other = load_generator(home / "generator")
    with torch.no_grad(): other.model.visual.blocks[0].attn.proj.weight += 0.1
    save_generator(other, home / "generator")
    with pytest.raises(CheckpointError, match="was trained with another generator than .*generator"): load_internvl(home / "evaluator")
    for f in (home / "generator").glob("*.safetensors"): f.unlink()
    save_file({"model.norm.weight": torch.ones(4)}, home / "generator" / "model.safetensors")
    with pytest.raises(CheckpointError, match="has neither a vision tower .* nor layers"): load_internvl(home / "evaluator")
    shutil.rmtree(home / "generator")
    with pytest.raises(CheckpointError, match="shares weights with .*generator, which is not there"): load_internvl(home / "evaluator")


def test_an_evaluator_that_kept_nothing_shares_nothing(loaded, tmp_path):
    shutil.copytree(resolve("embedded:generator"), tmp_path / "generator")
    with torch.no_grad():
        for p in loaded.model.parameters(): p += 0.1
    with pytest.raises(CheckpointError, match="neither the tower nor a layer of the evaluator is that of"): save_evaluator(loaded, tmp_path / "evaluator", torch.bfloat16, shares="../generator")
    assert not (tmp_path / "evaluator").exists()


def test_a_template_without_a_photo_draws_on_it(loaded):
    with pytest.raises(ValueError, match="mask_view overlay or cutout, not binary"):
        InternvlEvaluator(loaded, Settings.load("tiny", **PROFILE | dict(mask_view="binary"))).score(np.zeros((64, 64, 3), np.uint8), "it", torch.ones(1, 64, 64, dtype=torch.bool))


def test_groups_come_after_singles(loaded, pack, pool):
    s = settings(group_from=0.5, group_share=1.0)
    trainee = OverlayTrainee(loaded, s, Settings.load("tiny", **PROFILE | dict(group_size=5)))
    batches = OverlayBatches(pack, pool, trainee)
    assert all(len(r.features) == 1 for r in batches(0, 0, 1)["rows"])
    trainee.progress = 0.6
    batch = batches(0, 0, 1)
    assert all(len(r.features) == 3 and len(r.scores) == 3 for r in batch["rows"])  # three masks were found for each question
    loss, log = trainee(batch, 0)
    assert torch.isfinite(loss) and 0 < float(log["mass"]) < 1
    with pytest.raises(ValueError, match="no scene of the pack"): OverlayBatches(pack, Pool({}, {}, (256, 256)), trainee)


def test_masks_of_prompts_need_no_mining(generator, loaded, pack):
    pool = PromptedPool(pack, generator.sam, settings().prompt_noise)
    masks, found_for = pool.draw(0, np.random.default_rng(3))
    assert masks.dtype == torch.bool and masks.shape[1:] == (256, 256) and len(masks) == len(found_for) and masks.flatten(1).any(1).all()
    ious, _ = overlaps(masks, question_masks(pack, 0, list(range(len(pack.questions[0])))))
    asked = np.unique(found_for)
    assert len(asked) == 2 and all(ious[found_for == q, q].max() > 0.5 and ious[found_for == q, q].min() < 0.5 for q in asked)  # right ones and wrong ones
    again = pool.draw(0, np.random.default_rng(3)); other = pool.draw(0, np.random.default_rng(4))
    assert torch.equal(masks, again[0]) and not (masks.shape == other[0].shape and torch.equal(masks, other[0]))
    batch = OverlayBatches(pack, pool, OverlayTrainee(loaded, settings(), Settings.load("tiny", **PROFILE)))(0, 0, 1)
    assert len(batch["rows"]) == 3 and len(batch["truths"].ious) == 12 and float(batch["truths"].ious.max()) > 0.5


def test_losses_prefer_the_truth():
    assert soft_digits(torch.tensor([0.39]), 0.06)[0, [3, 4]].min() > 0.4 # nearly 0.4
    ious = torch.tensor([0.9, 0.4, 0.0])
    assert rank_loss(ious, ious, 10.0) < rank_loss(torch.full((3,), 0.5), ious, 10.0) < rank_loss(1 - ious, ious, 10.0)
    a = torch.zeros(2, 4, 4, dtype=torch.bool); a[0, :2] = True; a[1, 1:3] = True
    iou, cover = overlaps(a[:1], a)
    assert torch.allclose(iou[0], torch.tensor([1.0, 1 / 3])) and torch.allclose(cover[0, 1], torch.tensor([0.5, 0.5]))


def test_a_pool_of_another_pack(pack):
    class Mined:
        name, question = ["p/000000/00"], ["not asked"]
    with pytest.raises(ValueError, match="mined from another pack"): pool_of(Mined(), pack)


def test_attention_losses_pull_at_target_and_mask(loaded, pack, pool):
    trainee = OverlayTrainee(loaded, settings(), Settings.load("tiny", **PROFILE))
    batch = OverlayBatches(pack, pool, trainee)(0, 0, 1)
    features = trainee.model.get_image_features(pixel_values=batch["pixels"], return_dict=True).pooler_output
    found = trainee.scores(features, batch["rows"], attention=True)
    _, log = overlay_losses(found, batch["truths"], trainee.settings)
    s = trainee.settings
    heads = found["attention"].shape[3] - s.mask_heads
    target = batch["truths"].target[found["truth"]]
    by_hand = torch.stack([(found["attention"][:, n, :, :heads] * target[n]).sum(-1).mean() for n in range(len(target))]).mean()
    assert abs(float(log["mass"]) - float(by_hand.detach())) < 1e-5
