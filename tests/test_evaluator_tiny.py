"The embedded evaluator's own training: it reads what scoring reads, looks through masks, and its scores fall into place."
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from rea2seg.checkpoints import CheckpointError, resolve
from rea2seg.data.sources import load_samples
from rea2seg.evaluator_internvl import InternvlEvaluator, Rows
from rea2seg.eyes import Eyes, EyesConfig
from rea2seg.generators import load_generator
from rea2seg.internvl import load_internvl, new_internvl, save_evaluator
from rea2seg.lens_files import save_generator
from rea2seg.mined import read_mined
from rea2seg.mining import mine
from rea2seg.settings import Settings, load_section
from rea2seg.train.evaluator import builder_of
from rea2seg.train.evaluator_tiny import Candidates, EvaluatorShape, LookBatches, MinedCandidates, PoolSettings, build_pool, evaluator_from, main, overlaps, train_looks
from rea2seg.train.generator import patchify
from rea2seg.train.loop import fit
from rea2seg.train.looks import LookTrainee, LookTraining, look_losses, rank_loss, soft_digits
from rea2seg.train.pack import Pack, build_pack

PROFILE = dict(evaluator_kind="internvl", prompt="bare", question_place="before", mask_view="binary", chain_of_thought=False, scoring="expected", group_size=1)
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
def pool(generator, pack, tmp_path_factory):
    return build_pool(generator, pack, tmp_path_factory.mktemp("pool"), load_section(PoolSettings, "tiny.pool", scenes_per_part=1), progress=False)


@pytest.fixture
def loaded(generator): return evaluator_from(generator)


@pytest.fixture
def moved(loaded):
    "Weights with which everything that can be looked at counts."
    g, eyes = torch.Generator().manual_seed(3), loaded.model.model.vision_tower
    with torch.no_grad():
        for p, std in ((eyes.look, 0.3), (eyes.outline.weight, 0.05)): p += std * torch.randn(p.shape, generator=g)
        for layer in loaded.model.model.language_model.layers[10:]: layer.self_attn.o_proj.weight.normal_(std=0.05, generator=g)
    return loaded


def settings(**changes): return load_section(LookTraining, "tiny.evaluator", **dict(dict(masks=4, questions=3, batch_size=2, precision="no", steps=8, warmup_steps=1, log_every=1), **changes))
def trainee_of(loaded, **changes): return LookTrainee(loaded, settings(**changes), Settings.load("tiny", **PROFILE))


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
    assert len(lm.layers) > len(own.model.layers) and torch.allclose(ours, theirs, atol=1e-4)  # plain positions: the same rope; the layers behind are silent


def test_it_sees_as_the_generator(generator, loaded, pack):
    image = torch.as_tensor(pack.image[:2])
    theirs = generator.model.image_tokens(*patchify(image, 16, 1, 1)).unflatten(0, (2, -1))
    pixels = torch.cat([trainee_of(loaded).builder.photo(i.numpy()) for i in image])
    with torch.no_grad():
        assert torch.allclose(loaded.model.model.vision_tower(pixel_values=pixels).last_hidden_state[:, 1:], theirs, atol=1e-4)
        projected = loaded.model.get_image_features(pixel_values=pixels, return_dict=True).pooler_output
    assert ((projected - theirs) ** 2).mean() < 0.1 * theirs.var()  # the norm inside the projector is all that differs


def test_another_shape_is_refused(generator):
    for layers in (9, 21):
        with pytest.raises(ValueError, match=f"text_layers is {layers}, expected 10 .* to 20"): evaluator_from(generator, EvaluatorShape(layers, 6, 8192))
    with pytest.raises(ValueError, match="opens with"): evaluator_from(generator, prompt="full")


@pytest.mark.parametrize(("change", "message"), [(dict(fullatt_block_indexes=[0]), "over the whole picture in every block"), (dict(spatial_merge_size=2), "one token a patch")])
def test_eyes_of_another_kind_are_refused(loaded, change, message):
    config = loaded.model.config.vision_config
    with pytest.raises(ValueError, match=message): Eyes(EyesConfig(hidden_size=256, image_size=[256, 256], patch_size=[16, 16], tower=config.tower | change))


def test_training_reads_what_scoring_reads(loaded, pack):
    trainee = trainee_of(loaded)
    whole = trainee.builder.group_inputs(pack.image[0].numpy(), "the cube", some_masks()[:1], [0.37]).input_ids.tolist()
    ids = [*trainee.prefix, *trainee._cut("the cube")[1], *trainee.mask_ids]
    assert whole[:len(ids)] == ids and len(whole) == len(ids) + 3  # two digits and the end


def test_what_stands_side_by_side_does_not_see_each_other(moved):
    trainee = trainee_of(moved).eval()
    photo, covered = 3 * torch.randn(1, 256, 256), trainee.eyes.coverage(some_masks())
    with torch.no_grad():
        together = trainee.scores(photo, [TEXTS], covered.expand(1, 3, 4, 256))
        alone = [trainee.scores(photo, [[t]], c.expand(1, 1, 1, 256)) for t in TEXTS for c in covered]
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
        found = trainee.scores(trainee.see(pack.image[:1], [0]), [TEXTS], trainee.eyes.coverage(masks).expand(1, 3, 4, 256))
        photo, shown = evaluator._features(image, masks)
        for k, text in enumerate(TEXTS):
            ids, rows = evaluator.builder.opening(text, 1), Rows(moved.model)
            rows.photo = torch.tensor([i for i, t in enumerate(ids) if t == enc.ids["<IMG_CONTEXT>"]])
            rows.feed([evaluator._embed(ids, [(photo.bfloat16().float(), None)])[0]])  # training keeps what it saw in half precision
            rows = rows.spread(len(masks))
            rows.feed(*zip(*[evaluator._embed(trainee.mask_ids, [m]) for m in shown]))
            assert torch.allclose(rows.logits[:, trainee.digits], found["tenths"][0, k], atol=2e-4)


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


def test_scores_fall_into_place(loaded, pack, pool, tmp_path):
    trainee = trainee_of(loaded)
    batch = LookBatches(Candidates(pack, pool, trainee.settings))(0, 0, 1)
    assert batch["covered"].shape == (2, 3, 4, 256) and float(batch["iou"].max()) > 0.6
    history = fit(trainee, lambda *_: batch, settings(learning_rate=1e-3, steps=12), tmp_path, cpu=True, progress=False)
    assert history[-1]["loss"] < 0.8 * history[0]["loss"] and history[-1]["digits"] < history[0]["digits"]
    trainee.settle(); loaded.model.eval()
    save_evaluator(loaded, tmp_path / "evaluator", torch.bfloat16)
    again = load_internvl(tmp_path / "evaluator")
    a, b = (InternvlEvaluator(x, Settings.load("tiny", **PROFILE)).score(pack.image[0].numpy(), "the cube", some_masks()).ious for x in (loaded, again))
    assert again.tokens_per_mask == 2 and torch.allclose(a, b, atol=0.03)  # bfloat16 on disk
    with torch.no_grad():
        found = trainee.eval().scores(trainee.see(pack.image[:1], [0]), [["the cube"]], trainee.eyes.coverage(some_masks()).expand(1, 1, 4, 256))
    assert torch.allclose(found["expected"][0, 0], a, atol=0.06)  # tenths against the whole distribution of digits


def test_only_the_last_layers_learn(loaded, pack, pool, tmp_path):
    before = {n: p.clone() for n, p in loaded.model.state_dict().items()}
    train_looks(loaded, pack, pool, tmp_path, profile=Settings.load("tiny", **PROFILE), steps=2, batch_size=2, masks=4, questions=3, warmup_steps=1, log_every=1, save_every=2, precision="no")
    changed = {n for n, p in loaded.model.state_dict().items() if not torch.equal(p, before[n])}
    kept = load_section(LookTraining, "tiny.evaluator").frozen_layers
    assert {n.split(".layers.")[1].split(".")[0] for n in changed if ".layers." in n} == {str(k) for k in range(kept, 13)}
    words = loaded.model.get_input_embeddings().weight
    rows = (words != before["model.language_model.embed_tokens.weight"]).any(1).nonzero()[:, 0].tolist()
    assert sorted(rows) == sorted(loaded.tokenizer.encode(str(d), add_special_tokens=False)[0] for d in range(10))
    assert not any("vision_tower.tower" in n or "projector" in n for n in changed) and (tmp_path / "evaluator" / "config.json").is_file()


def test_what_is_the_generators_stays_with_it(generator, loaded, pack, tmp_path):
    home = tmp_path / "weights"
    shutil.copytree(resolve("embedded:generator"), home / "generator")
    kept, layers = load_section(LookTraining, "tiny.evaluator").frozen_layers, loaded.model.model.language_model.layers
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


def test_the_two_ways_to_see_a_mask_are_not_mixed_up(loaded):
    with pytest.raises(ValueError, match="mask_view must be binary, got 'overlay'"): InternvlEvaluator(loaded, Settings.load("tiny", **PROFILE | dict(mask_view="overlay")))
    with pytest.raises(ValueError, match="evaluator_tiny` trains it"): builder_of(loaded, Settings.load("tiny", **PROFILE))
    with pytest.raises(ValueError, match="looks at pictures of masks, not through them"): LookTrainee(new_internvl(), settings(), Settings.load("tiny", **PROFILE))
    with pytest.raises(ValueError, match="must be 5 tokens, prompt 'turns' takes"): LookTrainee(loaded, settings(), Settings.load("tiny", **PROFILE | dict(prompt="turns")))
    with pytest.raises(ValueError, match="6 layers are told of masks, .* leaves 5 that learn"): trainee_of(loaded, frozen_layers=8)


def test_candidates_of_a_scene(pack, pool, generator, tmp_path):
    found = Candidates(pack, pool, settings(masks=6, good_share=1.0, own_share=1.0))
    for scene, c in found.of.items():
        n, answers = c["iou"].shape
        assert c["covered"].shape == (n, 256) and len(c["answer"]) == len(pack.questions[scene]) == len(c["attention"]) and answers == c["answer"].max() + 1
        assert 0.05 < c["attention"].astype(float).sum(1).min() and c["attention"].astype(float).sum(1).max() < 1.001 and c["iou"].max(0).mean() > 0.6  # most answers are found
        area = c["covered"].astype(float).sum(1) / 255
        target = c["target"].astype(float).sum(1) / 255
        assert np.allclose(c["recall"] * target[None], c["precision"] * area[:, None], atol=1.0)  # both are the overlap
    seen = [found.pick(0, q, np.random.default_rng(q)) for q in range(len(pack.questions[0]))]
    c = found.of[0]
    for q, chosen in enumerate(seen):
        assert len(set(chosen)) == 6 and {c["initial"][q], *c["own"][q]} <= {*chosen, -1}
        iou, looked_at = c["iou"][:, c["answer"][q]], np.argsort(-c["attention"][q].astype(float), kind="stable")[:30]
        reachable = iou[(c["covered"][:, looked_at] > 102).any(1)].max()
        assert reachable < max(iou.max() - 0.08, 0.3) or iou[chosen].max() >= iou.max() - 0.09
    assert seen[0] == found.pick(0, 0, np.random.default_rng(0))
    asked = found.asked(1, np.random.default_rng(2))
    assert len(set(asked)) == 3 and len({pack.questions[1][q]["c"] for q in asked}) > 1  # no question twice, categories in turn
    with pytest.raises(FileNotFoundError, match="no pool-"): Candidates(pack, tmp_path, settings())
    with pytest.raises(ValueError, match="no scene of the pack has 500 candidates"): Candidates(pack, pool, settings(masks=500))


def test_a_pool_goes_on_where_it_was_stopped(pack, pool, generator, tmp_path):
    s = load_section(PoolSettings, "tiny.pool", scenes_per_part=1)
    shutil.copytree(pool, tmp_path / "pool")
    files = sorted((tmp_path / "pool").glob("pool-*.npz")); assert len(files) == 2
    kept = files[0].stat().st_mtime_ns; files[1].unlink()
    build_pool(generator, pack, tmp_path / "pool", s, (0, 2), progress=False); assert not files[1].exists()  # the other process' part
    build_pool(generator, pack, tmp_path / "pool", s, (1, 2), progress=False)
    assert files[0].stat().st_mtime_ns == kept and not list((tmp_path / "pool").glob("*.tmp"))
    with np.load(files[1]) as a, np.load(pool / files[1].name) as b: assert all(np.array_equal(a[k], b[k]) for k in b.files)
    with pytest.raises(ValueError, match="another pack or other settings: settings differ"): build_pool(generator, pack, tmp_path / "pool", load_section(PoolSettings, "tiny.pool", clicks=3), progress=False)
    other = Pack(pack.image, pack.part_map, pack.part_object, pack.part_attributes, [pack.questions[0], pack.questions[1][:1]], pack.seeds)
    with pytest.raises(ValueError, match="other settings: pack differ"): build_pool(generator, other, tmp_path / "pool", s, progress=False)
    silent = Pack(pack.image, pack.part_map, pack.part_object, pack.part_attributes, [[], []], pack.seeds)
    with pytest.raises(ValueError, match="no scene of the pack has a question"): build_pool(generator, silent, tmp_path / "silent", s, progress=False)
    with pytest.raises(ValueError, match="with the layers whose attention counts"): build_pool(load_generator("embedded:generator"), pack, tmp_path / "pool", s, progress=False)
    with pytest.raises(ValueError, match="scene 1 has 1 questions here"): Candidates(other, tmp_path / "pool", settings())


def test_processes_share_the_scenes(pack, pool):
    batches = LookBatches(Candidates(pack, pool, settings()))
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
    "By hand: two layers count, and of the masks only those that have the target inside, or some of it outside."
    s, T = settings(), 6
    true = {"iou": torch.tensor([[[0.5, 0.0]]]), "recall": torch.tensor([[[0.5, 0.0]]]), "precision": torch.tensor([[[1.0, 0.0]]]), "target": torch.tensor([[[True, True, False, False, False, False]]])}
    attention = torch.full((3, 1, 1, 2, 4, T), 1 / T)
    found = {"tenths": torch.zeros(1, 1, 2, 10), "expected": torch.tensor([[[0.5, 0.2]]]), "cover": torch.zeros(3, 1, 1, 2, 2), "attention": attention}
    _, log = look_losses(found, true, s)
    assert float(log["mass"]) == pytest.approx(2 / T) and float(log["inside"]) == pytest.approx(2 / T) and float(log["picked"]) == 0.5
    def loss_of(layer, mask, token):
        moved = attention.clone(); moved[layer, 0, 0, mask, token] = torch.eye(T)[0]
        return float(look_losses(found | {"attention": moved}, true, s)[0])
    still = loss_of(2, 0, 2)  # the last layer may look where it likes
    assert still == pytest.approx(float(look_losses(found, true, s)[0]), abs=1e-6)
    assert loss_of(0, 1, 0) == pytest.approx(still, abs=1e-6)  # nothing of the target is inside of the second mask
    for layer, mask, token in ((0, 0, 0), (1, 0, 1), (0, 1, 1), (1, 1, 3)): assert loss_of(layer, mask, token) < still - 1e-3


def test_the_command_finds_candidates_and_trains(pack_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    base = ["--pack", str(pack_folder), "--pool", str(tmp_path / "pool")]
    main(["pool", *base, "--scenes", "1", "--set", "clicks=4"])
    few = [x for k, v in dict(steps=1, warmup_steps=1, batch_size=1, masks=3, questions=2, log_every=1, save_every=1).items() for x in ("--set", f"{k}={v}")]
    main(["train", *base, "--scenes", "1", "--out", str(tmp_path / "out"), "--device", "cpu", *few])
    assert load_internvl(tmp_path / "out" / "evaluator").tokens_per_mask == 2
    log = [json.loads(line) for line in (tmp_path / "out" / "run-scores" / "log.jsonl").read_text().splitlines()]
    assert {"loss", "within", "mass"} <= log[-1].keys()
    for bad in ("2/2", "half"):
        with pytest.raises(SystemExit): main(["pool", *base, "--shard", bad])
        assert "I/N" in capsys.readouterr().err


def test_what_was_mined_is_read_too(loaded, pack, pool, pack_folder, generator, tmp_path):
    spec = f"pack:{pack_folder}"
    mine(generator, Settings.load("tiny", seed_points=6), load_samples(spec, per_image=2), tmp_path / "mined", 2, progress=False, data=dict(spec=spec, split=None, limit=None, seed=0, options=dict(per_image=2)))
    mined, s = read_mined(tmp_path / "mined"), settings(mined_share=0.5, mined_questions=2, mined_masks=3)
    found = MinedCandidates(mined, s)
    assert sum(len(v) for v in found.of.values()) == len(mined) == 4 and len(found.scenes) == 2
    for name in found.scenes: assert any(torch.equal(found.image(name), image) for image in pack.image)
    for d in found.draw(found.scenes[0], np.random.default_rng(0)):
        assert d["covered"].shape == (3, 256) and d["target"].shape == (256,) and d["question"] in [q["q"] for qs in pack.questions for q in qs]
        area, target = d["covered"].astype(float).sum(1) / 255, d["target"].astype(float).sum() / 255
        assert np.allclose(d["recall"] * target, d["precision"] * area, atol=1.5)  # both are the overlap, in patches
        both = d["recall"] * target
        assert np.allclose(d["iou"], both / (area + target - both), atol=0.06)
    batches = LookBatches(Candidates(pack, pool, s), found)
    sizes = [tuple(batches(i, 0, 1)["iou"].shape) for i in range(4)]
    assert sizes == [(2, 3, 4), (2, 2, 3), (2, 3, 4), (2, 2, 3)]  # by turns
    assert [tuple(LookBatches(Candidates(pack, pool, s))(i, 0, 1)["iou"].shape) for i in range(2)] == [(2, 3, 4)] * 2
    loss, _ = LookTrainee(loaded, s, Settings.load("tiny", **PROFILE))(batches(1, 0, 1), 0)
    assert torch.isfinite(loss)
    with pytest.raises(ValueError, match="no mined question has 250 candidates"): MinedCandidates(mined, settings(masks=500))
