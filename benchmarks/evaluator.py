"""Scoring 15 candidates: one shared pass against three separate `generate` calls, in one run.

    python benchmarks/evaluator.py [--size tiny|small] [--masks 15] [--runs 5] [--out FILE.json]

The rival is transformers' own `generate` over the whole prompt of each group, with the vision tower's features computed in it, held to the
same score grammar by `prefix_allowed_tokens_fn`. Both must write the same scores, else the run fails. Features kept from
an earlier question are cleared before each timing; `again` is a second question about the same picture, where they are not.
"""
import argparse
import json
import platform
import statistics
import time

import numpy as np
import torch

from rea2seg.evaluator import InternvlEvaluator
from rea2seg.groups import make_groups
from rea2seg.internvl import InternvlSize, new_internvl, small_tokenizer
from rea2seg.scoreline import SCORES
from rea2seg.settings import Settings, load_section

SMALL = dict(side=224, patch=14, vision_width=384, vision_layers=8, vision_heads=6, vision_mlp=1536, text_width=512, text_layers=8, text_heads=8, text_kv_heads=2, text_mlp=1408,
             downsample=0.5, rope_theta=1e6, positions=8192, tokens=1024)


def allowed_tokens(evaluator, start: int, n: int):
    "The score line's grammar as transformers' hook."
    b, grammar = evaluator.builder, evaluator.writer.grammar
    sep, close, end = b.encoder.text(b.template.sep), b.encoder.text(b.template.close), b.encoder.ids["<|im_end|>"]
    options = {t: (c.ids.tolist(), c.texts) for t, c in grammar.choices.items()}
    def allowed(_, ids):
        new = ids[start:].tolist()
        for k in range(n):
            text = ""
            while text not in SCORES:
                tokens, texts = options[text]
                if not new: return tokens
                text = texts[tokens.index(new.pop(0))]
            for t in sep if k < n - 1 else close:
                if not new: return [t]
                new.pop(0)
        return [end]
    return allowed


@torch.no_grad()
def separate(evaluator, image, question, masks) -> torch.Tensor:
    "One `generate` a group."
    b, model, ious = evaluator.builder, evaluator.model, torch.zeros(len(masks))
    for group in make_groups(len(masks), b.settings.group_size, b.settings.seed):
        pictures = [b.photo(image), *b.masks(image, masks[list(group)])]
        ids = torch.tensor([b.opening(question, len(pictures[0])) + b.stages(question, [len(p) for p in pictures[1:]], False)[0][0]])
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=torch.cat(pictures), do_sample=False, max_new_tokens=16 * len(group), use_cache=True,
                             prefix_allowed_tokens_fn=allowed_tokens(evaluator, ids.shape[1], len(group)), eos_token_id=b.encoder.ids["<|im_end|>"], pad_token_id=0)
        line = evaluator.loaded.tokenizer.decode(out[0, ids.shape[1]:-1].tolist())
        for i, v in zip(group, json.loads(b.template.open + line)["iou"], strict=True): ious[i] = v
    return ious


def timed(work, runs: int) -> tuple[float, object]: # median seconds, last result
    took = []
    for _ in range(runs): start = time.perf_counter(); out = work(); took.append(time.perf_counter() - start)
    return statistics.median(took), out


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--size", choices=("tiny", "small"), default="tiny"); p.add_argument("--masks", type=int, default=15); p.add_argument("--runs", type=int, default=5)
    p.add_argument("--threads", type=int, default=2); p.add_argument("--out")
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    size = load_section(InternvlSize, "tiny.internvl") if a.size == "tiny" else InternvlSize(**SMALL)
    settings = Settings.load("tiny", prompt="full", mask_view="binary", question_place="before", scoring="text")
    loaded = new_internvl(size, small_tokenizer(["Grade the masks in the order shown. The first image is a photo."], size.tokens))
    evaluator = InternvlEvaluator(loaded, settings)
    yy, xx = np.mgrid[:256, :256]
    image = np.stack([xx, yy, (xx + yy) // 2], -1).astype(np.uint8)
    masks = torch.stack([torch.tensor((xx - 16 * k) ** 2 + (yy - 128) ** 2 < 2500) for k in range(a.masks)])
    def shared(): evaluator.forget(); return evaluator.score(image, "the disc that is farthest to the left", masks).ious
    shared(); separate(evaluator, image, "the disc that is farthest to the left", masks[:2])      # warm up
    ours, theirs = [], []
    for _ in range(a.runs): # by turns, so that another program's load meets both
        t, x = timed(shared, 1); ours.append(t)
        t, y = timed(lambda: separate(evaluator, image, "the disc that is farthest to the left", masks), 1); theirs.append(t)
        torch.testing.assert_close(x, y, atol=1e-4, rtol=0)
    again, _ = timed(lambda: evaluator.score(image, "the disc that is farthest to the right", masks), a.runs)
    mean = InternvlEvaluator(loaded, settings.with_(scoring="expected"))
    def expected(): mean.forget(); return mean.score(image, "the disc that is farthest to the left", masks)
    took, _ = timed(expected, a.runs)
    result = {"size": a.size, "parameters": sum(p.numel() for p in loaded.model.parameters()), "masks": a.masks, "group_size": settings.group_size, "runs": a.runs, "threads": a.threads,
              "shared_s": round(statistics.median(ours), 4), "separate_s": round(statistics.median(theirs), 4), "again_s": round(again, 4), "expected_s": round(took, 4),
              "speedup": round(statistics.median(t / o for o, t in zip(ours, theirs)), 2), "equal_scores": True, "machine": f"{platform.machine()}, torch {torch.__version__}"}
    print(json.dumps(result, indent=1))
    if a.out: open(a.out, "w").write(json.dumps(result, indent=1))


if __name__ == "__main__": main()
