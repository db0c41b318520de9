"""The mask evaluator: grammar, shared prefix, batches, views, places of the question, reasoning, the other kinds, bad input."""
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings as hypothesis_settings, strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from rea2seg.evaluator import AttentionAgreement, InternvlEvaluator, Random, load_evaluator
from rea2seg.evaluator_internvl import GroupBuilder, collate
from rea2seg.groups import GroupScorer, GroupScores, expected_iou, make_groups, play_off
from rea2seg.internvl import SPECIAL_TOKENS, InternvlSize, load_internvl, new_internvl, save_evaluator, small_tokenizer
from rea2seg.masks import pairwise_iou
from rea2seg.prompts import TEMPLATES, Encoder, Picture, opening, stages
from rea2seg.records import CandidateSet, Grounding
from rea2seg.scoreline import SCORES, ScoreGrammar
from rea2seg.settings import Settings

FIXTURE = Path(__file__).resolve().parents[2] / "shared" / "parity" / "internvl-tiny-a"
needs_fixture = pytest.mark.skipif(not FIXTURE.is_dir(), reason="the parity fixture internvl-tiny-a is not here")
SIZE = InternvlSize(side=32, patch=8, vision_width=32, vision_layers=2, vision_heads=2, vision_mlp=48, text_width=32, text_layers=2, text_heads=4, text_kv_heads=2, text_mlp=48,
                    downsample=0.5, rope_theta=10000.0, positions=4096, tokens=500)
H, W = 40, 56
IMAGE = np.random.default_rng(0).integers(0, 256, (H, W, 3), np.uint8)
QUESTION = "the part on the left of the blue thing"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    "Models this small are slower with more, much slower where other programs want the cores."
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def wild(loaded, factor=5.0):
    "Random weights that care about their input: plain initialisation says nearly the same whatever it sees."
    with torch.no_grad():
        for p in loaded.model.parameters():
            if p.ndim > 1: p.mul_(factor)
    return loaded


def blobs(n, seed=0):
    g = np.random.default_rng(seed)
    yy, xx = np.mgrid[:H, :W]
    return torch.stack([torch.tensor((xx - g.integers(W)) ** 2 + (yy - g.integers(H)) ** 2 < g.integers(20, 400)) for _ in range(n)]) if n else torch.zeros(0, H, W, dtype=torch.bool)


def merging_tokenizer():
    "Digits are merged as training on numbers does it, and spaces go with what follows."
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    lines = [f"the mask {i} of 0.{i % 100:02d} and 1.00, 0.5 of {i}" for i in range(400)]
    tok.train_from_iterator(lines, trainers.BpeTrainer(vocab_size=450, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False))
    tok.add_special_tokens(list(SPECIAL_TOKENS))
    return PreTrainedTokenizerFast(tokenizer_object=tok, eos_token="<|im_end|>", pad_token="<|endoftext|>")


@pytest.fixture(scope="module")
def small(): return wild(new_internvl(SIZE, small_tokenizer(["the mask of the question", QUESTION], 400)))
@pytest.fixture(scope="module")
def merging(): return wild(new_internvl(SIZE, merging_tokenizer()))


def settings_of(**changes):
    return Settings.load("tiny", **(dict(prompt="full", question_place="before", mask_view="binary", scoring="text", consensus=0.0, chain_of_thought=False, group_size=5) | changes))


def line_of(template, n): return re.escape(template.open) + re.escape(template.sep).join([r"(0\.\d\d|1\.00)"] * n) + re.escape(template.close)


# --- every score parses ---------------------------------------------------------------------------------------------------

def test_two_thousand_scorings_with_random_weights_all_parse():
    "Groups scored by random models, both kinds of tokenizer, all prompts, both ways of scoring; 0 unparsable."
    masks, scorings, bad = blobs(200), 0, 0
    for seed, tokenizer in enumerate([small_tokenizer(), merging_tokenizer()]):
        for prompt, scoring in (("brief", "text"), ("brief", "expected"), ("turns", "text"), ("full", "text")):
            ev = InternvlEvaluator(wild(new_internvl(SIZE, tokenizer, seed=seed), 3.0), settings_of(prompt=prompt, scoring=scoring))
            for k in range(7 if prompt == "brief" else 6 if prompt == "turns" else 5):
                got = ev.score(IMAGE, f"{QUESTION} {k}", masks)
                lines = [t for raw in got.raw for t in (raw.split("\n") if prompt == "turns" else [raw])]
                sizes = [1] * 200 if prompt == "turns" else [len(g) for g in got.groups]
                bad += sum(not re.fullmatch(line_of(TEMPLATES[prompt], n), t) for t, n in zip(lines, sizes, strict=True))
                bad += int((~torch.isfinite(got.ious) | (got.ious < 0) | (got.ious > 1)).sum())
                scorings += len(got.groups)
    assert scorings >= 2000 and bad == 0


@pytest.mark.parametrize("scoring", ["text", "expected"])
def test_reasoning_is_free_and_bounded_and_the_line_still_parses(small, merging, scoring):
    for loaded in (small, merging):
        ev = InternvlEvaluator(loaded, settings_of(chain_of_thought=True, max_reasoning_tokens=15, scoring=scoring))
        got = ev.score(IMAGE, QUESTION, blobs(12))
        assert len(got.reasoning) == 3
        for raw, said, g in zip(got.raw, got.reasoning, got.groups):
            assert re.search(line_of(TEMPLATES["full"], len(g)) + "$", raw) and len(loaded.tokenizer.encode(said)) <= 3 * 15
            assert not any(t in said for t in SPECIAL_TOKENS)


def test_written_scores_are_the_values():
    loaded, g = new_internvl(SIZE, small_tokenizer(["the mask of the question", QUESTION], 400), seed=2), torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in loaded.model.parameters(): p.add_(torch.randn(p.shape, generator=g) * 0.8)
    got = InternvlEvaluator(loaded, settings_of()).score(IMAGE, QUESTION, blobs(12))
    for raw, g in zip(got.raw, got.groups): assert json.loads(raw)["iou"] == pytest.approx([got.ious[i].item() for i in g], abs=1e-6)
    assert len(set(got.ious.tolist())) > 3      # the model does look


def test_expected_is_the_mean_of_the_distribution(small, merging):
    "Against the logits of plain forward passes over every way to write the first score."
    for loaded in (small, merging):
        ev = InternvlEvaluator(loaded, settings_of(scoring="expected", prompt="brief"))
        mask, g = blobs(1), ev.writer.grammar
        got = ev.score(IMAGE, QUESTION, mask).ious[0].item()
        b = ev.builder
        head = b.opening(QUESTION, 1) + b.stages(QUESTION, [1], False)[0][0]
        pixels = torch.cat([b.photo(IMAGE), *b.masks(IMAGE, mask)])
        def mean(text="", ids=()):
            if text in SCORES: return float(text)
            if len(left := {s for s in SCORES if s.startswith(text)}) == 1: return float(left.pop())
            c = g.choices[text]
            if len(c.ids) == 1: return mean(c.texts[0], (*ids, int(c.ids[0])))
            with torch.no_grad(): logits = loaded.model(input_ids=torch.tensor([head + list(ids)]), pixel_values=pixels).logits[0, -1]
            p = logits[c.ids].double().softmax(0)
            return sum(p[k].item() * mean(c.texts[k], (*ids, int(c.ids[k]))) for k in range(len(c.ids)))
        assert got == pytest.approx(mean(), abs=1e-5)


def test_expected_breaks_ties(small):
    text, mean = (InternvlEvaluator(small, settings_of(scoring=s)).score(IMAGE, QUESTION, blobs(60)).ious for s in ("text", "expected"))
    assert len(set(mean.tolist())) > 50 and len(set(text.tolist())) < 30


# --- shared prefix and batches -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("prompt", ["full", "brief", "turns"])
@pytest.mark.parametrize("scoring", ["text", "expected"])
@pytest.mark.parametrize("place", ["before", "after", "repeated"])
def test_shared_equals_one_group_at_a_time(small, merging, prompt, scoring, place):
    masks = blobs(12)
    for loaded in (small, merging):
        s = settings_of(prompt=prompt, scoring=scoring, question_place=place)
        a, b = (InternvlEvaluator(loaded, s, share=share).score(IMAGE, QUESTION, masks) for share in (True, False))
        torch.testing.assert_close(a.ious, b.ious, atol=1e-4, rtol=0)
        assert a.raw == b.raw and a.groups == b.groups and a.usage["tokens"] < b.usage["tokens"]


def test_shared_equals_one_group_at_a_time_with_reasoning(small):
    s = settings_of(chain_of_thought=True, max_reasoning_tokens=20, scoring="expected")
    a, b = (InternvlEvaluator(small, s, share=share).score(IMAGE, QUESTION, blobs(7)) for share in (True, False))
    torch.testing.assert_close(a.ious, b.ious, atol=1e-4, rtol=0)
    assert a.reasoning == b.reasoning


def test_equal_to_transformers_generate(small):
    "The same scores as `generate` with the whole prompt, held to the same grammar by transformers' own hook."
    ev = InternvlEvaluator(small, settings_of())
    masks, g, b = blobs(3), ev.writer.grammar, ev.builder
    got = ev.score_groups(IMAGE, QUESTION, masks, [(0, 1, 2)])
    head = torch.tensor([b.opening(QUESTION, 1) + b.stages(QUESTION, [1, 1, 1], False)[0][0]])
    enc = b.encoder
    def allowed(_, ids):
        new = ids[head.shape[1]:].tolist()
        for k in range(3):
            text = ""
            while text not in SCORES:
                if not new: return g.choices[text].ids.tolist()
                c = g.choices[text]; text = c.texts[c.ids.tolist().index(new.pop(0))]
            for t in enc.text(b.template.sep if k < 2 else b.template.close):
                if not new: return [t]
                new.pop(0)
        return [enc.ids["<|im_end|>"]]
    out = small.model.generate(input_ids=head, attention_mask=torch.ones_like(head), pixel_values=torch.cat([b.photo(IMAGE), *b.masks(IMAGE, masks)]), do_sample=False, max_new_tokens=60,
                               prefix_allowed_tokens_fn=allowed, eos_token_id=enc.ids["<|im_end|>"], pad_token_id=0)
    said = small.tokenizer.decode(out[0, head.shape[1]:-1])
    assert b.template.open + said == got.raw[0]


@needs_fixture
def test_on_the_original_checkpoint():
    "A checkpoint in the original layout, several tiles a picture: shared equals one at a time."
    loaded = load_internvl(FIXTURE)
    masks = torch.zeros(7, 90, 160, dtype=torch.bool)
    for k in range(7): masks[k, 10:20 + 10 * k, 20 * k:20 * k + 40] = True
    photo = np.random.default_rng(1).integers(0, 256, (90, 160, 3), np.uint8)
    for scoring in ("text", "expected"):
        s = Settings.load("lens", scoring=scoring, chain_of_thought=True, max_reasoning_tokens=6)
        a, b = (InternvlEvaluator(loaded, s, share=share).score(photo, QUESTION, masks) for share in (True, False))
        torch.testing.assert_close(a.ious, b.ious, atol=1e-4, rtol=0)
    assert InternvlEvaluator(loaded, s).builder.photo_tiles == 2     # 12 shared by six pictures
    ev = load_evaluator(FIXTURE / "lora-original-layout", Settings.load("lens", chain_of_thought=False))
    assert ev.kind == "internvl" and ev.score(photo, QUESTION, masks).ious.shape == (7,)


def test_what_was_read_and_reasoned_is_kept(small, monkeypatch):
    "The same question about the same picture, other masks, groups or ways to read scores: reasoned about once, scored as from the start; all else is read anew."
    s, masks, said = settings_of(prompt="bare", chain_of_thought=True, max_reasoning_tokens=6), blobs(7), []
    ev = InternvlEvaluator(small, s)
    think = InternvlEvaluator._think
    monkeypatch.setattr(InternvlEvaluator, "_think", lambda self, rows: said.append(1) or think(self, rows))
    fresh = lambda question=QUESTION, image=IMAGE, shown=masks, **changes: InternvlEvaluator(small, settings_of(prompt="bare", chain_of_thought=True, max_reasoning_tokens=6, **changes)).score(image, question, shown)
    first = ev.score(IMAGE, QUESTION, masks)
    assert len(said) == 1
    for changes in (dict(), dict(group_size=2), dict(scoring="expected"), dict(rounds=2)):
        other = ev.like(settings_of(prompt="bare", chain_of_thought=True, max_reasoning_tokens=6, **changes))
        for shown in (masks, masks[2:5]):
            said.clear(); got = other.score(IMAGE, QUESTION, shown)
            assert not said
            want = fresh(shown=shown, **changes)
            assert torch.equal(got.ious, want.ious) and got.reasoning == want.reasoning and got.usage["tokens"] < want.usage["tokens"]
    for question, image, changes in ((QUESTION + "?", IMAGE, dict()), (QUESTION, 255 - IMAGE, dict()), (QUESTION, IMAGE, dict(max_reasoning_tokens=5)), (QUESTION, IMAGE, dict(chain_of_thought=False))):
        said.clear(); ev.like(settings_of(**dict(prompt="bare", chain_of_thought=True, max_reasoning_tokens=6) | changes)).score(image, question, masks)
        assert said == [1]
    assert len(ev._openings) == 2
    ev.forget(); said.clear()
    assert torch.equal(ev.score(IMAGE, QUESTION, masks).ious, first.ious) and said == [1]
    none = InternvlEvaluator(small, s, options=replace(ev.builder.options, openings_kept=0))
    for _ in range(2): said.clear(); assert torch.equal(none.score(IMAGE, QUESTION, masks).ious, first.ious) and said == [1]


def test_features_are_kept_by_content(small, monkeypatch):
    ev, seen = InternvlEvaluator(small, settings_of()), []
    look = small.model.get_image_features
    monkeypatch.setattr(small.model, "get_image_features", lambda pixel_values, **k: seen.append(len(pixel_values)) or look(pixel_values=pixel_values, **k))
    masks = blobs(6)
    first = ev.score(IMAGE, QUESTION, masks)
    assert seen == [7]
    ev.score(IMAGE, "another question", masks[[3, 1, 5]])
    assert seen == [7]
    assert torch.equal(ev.score(IMAGE, QUESTION, masks).ious, first.ious) and seen == [7]
    ev.score(255 - IMAGE, QUESTION, torch.cat([masks, masks[:1], ~masks[:1]]))     # new photo and one new mask, a repeated one once
    assert seen == [7, 2]
    over = InternvlEvaluator(small, settings_of(mask_view="overlay"))
    over.score(IMAGE, QUESTION, masks); over.score(255 - IMAGE, QUESTION, masks)        # an overlay depends on the photo
    assert seen == [7, 2, 7, 7]
    ev.forget(); ev.score(IMAGE, QUESTION, masks)
    assert seen[-1] == 7
    tight = InternvlEvaluator(small, settings_of(), options=replace(ev.builder.options, features_kept=3, tiles_at_once=2))
    torch.testing.assert_close(tight.score(IMAGE, QUESTION, masks).ious, first.ious, atol=1e-4, rtol=0)
    assert len(tight._kept) == 3


@pytest.mark.parametrize("view", ["binary", "overlay", "cutout"])
def test_views_reach_the_model(small, view):
    got = {v: InternvlEvaluator(small, settings_of(mask_view=v, scoring="expected")).score(IMAGE, QUESTION, blobs(3)).ious for v in ("binary", "overlay", "cutout")}
    assert all(not torch.equal(got[view], got[v]) for v in got if v != view)


# --- any number of masks, bad input ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("n", [0, 1, 4, 5, 6, 200])
@pytest.mark.parametrize("rounds", [1, 2])
def test_any_number_of_masks(small, n, rounds):
    got = InternvlEvaluator(small, settings_of(prompt="brief", rounds=rounds)).score(IMAGE, QUESTION, blobs(n))
    assert got.ious.shape == (n,) and got.ious.dtype == torch.float32
    groups = got.groups if rounds == 1 or n <= 5 else got.groups[:-1]
    assert sorted(i for g in groups for i in g) == list(range(n)) and len(got.groups) == len(got.raw) == -(-n // 5) + (rounds == 2 and n > 5)


@pytest.mark.parametrize("size", [1, 2, 7])
def test_group_size(small, size):
    got = InternvlEvaluator(small, settings_of(prompt="brief", group_size=size)).score(IMAGE, QUESTION, blobs(9))
    assert [len(g) for g in got.groups] == [size] * (9 // size) + [9 % size] * bool(9 % size)


def test_the_seed_shuffles(small):
    score = lambda seed: InternvlEvaluator(small, settings_of(seed=seed)).score(IMAGE, QUESTION, blobs(12))
    assert score(0).groups == score(0).groups != score(1).groups and torch.equal(score(3).ious, score(3).ious)


@pytest.mark.parametrize("kind", ["internvl", "predicted_iou", "oracle", "random", "attention"])
def test_bad_input(small, kind):
    ev = InternvlEvaluator(small, settings_of()) if kind == "internvl" else load_evaluator(kind)
    context = dict(candidates=candidates(2), grounding=grounding(), ground_truth=blobs(1)[0])
    ok = blobs(2)
    assert ev.score(IMAGE, QUESTION, ok, **context).ious.shape == (2,)
    with pytest.raises(ValueError, match=rf"masks are {H}x{W - 1} .* picture is {H}x{W}"): ev.score(IMAGE, QUESTION, ok[:, :, 1:], **context)
    with pytest.raises(TypeError, match="bool"): ev.score(IMAGE, QUESTION, ok.float(), **context)
    with pytest.raises(TypeError, match="bool"): ev.score(IMAGE, QUESTION, ok[0], **context)
    with pytest.raises(TypeError, match="uint8"): ev.score(IMAGE / 255, QUESTION, ok, **context)
    with pytest.raises(ValueError, match="question"): ev.score(IMAGE, "", ok, **context)
    empty = context | {"candidates": candidates(0)}
    assert ev.score(IMAGE, QUESTION, ok[:0], **empty).ious.shape == (0,)


def test_too_long_a_question_is_an_error_and_not_garbage(small):
    ev = InternvlEvaluator(small, settings_of())
    with pytest.raises(ValueError, match="4096"): ev.score(IMAGE, "x" * 5000, blobs(3))


# --- prompts -----------------------------------------------------------------------------------------------------------------

@hypothesis_settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(["<", "|", ">", "<img>", "</img>", "<IMG_CONTEXT>", "<|im_end|>", "<|im_start|>", "im_end", "a", "\n", " ", "é", "{question}", "{n}"]), max_size=12).map("".join)
       | st.lists(st.sampled_from(["<img>", "<IMG_CONTEXT>", "<|im_end|>", "<|im_", "end|>", "<", "x{0}", "\ud800", "０"]), max_size=8).map("".join))
def test_a_users_text_never_becomes_control_tokens(text):
    for tokenizer in (_single, _merged):
        enc = Encoder(tokenizer, 4)
        assert not set(enc.text(text)) & set(enc.added.values())
        clean = text.encode("utf-8", "replace").decode()
        assert tokenizer.decode(enc.text(text), clean_up_tokenization_spaces=False) == clean
        if not text: continue
        parts = opening(TEMPLATES["full"], text, "binary", "repeated") + [p for s in stages(TEMPLATES["full"], text, 2, "repeated", True) for p in s.parts]
        ids = enc(parts, [1, 1, 1])
        assert ids.count(enc.ids["<IMG_CONTEXT>"]) == 12 and ids.count(enc.ids["<img>"]) == 3 and ids.count(enc.ids["<|im_start|>"]) == 3 and ids.count(enc.ids["<|im_end|>"]) == 2

_single, _merged = small_tokenizer(["the mask"], 300), merging_tokenizer()


@needs_fixture
def test_prompt_ids_are_the_originals():
    "The original's own prompt, built from parts, has the reference's ids."
    from safetensors.torch import load_file
    given, meta, loaded = load_file(FIXTURE / "inputs.safetensors"), json.loads((FIXTURE / "meta.json").read_text()), load_internvl(FIXTURE)
    enc = Encoder(loaded.tokenizer, loaded.tokens_per_tile)
    texts = re.split(r"(<image>|<\|im_start\|>|<\|im_end\|>)", meta["prompt"]["rendered_with_image_markers"])
    from rea2seg.prompts import Control
    images = iter(range(6))
    parts = [Picture(next(images)) if t == "<image>" else Control(t) if t.startswith("<|") else t for t in texts if t]
    assert enc(parts, given["num_patches_list"].tolist()) == given["prompt_ids"][0].tolist()
    assert enc([meta["prompt"]["answer"].removesuffix("<|im_end|>"), Control("<|im_end|>")]) == given["answer_ids"][0].tolist()


def test_grammar_of_a_tokenizer_without_digits_is_refused():
    tok = Tokenizer(models.WordLevel({"a": 0, "x": 1, "[UNK]": 2}, unk_token="[UNK]"))
    with pytest.raises(ValueError, match="no token that continues"): ScoreGrammar(PreTrainedTokenizerFast(tokenizer_object=tok, unk_token="[UNK]"))


# --- training inputs ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("prompt", ["full", "brief", "turns"])
@pytest.mark.parametrize("reasoning", [None, "It is the left one. The second mask spills over."])
def test_training_inputs_are_what_scoring_reads(small, merging, prompt, reasoning):
    "Teacher-forced on its own answer, the model's logits prefer exactly what scoring wrote; labels cover the answer alone."
    for loaded in (small, merging):
        ev = InternvlEvaluator(loaded, settings_of(prompt=prompt, question_place="repeated"))
        masks = blobs(4)
        said = ev.score_groups(IMAGE, QUESTION, masks, [(0, 1, 2, 3)])
        g = ev.builder.group_inputs(IMAGE, QUESTION, masks, said.values[0], reasoning)
        assert [loaded.tokenizer.decode(g.input_ids[a:b].tolist()) for a, b in g.numbers] == [f"{v:.2f}" for v in said.values[0]]
        learnt = loaded.tokenizer.decode(g.labels[g.labels >= 0].tolist())
        answer = (reasoning + "\n" if reasoning else "") + said.raw[0] + "<|im_end|>"
        if prompt == "turns": # the first line starts where scoring has already written the opening, as each further one
            assert re.sub(r"IoU: |\n|<\|im_end\|>", "", learnt) == re.sub(r"IoU: |\n|<\|im_end\|>", "", answer) and learnt.count("<|im_end|>") == 4
        else: assert answer.endswith(learnt) and (reasoning is None or learnt == answer)
        if reasoning is None:
            with torch.no_grad(): logits = loaded.model(input_ids=g.input_ids[None], pixel_values=g.pixel_values).logits[0]
            for (a, _), value in zip(g.numbers, said.values[0]):
                text, at = "", a
                i, _ = ev.writer.grammar.best("", logits[a - 1])
                if loaded is small: # one way to write a score
                    while text not in SCORES: i, text = ev.writer.grammar.best(text, logits[at - 1]); assert i == g.input_ids[at]; at += 1
                    assert float(text) == value


def test_training_batches_have_gradients(small):
    b = GroupBuilder(small.tokenizer, small.tiling, small.tokens_per_tile, settings_of(prompt="brief"))
    one, two = b.group_inputs(IMAGE, QUESTION, blobs(5), [0.1, 0.2, 0.3, 0.4, 1.0]), b.group_inputs(IMAGE, "it", blobs(2), [0.5, 0.0], "Short.")
    model = new_internvl(SIZE, small.tokenizer).model
    batch = collate([one, two], small.tokenizer.pad_token_id)
    assert batch["pixel_values"].shape[0] == 9 and batch["labels"][1, len(two.input_ids):].eq(-100).all()
    model(**batch).loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        both = model(**batch).logits
        alone = model(input_ids=two.input_ids[None], pixel_values=two.pixel_values).logits
    torch.testing.assert_close(both[1, :len(two.input_ids)], alone[0], atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="2 masks but 1 IoUs"): b.group_inputs(IMAGE, "it", blobs(2), [0.5])


# --- groups and play-off -----------------------------------------------------------------------------------------------------

class Sheet(GroupScorer):
    "Reads scores off a list, a second one for the second round."
    def __init__(self, settings, first, second): super().__init__(settings); self.rounds, self.asked = [first, second], []
    def score_groups(self, image, question, masks, groups):
        self.asked.append(groups)
        return GroupScores([[self.rounds[len(self.asked) - 1][i] for i in g] for g in groups], usage={"calls": len(groups)})


def test_the_play_off_decides_between_the_leaders():
    first = [0.8] * 5 + [0.1] * 4 + [0.75, 0.7, 0.2]
    ev = Sheet(settings_of(rounds=2), first, {**{i: 0.3 for i in range(12)}, 3: 0.9})
    got = ev.score(IMAGE, QUESTION, blobs(12))
    assert sorted(ev.asked[1][0]) == [0, 1, 2, 3, 4] and got.ious.argmax() == 3 and got.usage == {"calls": 4}
    assert got.ious[3] == pytest.approx(0.85) and got.ious[0] == pytest.approx(0.55) and got.ious[9] == pytest.approx(0.75)


@pytest.mark.parametrize("rounds", [1, 2])
def test_estimates_are_read_together(small, rounds):
    "As from the estimates by themselves; copies of a mask get one score, whatever group they stood in."
    masks = torch.cat([blobs(7), blobs(7)[2:4]])
    alone, together = (InternvlEvaluator(small, settings_of(prompt="brief", scoring="expected", rounds=rounds, consensus=c)).score(IMAGE, QUESTION, masks) for c in (0.0, 0.05))
    assert torch.allclose(together.ious, expected_iou(alone.ious, masks, 0.05)) and together.raw == alone.raw
    assert torch.allclose(together.ious[2:4], together.ious[7:], atol=1e-6) and not torch.allclose(alone.ious[2:4], alone.ious[7:], atol=1e-6)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.floats(0.005, 1), st.randoms(use_true_random=False))
def test_an_expected_iou_is_one(values, temperature, random):
    t, masks = torch.tensor(values), blobs(len(values))
    out, order = expected_iou(t, masks, temperature), random.sample(range(len(values)), len(values))
    assert 0 <= out.min() and out.max() <= t.max() + 1e-6
    assert torch.allclose(expected_iou(t[order], masks[order], temperature), out[order], atol=1e-5)
    sure = torch.zeros(len(t)); sure[order[0]] = 1
    assert torch.allclose(expected_iou(sure, masks, 0.005), pairwise_iou(masks, masks)[order[0]], atol=1e-5)


@given(st.lists(st.floats(0, 1), min_size=6, max_size=20), st.data())
def test_the_winner_took_part(values, data):
    t = torch.tensor(values)
    leaders = t.argsort(descending=True)[:5].tolist()
    again = {i: data.draw(st.floats(0, 1)) for i in leaders}
    out = play_off(t, again)
    assert 0 <= out.min() and out.max() <= 1
    best = max(out[i].item() for i in leaders)
    assert all(out[i] < best or best < 0.006 for i in range(len(values)) if i not in leaders)


@given(st.integers(0, 300), st.integers(1, 12), st.integers(0, 5))
def test_groups_lose_nothing(n, size, seed):
    groups = make_groups(n, size, seed)
    assert sorted(i for g in groups for i in g) == list(range(n)) and all(len(g) == size for g in groups[:-1]) and all(groups)


# --- the other kinds ---------------------------------------------------------------------------------------------------------

def candidates(n):
    return CandidateSet(blobs(n), ("amg",) * n, torch.linspace(1.2, 0.2, n), torch.ones(n))


def grounding(attention=None, n=1):
    boxes = torch.tensor([[14. * x, 10. * y, 14. * x + 14, 10. * y + 10] for y in range(4) for x in range(4)])
    a = torch.rand(1, 16, generator=torch.Generator().manual_seed(0)) if attention is None else attention
    return Grounding(torch.zeros(1, 1, 4), torch.zeros(1, 1, 8, 8), a, torch.zeros(H, W), boxes, (4, 4))


def test_predicted_iou_is_sams_and_stays_in_range():
    c = candidates(3)
    assert load_evaluator("predicted_iou").score(IMAGE, QUESTION, c.masks, candidates=c).ious.tolist() == pytest.approx([1.0, 0.7, 0.2])
    with pytest.raises(ValueError, match="3 masks but 2 candidates"): load_evaluator("predicted_iou").score(IMAGE, QUESTION, c.masks, candidates=c[:2])
    with pytest.raises(ValueError, match="needs candidates="): load_evaluator("predicted_iou").score(IMAGE, QUESTION, c.masks)


def test_oracle():
    masks = blobs(6)
    got = load_evaluator("oracle").score(IMAGE, QUESTION, masks, ground_truth=masks[2]).ious
    assert got.argmax() == 2 and got[2] == 1
    with pytest.raises(ValueError, match="ground_truth is"): load_evaluator("oracle").score(IMAGE, QUESTION, masks, ground_truth=masks[2, 1:])


def test_attention_prefers_where_the_model_looked():
    a = torch.zeros(1, 16); a[0, 5] = 0.7
    masks = torch.zeros(3, H, W, dtype=torch.bool)
    masks[0, 10:20, 14:28] = True; masks[1, 10:20, 14:42] = True; masks[2, 30:, :14] = True
    got = AttentionAgreement().score(IMAGE, QUESTION, masks, grounding=grounding(a)).ious
    assert got.tolist() == pytest.approx([1.0, 0.5, 0.0])
    flat = AttentionAgreement().score(IMAGE, QUESTION, masks, grounding=grounding(torch.zeros(1, 16))).ious
    assert torch.isfinite(flat).all() and flat.max() == 0


def test_random_depends_on_question_and_seed_alone():
    masks, r = blobs(200), Random(0)
    assert torch.equal(r.score(IMAGE, QUESTION, masks).ious, Random(0).score(255 - IMAGE, QUESTION, masks).ious)
    assert not torch.equal(r.score(IMAGE, QUESTION, masks).ious, r.score(IMAGE, "else", masks).ious)
    assert 0.4 < r.score(IMAGE, QUESTION, masks).ious.mean() < 0.6


def test_load_by_path_and_profile(small, tmp_path):
    folder = save_evaluator(small, tmp_path / "e")
    s = settings_of(evaluator=str(folder), evaluator_kind="internvl")
    want = InternvlEvaluator(small, s).score(IMAGE, QUESTION, blobs(6)).ious
    for name in (folder, str(folder), "internvl", None):
        torch.testing.assert_close(load_evaluator(name, s).score(IMAGE, QUESTION, blobs(6)).ious, want, atol=1e-5, rtol=0)
