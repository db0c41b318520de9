"""The candidate stage against the official parts of SAM 2 put together: time ratios within one run.

    python benchmarks/candidates.py [--cases open default] [--rounds 7] [--threads 2] [--clock wall|cpu] [--size hiera_t] [--device cpu] [--out benchmarks/results]

Random weights, shared by both sides, 30 seeds, a picture of 1024x1024 pixels. Three ways are timed in turn, round by round, and medians compared:
  ours      encode, prompt token, seeds, `discover` (multimask, refinement, attention-guided generation, top 9)
  official  SAM2ImagePredictor (prompt token in single- and multimask mode, refinement) and SAM2AutomaticMaskGenerator with the seeds as its point grid
  floor     one image encoding and the decoder calls alone
Thresholds: open (all pass), all (open, and every survivor of the suppression kept instead of nine), default (profile `lens`), third (quantiles of this
model's own values, so that about a third passes: random weights make the default ones let through few or none).
On a busy machine `--threads 1 --clock cpu` counts the process' own time.
"""
import argparse
import csv
import statistics
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from sam2.automatic_mask_generator import SAM2AutomaticMaskGenerator
from sam2.build_sam import build_sam2
from sam2.sam2_image_predictor import SAM2ImagePredictor

from rea2seg.candidates import decode_points, discover, filter_masks, measure
from rea2seg.kcore import background_point, main_core, point_features
from rea2seg.records import Grounding
from rea2seg.sam import load_sam2
from rea2seg.sam2_model import Sam2
from rea2seg.seeds import seed_points
from rea2seg.settings import Settings

CONFIGS = dict(hiera_t="sam2.1/sam2.1_hiera_t", hiera_s="sam2.1/sam2.1_hiera_s", hiera_l="sam2.1/sam2.1_hiera_l")


def models(size, device):
    "The same random weights on both sides; sharpened, so that masks, predicted IoUs and stabilities spread instead of being all alike."
    source = Sam2.random(size, 0)
    with torch.no_grad():
        for conv in source.image_encoder.neck.convs: conv.conv.weight.mul_(.1)
        for layer in source.parts.layers: layer.to_tokens.out_proj.weight.mul_(8)
        for mlp in source.parts.hyper: mlp.layers[-1].weight.mul_(40); mlp.layers[-1].bias.sub_(40)
        source.parts.iou_head.layers[-1].weight.mul_(12)
    official = build_sam2(f"configs/{CONFIGS[size]}.yaml", None, device=device)
    official.load_state_dict(source.state_dict(), strict=False)
    return load_sam2(official.state_dict(), size, device=device, resizer="torchvision"), official


class Bench:
    def __init__(self, args):
        self.device = args.device
        self.sam, self.official = models(args.size, args.device)
        torch.manual_seed(0)
        side = args.image
        self.image = torch.nn.functional.interpolate(torch.rand(1, 3, 24, 24), (side, side), mode="bicubic").clamp(0, 1)[0].permute(1, 2, 0).mul(255).byte().numpy()
        self.prompt = torch.randn(1, 1, self.sam.dim, device=args.device)
        n = 24 # image tokens a side
        y, x = torch.meshgrid(torch.arange(n), torch.arange(n), indexing="ij")
        self.cells = torch.stack([x, y, x + 1, y + 1], -1).view(-1, 4) * side / n
        self.grid, self.attention = (n, n), torch.rand(1, n * n).pow(4)
        self.predictor = SAM2ImagePredictor(self.official)
        with torch.inference_mode():
            self.set_thresholds(Settings.load("lens"))
            g = self.ground()
            self.seeds = seed_points(g, self.settings)
            self.decoded = decode_points(self.sam, g.embedding, self.seeds.points_xy, 64)
            self.stability, _ = measure(self.sam.upscale(self.decoded.logits, g.embedding), 1.0)
            self.embedding, self.grounding = g.embedding, g

    def set_thresholds(self, settings):
        self.settings = settings
        H, W = self.image.shape[:2]
        if not hasattr(self, "seeds"): return
        self.generator = SAM2AutomaticMaskGenerator(self.official, points_per_side=None, point_grids=[self.seeds.points_xy.double().numpy() / [W, H]],
                                                    pred_iou_thresh=settings.predicted_iou, stability_score_thresh=settings.stability,
                                                    stability_score_offset=settings.stability_offset, box_nms_thresh=settings.box_nms_iou)

    def ground(self):
        e = self.sam.encode(self.image)
        low = self.sam.decode(e, prompt_embed=self.prompt, multimask=False).logits
        return Grounding(self.prompt, low, self.attention.to(self.device), self.sam.upscale(low, e)[0, 0], self.cells.to(self.device), self.grid, e)

    def ours(self): return discover(self.sam, self.ground(), self.settings)

    def token_call(self, multimask):
        "The prompt token through the official modules, as the reference of the generator does it."
        p, m = self.predictor, self.official
        sparse, dense = m.sam_prompt_encoder(points=None, boxes=None, masks=None)
        low, ious, _, _ = m.sam_mask_decoder(image_embeddings=p._features["image_embed"], image_pe=m.sam_prompt_encoder.get_dense_pe(),
                                             sparse_prompt_embeddings=torch.cat([sparse.expand(1, -1, -1), self.prompt], 1), dense_prompt_embeddings=dense,
                                             multimask_output=multimask, repeat_image=False, high_res_features=p._features["high_res_feats"])
        return low, ious, p._transforms.postprocess_masks(low, p._orig_hw[-1])

    def composed(self):
        self.predictor.set_image(self.image)
        low, _, L = self.token_call(False)
        _, _, multi = self.token_call(True)
        masks = list(multi[0] > 0)
        g = Grounding(self.prompt, low, self.attention.to(self.device), L[0, 0], self.cells.to(self.device), self.grid, self.embedding)
        seeds = seed_points(g, self.settings)
        f = point_features(self.embedding, seeds.points_xy)
        core = main_core(f @ f.T > self.settings.similarity)
        points = torch.cat([seeds.points_xy[core.cpu()], background_point(L[0, 0], self.settings.background_logit).cpu()[None]]).numpy()
        refined, _, _ = self.predictor.predict(points, np.array([1] * len(core) + [0]), mask_input=low[0].clamp(-32, 32).cpu().numpy(), multimask_output=True)
        return masks + list(refined) + [m["segmentation"] for m in self.generator.generate(self.image)[:self.settings.amg_candidates]]

    def floor(self):
        s, e = self.sam, self.sam.encode(self.image)
        s.decode(e, prompt_embed=self.prompt, multimask=False)
        s.decode(e, prompt_embed=self.prompt, multimask=True)
        points = self.seeds.points_xy[:12]
        s.decode(e, points[None], torch.ones(1, 12, dtype=torch.int64), mask_logits=s.mask_prompt(self.grounding.low_res_masks), multimask=True)
        decode_points(s, e, self.seeds.points_xy, self.settings.points_per_batch)

    def passing(self):
        loose = self.settings.with_(box_nms_iou=1.0)
        return len(filter_masks(self.sam, self.embedding, self.decoded, loose)[0]), len(filter_masks(self.sam, self.embedding, self.decoded, self.settings)[0])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7); parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall"); parser.add_argument("--size", choices=CONFIGS, default="hiera_t")
    parser.add_argument("--image", type=int, default=1024); parser.add_argument("--device", default="cpu"); parser.add_argument("--out", default="benchmarks/results")
    parser.add_argument("--cases", nargs="*", help="only these thresholds: open, all, default, third")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(args.threads)
    clock = time.perf_counter if args.clock == "wall" else time.process_time
    bench = Bench(args)
    lens = Settings.load("lens")
    third = lambda values, q: float(values.quantile(q))
    typical_iou = third(bench.decoded.ious, .4)
    cases = {
        "open": lens.with_(predicted_iou=0.0, stability=0.0),
        "all": lens.with_(predicted_iou=0.0, stability=0.0, amg_candidates=90, max_candidates=96),
        "default": lens,
        "third": lens.with_(predicted_iou=typical_iou, stability=third(bench.stability[bench.decoded.ious > typical_iou], .45)),
    }
    if args.cases: cases = {k: cases[k] for k in args.cases}
    def timed(function):
        if args.device != "cpu": torch.cuda.synchronize()
        start = clock(); function()
        if args.device != "cpu": torch.cuda.synchronize()
        return clock() - start
    out = Path(args.out); out.mkdir(parents=True, exist_ok=True)
    rows = []
    with torch.inference_mode():
        for name, settings in cases.items():
            bench.set_thresholds(settings)
            ours, official = bench.ours(), bench.composed() # warm
            same = min((torch.as_tensor(np.asarray(b)).bool().cpu() == a.cpu()).float().mean().item() for a, b in zip(ours.masks, official, strict=True))
            times = {k: [] for k in ("ours", "official", "floor")}
            for _ in range(args.rounds):
                for k, f in (("ours", bench.ours), ("official", bench.composed), ("floor", bench.floor)): times[k].append(timed(f))
            o, c, f = (statistics.median(times[k]) for k in times)
            # ratios round by round, so that a slow spell of the machine strikes both sides
            by_round = lambda a, b, times=times: statistics.median(x / y for x, y in zip(times[a], times[b], strict=True))
            passing, after_nms = bench.passing()
            rows.append(dict(thresholds=name, predicted_iou=round(settings.predicted_iou, 3), stability=round(settings.stability, 3), passing=passing, after_nms=after_nms,
                             candidates=len(ours), pixel_agreement=round(same, 6), ours_s=round(o, 3), official_s=round(c, 3), floor_s=round(f, 3),
                             speedup=round(by_round("official", "ours"), 2), over_floor=round(by_round("ours", "floor"), 2),
                             size=args.size, image=args.image, threads=args.threads, clock=args.clock, rounds=args.rounds, device=args.device))
            print("  ".join(f"{k} {v}" for k, v in rows[-1].items() if k not in ("size", "image", "threads", "clock", "rounds", "device")), flush=True)
            with open(out / "candidates.csv", "w", newline="") as file: # after every case, so that a stopped run leaves what it has
                writer = csv.DictWriter(file, rows[0]); writer.writeheader(); writer.writerows(rows)


if __name__ == "__main__": main()
