"""How many verified questions a second one core makes about rendered scenes: python benchmarks/questions.py [scenes a theme] -> CSV on stdout."""
import csv
import sys
import time

import torch

from rea2seg.scenes.layout import THEMES, sample_scene
from rea2seg.scenes.questions import questions_for
from rea2seg.scenes.render import render
from rea2seg.scenes.view import View


def main(each: int = 8):
    torch.set_num_threads(1)
    out = csv.writer(sys.stdout)
    out.writerow(["theme", "scenes", "questions", "questions_per_scene", "ms_per_view", "ms_per_question"])
    for theme in THEMES:
        pool = [(s, render([s])[0]) for s in (sample_scene(seed, theme) for seed in range(each))]
        start = time.process_time()
        views = [View(s, r) for s, r in pool]
        middle = time.process_time()
        made = sum(len(questions_for(v, rng=k, n=16)) for k, v in enumerate(views))
        end = time.process_time()
        out.writerow([theme, each, made, f"{made / each:.1f}", f"{1e3 * (middle - start) / each:.2f}", f"{1e3 * (end - middle) / made:.2f}"])


if __name__ == "__main__": main(*map(int, sys.argv[1:]))
