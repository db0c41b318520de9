"""The LISA family against recorded outputs of the reference, and what can go wrong with it."""
import json
import re
import shutil
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings, strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaForCausalLM, LlamaTokenizer

from rea2seg import lisa as lisa_module, lisa_model
from rea2seg.attention import record_attention
from rea2seg.checkpoints import CheckpointError
from rea2seg.generators import load_generator
from rea2seg.lisa import NO_SEG, LisaGenerator, says_present
from rea2seg.lisa_model import layout
from rea2seg.lisa_new import conversations, new_lisa, original_sam1, save_lisa
from rea2seg.lisa_prompt import END, IMAGE_ID, SEG, START, LisaTokens, Token, prompt_parts, train_tokens
from rea2seg.sam_core import normalise

PARITY = Path(__file__).resolve().parents[2] / "shared" / "parity"
MASK, ELSE = 5e-4, 1e-4

class Case:
    "A fixture's tensors and texts, and the generator loaded from it."
    def __init__(self, name: str):
        self.folder = PARITY / name
        if not self.folder.is_dir(): pytest.skip(f"{self.folder} is not on this machine")
        self.inputs, self.outputs = (load_file(self.folder / f"{part}.safetensors") for part in ("inputs", "outputs"))
        self.meta = json.loads((self.folder / "meta.json").read_text())
        self.image = np.array(Image.open(self.folder / "image.png").convert("RGB"))
        self.gen = load_generator(self.folder, sam_config=self.meta["sam_vit"])
        self.gen.system = self.meta["prompt"]["system"]
        self.sam_u8 = np.array(Image.open(self.folder / "sam_image_u8.webp").convert("RGB"))
        pixels = normalise(self.sam_u8)
        self.sam_images = F.pad(pixels, (0, 1024 - pixels.shape[3], 0, 1024 - pixels.shape[2]))
        self.grounded = self.ground()
        with torch.no_grad(): self.out = self.gen.model(self.inputs["input_ids"], self.gen.tower(self.inputs["pixel_values_clip"]), attention=True)

    def tensors(self, **other):
        own = {k: self.inputs[k] for k in ("input_ids", "attention_mask", "pixel_values_clip", "resize_hw", "orig_hw") if k in self.inputs}
        return own | {"sam_images": self.sam_images} | other

    def ground(self, **other): return self.gen.ground_tensors(**self.tensors(**other))

_cases = {}
@pytest.fixture(params=["lisa-tiny-a", "sesame-tiny-a"])
def case(request) -> Case:
    if request.param not in _cases: _cases[request.param] = Case(request.param)
    return _cases[request.param]

@pytest.fixture
def sesame() -> Case:
    if "sesame-tiny-a" not in _cases: _cases["sesame-tiny-a"] = Case("sesame-tiny-a")
    return _cases["sesame-tiny-a"]

def close(actual, expected, atol):
    assert actual.shape == expected.shape, (list(actual.shape), list(expected.shape))
    worst = (actual.float() - expected.float()).abs().max().item()
    assert worst <= atol, f"max abs difference {worst:.2g} > {atol:.2g}"

# ---- the reference's recorded outputs -------------------------------------------------------------------------------------

def test_text_becomes_the_references_ids(case):
    tokens, prompt = case.gen.tokens, case.meta["prompt"]
    ids = case.inputs["input_ids"][0].tolist()
    assert case.gen.prompt_ids(prompt["question"]) == case.inputs["prompt_ids"][0].tolist()
    assert tokens.encode(tokens.parse(prompt["answer"]), bos=False) == case.inputs["answer_ids"][0].tolist()
    assert tokens.encode(tokens.parse(prompt["rendered"] + " " + prompt["answer"])) == ids
    assert tokens.seg == case.meta["seg_token_idx"] and ids.count(IMAGE_ID) == 1

def test_batch_of_questions_becomes_the_references_ids(sesame):
    meta = sesame.meta["batch2"]
    for ids, text, pads in zip(sesame.inputs["batch2_prompt_ids"].tolist(), meta["questions"], meta["left_pads"], strict=True):
        assert [0] * pads + sesame.gen.prompt_ids(text) == ids
    for ids, answer in zip(meta["answer_ids"], meta["answers"], strict=True):
        assert sesame.gen.tokens.encode(sesame.gen.tokens.parse(answer), bos=False) == ids

def test_clip_pixels(case):
    pixels, step = case.gen.tower.pixels(case.image), case.inputs["pixel_values_clip"].shape[-1] // case.inputs["pixel_values_clip_exact_sub8"].shape[-1]
    close(pixels[..., ::step, ::step], case.inputs["pixel_values_clip_exact_sub8"], 1e-6)
    close(pixels, case.inputs["pixel_values_clip"], 2e-3) # float16 on disk

def test_sam_pixels(case):
    pixels, hw = case.gen.sam.prepare(case.image)
    assert list(hw) == case.inputs["resize_hw"].tolist() == case.meta["image"]["sam_resize_hw"]
    close(pixels, case.sam_images, 1e-5)

def test_vision_features(case):
    features = case.gen.tower(case.inputs["pixel_values_clip"])
    close(features, case.outputs["clip_features"], ELSE)
    close(case.gen.model.model.mm_projector(features), case.outputs["image_features"], ELSE)

def test_places(case):
    where, out = case.out.layout, case.outputs
    assert (case.inputs["input_ids"][0] == case.gen.tokens.seg).nonzero()[:, 0].tolist() == out["seg_token_index"].tolist()
    assert where.places.tolist() == out["seg_position_embedding"].tolist()
    assert where.columns[0].tolist() == out["image_columns"].tolist()
    assert where.tokens == out.get("num_patches", torch.tensor([256])).item()

def test_language_model(case):
    out = case.out
    close(out.hidden, case.outputs["last_hidden_state"], ELSE)
    close(out.hidden[0, out.layout.places], case.outputs["seg_hidden_state"], ELSE)
    close(out.hidden[0, out.layout.places + 1], case.outputs["hidden_at_seg_token"], ELSE)
    close(out.logits[0, out.layout.places], case.outputs["logits_predicting_seg"], ELSE)
    close(out.embeds, case.outputs["pred_embedding"], ELSE)

def test_attention(case):
    close(case.out.attention, case.outputs["attn_predicting_seg_image"].transpose(0, 1), ELSE)
    close(case.grounded.attention_layers, case.outputs["attn_predicting_seg_image_mean"][:, 0], ELSE)
    ids, gen, at = case.inputs["input_ids"], case.gen, case.out.layout
    with torch.no_grad(), record_attention(gen.model, at.places + 1, at.columns, submodule=gen.model.model) as there: gen.model(ids, gen.tower(case.inputs["pixel_values_clip"]))
    close(there.rows, case.outputs["attn_seg_token_image_mean"], ELSE) # the [SEG] token's own row is another one
    assert (there.rows[:, 0] - case.grounded.attention_layers).abs().max() > 10 * ELSE

def test_sam_features(case):
    close(case.grounded.embedding.features[:, :, ::8, ::8], case.outputs["sam_image_embed_sub"], ELSE)

def test_masks(case):
    g, out, sam = case.grounded, case.outputs, case.gen.sam
    close(g.prompt_embed[:, 0], out["pred_embedding"], ELSE)
    close(g.low_res_masks, out["low_res_masks"], MASK)
    close(g.logits[None], out["pred_masks"], MASK)
    assert g.logits.dtype == torch.float32 and (g.initial != (out["pred_masks"][0] > 0)).sum() <= 5
    close(sam.decode(g.embedding, prompt_embed=g.prompt_embed, multimask=False).ious, out["low_res_iou"], ELSE)
    three = sam.decode(g.embedding, prompt_embed=g.prompt_embed)
    close(three.logits[..., ::4, ::4], out["multimask_low_res_sub4"], MASK)
    close(three.ious, out["multimask_iou"], ELSE)

def test_sesames_own_evaluation(sesame):
    assert (sesame.grounded.initial.int() != sesame.outputs["evaluate_mask"].int()).sum() <= 5
    assert says_present(sesame.grounded) == sesame.outputs["object_presence"].bool().tolist()

def test_padded_batch_attends_to_its_padding(sesame):
    out, ids = sesame.outputs, sesame.outputs["batch2_output_ids"]
    g = sesame.ground(input_ids=ids)
    close(g.prompt_embed[:, 0], out["batch2_pred_embedding"], ELSE)
    close(g.low_res_masks[..., ::4, ::4], out["batch2_low_res_masks_sub4"], MASK)
    close(g.attention_layers.transpose(0, 1), out["batch2_attn_predicting_seg_image_mean"], ELSE)
    assert says_present(g) == out["batch2_object_presence"].bool().tolist()
    where = layout(ids, sesame.gen.tower.tokens, sesame.gen.tokens.seg)
    assert (where.rows.tolist(), where.places.tolist()) == (out["batch2_seg_row"].tolist(), out["batch2_seg_position_embedding"].tolist())
    close(sesame.ground(input_ids=ids, attention_mask=torch.ones_like(ids)).prompt_embed, g.prompt_embed, ELSE)
    alone = sesame.ground(input_ids=ids, attention_mask=(ids != 0).long()) # a mask takes the neighbours' influence away
    close(alone.prompt_embed[:1, 0], out["pred_embedding"], ELSE)
    assert (alone.prompt_embed[0] - g.prompt_embed[0]).abs().max() > 1

# ---- every trap of the fixtures is one the tests above would notice ---------------------------------------------------------

def _next_place(gen, monkeypatch):
    real = lisa_model.Layout.__init__
    def later(self, image, tokens, length, rows, places): real(self, image, tokens, length, rows, places + 1)
    monkeypatch.setattr(lisa_model.Layout, "__init__", later)

def _last_layer(gen, monkeypatch): monkeypatch.setattr(gen.tower, "layer", -1)

def _tanh(gen, monkeypatch):
    for m in gen.model.model.mm_projector.modules():
        if isinstance(m, nn.GELU): monkeypatch.setattr(m, "approximate", "tanh")

TRAPS = {"state of [SEG] itself": (_next_place, "prompt_embed", 1.0), "CLIP's last layer": (_last_layer, "prompt_embed", 1e-2)}

@pytest.mark.parametrize("trap", TRAPS)
def test_trap_in_the_model(case, trap, monkeypatch):
    spring, field, least = TRAPS[trap]
    spring(case.gen, monkeypatch)
    assert (getattr(case.ground(), field) - getattr(case.grounded, field)).abs().max() > least

def test_trap_tanh_gelu(sesame, monkeypatch):
    _tanh(sesame.gen, monkeypatch)
    changed = sesame.gen.model.model.mm_projector(sesame.gen.tower(sesame.inputs["pixel_values_clip"]))
    assert (changed - sesame.outputs["image_features"]).abs().max() > 5 * ELSE

def test_trap_padding_before_normalising(case):
    wrong = normalise(np.pad(case.sam_u8, ((0, 1024 - case.sam_u8.shape[0]), (0, 0), (0, 0))))
    assert (case.ground(sam_images=wrong).logits - case.grounded.logits).abs().max() > 1

def test_trap_resizing(case):
    low, hw = case.grounded.low_res_masks, case.image.shape[:2]
    one_step = F.interpolate(low[..., :int(case.inputs["resize_hw"][0]) // 4, :], hw, mode="bilinear")[0, 0]
    uncropped = F.interpolate(F.interpolate(low, (1024, 1024), mode="bilinear"), hw, mode="bilinear")[0, 0]
    for wrong in (one_step, uncropped): assert (wrong - case.grounded.logits).abs().max() > .5

def test_trap_square_padding_of_clips_input(case):
    H, W = case.image.shape[:2]
    square = np.zeros((W, W, 3), np.uint8); square[(W - H) // 2:(W - H) // 2 + H] = case.image
    wrong = case.gen.tower(case.gen.tower.pixels(square))
    assert (wrong - case.outputs["clip_features"]).abs().max() > 1

def test_trap_white_space(case):
    text = case.meta["prompt"]["rendered"]
    kept = [i for part in case.gen.tokens.parse(text) for i in ([case.gen.tokens.ids[part]] if isinstance(part, Token) else case.gen.tokens.pieces.encode(part))]
    assert [case.gen.tokens.bos, *kept] != case.inputs["prompt_ids"][0].tolist()

# ---- tokens -----------------------------------------------------------------------------------------------------------------

WORDS = st.lists(st.sampled_from(["the", " car", "\n", "  ", "[SEG]", "<im_start>", "<im_end>", "</s>", "<s>", "<unk>", "<image>", "é", "図", "▁", "<0x0A>", ".", "?"]) | st.text(max_size=6), max_size=12)

@given(words=WORDS)
@settings(max_examples=150, deadline=None)
def test_a_question_never_makes_tokens(words):
    tokens = _tokens()
    text = "".join(words).encode("utf-8", "ignore").decode()
    ids = tokens.encode(prompt_parts(text, "System."))
    plain = tokens.encode(prompt_parts("x", "System."))
    for i in (tokens.seg, IMAGE_ID, tokens.bos, tokens.eos, tokens.pieces.unk, tokens.added[START], tokens.added[END]): assert ids.count(i) == plain.count(i)

@cache
def _tokens(): return train_tokens(["the car is red. USER: ASSISTANT: Give a mask [SEG] of it, please."] * 9, 300)

@given(words=st.lists(st.sampled_from(["the car", " red ", "\n", " [SEG] ", "[SEG]", "<im_start>", "<im_end> ", " it", "é", "."]), max_size=10))
@settings(max_examples=60, deadline=None)
def test_trusted_text_as_transformers_tokenizer_without_white_space(words):
    text, tokens, real = "".join(words), _tokens(), _llama()
    assume(not text.strip("\n").startswith(" ")) # there transformers 5 drops a blank that the trained tokenizer keeps
    bare = re.sub(r"\s*(\[SEG\]|<im_start>|<im_end>)\s*", r"\1", text)
    assert tokens.encode(tokens.parse(text)) == real(bare).input_ids

@cache
def _llama():
    with tempfile.TemporaryDirectory() as tmp:
        _tokens().save(tmp)
        return LlamaTokenizer.from_pretrained(tmp, legacy=True)

def test_tokenizer_json_alone_gives_the_same_ids(case, tmp_path):
    real = LlamaTokenizer.from_pretrained(case.folder, legacy=True)
    real.save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").is_file() and not (tmp_path / "tokenizer.model").exists()
    tokens, text = LisaTokens.load(tmp_path), case.meta["prompt"]["rendered"] + " " + case.meta["prompt"]["answer"]
    assert tokens.encode(tokens.parse(text)) == case.inputs["input_ids"][0].tolist()
    assert tokens.decode(case.inputs["answer_ids"][0].tolist()) == case.gen.tokens.decode(case.inputs["answer_ids"][0].tolist())
    evil = ["</s><s><unk>[SEG] <image>"]
    assert tokens.encode(evil) == case.gen.tokens.encode(evil)

# ---- several masks, batches, other sizes --------------------------------------------------------------------------------------

def _several(case):
    seg, ids = case.gen.tokens.seg, case.inputs["input_ids"][0].tolist()
    return torch.tensor([[*ids[:-1], seg, *ids[-4:-1], seg, ids[-1]]])

def test_several_seg_tokens_stack_in_order(case):
    ids = _several(case)
    g = case.ground(input_ids=ids, attention_mask=torch.ones_like(ids))
    n, (H, W), L, T = 4, case.image.shape[:2], case.gen.model.config.num_hidden_layers, case.gen.tower.tokens # the repeated end has a [SEG] too
    assert [list(t.shape) for t in (g.prompt_embed, g.low_res_masks, g.attention_layers, g.logits)] == [[n, 1, 256], [n, 1, 256, 256], [n, L, T], [n, H, W]]
    close(g.prompt_embed[:1], case.grounded.prompt_embed, ELSE); close(g.logits[0], case.grounded.logits, MASK)
    features = case.gen.tower(case.inputs["pixel_values_clip"])
    for i in range(n): # an answer cut behind the i-th [SEG] gives the same masks so far
        end = (ids[0] == case.gen.tokens.seg).nonzero()[i, 0] + 1
        with torch.no_grad(): close(case.gen.model(ids[:, :end], features).embeds[-1:], g.prompt_embed[i], ELSE)
    assert (g.prompt_embed[1] - g.prompt_embed[0]).abs().max() > .1

def test_right_padded_rows_are_as_alone(case):
    short, long = case.inputs["input_ids"], _several(case)
    ids = torch.cat([F.pad(short, (0, long.shape[1] - short.shape[1])), long])
    g = case.ground(input_ids=ids, attention_mask=(ids != 0).long())
    assert g.n == 5
    close(g.prompt_embed[:1], case.grounded.prompt_embed, ELSE)
    close(g.attention_layers[0], case.grounded.attention_layers, ELSE)
    two = case.ground(input_ids=ids, attention_mask=None, pixel_values_clip=case.inputs["pixel_values_clip"].repeat(2, 1, 1, 1), sam_images=case.sam_images.repeat(2, 1, 1, 1))
    close(two.prompt_embed, g.prompt_embed, ELSE); close(two.logits, g.logits, MASK)
    assert two.embedding is None and g.embedding is not None

SMALL = dict(clip=dict(hidden_size=24, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, image_size=40, patch_size=8),
             sam=dict(encoder_embed_dim=16, encoder_depth=2, encoder_num_heads=2, encoder_global_attn_indexes=(1,), image_size=64, dim=32, decoder_heads=4, decoder_mlp=64))

def small(seed=0, clip=None, **llm):
    llm = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=256, initializer_range=.2) | llm
    return new_lisa(_tokens(), llm, SMALL["clip"] | (clip or {}), SMALL["sam"], system="System.", seed=seed)

@pytest.fixture(scope="module")
def tiny() -> LisaGenerator: return small()

@pytest.fixture(scope="module")
def picture(): return np.random.default_rng(1).integers(0, 256, (50, 90, 3), dtype=np.uint8)

@pytest.mark.parametrize("llm", [dict(num_key_value_heads=2, rope_theta=500000.0), dict(mm_projector_type="linear", rope_scaling={"type": "linear", "factor": 2.0}),
                                 dict(tie_word_embeddings=True, mm_use_im_start_end=False), dict(mm_vision_select_layer=-1, head_dim=16)], ids=lambda d: next(iter(d)))
def test_other_sizes_against_eager_llama(llm, picture, tmp_path):
    gen = load_generator(save_lisa(small(**llm), tmp_path / "c"))
    batch = conversations(gen, [("the car", "It [SEG] is [SEG] ."), ("red?", "[SEG]")])
    features = gen.tower(gen.tower.pixels(picture))
    with torch.no_grad():
        out = gen.model(**batch, features=features, attention=True)
        eager = LlamaForCausalLM(gen.model.config).eval()
        eager.load_state_dict({k: v for k, v in gen.model.state_dict().items() if k in eager.state_dict()})
        eager.set_attn_implementation("eager")
        for r in range(2): # by hand, one row at a time, without padding
            ids = batch["input_ids"][r, :batch["attention_mask"][r].sum()].tolist()
            i = ids.index(IMAGE_ID)
            words = lambda part: eager.model.embed_tokens(torch.tensor([part], dtype=torch.long))
            plain = eager.model(inputs_embeds=torch.cat([words(ids[:i]), gen.model.model.mm_projector(features), words(ids[i + 1:])], 1), output_attentions=True)
            at = [j + gen.tower.tokens - 2 for j, t in enumerate(ids) if t == gen.tokens.seg]
            mine = out.layout.rows == r
            close(out.embeds[mine], gen.model.prompt_embeds(plain.last_hidden_state[0, at]), ELSE)
            close(out.attention[mine], torch.stack([a[0, :, at, i:i + gen.tower.tokens] for a in plain.attentions], 1).transpose(0, 2), ELSE)

def test_class_token_among_the_features(picture, tmp_path):
    gen = save_lisa(small(), tmp_path / "c")
    config = json.loads((gen / "config.json").read_text()) | {"mm_vision_select_feature": "cls_patch"}
    (gen / "config.json").write_text(json.dumps(config))
    found = load_generator(gen).ground(picture, "the car", max_new_tokens=4)
    assert found.attention_layers.shape[-1] == 25 and found.grid_hw == (5, 5)

# ---- questions ------------------------------------------------------------------------------------------------------------------

def says(gen, monkeypatch, *answers):
    "Let the model answer what we want."
    said = iter([gen.tokens.encode(gen.tokens.parse(a, (SEG,)), bos=False) for a in answers])
    monkeypatch.setattr(gen, "_write", lambda tail, kept, most: (next(said), True))

def test_ground_is_ground_tensors(case, monkeypatch):
    "Cached prefix, own preprocessing and prompt give what the whole sequence gives."
    prompt, gen = case.meta["prompt"], case.gen
    monkeypatch.setattr(lisa_module, "ask", lambda q, explain: q)
    says(gen, monkeypatch, prompt["answer"].removesuffix("</s>"))
    g = gen.ground(case.image, prompt["question"])
    t = case.ground(pixel_values_clip=gen.tower.pixels(case.image))
    close(g.prompt_embed, t.prompt_embed, ELSE); close(g.attention_layers, t.attention_layers, ELSE); close(g.logits, t.logits, MASK)
    assert g.answer == prompt["answer"].removesuffix("</s>") and g.notes == () and says_present(g) == [bool(g.initial.any())]

def test_greedy_answers_are_those_of_the_whole_sequence(tiny, picture):
    "The cache and the shared prefix change no token."
    g = tiny.ground(picture, "the red car", max_new_tokens=10)
    features, ids = tiny.tower(tiny.tower.pixels(picture)), tiny.prompt_ids(lisa_module.ask("the red car"))
    said = []
    with torch.no_grad():
        while len(said) < 10:
            said.append(int(tiny.model(torch.tensor([ids + said]), features).logits[0, -1].argmax()))
            if said[-1] == tiny.tokens.eos: break
    assert g.answer == tiny.tokens.decode(said)

def test_many_questions_encode_once_and_do_not_mix(tiny, picture, monkeypatch):
    calls = {"clip": 0, "sam": 0}
    for name, module in (("clip", tiny.tower.clip), ("sam", tiny.sam.model.vision_encoder)):
        def forward(*a, _real=module.forward, _name=name, **k): calls[_name] += 1; return _real(*a, **k)
        monkeypatch.setattr(module, "forward", forward)
    questions = ["the car", "What is red in this picture?", "x", "the car"]
    many = tiny.ground_many(picture, questions, max_new_tokens=6)
    assert calls == {"clip": 1, "sam": 1}
    for q, g in zip(questions, many, strict=True):
        one = tiny.ground(picture, q, max_new_tokens=6, embedding=many[0].embedding)
        assert g.answer == one.answer
        close(g.logits, one.logits, MASK); close(g.attention_layers, one.attention_layers, 1e-5)
    assert calls["sam"] == 1 and tiny.ground_many(picture, []) == []
    assert torch.equal(many[0].logits, many[3].logits)

def test_answer_without_seg(tiny, picture, monkeypatch):
    says(tiny, monkeypatch, "there is no car.", "[SEG]", "a [SEG] b [SEG]")
    none, one, two = tiny.ground_many(picture, ["a car"] * 3)
    assert none.n == 1 and none.notes == (NO_SEG,) and says_present(none) == [False] and "[SEG]" not in none.answer
    assert one.n == 1 and one.notes == () and two.n == 2 and two.logits.shape == (2, *picture.shape[:2])

def test_a_model_that_repeats_itself(tiny, picture, monkeypatch):
    says(tiny, monkeypatch, "[SEG]" * 20)
    g = tiny.ground(picture, "a car")
    assert g.n == tiny.max_masks and any("20 [SEG] tokens" in n for n in g.notes)

def test_reasoning_and_length(tiny, picture, monkeypatch):
    g = tiny.ground(picture, "the car", max_new_tokens=3)
    assert any("cut after 3 tokens" in n for n in g.notes) and g.reasoning is None
    seen = []
    monkeypatch.setattr(tiny, "prompt_ids", lambda text, real=tiny.prompt_ids: (seen.append(text), real(text))[1])
    says(tiny, monkeypatch, "it is red [SEG] .")
    assert tiny.ground(picture, "the car", reasoning=True).reasoning == "it is red  ." and "explain" in seen[0]

@pytest.mark.parametrize("size", [(1, 1), (1, 7), (40, 40), (90, 50)])
def test_pictures_of_any_size(tiny, size):
    g = tiny.ground(np.full((*size, 3), 99, np.uint8), "the car", max_new_tokens=2)
    boxes = g.token_boxes_xyxy
    assert g.logits.shape == size and (boxes >= 0).all() and (boxes[:, 2] <= size[1] + 1e-3).all() and (boxes[:, 3] <= size[0] + 1e-3).all()

def test_bad_questions_and_tensors(case, tiny, picture):
    for question, says_ in (("", "empty"), (" \n", "empty"), (None, "must be text"), ("car " * 400, "too long")):
        with pytest.raises(ValueError, match=says_): tiny.ground(picture, question)
    with pytest.raises(ValueError, match="max_new_tokens"): tiny.ground(picture, "car", max_new_tokens=0)
    with pytest.raises(ValueError, match="uint8"): tiny.ground(picture / 255, "car")
    ids = case.inputs["input_ids"]
    bare = torch.where(ids == case.gen.tokens.seg, 5, ids)
    with pytest.raises(ValueError, match=r"no \[SEG\] token"): case.ground(input_ids=bare)
    with pytest.raises(ValueError, match="one image place"): case.ground(input_ids=ids.clamp(min=0))
    with pytest.raises(ValueError, match="attention_mask"): case.ground(attention_mask=torch.ones(1, 3))
    with pytest.raises(ValueError, match="pixel_values_clip"): case.ground(pixel_values_clip=case.inputs["pixel_values_clip"].repeat(2, 1, 1, 1))
    with pytest.raises(ValueError, match="CLIP tower takes"): case.ground(pixel_values_clip=torch.zeros(1, 3, 100, 100))
    with pytest.raises(ValueError, match="orig_hw"): case.ground(orig_hw=torch.tensor([[1, 2], [3, 4]]))

def test_nan_is_refused(picture):
    gen = small()
    with torch.no_grad(): gen.model.lm_head.weight[3, 3] = torch.nan
    with pytest.raises(ValueError, match="NaN"): gen.ground(picture, "car")

def test_bfloat16(case):
    gen = load_generator(case.folder, dtype=torch.bfloat16, sam_config=case.meta["sam_vit"])
    assert gen.model.dtype == gen.tower.clip.dtype == torch.bfloat16
    g = gen.ground_tensors(**case.tensors())
    assert g.logits.dtype == torch.float32 and (g.logits - case.grounded.logits).abs().max() < 1.5
    assert (g.initial != case.grounded.initial).float().mean() < .08

# ---- checkpoints ----------------------------------------------------------------------------------------------------------------

@pytest.fixture
def saved(tiny, tmp_path): return save_lisa(tiny, tmp_path / "c")

def change(folder, edit):
    state = load_file(folder / "model.safetensors"); edit(state); save_file(state, folder / "model.safetensors")

@pytest.mark.parametrize("edit, message", [
    (lambda s: s.pop("model.text_hidden_fcs.0.2.bias"), "missing: model.text_hidden_fcs.0.2.bias"),
    (lambda s: s.pop("model.layers.1.self_attn.q_proj.weight"), "missing: model.layers.1.self_attn.q_proj.weight"),
    (lambda s: s.update({"model.layers.9.mlp.weight": torch.ones(2)}), "unexpected: model.layers.9.mlp.weight"),
    (lambda s: s.update({"model.mm_projector.0.weight": torch.ones(3, 3)}), r"wrong shape: model.mm_projector.0.weight \[3, 3\]"),
    (lambda s: s.update({"lm_head.weight": s["lm_head.weight"] * torch.nan}), "NaN or infinite: lm_head.weight"),
    (lambda s: s.pop("model.visual_model.mask_decoder.iou_token.weight"), "iou_token"),
    (lambda s: [s.pop(k) for k in list(s) if "visual_model" in k], "no SAM"),
])
def test_bad_weights_are_named(saved, edit, message):
    change(saved, edit)
    with pytest.raises(CheckpointError, match=message): load_generator(saved)

@pytest.mark.parametrize("name, edit, message", [
    ("config.json", lambda c: c.pop("hidden_size"), "lacks hidden_size"),
    ("config.json", lambda c: c.update(mm_projector_type="qformer"), "qformer"),
    ("config.json", lambda c: c.update(vision_tower="no-one/nothing-here"), "Pass clip=FOLDER"),
    ("config.json", lambda c: c.update(mm_vision_select_layer=-9), "mm_vision_select_layer"),
    ("config.json", lambda c: c.update(mm_hidden_size=23), "mm_projector"),
    ("added_tokens.json", lambda c: c.pop("[SEG]"), r"no \[SEG\] token"),
    ("added_tokens.json", lambda c: c.update({"[SEG]": 9999}), "9999"),
    ("rea2seg.json", lambda c: c["sam_vit"].update(encoder_depth=3), "missing"),
])
def test_bad_configs_are_named(saved, name, edit, message, monkeypatch):
    def offline(*a, **k): raise OSError("no network")
    for function in ("HfApi", "snapshot_download"): monkeypatch.setattr(f"rea2seg.checkpoints.{function}", offline)
    content = json.loads((saved / name).read_text()); edit(content); (saved / name).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=message): load_generator(saved)

def test_wrong_clip_tower(saved, picture, tmp_path):
    other = small(clip=dict(hidden_size=16)).tower
    other.save(tmp_path / "other")
    with pytest.raises(CheckpointError, match="width 16, the projector takes 24; pass clip="): load_generator(saved, clip=tmp_path / "other")

def test_clip_argument_and_other_layouts(saved, tiny, picture, tmp_path):
    "Sharded .bin files, an own tower in the checkpoint, a whole CLIP model as tower: the same answers."
    expected = tiny.ground(picture, "the car", max_new_tokens=5)
    check = lambda gen: close(gen.ground(picture, "the car", max_new_tokens=5).logits, expected.logits, 1e-6)
    shutil.move(saved / "clip", tmp_path / "elsewhere")
    state = load_file(saved / "model.safetensors"); (saved / "model.safetensors").unlink()
    state |= {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.rand(4) for i in range(3)} # an old library's tables
    names = sorted(state); shards = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
    for file, keys in shards.items(): torch.save({k: state[k] for k in keys}, saved / file)
    (saved / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": {k: f for f, ks in shards.items() for k in ks}}))
    check(load_generator(saved, clip=tmp_path / "elsewhere"))

    tower = load_file(tmp_path / "elsewhere" / "model.safetensors")
    full = tmp_path / "full"; full.mkdir()
    config = json.loads((tmp_path / "elsewhere" / "config.json").read_text())
    (full / "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": {**config, "model_type": "clip_vision_model"}, "text_config": {}}))
    save_file(tower | {"text_model.x": torch.ones(1), "logit_scale": torch.ones(1), "vision_model.embeddings.position_ids": torch.arange(26)[None]}, full / "model.safetensors")
    check(load_generator(saved, clip=full))

    for name in shards: (saved / name).unlink()
    (saved / "pytorch_model.bin.index.json").unlink()
    save_file(state | {"model.vision_tower.vision_tower." + k: v for k, v in tower.items()}, saved / "model.safetensors")
    check(load_generator(saved, clip=full))
    (full / "model.safetensors").unlink() # the tower's folder has a config only
    check(load_generator(saved, clip=full))

def test_another_sam(saved, tiny, picture, tmp_path):
    other = small(seed=5)
    save_file({k: v.clone() for k, v in original_sam1(other.sam).items()}, tmp_path / "sam.safetensors")
    gen = load_generator(saved, sam=str(tmp_path / "sam.safetensors"))
    g = gen.ground(picture, "the car", max_new_tokens=3)
    close(g.logits, load_generator(saved, sam=other.sam).ground(picture, "the car", max_new_tokens=3).logits, 1e-6)
    assert (g.logits - tiny.ground(picture, "the car", max_new_tokens=3).logits).abs().max() > 1e-2

def test_reference_checkpoint_saved_again(case, tmp_path):
    again = load_generator(save_lisa(case.gen, tmp_path / "again"))
    close(again.ground_tensors(**case.tensors()).logits, case.grounded.logits, MASK)
    assert again.system == case.gen.system
    released, ours = load_file(case.folder / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    assert {k for k in released if "inv_freq" not in k} == set(ours)

def test_a_full_disk_leaves_the_old_checkpoint(saved, tiny, picture, monkeypatch):
    import rea2seg.lisa_new as module
    before = (saved / "model.safetensors").read_bytes()
    def full(*a, **k): raise OSError(28, "No space left on device")
    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(OSError, match="No space"): save_lisa(small(seed=3), saved)
    assert (saved / "model.safetensors").read_bytes() == before and [p.name for p in saved.parent.iterdir()] == ["c"]

def test_training_step(picture, tmp_path):
    "Text and mask losses of eight samples fall together through the frozen SAM; the checkpoint loads back and answers as taught."
    gen = small(seed=2)
    features, embedding = gen.tower(gen.tower.pixels(picture)), gen.sam.encode(picture)
    wanted = gen.sam.decode(embedding, prompt_embed=torch.randn(8, 1, 32, generator=torch.Generator().manual_seed(0)), multimask=False).logits
    targets = (wanted > wanted.flatten(1).median(1).values[:, None, None, None]).float()
    batch = conversations(gen, [(f"the car {i}", f"It is red {i} [SEG] .") for i in range(8)])
    optimizer = torch.optim.AdamW(gen.model.parameters(), 3e-3)
    losses = []
    for _ in range(40):
        out = gen.model(**batch, features=features)
        mask = F.binary_cross_entropy_with_logits(gen.sam.decode(embedding, prompt_embed=out.embeds[:, None], multimask=False).logits, targets)
        optimizer.zero_grad(); (out.loss + 2 * mask).backward(); optimizer.step()
        losses.append((out.loss.item(), mask.item()))
    assert losses[-1][0] < .3 * losses[0][0] and losses[-1][1] < .93 * losses[0][1], (losses[0], losses[-1])
    assert all(p.grad is None for m in (gen.sam, gen.tower) for p in m.parameters())
    g = load_generator(save_lisa(gen, tmp_path / "trained")).ground(picture, "the car 0", max_new_tokens=40)
    assert "red" in g.answer and "[SEG]" in g.answer and NO_SEG not in g.notes
