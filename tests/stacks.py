"Small random checkpoints of both families, made on the fly: what a clone without the recorded reference checks the whole path with."
from pathlib import Path

import numpy as np
import torch

from rea2seg.lens import new_lens
from rea2seg.lens_files import lens_config, make_tokenizer, save_generator
from rea2seg.lens_prompt import LensTokenizer
from rea2seg.lisa_new import new_lisa, save_lisa
from rea2seg.lisa_prompt import train_tokens
from rea2seg.sam2_model import Sam2

QUESTIONS = ["the red cube", "the blue sphere behind it", "anything at all that is neither a cube nor a sphere"]
LAYERS = dict(first_layer=1, last_layer=2) # both have three
SAM2 = dict(embed_dim=8, num_heads=1, stages=(1, 1, 2), global_att_blocks=(3,), window_spec=(4, 4, 4), window_pos_embed_bkg_spatial_size=(4, 4),
            image_size=64, dim=32, decoder_heads=2, decoder_mlp=32)
SAM1 = dict(encoder_embed_dim=16, encoder_depth=2, encoder_num_heads=2, encoder_global_attn_indexes=(1,), image_size=64, dim=32, decoder_heads=4, decoder_mlp=64)
OPEN = dict(predicted_iou=0.0, stability=0.0) # random weights know nothing of mask quality

def lens_folder(folder: Path, **extra) -> Path:
    "A LENS-family checkpoint of 100,000 weights; `extra` goes into rea2seg.json."
    words = make_tokenizer(QUESTIONS, folder.parent / f"{folder.name}-words", vocab_size=300)
    config = lens_config(LensTokenizer(words), hidden=32, layers=3, heads=4, kv_heads=2, mlp=48, mrope_section=(1, 1, 2), rope_theta=1e4, context=600, queries=4,
                         vision_hidden=16, vision_layers=2, vision_heads=2, vision_mlp=24, patch=8, full=[1], window=32)
    gen = new_lens(config, Sam2.random(SAM2), words, dict(llm_size=64) | extra, seed=1)
    with torch.no_grad(): # larger than a training starts from: attention and masks that differ from place to place
        for p in gen.model.parameters(): p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * 0.1)
    return save_generator(gen, folder, torch.float32)

def lisa_folder(folder: Path) -> Path:
    "A LISA-family checkpoint of the same size, its CLIP tower beside it."
    tokens = train_tokens(["the car is red. USER: ASSISTANT: Give a mask [SEG] of it, please."] * 9, 300)
    llm = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=300, initializer_range=.2)
    clip = dict(hidden_size=24, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, image_size=40, patch_size=8)
    return save_lisa(new_lisa(tokens, llm, clip, SAM1, system="System.", seed=1), folder)

FOLDERS = dict(lens=lens_folder, lisa=lisa_folder)

def picture(H: int = 48, W: int = 80, seed: int = 0) -> np.ndarray: # uint8[H,W,3]
    "Two soft blobs on a gradient."
    y, x = np.mgrid[:H, :W] / max(H, W)
    rng = np.random.default_rng(seed)
    layers = [np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / .01) for cx, cy in rng.uniform(.2, .6, (3, 2))]
    return (255 * np.clip(np.stack(layers, -1) + .3 * np.stack([x, y, 1 - x], -1), 0, 1)).astype(np.uint8)
