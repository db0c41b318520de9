"""Generator training: packing is exact and faster, both families learn, traps and bad data are seen."""
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from training_models import SAM2, SHAPE, curve, lens, lisa, settings, squares, stack

from rea2seg.cli import main as rea2seg
from rea2seg.data.reader import DataError
from rea2seg.data.samples import SampleError
from rea2seg.data.sources import Listed, register_source
from rea2seg.generators import load_generator
from rea2seg.lens_files import save_generator
from rea2seg.lisa_prompt import SEG
from rea2seg.masks import to_rle
from rea2seg.sam2_model import Sam2
from rea2seg.settings import SettingsError, load_section
from rea2seg.train.families import SampleTrainee, choose_weights, measure_samples, merge_lora, prepare_sample, train_samples
from rea2seg.train.generator import GeneratorShape, GeneratorTrainee, GeneratorTraining, QuestionBatches, draw_answers, new_generator, pack_examples, per_owner, photo_tokens, trainee_of
from rea2seg.train.pack import Pack
from rea2seg.train.samples import Mixture, SampleTraining, open_sources
from rea2seg.train.tiny import HEAD, deepen, optimizer_groups
from rea2seg.train.tiny import main as tiny

ROOT = Path(__file__).resolve().parents[1]
FAMILIES = {"lens": lens, "lisa": lisa}

def packed_settings(**changes) -> GeneratorTraining:
    return load_section(GeneratorTraining, "tiny.generator", **{**dict(steps=4, batch_size=2, questions=5, mask_questions=5, attention_first=0, attention_last=1, mention_first=0, mention_last=1, precision="no", log_every=1), **changes})

@pytest.fixture(scope="module")
def packs() -> Pack: return Pack.load(stack() / "train")

def packed_trainee(packs, **changes):
    texts = sorted({q["q"] for qs in packs.questions for q in qs})
    generator = new_generator(Sam2.random(SAM2), texts, GeneratorShape(**{**SHAPE, "image_size": 256, "context": 1024}))
    trainee, batches = trainee_of(generator, packs, packed_settings(**changes))
    trainee.progress = 1.0
    return trainee, batches

# ---- packing --------------------------------------------------------------------------------------------------------------

def test_packed_losses_are_those_of_one_sequence_each(packs):
    trainee, batches = packed_trainee(packs)
    whole = batches(0, 0, 1)
    answers = [[trainee_answer(k) for k in range(5)] for _ in range(2)]
    loss, log = trainee(whole | {"answers": answers}, 0)
    assert {"attention", "mentions", "align", "mask", "text", "attributes", "mass", "prompt_spread"} <= log.keys()
    assert any(len(at) > 1 for of in whole["looks"] for at in of) and any(not at for of in whole["looks"] for at in of), "several mentions and none"
    loss.backward()
    gradient = {n: p.grad.clone() for n, p in trainee.named_parameters() if p.grad is not None}
    trainee.zero_grad()
    alone, n = {}, 0
    for b in range(2):
        for k in range(5):
            before, here = sum(map(len, whole["looks"][b][:k])), len(whole["looks"][b][k])
            one = {key: v[b:b + 1] for key, v in whole.items() if isinstance(v, torch.Tensor)} | dict(looks=[[whole["looks"][b][k]]], mentioned=whole["mentioned"][b:b + 1, before:before + here], rows=whole["rows"][b:b + 1, k:k + 1], questions=[[whole["questions"][b][k]]], pick=torch.zeros(1, 1, dtype=torch.long))
            single, parts = trainee(one | {"answers": [[answers[b][k]]]}, 0)
            (single / 10).backward(); n += 1
            for key, v in (parts | {"loss": single.detach()}).items(): alone[key] = alone.get(key, 0.0) + float(v) / 10
    for key in ("attention", "mentions", "align", "mask", "text", "attributes", "mass"): assert float(log[key]) == pytest.approx(alone[key], abs=1e-4), key
    assert loss.item() == pytest.approx(alone["loss"], abs=1e-4 * max(1, abs(loss.item())))
    assert n == 10 and gradient
    for name, p in trainee.named_parameters():
        if name in gradient: assert (gradient[name] - p.grad).abs().max() <= 1e-4 * max(1.0, float(p.grad.abs().max())), name

def trainee_words(packs): return new_generator(Sam2.random(SAM2), sorted({q["q"] for qs in packs.questions for q in qs}), GeneratorShape(**{**SHAPE, "image_size": 256, "context": 1024})).tokenizer.plain

def trainee_answer(k: int) -> list[int]: return [5 + k, 6, 7 + k % 2]

def test_a_question_sees_no_other(packs):
    trainee, batches = packed_trainee(packs, questions=3)
    batch = batches(0, 0, 1)
    tokens, _ = photo_tokens(trainee.model, batch["image"])
    ask = lambda questions: trainee.model.packed(tokens, [trainee.prefix] * 2, questions).prompt_embeds
    with torch.no_grad(): a, b = ask(batch["questions"]), ask([[q[0], [9, 9, 9, 9], q[2]] for q in batch["questions"]])
    assert torch.allclose(a[[0, 2, 3, 5]], b[[0, 2, 3, 5]], atol=1e-5) and not torch.allclose(a[[1, 4]], b[[1, 4]], atol=1e-4)

@pytest.mark.slow
def test_packing_is_six_times_as_fast(tmp_path):
    out = subprocess.run([sys.executable, ROOT / "benchmarks" / "packing.py", "--repeats", "1", "--out", tmp_path], capture_output=True, text=True, check=True).stdout
    assert float(out.split("packed is ")[1].split(" times")[0]) >= 6, out

# ---- the embedded stack's commands ----------------------------------------------------------------------------------------

def test_the_command_lowers_the_loss_and_watches_the_traps():
    rows = [json.loads(l) for l in (stack() / "one" / "run" / "log.jsonl").read_text().splitlines()]
    train = [r for r in rows if "loss" in r]
    before = [r for r in train if "mask" not in r]  # the mask loss joins later
    assert np.mean([r["align"] for r in before[-2:]]) < np.mean([r["align"] for r in before[:2]])
    assert train[0]["step"] == 1 and 0 < train[0]["mass"] < 1 and 0 <= train[0]["pointer"] <= 1
    assert all(r["prompt_spread"] > 1e-4 for r in train) and "mask" in train[-1] and "iou" in train[-1]
    assert {"val_overall", "val_geometric", "val_spatial"} <= rows[-1].keys()

def test_the_result_opens_as_a_released_checkpoint(packs):
    folder = stack() / "one" / "generator"
    assert not (folder / HEAD).exists()
    generator = load_generator(folder)
    (image, question, truth), *_ = pack_examples(packs, 2)
    found = generator.ground(image, question)
    assert found.initial.shape == truth.shape == (256, 256) and truth.any()
    report = json.loads((stack() / "one" / "generator.report.json").read_text())
    assert report["questions"] > 10 and 0 <= report["iou"]["overall"] <= 1
    assert len(draw_answers(generator, pack_examples(packs, 2))) == 2

def test_what_was_trained_can_be_measured_again(capsys):
    report = json.loads((stack() / "one" / "generator.report.json").read_text())
    tiny(["measure", "--start", str(stack() / "one" / "generator"), "--validation", str(stack() / "val"), "--device", "cpu"])
    again = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert again["questions"] == report["questions"] and again["iou"].keys() == report["iou"].keys() and {"geometric/attribute"} <= again["subtypes"].keys()
    assert all(again["iou"][k] == pytest.approx(v, abs=0.02) for k, v in report["iou"].items())  # weights on disk are bfloat16
    with pytest.raises(SystemExit): tiny(["measure", "--start", "embedded:generator"])
    assert "measure needs --start and --validation" in capsys.readouterr().err

def test_training_goes_on_with_the_same_attribute_head():
    one, two = (load_file(stack() / name / HEAD) for name in ("one", "two"))
    assert one["weight"].shape == two["weight"].shape
    moved = (one["weight"] - two["weight"]).abs().max()
    assert 0 < moved < 0.01, "one step moves a weight by at most the learning rate"
    first = lambda name: json.loads((stack() / name / "run" / "log.jsonl").read_text().splitlines()[0])
    assert first("two")["attributes"] < 0.8 * first("one")["attributes"]

def test_batches_are_shared_out_without_loss(packs):
    _, batches = packed_trainee(packs)
    whole, parts = batches(3, 0, 1), [batches(3, r, 2) for r in (0, 1)]
    assert [q for part in parts for q in part["questions"]] == whole["questions"]
    for key in ("rows", "pick", "part_map"): assert torch.equal(torch.cat([p[key] for p in parts]), whole[key])

def test_phrases_are_taught_where_they_end(packs):
    trainee, batches = packed_trainee(packs)
    batch, words = batches(0, 0, 1), trainee_words(packs)
    for b, (questions, looks) in enumerate(zip(batch["questions"], batch["looks"], strict=True)):
        scene = next(k for k in range(len(packs)) if torch.equal(packs.image[k], batch["image"][b]))
        named = [(q, end, parts) for rest in questions for q in packs.questions[scene] if batches.suffix[q["q"]] == rest for end, parts in q["m"]]
        assert sum(map(len, looks)) == len(named) == int(batch["mentioned"][b].any(-1).sum())
        found = [(rest, place) for rest, places in zip(questions, looks, strict=True) for place in places]
        for (rest, place), (q, end, parts), row in zip(found, named, batch["mentioned"][b]):
            assert row.nonzero()[:, 0].tolist() == sorted(parts)
            said = words.decode(rest[:place + 1])
            assert said.endswith(q["q"][:end].split()[-1]), (said, q["q"][:end])

def test_mentions_need_a_pack_that_tells_them(packs):
    old = replace(packs, questions=[[{k: v for k, v in q.items() if k != "m"} for q in qs] for qs in packs.questions])
    with pytest.raises(ValueError, match="needs a pack that says what its questions name"): packed_trainee(old)
    trainee, batches = packed_trainee(old, mention_weight=0.0)
    assert "looks" not in batches(0, 0, 1) and "mentions" not in trainee(batches(0, 0, 1), 0)[1]
    silent = replace(packs, questions=[[q | {"m": []} for q in qs] for qs in packs.questions])
    trainee, batches = packed_trainee(silent)
    assert "mentions" not in trainee(batches(0, 0, 1), 0)[1]

def test_mention_loss_moves_looks(packs):
    trainee, batches = packed_trainee(packs, attention_weight=0.0, align_weight=0.0, attribute_weight=0.0, bce_weight=0.0, dice_weight=0.0)
    batch, optimizer, seen = batches(0, 0, 1), torch.optim.AdamW(trainee.parameters(), lr=2e-3), []
    for _ in range(12):
        loss, log = trainee(batch, 0)
        optimizer.zero_grad(); loss.backward(); optimizer.step(); seen.append(float(log["mentioned"]))
    assert seen[-1] > 2 * seen[0], seen

def test_layers_that_find_what_is_mentioned_learn_faster(packs):
    trainee, _ = packed_trainee(packs, mention_first=1, mention_last=1, mention_rate=3.0)
    slow, fast = optimizer_groups(trainee, trainee.settings)
    names = {id(p): n for n, p in trainee.named_parameters()}
    assert fast["lr"] == pytest.approx(3 * slow["lr"]) and {names[id(p)].split("layers.")[1].split(".")[0] for p in fast["params"]} == {"1"} and len(fast["params"]) == 12
    assert len(slow["params"]) + len(fast["params"]) == len(names)
    assert optimizer_groups(trainee, replace(trainee.settings, mention_weight=0.0)) is None

@pytest.mark.parametrize("copies", [(4, 5), (0,), (9, 2)], ids=str)
def test_a_deeper_generator_answers_as_before(packs, tmp_path, copies):
    start = stack() / "one" / "generator"
    before, after = load_generator(start), load_generator(deepen(start, tmp_path / "deep", copies))
    depth = before.config["num_hidden_layers"]
    assert after.config["num_hidden_layers"] == depth + len(copies)
    image, question, _ = pack_examples(packs, 1)[0]
    a, b = before.ground(image, question), after.ground(image, question)
    assert torch.equal(a.prompt_embed, b.prompt_embed)
    kept = [i for i in range(depth + len(copies)) if not min(copies) <= i < min(copies) + len(copies)]
    x, y = a.attention_layers, b.attention_layers
    assert torch.equal(x, y[kept]) and torch.equal(y[min(copies)], x[min(copies)]) == (copies[0] == min(copies))

def test_deepening_refuses_layers_that_are_not_there(tmp_path, capsys):
    start, depth = stack() / "one" / "generator", load_generator(stack() / "one" / "generator").config["num_hidden_layers"]
    for copies in ((), (depth,), (-1, 2)):
        with pytest.raises(ValueError, match=f"copies must be layers of 0 to {depth - 1}"): deepen(start, tmp_path / "out", copies)
    assert not (tmp_path / "out").exists()
    for command, says in ((["deepen", "--copies", "1"], "deepen needs --start and --copies"), (["generator"], "generator needs --pack")):
        with pytest.raises(SystemExit): tiny(command)
        assert says in capsys.readouterr().err

def test_packs_without_masks_or_questions_are_refused(packs):
    ask = lambda texts: [([1], [2])] * len(texts)
    bare = replace(packs, questions=[[{**q, "a": []} for q in qs] for qs in packs.questions])
    with pytest.raises(ValueError, match="has no mask"): QuestionBatches(bare, ask, packed_settings())
    with pytest.raises(ValueError, match="no scene of the pack has a question"): QuestionBatches(replace(packs, questions=[[]] * len(packs)), ask, packed_settings())
    some = QuestionBatches(replace(packs, questions=[[], *packs.questions[1:]]), ask, packed_settings(mention_weight=0.0))
    assert all(some(i, 0, 1)["rows"].any(-1).all() for i in range(6))

def test_means_do_not_depend_on_who_has_more():
    values, owner = torch.tensor([1.0, 2.0, 3.0, 7.0]), torch.tensor([0, 0, 0, 1])
    assert float(per_owner(values, owner, 2)) == pytest.approx(4.5) and float(per_owner(values[:3], owner[:3], 2)) == pytest.approx(1.0)

# ---- both families on samples ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("reasoning", [None, "It is red because it is not blue."])
def test_eight_samples_are_learned(family, reasoning, tmp_path):
    generator, s = FAMILIES[family](), settings(steps=25 if reasoning is None else 8)
    data = Mixture({"referring": squares(8, reasoning, hw=(64, 80))}, s.weights)
    log = train_samples(generator, data, tmp_path, s, progress=False)
    masks = [r["bce"] * s.bce_weight + r["dice"] * s.dice_weight for r in log]
    assert np.mean(masks[-3:]) < masks[0] and log[-1]["loss"] < log[0]["loss"], masks
    if family == "lisa": assert log[-1]["text"] < log[0]["text"]
    assert log[-1]["prompt_spread"] > 0
    again = load_generator(tmp_path / "generator")
    assert again.family == family
    sample = data.roles["referring"][0]
    a, b = (g.ground(sample.load_image(), sample.question, max_new_tokens=4).logits for g in (generator, again))
    assert a.shape == (64, 80) and torch.allclose(a, b, atol=1e-4)
    assert 0 <= measure_samples(again, squares(2), 4)["val_giou"] <= 1

def test_sam_and_vision_towers_stand_still(tmp_path):
    generator, s = lisa(), settings(steps=2, lora_rank=2, lora_alpha=4, train_words=True)
    frozen = {k: v.clone() for m in (generator.sam, generator.tower) for k, v in m.state_dict().items()}
    before = {k: v.clone() for k, v in generator.model.state_dict().items()}
    train_samples(generator, Mixture({"referring": squares(8)}, s.weights), tmp_path, s, progress=False)
    assert all(torch.equal(v, frozen[k]) for m in (generator.sam, generator.tower) for k, v in m.state_dict().items())
    after = generator.model.state_dict()
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    assert after.keys() == before.keys()
    assert {"model.layers.0.self_attn.q_proj.weight", "model.layers.1.self_attn.v_proj.weight", "model.text_hidden_fcs.0.0.weight", "lm_head.weight"} <= changed
    assert not any("k_proj" in k or "o_proj" in k or "mlp" in k or "mm_projector" in k for k in changed)
    run = load_file(tmp_path / "run" / "step-0000002" / "model.safetensors")
    assert run and all(".lora_" in k or "text_hidden_fcs" in k or "embed_tokens" in k or "lm_head" in k for k in run)

@pytest.mark.parametrize("family", FAMILIES)
def test_merged_adapters_say_the_same(family):
    generator = FAMILIES[family]()
    choose_weights(generator, settings(lora_rank=4, lora_alpha=8))
    for n, p in generator.model.named_parameters():
        if "lora_B" in n: nn.init.normal_(p, std=0.1)
    sample = squares(1)[0]
    generator.model.eval()
    adapted = generator.ground(sample.load_image(), sample.question, max_new_tokens=2).prompt_embed
    merge_lora(generator.model)
    merged = generator.ground(sample.load_image(), sample.question, max_new_tokens=2).prompt_embed
    plain = FAMILIES[family]().ground(sample.load_image(), sample.question, max_new_tokens=2).prompt_embed
    assert torch.allclose(adapted, merged, atol=1e-5) and not torch.allclose(plain, merged, atol=1e-4)

@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointing_and_accumulation_change_nothing(family, tmp_path):
    data = lambda s: Mixture({"referring": squares(8)}, s.weights)
    def losses(name, **changes):
        s = settings(steps=2, **changes)
        train_samples(FAMILIES[family](), data(s), tmp_path / name, s, progress=False)
        return [r["loss"] for r in curve(tmp_path / name)]
    plain = losses("plain", batch_size=8)
    assert losses("checkpointing", batch_size=8, checkpointing=True) == pytest.approx(plain, rel=1e-5)
    assert losses("accumulation", batch_size=4, accumulation=2) == pytest.approx(plain, rel=1e-4)

@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_around_bfloat16_weights(family, tmp_path):
    generator, s = FAMILIES[family](), settings(steps=2, precision="bf16", lora_rank=2, lora_alpha=4, checkpointing=True)
    generator.model.bfloat16()
    log = train_samples(generator, Mixture({"referring": squares(8)}, s.weights), tmp_path, s, squares(2), progress=False)
    assert all(np.isfinite(r["loss"]) for r in log)
    assert 0 <= json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])["val_giou"] <= 1
    assert load_file(tmp_path / "generator" / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"].dtype == torch.bfloat16

def test_ignored_pixels_do_not_count():
    generator, s = lens(), settings()
    sample = squares(1)[0]
    left = np.zeros((64, 64), bool); left[:, :32] = True
    trainee = SampleTrainee(generator, s)
    other = sample.load_mask() ^ left  # what differs is ignored
    loss_of = lambda **changes: float(trainee([prepare_sample(generator, replace(sample, **changes))], 0)[0].detach())
    losses = [loss_of(mask=to_rle(m), ignore=to_rle(left)) for m in (sample.load_mask(), other)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert losses[0] != pytest.approx(loss_of(), rel=1e-4)

@pytest.mark.parametrize("family", FAMILIES)
def test_answers_in_words_have_the_text_loss_alone(family):
    generator = FAMILIES[family]()
    if family == "lens": generator.direct = False
    trainee = SampleTrainee(generator, settings())
    talk, shown = (prepare_sample(generator, replace(squares(1)[0], reasoning="It is red."), masked) for masked in (False, True))
    loss, log = trainee([talk], 0)
    assert float(loss.detach()) == pytest.approx(float(log["text"])) and float(log["text"]) > 0 and float(log["bce"]) == 0
    both, parts = trainee([talk, shown], 0)
    assert float(parts["bce"]) > 0 and torch.isfinite(both)

def test_users_words_never_become_seg():
    sample = replace(squares(1)[0], reasoning="[SEG] is written here", question="where is [SEG]")
    generator = lisa()
    made = prepare_sample(generator, sample)
    assert made["ids"].count(generator.tokens.added[SEG]) == 1

def test_written_boxes_are_in_the_models_pixels():
    generator = lens(); generator.direct = False
    sample = squares(1)[0]
    made = prepare_sample(generator, replace(sample, image=sample.load_image()))
    text = generator.tokenizer.decode(made["answer"])
    ys, xs = np.nonzero(sample.load_mask())
    assert json.loads(text)["bbox_2d"] == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]

# ---- bad data -------------------------------------------------------------------------------------------------------------

@pytest.fixture
def source(monkeypatch):
    "Registers samples as the source `made:`."
    from rea2seg.data import sources
    monkeypatch.setattr(sources, "_kinds", dict(sources._kinds))
    return lambda samples: register_source("made", lambda where, split=None, limit=None, seed=None: Listed("made", samples, limit), needs_where=False)

def test_a_data_set_without_masks(source):
    source([replace(x, mask=None) for x in squares(3)])
    with pytest.raises(DataError, match="3 of 3 samples of made cannot be trained on: squares0: has no mask"): open_sources(["referring=made"], settings())

def test_some_bad_samples_can_be_left_out(source, capsys):
    good = squares(4)
    source([*good[:3], replace(good[3], mask=to_rle(np.zeros((64, 64), bool)))])
    with pytest.raises(DataError, match="1 of 4 samples .*squares3: has an empty mask"): open_sources(["referring=made"], settings())
    assert len(open_sources(["referring=made"], settings(), skip_bad=True)) == 3 and "squares3" in capsys.readouterr().out

def test_a_mask_of_another_size(tmp_path):
    bad = replace(squares(1)[0], name="odd1", image=lambda: np.zeros((64, 65, 3), np.uint8))
    with pytest.raises(SampleError, match="odd1: mask is 64x64 but the picture is 64x65"):
        train_samples(lens(), Mixture({"referring": [bad]}, settings().weights), tmp_path, settings(), progress=False)

@pytest.mark.parametrize("family", FAMILIES)
def test_a_question_longer_than_the_context(family, tmp_path):
    bad = replace(squares(1)[0], name="long1", question="the red square and " * 700)
    with pytest.raises(SampleError, match="^long1: .*context"):
        train_samples(FAMILIES[family](), Mixture({"referring": [bad]}, settings().weights), tmp_path, settings(), progress=False)

def test_an_unknown_role_and_setting(source, tmp_path, capsys):
    source(squares(2))
    with pytest.raises(DataError, match="no weight for dreams"): open_sources(["dreams=made"], settings())
    with pytest.raises(DataError, match="must say which role"): open_sources(["made"], settings())
    assert rea2seg(["train", "generator", "--data", "referring=made", "--set", "epoch=1", "--out", str(tmp_path)]) == 2
    assert "no setting is called epoch" in capsys.readouterr().err
    with pytest.raises(SettingsError, match="no setting is called"): load_section(SampleTraining, "lens.generator", colour=1)

# ---- the command ----------------------------------------------------------------------------------------------------------

def test_the_verb_trains_and_continues(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    save_generator(lens(), tmp_path / "start", torch.float32)
    mine = tmp_path / "mine"
    for kind in ("images", "masks"): (mine / kind).mkdir(parents=True)
    lines = []
    for x in squares(6):
        Image.fromarray(x.load_image()).save(mine / "images" / f"{x.name}.png"); Image.fromarray(x.load_mask().astype(np.uint8) * 255).save(mine / "masks" / f"{x.name}.png")
        lines.append({"image": f"{x.name}.png", "question": x.question})
    (mine / "questions.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    command = ["train", "generator", "--profile", "tiny", "--start", str(tmp_path / "start"), "--data", f"referring=folder:{mine}", "--validation", f"referring=folder:{mine}", "--validation-split", "train",
               "--device", "cpu", "--out", str(tmp_path / "out"), *[x for kv in ("epochs=4", "batch_size=3", "warmup_steps=1", "log_every=1", "learning_rate=3e-3") for x in ("--set", kv)]]
    assert rea2seg(command) == 0, capsys.readouterr().err
    rows = curve(tmp_path / "out")
    assert [r["step"] for r in rows] == list(range(1, 9)) and rows[-1]["loss"] < rows[0]["loss"]
    note = json.loads((tmp_path / "out" / "training.json").read_text())
    assert note["steps"] == 8 and note["settings"]["epochs"] == 4 and note["samples"] == {"referring": 6}
    assert load_generator(tmp_path / "out" / "generator").family == "lens"
    assert rea2seg(command) == 0 and curve(tmp_path / "out") == rows

# ---- the connection module alone ------------------------------------------------------------------------------------------

def test_only_the_connection_module_learns():
    polish = dict(trained="connector", attention_weight=0.0, attribute_weight=0.0)
    train = lambda **changes: GeneratorTrainee((g := load_generator("embedded:generator")).model, g.sam, [], load_section(GeneratorTraining, "tiny.generator", **polish | changes))
    names = {n.removeprefix("model.").split(".")[0] for n, p in train().named_parameters() if p.requires_grad}
    assert names == {"connector", "conv_1d", "proj_to_sam"}
    with pytest.raises(ValueError, match="trained must be all, eyes or connector, got 'half'"): train(trained="half")
    with pytest.raises(ValueError, match="must be 0 where only the connector is trained"): train(attention_weight=1.0)
