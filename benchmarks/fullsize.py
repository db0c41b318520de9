"""Time and memory of every stage at the released size: Qwen2.5-VL-3B with 64 queries and SAM 2 Hiera-L, random weights, bfloat16, one GPU.

    python benchmarks/fullsize.py [--small] [--csv benchmarks/results/fullsize.csv]
"""
import argparse
import csv
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from rea2seg.candidates import discover
from rea2seg.lens import LensGenerator
from rea2seg.lens_files import SMALL_FILES, lens_config, make_tokenizer
from rea2seg.lens_model import LensModel, mllm_config
from rea2seg.lens_prompt import LensTokenizer
from rea2seg.sam2_model import Sam2
from rea2seg.settings import Settings

QWEN = dict(hidden=2048, layers=36, heads=16, kv_heads=2, mlp=11008, mrope_section=(16, 24, 24), rope_theta=1e6, context=128000, queries=64,
            vision_hidden=1280, vision_layers=32, vision_heads=16, vision_mlp=3420, patch=14, temporal_patch=2, merge=2, full=(7, 15, 23, 31))
SMALL = QWEN | dict(hidden=64, layers=34, heads=4, kv_heads=2, mlp=96, mrope_section=(2, 3, 3), context=2048, queries=8, vision_hidden=32, vision_layers=2, vision_heads=2,
                    vision_mlp=48, full=(1,))


def build(size: dict, trunk, device: str, dtype: torch.dtype) -> LensGenerator:
    "A LENS generator with random weights, made on the device."
    with tempfile.TemporaryDirectory() as tmp:
        make_tokenizer(["the cup nearest the kettle"] * 4, tmp, 300)
        words = LensTokenizer(tmp)
        files = {n: (Path(tmp) / n).read_bytes() for n in SMALL_FILES if (Path(tmp) / n).is_file()}
    config = lens_config(words, **size)
    vision = config["vision_config"]
    files["preprocessor_config.json"] = json.dumps(dict(patch_size=vision["patch_size"], temporal_patch_size=vision["temporal_patch_size"], merge_size=vision["spatial_merge_size"],
                                                        min_pixels=3136, max_pixels=12845056, image_mean=[0.48145466, 0.4578275, 0.40821073], image_std=[0.26862954, 0.26130258, 0.27577711])).encode()
    torch.set_default_dtype(dtype)
    with torch.device(device): model = LensModel(mllm_config(config), size["queries"], 256).finish().eval().requires_grad_(False)
    torch.set_default_dtype(torch.float32)
    sam = Sam2.random(trunk).to(device, dtype)
    return LensGenerator(model, sam, words, config, {}, files)


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--small", action="store_true", help="a few million parameters, to try the script on a CPU")
    p.add_argument("--rounds", type=int, default=5); p.add_argument("--answer", type=int, default=64, help="tokens of the written answer")
    p.add_argument("--csv", default="benchmarks/results/fullsize.csv")
    a = p.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not a.small: raise SystemExit("this benchmark needs a CUDA device; --small tries it on a CPU")
    dtype = torch.float32 if a.small else torch.bfloat16
    gen = build(SMALL if a.small else QWEN, "hiera_t" if a.small else "hiera_l", device, dtype)
    settings = Settings.load("lens", predicted_iou=0.0, stability=0.0)  # random weights: the filters stay open, so the stage does all its work
    gen.layers = settings.layers
    image = np.random.default_rng(0).integers(0, 256, (480, 640, 3), np.uint8)
    sync = torch.cuda.synchronize if device == "cuda" else lambda: None
    rows, state = [], {}

    def stage(name: str, f):
        times, peak = [], 0.0
        for i in range(a.rounds + 1):
            if device == "cuda": torch.cuda.reset_peak_memory_stats()
            sync(); start = time.perf_counter(); state[name] = f(); sync()
            if i: times.append(time.perf_counter() - start)
            if device == "cuda": peak = max(peak, torch.cuda.max_memory_allocated() / 2**30)
        rows.append(dict(stage=name, ms=round(1000 * statistics.median(times), 1), peak_gib=round(peak, 2)))
        print(f"{name:44}{rows[-1]['ms']:>10.1f} ms {peak:>8.2f} GiB", flush=True)

    print(f"{torch.cuda.get_device_name() if device == 'cuda' else 'CPU'}, torch {torch.__version__}, {sum(q.numel() for q in gen.model.parameters()) / 1e6:.0f} M + "
          f"{sum(q.numel() for q in gen.sam.parameters()) / 1e6:.0f} M parameters, {dtype}")
    with torch.inference_mode():
        stage("SAM encodes the image", lambda: gen.sam.encode(image))
        embedding = state["SAM encodes the image"]
        stage(f"vision tower, {a.answer} answer tokens, query pass", lambda: gen.ground(image, "the cup nearest the kettle", max_new_tokens=a.answer, embedding=embedding))
        grounding = state[f"vision tower, {a.answer} answer tokens, query pass"]
        gen.direct = True
        stage("the same without a written answer", lambda: gen.ground(image, "the cup nearest the kettle", embedding=embedding))
        stage("candidates (3 + 3 + 9 masks)", lambda: discover(gen.sam, grounding, settings))
    total = rows[0]["ms"] + rows[1]["ms"] + rows[3]["ms"]
    rows.append(dict(stage="one image, one question", ms=round(total, 1), peak_gib=max(r["peak_gib"] for r in rows)))
    print(f"{rows[-1]['stage']:44}{total:>10.1f} ms {rows[-1]['peak_gib']:>8.2f} GiB, {len(state['candidates (3 + 3 + 9 masks)'])} candidates")
    Path(a.csv).parent.mkdir(parents=True, exist_ok=True)
    with open(a.csv, "w", newline="") as f:
        device_name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
        w = csv.DictWriter(f, ["stage", "ms", "peak_gib", "device"]); w.writeheader(); w.writerows(r | {"device": device_name} for r in rows)


if __name__ == "__main__":
    main()
