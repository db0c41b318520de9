"""Recorded attention rows against `output_attentions=True` with eager attention."""
import threading

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (CLIPVisionConfig, DynamicCache, Gemma2Config, Gemma2ForCausalLM, GptOssConfig, GptOssForCausalLM, InternVLConfig,
                          InternVLForConditionalGeneration, LlamaConfig, LlamaForCausalLM, LlavaConfig, LlavaForConditionalGeneration,
                          Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Config, Qwen2ForCausalLM, StaticCache)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rea2seg import attention as A
from rea2seg.attention import aggregate, attention_layers, decoder_of, record_attention

VOCAB, IMAGE = 101, 7
SMALL = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=128)


def text(kind):
    torch.manual_seed(0)
    match kind:
        case "llama-mha": m = LlamaForCausalLM(LlamaConfig(**SMALL))
        case "llama-gqa": m = LlamaForCausalLM(LlamaConfig(**SMALL, num_key_value_heads=2))
        case "qwen2": m = Qwen2ForCausalLM(Qwen2Config(**SMALL, num_key_value_heads=1))
        case "qwen2-sliding": m = Qwen2ForCausalLM(Qwen2Config(**SMALL, num_key_value_heads=2, use_sliding_window=True, sliding_window=4, max_window_layers=1))
        case "gemma2": m = Gemma2ForCausalLM(Gemma2Config(**SMALL, num_key_value_heads=2, head_dim=8, sliding_window=4, attn_logit_softcapping=.5,
                                                          query_pre_attn_scalar=5))
        case "gpt-oss": m = GptOssForCausalLM(GptOssConfig(**SMALL, num_key_value_heads=2, head_dim=8, sliding_window=4, num_local_experts=2,
                                                           num_experts_per_tok=1))
    for p in m.parameters(): p.data.mul_(10) if p.ndim > 1 else None # attention far from uniform
    if kind == "gpt-oss":
        for layer in m.model.layers: torch.nn.init.normal_(layer.self_attn.sinks)
    return m.eval()


TEXT = ["llama-mha", "llama-gqa", "qwen2", "qwen2-sliding", "gemma2", "gpt-oss"]


def vlm(kind):
    torch.manual_seed(0)
    tower = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=4)
    lm = {k: v for k, v in SMALL.items()}
    if kind == "llava":
        cfg = LlavaConfig(vision_config=CLIPVisionConfig(**tower), text_config=LlamaConfig(**lm, num_key_value_heads=2), image_token_index=IMAGE, vision_feature_layer=-1)
        m, extra, n = LlavaForConditionalGeneration(cfg), dict(pixel_values=torch.randn(2, 3, 16, 16)), 16
    elif kind == "internvl":
        vision = {**tower, "image_size": [16, 16], "patch_size": [4, 4]}
        cfg = InternVLConfig(vision_config=vision, text_config=dict(model_type="qwen2", **lm, num_key_value_heads=2), image_token_id=IMAGE, image_seq_length=4)
        m, extra, n = InternVLForConditionalGeneration(cfg), dict(pixel_values=torch.randn(2, 3, 16, 16)), 4
    else:
        vision = dict(depth=2, hidden_size=32, intermediate_size=48, num_heads=2, patch_size=4, spatial_merge_size=2, temporal_patch_size=1, window_size=16,
                      out_hidden_size=32, fullatt_block_indexes=[1], in_channels=3)
        cfg = Qwen2_5_VLConfig(text_config=dict(**lm, num_key_value_heads=2, rope_parameters=dict(rope_type="default", mrope_section=[1, 1, 2], rope_theta=1e4)),
                               vision_config=vision, image_token_id=IMAGE, vision_start_token_id=8, vision_end_token_id=9, video_token_id=10)
        n = 4
        m, extra = Qwen2_5_VLForConditionalGeneration(cfg), dict(pixel_values=torch.randn(32, 48), image_grid_thw=torch.tensor([[1, 4, 4]] * 2))
    ids = torch.randint(20, VOCAB, (2, n + 9)); ids[:, 3:3 + n] = IMAGE
    if kind == "qwen2.5-vl": extra["mm_token_type_ids"] = (ids == IMAGE).long()
    return m.eval(), dict(input_ids=ids, attention_mask=torch.ones_like(ids), **extra)


def eager(model, dtype=torch.float32, **inputs):
    was = {id(m.config): (m.config, m.config._attn_implementation) for m in model.modules() if hasattr(m, "config")}
    model.set_attn_implementation("eager")
    with torch.no_grad(): out = model(**inputs, output_attentions=True, use_cache=False).attentions
    for config, name in was.values(): config._attn_implementation_internal = name
    return torch.stack(out).float() # [L,B,H,T,T]


def names(model): return [(type(m).__name__, m.config._attn_implementation) for m in model.modules() if hasattr(m, "config")]


def padded(B=3, T=11, left=True):
    torch.manual_seed(1)
    ids, mask = torch.randint(20, VOCAB, (B, T)), torch.ones(B, T, dtype=torch.long)
    for b, n in enumerate((0, 3, 5)): mask[b, :n if left else 0] = 0; mask[b, T - n if not left else T:] = 0
    return dict(input_ids=ids, attention_mask=mask)


@pytest.mark.parametrize("kind", TEXT)
@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_equals_eager(kind, padding):
    model, inputs = text(kind), padded(left=padding == "left")
    if padding == "none": inputs["attention_mask"] = None
    full = eager(model, **inputs)
    with torch.no_grad(), record_attention(model, dict(last=-1, fifth=5), heads="all") as rec: model(**inputs)
    assert torch.allclose(rec.rows["fifth"], full[:, :, :, 5], atol=1e-5)
    seen = slice(None) if padding != "right" else [0]
    assert torch.allclose(rec.rows["last"][:, seen], full[:, seen, :, -1], atol=1e-5)
    assert (full[:, 0, :, -1].std(-1) > .02).all() # the comparison is not between uniform rows


@pytest.mark.parametrize("kind", ["llava", "qwen2.5-vl", "internvl"])
def test_text_towers(kind):
    model, inputs = vlm(kind)
    full = eager(model, **inputs)
    at = torch.tensor([12, 8])
    before = names(model)
    with torch.no_grad(), record_attention(model, at, keys=inputs["input_ids"] == IMAGE, layers=[-1, 0]) as rec: out = model(**inputs)
    image = inputs["input_ids"][0] == IMAGE
    want = torch.stack([full[[0, 2], b, :, at[b]][..., image].mean(1) for b in range(2)], 1)
    assert rec.rows.shape == want.shape and torch.allclose(rec.rows, want, atol=1e-5)
    assert names(model) == before
    with torch.no_grad(): assert torch.equal(out.logits, model(**inputs).logits) # recording changes nothing


@pytest.mark.parametrize("kind", ["llava", "internvl"])
def test_vision_tower_is_recorded_only_when_named(kind):
    model, inputs = vlm(kind)
    with torch.no_grad(), record_attention(model, 0) as rec: model(**inputs)
    assert rec.rows.shape[0] == 3 # the language model's layers, not the tower's two
    with torch.no_grad(), record_attention(model, 0, submodule="model.vision_tower") as rec: model(**inputs)
    assert rec.rows.shape[:2] == (2, 2) and torch.allclose(rec.rows.sum(-1), torch.ones(2, 2), atol=1e-5)


@pytest.mark.parametrize("kind", TEXT)
@pytest.mark.parametrize("start", ["sdpa", "eager"])
def test_generation_with_cache_and_left_padding(kind, start):
    model, inputs = text(kind), padded()
    if kind in ("gemma2", "gpt-oss") and start == "sdpa": pytest.skip("this model does not run under SDPA")
    model.set_attn_implementation(start)
    kw = dict(max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=None)
    P = inputs["input_ids"].shape[1]
    with record_attention(model, dict(step=-1, prompt=P - 1, answer=P + 1), keys=slice(0, P), heads="all") as rec: ids = model.generate(**inputs, **kw)
    mask = torch.cat([inputs["attention_mask"], torch.ones(3, 5, dtype=torch.long)], 1)
    full = eager(model, input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
    steps = rec.steps["step"]
    assert len(steps) == 5
    for i, rows in enumerate(steps): assert torch.allclose(rows, full[:, :, :, P - 1 + i, :P], atol=1e-5), i
    assert torch.allclose(rec.rows["prompt"], full[:, :, :, P - 1, :P], atol=1e-5)
    assert torch.allclose(rec.rows["answer"], full[:, :, :, P + 1, :P], atol=1e-5)
    assert len(rec.steps["answer"]) == 1


def test_prompt_in_pieces_and_callable():
    model, ids = text("llama-gqa"), padded()["input_ids"]
    full = eager(model, input_ids=ids)
    cache = DynamicCache(config=model.config)
    at = torch.tensor([2, 7, 9])
    with torch.no_grad(), record_attention(model, at, keys=slice(0, 2)) as rec, record_attention(model, lambda a, b: b - 2 if b > 6 else None) as second:
        for piece in ids.split([6, 5], 1): model(piece, past_key_values=cache)
    want = torch.stack([full[:, b, :, at[b], :2].mean(1) for b in range(3)], 1)
    assert torch.allclose(rec.rows, want, atol=1e-5)
    assert rec.steps[0][:, 1:].isnan().all() and rec.steps[1][:, 0].isnan().all()
    assert len(second.steps) == 1 and torch.allclose(second.rows, full[:, :, :, 9].mean(2), atol=1e-5)


@pytest.mark.parametrize("kind", ["llama-gqa", "qwen2-sliding"])
def test_static_cache(kind):
    model, ids = text(kind), padded()["input_ids"]
    full = eager(model, input_ids=ids)
    cache = StaticCache(config=model.config, max_cache_len=32)
    with torch.no_grad(), record_attention(model, -1, keys=None if kind == "llama-gqa" else slice(0, 9), heads="all") as rec:
        for piece in ids.split([9, 1, 1], 1): model(piece, past_key_values=cache, use_cache=True)
    for rows, at in zip(rec.steps, (8, 9, 10), strict=True): assert torch.allclose(rows, full[:, :, :, at, :rows.shape[-1]], atol=1e-5), at
    if kind == "llama-gqa": assert rec.rows.shape[-1] == 11


def test_several_queries_per_row_and_custom_mask():
    model, inputs = text("llama-mha"), padded()
    torch.manual_seed(3)
    seen = (torch.rand(3, 1, 11, 11) < .6) | torch.eye(11, dtype=torch.bool)
    additive = torch.where(seen, 0., torch.finfo(torch.float32).min)
    full = eager(model, input_ids=inputs["input_ids"], attention_mask=additive)
    at = torch.tensor([[1, 9], [4, 4], [0, 10]])
    for mask in (seen, additive):
        with torch.no_grad(), record_attention(model, at, keys=torch.tensor([[0, 3], [1, 1], [-1, 2]])) as rec: model(inputs["input_ids"], attention_mask=mask)
        want = torch.stack([full[:, b].mean(1)[:, at[b]][..., [[0, 3], [1, 1], [10, 2]][b]] for b in range(3)], 1)
        assert rec.rows.shape == (3, 3, 2, 2) and torch.allclose(rec.rows, want, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama-gqa", "qwen2"])
def test_bfloat16(kind):
    model, inputs = text(kind).bfloat16(), padded()
    full = eager(model, **inputs)
    with torch.no_grad(), record_attention(model, -1, heads="all") as rec: model(**inputs)
    assert rec.rows.dtype == torch.float32 and torch.allclose(rec.rows, full[:, :, :, -1], atol=2e-2)
    assert torch.allclose(rec.rows.sum(-1), torch.ones(3, 3, 4), atol=1e-5) # float32 softmax: eager's bfloat16 rows do not add up this well
    assert (full[:, :, :, -1].sum(-1) - 1).abs().max() > 1e-4


def flash_mask(batch_size, q_length, kv_length, attention_mask=None, **kw):
    return None if attention_mask is None or attention_mask.all() else attention_mask[:, -kv_length:]


def test_flash_style_padding_mask(monkeypatch):
    "A stand-in with flash attention's contract: 2-D mask or none, causal to the end, a window as an argument."
    def stand_in(module, q, k, v, mask, scaling=None, sliding_window=None, **kw):
        Q, T = q.shape[2], k.shape[2]
        at = torch.arange(T - Q, T)[:, None]
        seen = torch.arange(T)[None] <= at
        if sliding_window: seen = seen & (at - torch.arange(T)[None] < sliding_window)
        seen = seen[None, None] if mask is None else seen[None, None] & mask[:, None, None].bool()
        scores = (q @ k.repeat_interleave(module.num_key_value_groups, 1).transpose(2, 3) * scaling).masked_fill(~seen, -1e30)
        stand_in.calls += 1
        return (scores.softmax(-1) @ v.repeat_interleave(module.num_key_value_groups, 1)).transpose(1, 2), None
    stand_in.calls = 0
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as masks
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "test_flash", stand_in)
    monkeypatch.setitem(masks._global_mapping, "test_flash", flash_mask)
    for kind in ("llama-gqa", "qwen2-sliding"):
        model = text(kind)
        for left in (True, False):
            inputs = padded(left=left)
            full = eager(model, **inputs)
            for config in {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values(): config._attn_implementation_internal = "test_flash"
            at = torch.tensor([10, 7, 5])
            before = stand_in.calls
            with torch.no_grad(), record_attention(model, at, heads="all") as rec: model(**inputs, use_cache=False)
            assert stand_in.calls == before + 3
            assert torch.allclose(rec.rows, torch.stack([full[:, b, :, at[b]] for b in range(3)], 1), atol=1e-5)
            assert model.config._attn_implementation == "test_flash"
            model.set_attn_implementation("sdpa")


class Largest(TorchDispatchMode):
    "Largest tensor that any operation makes."
    def __init__(self): super().__init__(); self.numel = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor): self.numel = max(self.numel, t.untyped_storage().nbytes() // t.element_size())
        return out


def test_no_square_matrix_is_made():
    model, ids = text("llama-gqa"), torch.randint(20, VOCAB, (1, 600))
    model.config.max_position_embeddings = 600
    with torch.no_grad(), record_attention(model, 599, layers=[1]) as rec, Largest() as largest: model(ids, use_cache=False)
    assert largest.numel < 600 * 600 and rec.rows.shape == (1, 1, 600)
    with torch.no_grad(), Largest() as largest: eager(model, input_ids=ids)
    assert largest.numel >= 4 * 600 * 600 # what the recorder avoids; shows that the meter works


def test_two_models_one_config_and_overlap():
    config = LlamaConfig(**SMALL)
    a, b = LlamaForCausalLM(config).eval(), LlamaForCausalLM(config).eval()
    b.load_state_dict({k: v * 3 for k, v in a.state_dict().items()})
    ids = padded()["input_ids"]
    ra, rb = record_attention(a, -1), record_attention(b, -1)
    with torch.no_grad():
        first = ra.__enter__(); second = rb.__enter__()
        a(ids); b(ids)
        ra.__exit__(None, None, None) # out of order on purpose
        b(ids)
        rb.__exit__(None, None, None)
    assert len(first.steps) == 1 and len(second.steps) == 2 and not torch.allclose(first.rows, second.rows, atol=1e-4)
    assert torch.allclose(first.rows, eager(a, input_ids=ids)[:, :, :, -1].mean(2), atol=1e-5)
    assert config._attn_implementation == "sdpa" and not A._recorders and not A._switched


def test_nested():
    model, ids = text("llama-gqa"), padded()["input_ids"]
    with torch.no_grad(), record_attention(model, -1, layers=[0]) as outer:
        model(ids)
        with record_attention(model, 3, layers=[0, 1]) as inner: model(ids)
        model(ids[:, :5])
    assert len(outer.steps) == 3 and len(inner.steps) == 1 and outer.rows.shape[-1] == 5
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("start", ["sdpa", "eager"])
def test_exception_restores(start):
    model, _ = vlm("llava")
    model.set_attn_implementation(start)
    hooks = lambda: sum(len(m._forward_pre_hooks) for m in model.modules())
    before = names(model), hooks()
    with pytest.raises(ValueError, match="reach from 900"):
        with record_attention(model, -1, keys=torch.tensor([900])): model(torch.randint(20, VOCAB, (1, 6)))
    assert (names(model), hooks()) == before and not A._recorders and not A._switched
    with pytest.raises(TypeError): # a mistake that only shows while entering
        with record_attention(model, -1, layers="1"): pass
    assert (names(model), hooks()) == before and not A._recorders and not A._switched


def test_implementation_chosen_inside_the_block_stays():
    model, ids = text("llama-mha"), padded()["input_ids"]
    with torch.no_grad(), record_attention(model, -1) as rec:
        model(ids); model.set_attn_implementation("eager"); model(ids)
    assert model.config._attn_implementation == "eager" and len(rec.steps) == 1


def test_threads():
    models = [text("llama-gqa"), text("qwen2")]
    ids = padded()["input_ids"]
    wanted = [eager(m, input_ids=ids)[:, :, :, -1].mean(2) for m in models]
    errors = []
    def work(i):
        try:
            for _ in range(15):
                with torch.no_grad(), record_attention(models[i], -1) as rec: models[i](ids)
                assert len(rec.steps) == 1 and torch.allclose(rec.rows, wanted[i], atol=1e-5)
        except Exception as e: errors.append(e)
    threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert not errors and all(m.config._attn_implementation == "sdpa" for m in models)


def test_gradient():
    model, ids = text("llama-gqa"), padded()["input_ids"]
    with record_attention(model, -1, keys=slice(0, 4), grad=True) as rec: model(ids)
    (-rec.rows.sum(-1).log().mean()).backward()
    assert all(l.self_attn.q_proj.weight.grad.abs().sum() > 0 and l.self_attn.k_proj.weight.grad.abs().sum() > 0 for l in model.model.layers)
    with record_attention(model, -1) as rec: model(ids)
    assert not rec.rows.requires_grad


def test_wrapped_model_and_errors():
    model = text("llama-mha")
    wrapped = torch.nn.ModuleDict(dict(lm=model, head=torch.nn.Linear(2, 2)))
    assert decoder_of(wrapped) is model.model and list(attention_layers(model)) == [0, 1, 2]
    with pytest.raises(ValueError, match="no attention module"):
        with record_attention(torch.nn.Linear(2, 2), 0): pass
    with pytest.raises(ValueError, match="heads must be"):
        with record_attention(model, 0, heads="max"): pass
    with record_attention(model, 50) as rec:
        with torch.no_grad(): model(padded()["input_ids"])
    with pytest.raises(RuntimeError, match="no attention row"): rec.rows
    with pytest.raises(ValueError, match="2 batch rows, the forward has 3"):
        with torch.no_grad(), record_attention(model, torch.tensor([1, 2])): model(padded()["input_ids"])


def test_aggregate_is_the_mean():
    rows = torch.rand(4, 2, 3, 5)
    assert torch.allclose(aggregate(rows, [1, 3], [0, 2]), rows[[1, 3]][:, :, [0, 2]].mean((0, 2)))


def test_a_reloaded_module_records_too():
    "A notebook that defines the recorder again, or importlib.reload, must not take the rows away from later blocks."
    import importlib

    import rea2seg.attention as module
    from transformers import LlamaConfig, LlamaModel
    model = LlamaModel(LlamaConfig(vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)).eval()
    ids = torch.arange(6)[None]
    with module.record_attention(model, 5) as before: model(ids)
    old = dict(vars(module))
    try:
        module = importlib.reload(module)
        with module.record_attention(model, 5) as after: model(ids)
    finally: vars(module).update(old)
    torch.testing.assert_close(after.rows, before.rows)
