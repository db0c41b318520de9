"Tiny random vision-language models of three families with their real processors, built from configurations: nothing is downloaded."
import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import (CLIPImageProcessor, GotOcr2ImageProcessor, InternVLConfig, InternVLForConditionalGeneration, InternVLProcessor, InternVLVideoProcessor, LlavaConfig,
                          LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor,
                          Qwen2VLImageProcessor, Qwen2VLVideoProcessor)

WORDS = "what is left of the red cube ? a sphere , and two".split()
TEXT = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, eos_token_id=None, bos_token_id=None, initializer_range=.3)
VISION = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)

def tokenizer(*special: str, **names: str) -> PreTrainedTokenizerFast:
    "Whole words; `names` are attributes that a processor asks for."
    vocab = {w: i for i, w in enumerate(["<pad>", "<unk>", *special, *WORDS])}
    t = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(vocab, unk_token="<unk>")), pad_token="<pad>", unk_token="<unk>", additional_special_tokens=list(special), **names)
    t.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return t

def qwen():
    "Qwen2.5-VL: any size, patches merged two by two, a chat template."
    tok = tokenizer("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    template = ("{% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %} {{ c['text'] }} {% endif %}{% endfor %}{% endfor %}")
    processor = Qwen2_5_VLProcessor(Qwen2VLImageProcessor(patch_size=8, merge_size=2, min_pixels=256, max_pixels=4096), tok, Qwen2VLVideoProcessor(), chat_template=template)
    at = tok.convert_tokens_to_ids
    config = Qwen2_5_VLConfig(text_config=TEXT | dict(vocab_size=len(tok), rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[1, 1, 2])),
                              vision_config=dict(depth=2, hidden_size=16, intermediate_size=24, num_heads=2, patch_size=8, out_hidden_size=32, spatial_merge_size=2, window_size=32, fullatt_block_indexes=[1]),
                              image_token_id=at("<|image_pad|>"), video_token_id=at("<|video_pad|>"), vision_start_token_id=at("<|vision_start|>"), vision_end_token_id=at("<|vision_end|>"))
    return Qwen2_5_VLForConditionalGeneration(config), processor

def llava():
    "LLaVA 1.5: the centre square, CLIP's patches without the class token."
    tok = tokenizer("<image>")
    processor = LlavaProcessor(CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32), tok, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1)
    config = LlavaConfig(vision_config=VISION | dict(model_type="clip_vision_model", image_size=32, patch_size=8), text_config=TEXT | dict(model_type="llama", vocab_size=len(tok)), image_token_id=tok.convert_tokens_to_ids("<image>"))
    return LlavaForConditionalGeneration(config), processor

def internvl():
    "InternVL: square crops and a thumbnail, four tokens each."
    tok = tokenizer("<img>", "</img>", "<IMG_CONTEXT>", "<video>", start_image_token="<img>", end_image_token="</img>", context_image_token="<IMG_CONTEXT>", video_token="<video>")
    crops = GotOcr2ImageProcessor(size=dict(height=32, width=32), crop_to_patches=True, min_patches=1, max_patches=4)
    config = InternVLConfig(text_config=TEXT | dict(model_type="qwen2", vocab_size=len(tok)), vision_config=VISION | dict(image_size=[32, 32], patch_size=[8, 8]),
                            image_token_id=tok.convert_tokens_to_ids("<IMG_CONTEXT>"), image_seq_length=4, downsample_ratio=0.5)
    return InternVLForConditionalGeneration(config), InternVLProcessor(crops, tok, InternVLVideoProcessor(), image_seq_length=4)

FAMILIES = dict(qwen=qwen, llava=llava, internvl=internvl)

def build(family: str):
    "Model and processor, the same ones every time."
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, processor = FAMILIES[family]()
    return model.eval(), processor
