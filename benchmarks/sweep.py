"""All rows of the ablations: one pass that shares work, against row by row without the cache, in one run.

    python benchmarks/sweep.py [--samples 6] [--rows N] [--profile tiny] [--evaluator FOLDER|KIND] [--set NAME=VALUE] [--least 3.0] [--out FOLDER]

Row by row is the same model, asked again for every row: encode, ground, discover, score. It may keep what one row naturally keeps
(the embedding of a picture with several questions, the evaluator's visual tokens), and weights are loaded once for both. Rows that do not
ask the evaluator do not ask it in either way. Both ways are timed by turns, sample by sample, so that another program's load
meets both; every record must be equal in all its numbers, else the run fails, as it does below `--least` times.
"""
import argparse
import csv
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from rea2seg.candidates import discover
from rea2seg.data.sources import load_samples
from rea2seg.evaluation import Answer, record_of
from rea2seg.evaluator import AttentionAgreement, InternvlEvaluator, load_evaluator
from rea2seg.metrics import MetricSettings
from rea2seg.pipeline import Rea2Seg
from rea2seg.settings import parse_changes
from rea2seg.study.cache import CachedModel, evaluator_like
from rea2seg.study.plan import StudySettings, evaluator_variants, generator_variants, sweep_variants
from rea2seg.study.store import Store
from rea2seg.study.sweep import run_rows

TIMES = ("seconds_load", "seconds_ground", "seconds_discover", "seconds_score")


class RowByRow:
    "One row as a run of its own."
    def __init__(self, model: Rea2Seg, variant):
        self.generator, self.variant, self.settings, self.last = model.generator, variant, model.settings.with_(**variant.changes), (None, None)
        own = load_evaluator(variant.evaluator, self.settings) if variant.evaluator else model.evaluator
        self.evaluator = InternvlEvaluator(own.loaded, self.settings, own.builder.options, own.share) if own.kind == "internvl" else evaluator_like(own, self.settings)

    @torch.inference_mode()
    def __call__(self, sample) -> dict:
        image, truth, ignore, s = sample.load_image(), sample.load_mask(), sample.load_ignore(), self.settings
        self.generator.layers = s.layers
        seen = self.last[1] if self.last[0] is not None and np.array_equal(self.last[0], image) else None
        try: g = self.generator.ground(image, sample.question, reasoning=s.reasoning, max_new_tokens=s.max_new_tokens, embedding=seen).split()[0]
        except ValueError as e: return record_of(sample, image, truth, ignore, f"{type(e).__name__}: {e}", 0.0, RATIO)
        self.last = image, g.embedding
        found = discover(self.generator.sam, g, s, self.variant.parts)
        ious = self.evaluator.score(image, sample.question, found.masks, candidates=found, grounding=g).ious.cpu().double().numpy() if self.variant.scored and len(found) else None
        attention = AttentionAgreement().score(image, sample.question, found.masks, grounding=g).ious.double().numpy()
        return record_of(sample, image, truth, ignore, Answer(g.initial.cpu().numpy(), found, ious, {}, attention), s.prior, RATIO)


def equal(a: dict, b: dict) -> list[str]: # names of the numbers that differ
    return [k for k in a if k not in TIMES and a[k] != b[k]]


def main():
    global RATIO
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--samples", type=int, default=6); p.add_argument("--profile", default="tiny"); p.add_argument("--data", default="")
    p.add_argument("--evaluator"); p.add_argument("--set", action="append", default=[], dest="changes"); p.add_argument("--least", type=float, default=3.0); p.add_argument("--rows", type=int, help="the first ones alone")
    p.add_argument("--threads", type=int, default=2); p.add_argument("--out", default=str(Path(__file__).parent / "results"))
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    RATIO, plan = MetricSettings.load().boundary_ratio, StudySettings.load(a.profile)
    model = Rea2Seg.from_profile(a.profile, evaluator=a.evaluator, **parse_changes(a.changes))
    named = {v.name: v for v in [*generator_variants(), *evaluator_variants(plan, model.settings), *(v for line in sweep_variants(plan, model.settings).values() for v in line)] if not v.missing}
    variants = [named.pop("all"), *named.values()][:a.rows]
    samples = list(load_samples(a.data or plan.data, limit=a.samples))
    rows, took = {v.name: RowByRow(model, v) for v in variants}, []
    with tempfile.TemporaryDirectory() as tmp:
        cached = CachedModel(model, Store(f"{tmp}/kept.sqlite"), plan.keep_embeddings)
        rows["all"](samples[0]) # warm up
        for row in rows.values(): row.last = (None, None)
        if model.evaluator.kind == "internvl": model.evaluator.forget(); rows["all"].evaluator.forget()
        each = {v.name: [0.0, 0.0] for v in variants}
        for sample in samples:
            start = time.perf_counter(); want = []
            for v in variants: begun = time.perf_counter(); want.append(rows[v.name](sample)); each[v.name][0] += time.perf_counter() - begun
            middle = time.perf_counter()
            model.generator.layers = model.settings.layers
            got = run_rows(cached, [sample], variants, progress=False)
            took.append((middle - start, time.perf_counter() - middle))
            for v, w, g in zip(variants, want, got, strict=True):
                if wrong := equal(w, g.records[0]): raise SystemExit(f"row {v.name} of {sample.name}: {', '.join(wrong)} differ")
            print(f"{sample.name}: row by row {took[-1][0]:.1f} s, cached {took[-1][1]:.1f} s")
        start = time.perf_counter()
        run_rows(cached, samples, variants, progress=False)
        again = time.perf_counter() - start
    plain, shared = (sum(t[k] for t in took) for k in (0, 1))
    by_sample = sorted(t[0] / t[1] for t in took)
    print(f"{len(variants)} rows x {len(samples)} samples, evaluator {model.evaluator.kind}, {a.threads} threads: row by row {plain:.1f} s, cached {shared:.1f} s: {plain / shared:.1f} times as fast "
          f"(samples: {by_sample[0]:.1f} to {by_sample[-1]:.1f}); all {len(variants) * len(samples)} records equal; once more from the store {again:.1f} s")
    out = Path(a.out); out.mkdir(parents=True, exist_ok=True)
    with open(out / "sweep.csv", "w", newline="") as f:
        w = csv.writer(f); w.writerow(["rows", "samples", "evaluator", "threads", "row_by_row_s", "cached_s", "speedup", "least_speedup", "most_speedup", "again_s"])
        w.writerow([len(variants), len(samples), model.evaluator.kind, a.threads, round(plain, 2), round(shared, 2), round(plain / shared, 2), round(by_sample[0], 2), round(by_sample[-1], 2), round(again, 2)])
    if plain / shared < a.least: raise SystemExit(f"less than {a.least} times as fast")


if __name__ == "__main__": main()
