"""Scoring 15 candidates: one shared pass against three separate `generate` calls, in one run.

    python benchmarks/evaluator.py [--size tiny|small|both] [--masks 15] [--runs 5] [--out FOLDER]

The rival is transformers' own `generate` over the whole prompt of each group, with the vision tower's features computed in it, held to the
same score grammar by `prefix_allowed_tokens_fn`. Both must write the same scores, else the run fails. Features kept from
an earlier question are cleared before each timing; in `again` they are not, as for a further question about the same picture.
The gain is that of the shared beginning and of the tokens that need not be generated one by one; the masks themselves are read either way.
"""
import argparse
import csv
import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch

from rea2seg.evaluator_internvl import InternvlEvaluator, InternvlOptions
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


def measure(name: str, masks: int, runs: int, threads: int) -> dict:
    "One size of model: a first question, a further one about the same picture, and the mean of the distribution, against separate calls."
    size = load_section(InternvlSize, "tiny.internvl") if name == "tiny" else InternvlSize(**SMALL)
    settings = Settings.load("tiny", prompt="full", mask_view="binary", question_place="before", scoring="text", chain_of_thought=False, group_size=5, rounds=1, consensus=0.0)
    loaded = new_internvl(size, small_tokenizer(["Grade the masks in the order shown. The first image is a photo."], size.tokens))
    options = load_section(InternvlOptions, "evaluator.internvl", openings_kept=0)   # a further question is read anew
    evaluator, mean = (InternvlEvaluator(loaded, settings.with_(scoring=s), options) for s in ("text", "expected"))
    yy, xx = np.mgrid[:256, :256]
    image = np.stack([xx, yy, (xx + yy) // 2], -1).astype(np.uint8)
    shown = torch.stack([torch.tensor((xx - 16 * k) ** 2 + (yy - 128) ** 2 < 2500) for k in range(masks)])
    question = "the disc that is farthest to the left"
    def first(ev): ev.forget(); return ev.score(image, question, shown).ious
    work = {"shared": lambda: first(evaluator), "again": lambda: evaluator.score(image, question, shown).ious, "expected": lambda: first(mean),
            "separate": lambda: separate(evaluator, image, question, shown)}
    took, got = {k: [] for k in work}, {}
    for f in work.values(): f()                     # warm up
    for _ in range(runs):                           # by turns, so that another program's load meets all of them
        for k, f in work.items(): start = time.perf_counter(); got[k] = f(); took[k].append(time.perf_counter() - start)
        for k in ("shared", "again"): torch.testing.assert_close(got[k], got["separate"], atol=1e-4, rtol=0)
    ratio = lambda k: round(statistics.median(t / o for o, t in zip(took[k], took["separate"])), 2)
    return {"size": name, "parameters": sum(p.numel() for p in loaded.model.parameters()), "masks": masks, "group_size": settings.group_size,
            **{f"{k}_s": round(statistics.median(v), 3) for k, v in took.items()}, "speedup": ratio("shared"), "speedup_again": ratio("again"), "runs": runs, "threads": threads, "device": "cpu"}


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--size", choices=("tiny", "small", "both"), default="both"); p.add_argument("--masks", type=int, default=15); p.add_argument("--runs", type=int, default=5)
    p.add_argument("--threads", type=int, default=2); p.add_argument("--out", default=str(Path(__file__).parent / "results"))
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    rows = [measure(name, a.masks, a.runs, a.threads) for name in (("tiny", "small") if a.size == "both" else (a.size,))]
    for r in rows:
        print(f"{r['size']:>6} ({r['parameters'] / 1e6:.1f} M): shared {r['shared_s']:.2f} s, separate {r['separate_s']:.2f} s: {r['speedup']} times as fast; a further question {r['again_s']:.2f} s: "
              f"{r['speedup_again']} times; expected {r['expected_s']:.2f} s; equal scores")
    out = Path(a.out); out.mkdir(parents=True, exist_ok=True)
    with open(out / "evaluator.csv", "w", newline="") as f: w = csv.DictWriter(f, rows[0]); w.writeheader(); w.writerows(rows)


if __name__ == "__main__": main()
