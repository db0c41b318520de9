"""Small models and samples that the tests of training share; run as a script it is one training, for `accelerate launch` and for being killed."""
import atexit
import json
import shutil
import signal
import sys
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
from accelerate import PartialState

from rea2seg.data.samples import Sample
from rea2seg.lisa_new import new_lisa
from rea2seg.lisa_prompt import train_tokens
from rea2seg.masks import to_rle
from rea2seg.sam2_model import Sam2
from rea2seg.settings import load_section
from rea2seg.train.families import train_samples
from rea2seg.train.generator import GeneratorShape, new_generator
from rea2seg.train.samples import Mixture, SampleTraining
from rea2seg.train.tiny import main

SAM2 = dict(embed_dim=16, num_heads=1, stages=(1, 1, 2), global_att_blocks=(3,), window_pos_embed_bkg_spatial_size=(4, 4), window_spec=(4, 4, 4), image_size=64, dim=32,
            decoder_heads=2, decoder_mlp=32, iou_hidden=16)
SHAPE = dict(hidden=64, layers=2, heads=4, mlp=64, vision_layers=1, vision_hidden=32, vision_heads=2, vision_mlp=32, patch=16, image_size=64, queries=2, vocabulary=300, context=256)
LISA = dict(llm=dict(hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4),
            clip=dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14),
            sam=dict(encoder_embed_dim=32, encoder_depth=2, encoder_num_heads=2, encoder_global_attn_indexes=(1,), image_size=64, dim=32, decoder_heads=2, decoder_mlp=32))
WORDS = ["the red square", "the blue square", "Which region of the picture is it?", "It is red because it is not blue."]

def squares(n: int, reasoning: str | None = None, hw=(64, 64)) -> list[Sample]:
    "A red and a blue square on grey; one of them is asked for."
    out, rng = [], np.random.default_rng(0)
    for i in range(n):
        image, masks = np.full((*hw, 3), 128, np.uint8), np.zeros((2, *hw), bool)
        for k, x in enumerate((4, hw[1] // 2 + 4)):
            y = int(rng.integers(4, hw[0] - 28)); masks[k, y:y + 24, x:x + 24] = True
        image[masks[0]], image[masks[1]] = (200, 30, 30), (30, 30, 200)
        out.append(Sample(f"squares{i}", image, WORDS[1 - i % 2], to_rle(masks[1 - i % 2]), category="geometric", reasoning=reasoning))
    return out

def lens(**changes): return new_generator(Sam2.random(SAM2), WORDS, GeneratorShape(**{**SHAPE, **changes}))
def lisa(seed: int = 0): return new_lisa(train_tokens(WORDS * 20, 300), **LISA, system="A chat.", seed=seed)

def settings(**changes) -> SampleTraining:
    own = dict(steps=12, batch_size=8, learning_rate=3e-3, warmup_steps=2, log_every=1, save_every=100, workers=0, answer_tokens=8)
    return load_section(SampleTraining, "tiny.finetune", **(own | changes))

def curve(folder: Path) -> list[dict]:
    "The losses of a run's log."
    return [{k: v for k, v in r.items() if k not in ("seconds", "val_giou")} for r in map(json.loads, (Path(folder) / "run" / "log.jsonl").read_text().splitlines()) if "loss" in r]

def train(folder: str, mixture: type[Mixture] = Mixture, **changes) -> list[dict]:
    s = settings(**changes)
    return train_samples(lens(), mixture({"referring": squares(11)}, s.weights), folder, s, progress=False)

@cache
def stack() -> Path:
    "The embedded stack's own commands at a very small size: packs, small SAM, small generator, and a second stretch of the generator."
    folder = Path(tempfile.mkdtemp(prefix="rea2seg-stack-"))
    atexit.register(shutil.rmtree, folder, True)
    base = ["--device", "cpu", "--workers", "0"]
    choose = lambda **s: [x for k, v in s.items() for x in ("--set", f"{k}={v}")]
    main(["pack", "--pack", f"{folder}/train", "--scenes", "5", *base]); main(["validation", "--pack", f"{folder}/val", "--scenes", "2", *base])
    data = ["--pack", f"{folder}/train", "--validation", f"{folder}/val", *base]
    few = dict(batch_size=2, warmup_steps=1, log_every=1, precision="no")
    main(["sam", *data, "--out", f"{folder}/one", *choose(steps=6, plain_steps=0, clicks=2, floor_clicks=1, regions=2, refinements=2, **few)])
    own = choose(questions=4, mask_questions=2, **few)
    main(["generator", *data, "--sam", f"{folder}/one/sam", "--out", f"{folder}/one", *own, *choose(steps=6, mask_from=0.7)])
    main(["generator", *data[:2], *base, "--start", f"{folder}/one/generator", "--out", f"{folder}/two", *own, *choose(steps=1, mask_from=1.5)])
    return folder

class StoppedMixture(Mixture):
    "Data whose sixth sample brings a signal to stop."
    def __getitem__(self, k: int):
        if k == 5: signal.raise_signal(signal.SIGTERM)
        return super().__getitem__(k)

if __name__ == "__main__":
    train(sys.argv[1], StoppedMixture if "stopped" in sys.argv[3:] else Mixture, **json.loads(sys.argv[2]))
    state = PartialState()
    (Path(sys.argv[1]) / f"process-{state.process_index}-of-{state.num_processes}").touch()
