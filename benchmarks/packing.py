"""Training steps of the embedded generator: all questions about a picture in one sequence against one sequence each, in one run.

    python benchmarks/packing.py [--questions 24] [--pictures 1] [--threads 1] [--device cpu] [--out benchmarks/results]
"""
import argparse
import csv
import statistics
import time
from pathlib import Path

import numpy as np
import torch

from rea2seg.settings import load_section
from rea2seg.train.generator import GeneratorTrainee, GeneratorTraining, new_generator, prompts_of
from rea2seg.train.sam import new_sam

NOUNS, SIDES = ("cube", "sphere", "cylinder", "mug", "doll", "lamp"), ("left of", "behind", "in front of", "nearest to", "farther than")

def question(rng: np.random.Generator) -> str:
    "A sentence as long as the rendered world's."
    return f"the {rng.choice(['red', 'blue', 'metal', 'small'])} {rng.choice(NOUNS)} {rng.choice(SIDES)} the {rng.choice(['green', 'large', 'rubber'])} {rng.choice(NOUNS)}"

def step(trainee: GeneratorTrainee, batches: list[dict]) -> list[float]:
    "Forward and backward of some batches; their losses."
    losses = []
    for batch in batches:
        loss, _ = trainee(batch, 0)
        loss.backward(); losses.append(loss.item())
    trainee.zero_grad(set_to_none=True)
    if trainee.model.device.type == "cuda": torch.cuda.synchronize()
    return losses

def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--questions", type=int, default=24); p.add_argument("--pictures", type=int, default=1); p.add_argument("--repeats", type=int, default=3)
    p.add_argument("--device", default="cpu"); p.add_argument("--threads", type=int, default=1); p.add_argument("--out", default="benchmarks/results")
    a = p.parse_args()
    torch.set_num_threads(a.threads); torch.manual_seed(0)
    rng, B, Q = np.random.default_rng(0), a.pictures, a.questions
    texts = [[question(rng) for _ in range(Q)] for _ in range(B)]
    # what depends on the questions is timed; per-token attributes and SAM's masks cost the same either way
    s = load_section(GeneratorTraining, "tiny.generator", attribute_weight=0.0, mention_weight=0.0, bce_weight=0.0, dice_weight=0.0)
    generator = new_generator(new_sam(), [t for row in texts for t in row])
    v = generator.model.config.vision_config
    asked = dict(zip([t for r in texts for t in r], prompts_of(generator, [t for r in texts for t in r], (256 // v.patch_size) ** 2), strict=True))
    trainee = GeneratorTrainee(generator.model, generator.sam, next(iter(asked.values()))[0], s).to(a.device).train(); generator.sam.to(a.device)
    image = torch.randint(0, 256, (B, 256, 256, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    part_map = (torch.arange(256)[:, None] // 32 * 8 + torch.arange(256) // 32).repeat(B, 1, 1).to(torch.uint8)
    rows = torch.zeros(B, Q, 256, dtype=torch.bool); rows.scatter_(2, torch.from_numpy(rng.integers(0, 64, (B, Q, 1))), True)
    ids = [[asked[t][1] for t in row] for row in texts]
    packed = [dict(image=image, part_map=part_map, rows=rows, questions=ids)]
    alone = [dict(image=image[b:b + 1].expand(Q, -1, -1, -1), part_map=part_map[b:b + 1].expand(Q, -1, -1), rows=rows[b][:, None], questions=[[q] for q in ids[b]]) for b in range(B)]
    times = {"packed": [], "one each": []}
    for batches in (packed, alone): step(trainee, batches)
    for _ in range(a.repeats):
        for name, batches in (("packed", packed), ("one each", alone)):
            start = time.perf_counter(); losses = step(trainee, batches)
            times[name].append(time.perf_counter() - start)
            if name == "packed": together = float(np.mean(losses))
    apart = float(np.mean(losses))
    speed = {k: B * Q / statistics.median(v) for k, v in times.items()}
    rows_out = [dict(way=k, questions_per_second=round(q, 2), pictures=B, questions=Q, device=a.device, threads=a.threads) for k, q in speed.items()]
    for r in rows_out: print(f"{r['way']:>9}: {r['questions_per_second']:8.1f} questions/s")
    print(f"packed is {speed['packed'] / speed['one each']:.1f} times as fast; losses {together:.6f} and {apart:.6f}, difference {abs(together - apart):.1e}")
    out = Path(a.out); out.mkdir(parents=True, exist_ok=True)
    with open(out / "packing.csv", "w", newline="") as f: w = csv.DictWriter(f, rows_out[0]); w.writeheader(); w.writerows(rows_out)

if __name__ == "__main__": main()
