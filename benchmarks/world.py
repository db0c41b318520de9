"""Scenes per second of the rendered world, sampled and rendered.

    python benchmarks/world.py                                  two processes of one thread each, 256x256
    python benchmarks/world.py --device cuda --batch 128        one process that renders batches on a GPU
"""
import argparse
import json
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch

from rea2seg.scenes.cast import pack
from rea2seg.scenes.layout import THEMES, sample_scene
from rea2seg.scenes.render import render, render_packed


def work(job):
    "Sample and render some seeds on one thread; CPU seconds of sampling and of rendering."
    seeds, size = job
    torch.set_num_threads(1)
    render([sample_scene(0, "mixed", size_hw=size)], size) # the first call builds tables
    start = time.process_time()
    scenes = [sample_scene(s, THEMES[s % len(THEMES)], size_hw=size) for s in seeds]
    middle = time.process_time()
    render(scenes, size)
    return middle - start, time.process_time() - middle


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=140, help="scenes in all, themes in turn")
    parser.add_argument("--size", type=int, nargs=2, default=(256, 256), metavar=("H", "W"))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=128, help="scenes per batch on a GPU")
    args = parser.parse_args()
    size, n = tuple(args.size), args.scenes
    if args.device == "cpu":
        with ProcessPoolExecutor(args.processes, get_context("spawn")) as pool:
            list(pool.map(work, [(range(2), size)] * args.processes))  # imports and tables are not timed
            start = time.perf_counter()
            parts = list(pool.map(work, [(range(k, n, args.processes), size) for k in range(args.processes)]))
            wall = time.perf_counter() - start
        a, b = (1e3 * sum(p[i] for p in parts) / n for i in (0, 1))
        # wall time tells what a busy machine gives, CPU time what its cores would give if they were free
        result = {"scenes_per_s": n / wall, "cpu_ms_sampling": a, "cpu_ms_rendering": b, "scenes_per_s_on_free_cores": args.processes * 1e3 / (a + b)}
    else:
        start = time.perf_counter()
        scenes = [sample_scene(s, THEMES[s % len(THEMES)], size_hw=size) for s in range(args.batch)]
        sampled = time.perf_counter()
        packed = pack(scenes)
        done = time.perf_counter()
        for _ in range(2): render_packed(packed, size, args.device)
        torch.cuda.synchronize()
        begin, rounds = time.perf_counter(), max(1, n // args.batch)
        for _ in range(rounds): render_packed(packed, size, args.device)
        torch.cuda.synchronize()
        wall = time.perf_counter() - begin
        result = {"scenes_per_s": rounds * args.batch / wall, "ms_sampling": 1e3 * (sampled - start) / args.batch, "ms_packing": 1e3 * (done - sampled) / args.batch,
                  "peak_gib": torch.cuda.max_memory_allocated() / 2 ** 30, "name": torch.cuda.get_device_name()}
    print(json.dumps({"size_hw": size, "device": args.device, "processes": args.processes if args.device == "cpu" else 1} |
                     {k: round(v, 2) if isinstance(v, float) else v for k, v in result.items()}))


if __name__ == "__main__": main()
