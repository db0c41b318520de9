"""InternVL checkpoints: parity with the original implementation, every layout, every way to load half of one."""
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from rea2seg.checkpoints import CheckpointError, read_state
from rea2seg.internvl import IMAGENET, InternvlSize, load_internvl, native_name, native_state, new_internvl, save_evaluator, small_tokenizer
from rea2seg.tiles import Tiling, cut

FIXTURE = Path(__file__).resolve().parents[2] / "shared" / "parity" / "internvl-tiny-a"
needs_fixture = pytest.mark.skipif(not FIXTURE.is_dir(), reason="the parity fixture internvl-tiny-a is not here")
ATOL = 1e-4
SMALL = InternvlSize(side=64, patch=16, vision_width=32, vision_layers=2, vision_heads=2, vision_mlp=48, text_width=32, text_layers=2, text_heads=4, text_kv_heads=2, text_mlp=48,
                     downsample=0.5, rope_theta=10000.0, positions=4096, tokens=400)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    "Models this small are slower with more, much slower where other programs want the cores."
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def want(): return load_file(FIXTURE / "outputs.safetensors")
@pytest.fixture(scope="module")
def given():
    t = load_file(FIXTURE / "inputs.safetensors")
    return t | {"pixel_values": t["pixel_values"].float()}
@pytest.fixture(scope="module")
def meta(): return json.loads((FIXTURE / "meta.json").read_text())
@pytest.fixture(scope="module")
def loaded(): return load_internvl(FIXTURE)
@pytest.fixture(scope="module")
def adapted(): return load_internvl(FIXTURE / "lora-original-layout")


def logits_of(model, given, want):
    "Logits and last hidden states at the places that predict the answer."
    with torch.no_grad(): out = model(input_ids=given["input_ids"], pixel_values=given["pixel_values"], output_hidden_states=True)
    at = want["answer_positions"]
    return out.logits[0, at], out.hidden_states[-1][0, at]


def greedy(model, ids, pixels, n=16):
    with torch.no_grad(): return model.generate(input_ids=ids, pixel_values=pixels, attention_mask=torch.ones_like(ids), max_new_tokens=n, min_new_tokens=n, do_sample=False)[:, ids.shape[1]:]


@needs_fixture
def test_grids_of_all_sizes():
    t = load_file(FIXTURE / "preprocess.safetensors")
    for side in (112, 448):
        for most in (1, 2, 6, 12):
            tiling = Tiling(side, most)
            got = [tiling.grid(h, w) for w, h in t["sizes_wh"].tolist()]
            assert got == [tuple(g) for g in t[f"grid_cols_rows_tile{side}_max{most}"].tolist()]


@needs_fixture
def test_pixel_values(loaded, given, meta):
    "One grey level off at most, two in a few of a million values (the resize kernels round differently); thumbnails first or CLIP's statistics would be far off."
    tiles = []
    for entry, most in zip(meta["images"], given["max_num_per_image"].tolist()):
        picture = np.asarray(Image.open(FIXTURE / entry["file"]).convert("RGB"))
        tiles.append(cut(picture, loaded.tiling, most)[0])
    assert [len(t) for t in tiles] == given["num_patches_list"].tolist()
    got, level = torch.cat(tiles), 1 / 255 / min(IMAGENET[1])
    off = (got - given["pixel_values"]).abs()                                      # stored as float16
    assert off.max() <= 2 * level + 2e-3 and (off > level + 2e-3).float().mean() < 1e-5
    off = (got[:, :, ::4, ::4] - given["pixel_values_exact_sub4"]).abs()
    assert off.max() <= 2 * level + 1e-5 and (off > 1e-5).float().mean() < 0.03
    assert (got[7:] - given["pixel_values"][7:]).abs().mean() < 1e-3              # masks
    wrong = torch.cat([torch.cat([t[-1:], t[:-1]]) for t in tiles])
    assert (wrong - given["pixel_values"]).abs().max() > 1


@needs_fixture
def test_tiles_like_transformers(loaded, given, meta):
    from transformers import GotOcr2ImageProcessor
    theirs = GotOcr2ImageProcessor(size={"height": 112, "width": 112}, image_mean=IMAGENET[0], image_std=IMAGENET[1], crop_to_patches=True)
    for entry in meta["images"]:
        picture = np.asarray(Image.open(FIXTURE / entry["file"]).convert("RGB"))
        for most in (1, 5, 12):
            got = theirs(torch.as_tensor(picture).permute(2, 0, 1), max_patches=most, return_tensors="pt")["pixel_values"]
            torch.testing.assert_close(cut(picture, loaded.tiling, most)[0], got, atol=1e-5, rtol=0)


@needs_fixture
def test_vision_and_features(loaded, given, want):
    with torch.no_grad():
        seen = loaded.model.model.vision_tower(pixel_values=given["pixel_values"]).last_hidden_state
        features = loaded.model.get_image_features(pixel_values=given["pixel_values"], return_dict=True).pooler_output
        shuffled = loaded.model.model.pixel_shuffle(seen[:1, 1:].unflatten(1, (8, 8)), 0.5).flatten(1, 2)
    torch.testing.assert_close(seen[:1], want["vit_last_hidden_tile0"], atol=ATOL, rtol=0)
    torch.testing.assert_close(shuffled, want["pixel_shuffled_tile0"], atol=ATOL, rtol=0)
    torch.testing.assert_close(features, want["image_features"], atol=ATOL, rtol=0)


@needs_fixture
def test_logits_hidden_attention(loaded, given, want):
    logits, hidden = logits_of(loaded.model, given, want)
    torch.testing.assert_close(logits, want["answer_logits"], atol=ATOL, rtol=0)
    torch.testing.assert_close(hidden, want["answer_hidden"], atol=ATOL, rtol=0)
    assert (given["input_ids"][0] == loaded.model.config.image_token_id).nonzero()[:, 0].tolist() == want["image_token_positions"].tolist()
    loaded.model.set_attn_implementation("eager")
    try:
        with torch.no_grad(): out = loaded.model(input_ids=given["prompt_ids"], pixel_values=given["pixel_values"], output_hidden_states=True, output_attentions=True)
    finally: loaded.model.set_attn_implementation("sdpa")
    rows = torch.stack([a[0, :, -1, want["image_token_positions"]].mean(0) for a in out.attentions])
    torch.testing.assert_close(rows, want["attn_answer0_image_mean"], atol=ATOL, rtol=0)
    torch.testing.assert_close(torch.stack([h[0, -1] for h in out.hidden_states]), want["last_prompt_hidden_per_layer"], atol=ATOL, rtol=0)


@needs_fixture
def test_greedy(loaded, given, want):
    assert torch.equal(greedy(loaded.model, given["prompt_ids"], given["pixel_values"]), want["greedy16"])
    ids = torch.cat([given["prompt_ids"], given["answer_ids"][:, :-1]], 1)
    assert torch.equal(greedy(loaded.model, ids, given["pixel_values"]), want["greedy16_after_answer"])


@needs_fixture
def test_lora_around_the_original_model(adapted, given, want):
    with torch.no_grad(): features = adapted.model.get_image_features(pixel_values=given["pixel_values"], return_dict=True).pooler_output
    torch.testing.assert_close(features, want["lora_image_features"], atol=ATOL, rtol=0)
    torch.testing.assert_close(logits_of(adapted.model, given, want)[0], want["lora_answer_logits"], atol=ATOL, rtol=0)
    assert torch.equal(greedy(adapted.model, given["prompt_ids"], given["pixel_values"]), want["lora_greedy16"])


@needs_fixture
def test_known_mistakes_are_far_off(loaded, given, want, tmp_path):
    "The comparisons above can fail: what each trap would do is far outside the tolerance."
    tied = load_internvl(FIXTURE)
    tied.model.lm_head.weight.data = tied.model.model.language_model.embed_tokens.weight.data
    assert (logits_of(tied.model, given, want)[0] - want["answer_logits"]).abs().max() > 5
    assert (logits_of(loaded.model, given, want)[0] - want["lora_answer_logits"]).abs().max() > 5
    mean, std = torch.tensor(IMAGENET[0]).view(3, 1, 1), torch.tensor(IMAGENET[1]).view(3, 1, 1)
    clip = [torch.tensor(v).view(3, 1, 1) for v in ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))]
    with torch.no_grad(): features = loaded.model.get_image_features(pixel_values=(given["pixel_values"] * std + mean - clip[0]) / clip[1], return_dict=True).pooler_output
    assert (features - want["image_features"]).abs().max() > 0.1


def copy_fixture(to: Path, **config) -> Path:
    to.mkdir()
    for p in FIXTURE.iterdir():
        if p.suffix == ".json" and p.name != "meta.json" or p.name in ("merges.txt", "model.safetensors"): shutil.copyfile(p, to / p.name)
    changed = json.loads((to / "config.json").read_text()) | config
    (to / "config.json").write_text(json.dumps(changed))
    return to


@needs_fixture
@pytest.mark.parametrize("key,value,says", [("ps_version", "v1", "pixel shuffle v2"), ("use_mean_pooling", False, "use_mean_pooling"), ("model_type", "llava", "llava"),
                                            ("force_image_size", 448, "force_image_size")])
def test_configs_that_are_refused(tmp_path, key, value, says):
    with pytest.raises(CheckpointError, match=says): load_internvl(copy_fixture(tmp_path / "m", **{key: value}))


@needs_fixture
def test_missing_and_surplus_keys_are_named(tmp_path):
    folder, state = copy_fixture(tmp_path / "m"), load_file(FIXTURE / "model.safetensors")
    save_file({k: v for k, v in state.items() if k != "vision_model.encoder.layers.1.attn.qkv.weight"}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"encoder\.layer\.1\.attention\.q_proj\.weight"): load_internvl(folder)
    save_file(state | {"vision_model.extra.weight": torch.ones(2)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"vision_model\.extra\.weight"): load_internvl(folder)
    save_file({k: (v[:-1] if k == "mlp1.1.bias" else v).contiguous() for k, v in state.items()}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"linear_1\.bias"): load_internvl(folder)


@needs_fixture
@pytest.mark.parametrize("names", ["saved", "memory"])
def test_native_layouts(loaded, given, want, tmp_path, names):
    folder = save_evaluator(loaded, tmp_path / "native")
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "internvl"
    saved = load_file(folder / "model.safetensors")
    assert "language_model.model.norm.weight" in saved and "vision_tower.layernorm.weight" not in saved      # the released names
    if names == "memory": save_file({k: v.contiguous() for k, v in loaded.model.state_dict().items()}, folder / "model.safetensors", metadata={"format": "pt"})
    config.pop("tie_word_embeddings", None)                # the native default is true; the weights say otherwise
    (folder / "config.json").write_text(json.dumps(config))
    again = load_internvl(folder)
    assert again.tiling == loaded.tiling and again.layout == "native"
    torch.testing.assert_close(logits_of(again.model, given, want)[0], want["answer_logits"], atol=ATOL, rtol=0)
    from transformers import AutoModelForImageTextToText
    config["tie_word_embeddings"] = False
    (folder / "config.json").write_text(json.dumps(config))
    theirs, report = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    torch.testing.assert_close(logits_of(theirs, given, want)[0], want["answer_logits"], atol=ATOL, rtol=0)


def adapter_state(): return load_file(FIXTURE / "lora-original-layout" / "adapter_model.safetensors")
def write_adapter(folder: Path, state, base=FIXTURE, **changes) -> Path:
    folder.mkdir(parents=True)
    config = json.loads((FIXTURE / "lora-original-layout" / "adapter_config.json").read_text()) | {"base_model_name_or_path": str(base)} | changes
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file({k: v.clone().contiguous() for k, v in state.items()}, folder / "adapter_model.safetensors")
    return folder


def to_native_adapter(state):
    out = {}
    for k, v in state.items():
        name = native_name(k.removeprefix("base_model.model."))
        if ".qkv." in name:
            for p, part in zip("qkv", [v] * 3 if ".lora_A." in name else v.chunk(3)): out["base_model.model." + name.replace(".qkv.", f".{p}_proj.")] = part
        else: out["base_model.model." + name] = v
    return out


@needs_fixture
def test_lora_in_native_layout(loaded, given, want, tmp_path):
    native = to_native_adapter(adapter_state())
    targets = sorted({k.split(".lora_")[0].rsplit(".", 1)[1] for k in native})
    for base in (FIXTURE, save_evaluator(loaded, tmp_path / "native")):
        folder = write_adapter(tmp_path / f"lora-{base.name}", native, base, target_modules=targets)
        torch.testing.assert_close(logits_of(load_internvl(folder).model, given, want)[0], want["lora_answer_logits"], atol=ATOL, rtol=0)
    from peft import PeftModel
    theirs = PeftModel.from_pretrained(load_internvl(FIXTURE).model, folder)         # our names are PEFT's
    torch.testing.assert_close(logits_of(theirs, given, want)[0], want["lora_answer_logits"], atol=ATOL, rtol=0)


@needs_fixture
def test_lora_around_the_language_model_alone(given, want, tmp_path):
    llm = {k: v for k, v in adapter_state().items() if ".language_model." in k}
    whole = write_adapter(tmp_path / "whole", llm, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])
    alone = write_adapter(tmp_path / "alone", {k.replace("base_model.model.language_model.", "base_model.model."): v for k, v in llm.items()}, target_modules=["q_proj"])
    a, b = (logits_of(load_internvl(p).model, given, want)[0] for p in (whole, alone))
    torch.testing.assert_close(a, b)
    assert (a - want["lora_answer_logits"]).abs().max() > 5 and (a - want["answer_logits"]).abs().max() > 5


@needs_fixture
@pytest.mark.parametrize("base_layer", [True, False])
def test_lora_in_the_trainers_state_dict(given, want, tmp_path, base_layer):
    "Wrapped parts, LoRA beside the weights; the projector's change is merged, as that trainer has none there."
    folder = copy_fixture(tmp_path / "trainer", use_llm_lora=4, use_backbone_lora=4)
    state, lora = load_file(FIXTURE / "model.safetensors"), {k.removeprefix("base_model.model."): v for k, v in adapter_state().items()}
    out, wrap = {}, lambda n: n.replace("language_model.", "language_model.base_model.model.", 1) if n.startswith("language_model.") else n.replace("vision_model.", "vision_model.base_model.model.", 1)
    for k, v in state.items():
        module = k.rsplit(".", 1)[0]
        adapted = f"{module}.lora_A.weight" in lora
        if module.startswith("mlp1.") and adapted and k.endswith(".weight"): v = v.float() + 2 * lora[f"{module}.lora_B.weight"].float() @ lora[f"{module}.lora_A.weight"].float()
        out[wrap(k) if not (adapted and base_layer and not module.startswith("mlp1.")) else wrap(module) + ".base_layer." + k.rsplit(".", 1)[1]] = v
    for k, v in lora.items():
        if not k.startswith("mlp1."): out[wrap(k).replace(".lora_A.", ".lora_A.default.").replace(".lora_B.", ".lora_B.default.")] = v
    save_file({k: v.float().contiguous() for k, v in out.items()}, folder / "model.safetensors")
    torch.testing.assert_close(logits_of(load_internvl(folder).model, given, want)[0], want["lora_answer_logits"], atol=ATOL, rtol=0)


@needs_fixture
def test_half_a_lora_is_refused(tmp_path):
    full = adapter_state()
    drop = lambda part: {k: v for k, v in full.items() if part not in k}
    cases = {"vision": (drop("vision_model"), "attn.qkv"), "layer": (drop("language_model.model.layers.2.mlp.up_proj"), r"layers\.2\.mlp\.up_proj"),
             "partner": (drop("layers.1.self_attn.o_proj.lora_B"), r"o_proj\.lora_B"), "surplus": (full | {"base_model.model.mlp1.9.weight": torch.ones(2)}, r"mlp1\.9"),
             "place": ({k.replace("vision_model.encoder", "vision_model.decoder"): v for k, v in full.items()}, "decoder"), "empty": ({"base_model.model.x.modules_to_save.weight": torch.ones(1)}, "x.weight")}
    for name, (state, says) in cases.items():
        targets = {"target_modules": "all-linear"} if name == "empty" else {}
        with pytest.raises(CheckpointError, match=says): load_internvl(write_adapter(tmp_path / name, state, **targets))
    for key, value in (("use_dora", True), ("bias", "all"), ("peft_type", "IA3")):
        with pytest.raises(CheckpointError, match=key if key != "peft_type" else "IA3"): load_internvl(write_adapter(tmp_path / key, full, **{key: value}))
    with pytest.raises(CheckpointError, match="rank"): load_internvl(write_adapter(tmp_path / "rank", full, r=8))


def test_a_new_small_model_and_its_round_trip(tmp_path):
    small = new_internvl(SMALL)
    folder = save_evaluator(small, tmp_path / "e", dtype=torch.bfloat16)
    assert not [p for p in tmp_path.iterdir() if p != folder]
    again = load_internvl(folder)
    for (n, a), (m, b) in zip(small.model.state_dict().items(), again.model.state_dict().items(), strict=True):
        assert n == m and torch.equal(a.bfloat16().float(), b)
    save_evaluator(again, folder)
    assert {v.dtype for v in read_state(folder).values()} == {torch.float32}
    assert not torch.equal(new_internvl(SMALL, seed=1).model.lm_head.weight, small.model.lm_head.weight)


def test_a_failed_save_leaves_the_old_one(tmp_path, monkeypatch):
    small = new_internvl(SMALL)
    folder = save_evaluator(small, tmp_path / "e")
    before = sorted((p.name, p.stat().st_size) for p in folder.iterdir())
    monkeypatch.setattr(type(small.tokenizer), "save_pretrained", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError): save_evaluator(small, folder)
    assert sorted((p.name, p.stat().st_size) for p in folder.iterdir()) == before and [p.name for p in tmp_path.iterdir()] == ["e"]


def test_the_embedded_size():
    "The sizes of settings.ini: 64 tokens a picture, a few million parameters."
    loaded = new_internvl(tokenizer=small_tokenizer())
    assert loaded.tokens_per_tile == 64 and loaded.tiling.side == 256 and loaded.tiling.shared(6) == 1
    assert 3e6 < sum(p.numel() for p in loaded.model.parameters()) < 8e6


def test_names_collide_loudly():
    with pytest.raises(CheckpointError, match="lm_head"): native_state({"lm_head.weight": torch.ones(1), "language_model.lm_head.weight": torch.ones(1)})
