"The embedded evaluator's first stage: it writes what it looks for and where it finds it."
import json
import shutil

import pytest
import torch

from rea2seg.checkpoints import resolve
from rea2seg.evaluator_internvl import InternvlEvaluator, Rows
from rea2seg.generators import load_generator
from rea2seg.internvl import load_internvl, save_evaluator
from rea2seg.settings import Settings, load_section
from rea2seg.train.evaluator_tiny import evaluator_from
from rea2seg.train.loop import fit
from rea2seg.train.pack import Pack, build_pack
from rea2seg.train.reasons import ReasonBatches, ReasonTrainee, ReasonTraining, add_low_rank, answered, main, merge_low_rank, train_reasons

PROFILE = Settings.load("tiny", evaluator_kind="internvl", prompt="bare", question_place="before", mask_view="binary", chain_of_thought=True, max_reasoning_tokens=24, scoring="expected", group_size=1, consensus=0.0)
FEW = dict(energy=1.0, questions=4, batch_size=2, precision="no", steps=12, warmup_steps=1, log_every=1, save_every=100)


@pytest.fixture(scope="module")
def pack_folder(tmp_path_factory): return build_pack(tmp_path_factory.mktemp("pack"), 2, ("clevr", "multistep"), "val", 7, 0, 8, workers=0, progress=False)


@pytest.fixture(scope="module")
def pack(pack_folder): return Pack.load(pack_folder)


@pytest.fixture(scope="module")
def generator(): return load_generator("embedded:generator", layers=Settings.load("tiny").layers)


@pytest.fixture
def loaded(generator): return evaluator_from(generator)


def settings(**changes): return load_section(ReasonTraining, "tiny.reasons", **FEW | changes)


def test_a_trace_becomes_tokens_that_read_as_its_text(loaded, pack):
    trainee = ReasonTrainee(loaded, settings(), PROFILE)
    batch, enc = ReasonBatches(pack, trainee, trainee.settings)(0, 0, 1), trainee.builder.encoder
    n = 0
    for reasons in batch["reasons"]:
        for ids in reasons:
            text = loaded.tokenizer.decode(ids[:-1], clean_up_tokenization_spaces=False)
            assert enc.thought(text) == ids and " so " in text   # what is written is read as the same tokens
            n += len(enc.places_in(text))
    assert n == len(batch["places"]) == len(batch["final"]) and batch["places"].any(1).all() and 0 < batch["final"].sum() < n
    assert batch["target"].shape == (2 * 4, 256) and len(batch["named"]) == sum(len(at) for of in batch["looks"] for at in of)
    for rests, looks, image in zip(batch["questions"], batch["looks"], (k for _, k in batch["scene"]), strict=True):
        asked = {tuple(trainee.cut(q["q"])[1]): q for q in pack.questions[image]}
        for rest, at in zip(rests, looks, strict=True):
            q = asked[tuple(rest)]
            for (end, _), p in zip(q["m"], at, strict=True): assert q["q"][:end].lower().endswith(loaded.tokenizer.decode([rest[p]]).strip().lower())


def test_together_as_alone_and_as_it_is_written(loaded, pack):
    "Packed questions do not see each other, and the logits are those of reading step by step."
    trainee = ReasonTrainee(loaded, settings(), PROFILE).eval()
    with torch.no_grad():
        for m in trainee.changed.values(): m.parametrizations.weight[0].b.normal_(std=0.02, generator=torch.Generator().manual_seed(1))
        batch = ReasonBatches(pack, trainee, trainee.settings)(0, 0, 1)
        photo = trainee.see(batch["image"], batch["scene"])
        plan, together, rows = trainee.read(photo, batch["questions"], batch["reasons"], batch["looks"], range(4, 9))
        alone = [trainee.read(photo[b:b + 1], [[q]], [[r]])[1] for b in range(2) for q, r in zip(batch["questions"][b], batch["reasons"][b], strict=True)]
        assert torch.allclose(together, torch.cat(alone), atol=2e-3)
        assert rows["score"].shape == (8, 5, 256) and float(rows["score"].sum(-1).max()) <= 1 + 1e-5
        trainee.settle(torch.float32)
        step = Rows(loaded.model)
        step.photo = torch.arange(trainee.photo_at, trainee.photo_at + 256)
        opened, reason = [*trainee.prefix, *batch["questions"][0][0]], batch["reasons"][0][0]
        embeds = loaded.model.get_input_embeddings()(torch.tensor(opened)); embeds[step.photo] = photo[0]
        step.feed([embeds])
        for k, token in enumerate(reason):
            assert torch.allclose(step.logits[0], alone[0][k], atol=2e-3)
            step.write([[token]])


def test_the_loss_falls_and_what_is_stored_is_small(generator, loaded, pack, tmp_path):
    trainee = ReasonTrainee(loaded, settings(), PROFILE)
    batches = ReasonBatches(pack, trainee, trainee.settings)
    before = {n: p.clone() for n, p in loaded.model.state_dict().items() if "vision" in n or "norm" in n}
    history = fit(trainee, lambda *_: batches(0, 0, 1), settings(rank=16), tmp_path / "run", trainee.groups(), cpu=True, progress=False)
    assert history[-1]["loss"] < 0.8 * history[0]["loss"] and history[-1]["words"] < history[0]["words"] and history[-1]["place"] < history[0]["place"]
    assert all(torch.equal(loaded.model.state_dict()[n], p) for n, p in before.items())
    loaded.lora = trainee.settle(torch.bfloat16); loaded.model.eval()
    shutil.copytree(resolve("embedded:generator"), tmp_path / "generator")
    save_evaluator(loaded, tmp_path / "evaluator", torch.bfloat16, shares="../generator")
    note = json.loads((tmp_path / "evaluator" / "rea2seg.json").read_text())["shares"]
    assert len(note) == 1 and len(note[0]["names"]) == 11 and sum(f.stat().st_size for f in (tmp_path / "evaluator").iterdir()) < 12e6
    again = load_internvl(tmp_path / "evaluator")
    ours, theirs = loaded.model.state_dict(), again.model.state_dict()
    assert all(torch.allclose(theirs[n], p, atol=2e-2) for n, p in ours.items()) and all(torch.equal(theirs[n], p) for n, p in ours.items() if "layers." in n)
    said = [InternvlEvaluator(x, PROFILE).think(pack.image[0].numpy(), ["Which cube is the largest?"])[0] for x in (loaded, again)]
    assert said[0][:6] == said[1][:6]
    save_evaluator(again, tmp_path / "twice", torch.bfloat16, shares="../generator")   # and once more, from what was read
    assert all(torch.equal(p, theirs[n]) for n, p in load_internvl(tmp_path / "twice").model.state_dict().items())


def test_low_rank_changes_of_another_generator_are_not_stored(loaded, tmp_path):
    from rea2seg.checkpoints import CheckpointError
    shutil.copytree(resolve("embedded:generator"), tmp_path / "generator")
    trainee = ReasonTrainee(loaded, settings(rank=2), PROFILE)
    loaded.lora = trainee.settle(torch.bfloat16)
    with torch.no_grad(): loaded.model.model.language_model.layers[3].mlp.up_proj.weight += 0.1
    with pytest.raises(CheckpointError, match="do not make the evaluator's weights of those it shares: model.language_model.layers.3"): save_evaluator(loaded, tmp_path / "evaluator", torch.bfloat16, shares="../generator")
    assert not (tmp_path / "evaluator").exists()


def test_a_pack_without_traces_is_refused(loaded, pack):
    old = Pack(pack.image, pack.part_map, pack.part_object, pack.part_attributes, [[{k: v for k, v in q.items() if k != "t"} for q in of] for of in pack.questions], pack.seeds)
    with pytest.raises(ValueError, match="what is found on the way .t.: build it anew"): ReasonBatches(old, ReasonTrainee(loaded, settings(), PROFILE), settings())


def test_reasoning_behind_masks_is_refused(loaded):
    with pytest.raises(ValueError, match="prompt 'turns' reasons behind the masks"): ReasonTrainee(loaded, settings(), PROFILE.with_(prompt="turns"))


def test_the_command_trains(pack_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    few = [x for k, v in dict(FEW, steps=1, batch_size=1, rank=4).items() for x in ("--set", f"{k}={v}")]
    main(["--pack", str(pack_folder), "--validation", str(pack_folder), "--device", "cpu", "--out", str(tmp_path), *few])
    assert "answered: {" in capsys.readouterr().out and load_internvl(tmp_path / "evaluator").tokens_per_mask == 2


def test_answers_count_where_they_lie(loaded, pack, monkeypatch):
    "Places written by hand: the right one for every question, then a wrong one."
    trainee = ReasonTrainee(loaded, settings(), PROFILE)
    batches = ReasonBatches(pack, trainee, trainee.settings)
    from rea2seg.train.generator import token_counts
    counts = token_counts(pack.part_map.long(), (16, 16))
    right = {q["q"]: loaded.tokenizer.decode(batches.reason(q["t"], counts[k])[0][:-1], clean_up_tokenization_spaces=False) for k in range(2) for q in pack.questions[k]}
    trainee.settle(torch.bfloat16)
    monkeypatch.setattr(InternvlEvaluator, "think", lambda self, image, asked: [right[q] for q in asked])
    assert answered(loaded, pack, PROFILE)["overall"] > 0.95
    monkeypatch.setattr(InternvlEvaluator, "think", lambda self, image, asked: [" so cube" for q in asked])
    assert answered(loaded, pack, PROFILE)["overall"] == 0


def test_train_reasons_writes_an_evaluator(loaded, pack, tmp_path):
    train_reasons(loaded, pack, tmp_path, pack, profile=PROFILE, device="cpu", **FEW | dict(steps=1, rank=4))
    assert len(load_internvl(tmp_path / "evaluator").model.model.language_model.layers) == 10


def test_what_says_little_is_not_stored(pack, generator, tmp_path):
    "Both checkpoints are what was in memory; the trimmed one is smaller, and a training goes on from it."
    shutil.copytree(resolve("embedded:generator"), tmp_path / "generator")
    sizes, few = {}, FEW | dict(steps=2, rank=12)
    for energy in (1.0, 0.6):
        at = tmp_path / str(energy)
        made = train_reasons(evaluator_from(generator), pack, at, profile=PROFILE, device="cpu", shares="../../generator", **few | dict(energy=energy))
        read = load_internvl(at / "evaluator")
        for n, p in made.model.model.language_model.layers.named_parameters(): assert torch.allclose(p, read.model.model.language_model.layers.get_parameter(n), atol=1e-6), n
        sizes[energy] = sum(v.numel() for v in read.lora.values())
    assert sizes[0.6] < 0.7 * sizes[1.0]
    train_reasons(read, pack, tmp_path / "on", profile=PROFILE, device="cpu", **few | dict(steps=1))
    same = train_reasons(load_internvl(tmp_path / "0.6" / "evaluator"), pack, tmp_path / "same", profile=PROFILE, device="cpu", **few | dict(steps=1, rank=0, energy=1.0))
    kept = load_internvl(tmp_path / "0.6" / "evaluator").lora
    assert all(p.shape == kept[n].shape for n, p in same.lora.items()) and not all(torch.equal(p, kept[n]) for n, p in same.lora.items())
    with pytest.raises(ValueError, match="rank 0 lets low-rank changes go on as they are, and there are none"): ReasonTrainee(evaluator_from(generator), settings(rank=0), PROFILE)


def test_what_was_learnt_goes_on_exactly():
    "Changes are taken out of the weights and put back: the generator's own come out to the bit, and nothing moves."
    loaded, own = load_internvl("embedded:evaluator"), load_internvl("embedded:evaluator")
    lm, bare = loaded.model.model.language_model, load_generator("embedded:generator").model.model.layers
    changed = add_low_rank(lm, max(len(v) for k, v in loaded.lora.items() if k.endswith("lora_A.weight")), loaded.lora)
    assert torch.equal(lm.layers[3].mlp.up_proj.parametrizations.weight.original, bare[3].mlp.up_proj.weight)
    lora = merge_low_rank(changed, torch.bfloat16)
    made = lambda lora, n: lora[n.replace("_A", "_B")].float() @ lora[n].float()
    assert lora.keys() == own.lora.keys() and all(torch.allclose(made(lora, n), made(own.lora, n), atol=1e-6) for n in lora if "_A" in n)
    assert all(torch.allclose(p, own.model.state_dict()[n], atol=1e-6) for n, p in loaded.model.state_dict().items())
    with pytest.raises(ValueError, match="in all layers or in none, there is none of model.language_model.layers.0.self_attn.q_proj"): add_low_rank(lm, 96, {k: v for k, v in lora.items() if "layers.0.self_attn.q_proj" not in k})


def test_hard_questions_are_drawn_more_often(loaded, pack):
    trainee = ReasonTrainee(loaded, settings(), PROFILE)
    plain, more = (ReasonBatches(pack, trainee, settings(hard="ordinal extreme", hard_factor=f)).weights for f in (1.0, 3.0))
    for a, b, of in zip(plain, more, pack.questions, strict=True):
        for x, y, q in zip(a, b, of, strict=True): assert y == pytest.approx(x * (3 if q["s"] in ("ordinal", "extreme") and q["c"] != "warmup" else 1))
    with pytest.raises(ValueError, match=r"hard names nonsense; sub-types are attribute, between"): ReasonBatches(pack, trainee, settings(hard="ordinal nonsense"))
