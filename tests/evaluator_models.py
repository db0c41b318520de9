"""A small evaluator and mined candidates that the tests of its training share; run as a script it is one training, for `accelerate launch` and for being killed."""
import json
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from accelerate import PartialState
from PIL import Image

from rea2seg.internvl import InternvlSize, new_internvl, small_tokenizer
from rea2seg.mined import MINED, encode_masks, read_mined
from rea2seg.settings import Settings, load_section
from rea2seg.train.evaluator import builder_of, train_evaluator
from rea2seg.train.groups import EvaluatorTraining, open_groups

SIZE = dict(side=32, patch=8, vision_width=32, vision_layers=1, vision_heads=2, vision_mlp=32, text_width=48, text_layers=2, text_heads=4, text_kv_heads=2, text_mlp=64, positions=1024)
PROFILE = Settings.load("tiny", prompt="brief", question_place="before", mask_view="overlay", chain_of_thought=False, group_size=5, consensus=0.0)

def small(seed: int = 0, **changes): return new_internvl(load_section(InternvlSize, "tiny.internvl", **(SIZE | changes)), small_tokenizer(["the red square", "the blue square", "IoU of 5 masks:"] * 3, 320), seed)

def squares(folder: Path, n: int = 4, reasoning: str | None = None, **changes) -> Path:
    "A mined folder: a red and a blue square, one asked for; six candidates from right to wrong."
    folder.mkdir(parents=True, exist_ok=True)
    rows, rng = [], np.random.default_rng(0)
    for i in range(n):
        image, both = np.full((32, 48, 3), 128, np.uint8), np.zeros((2, 32, 48), bool)
        for k, x in enumerate((3, 27)):
            y = int(rng.integers(2, 14)); both[k, y:y + 16, x:x + 16] = True
        image[both[0]], image[both[1]] = (200, 30, 30), (30, 30, 200)
        Image.fromarray(image).save(folder / f"{i}.png")
        truth, other = both[i % 2], both[1 - i % 2]
        masks = np.stack([truth, np.roll(truth, 4, 1), np.roll(truth, 8, 0), truth | other, other, np.roll(other, 4, 1)])
        ious = [float((m & truth).sum() / (m | truth).sum()) for m in masks]
        rows.append(dict.fromkeys(MINED.names) | dict(name=f"s{i:02d}", question=("the red square", "the blue square")[i % 2], image_id=str(i), category=("geometric", "spatial")[i % 2],
                    image=str(folder / f"{i}.png"), height=32, width=48, truth=encode_masks(truth[None])[0], initial=encode_masks(masks[1:2])[0], candidates=encode_masks(masks), initial_iou=ious[1], ious=ious,
                    sources=["multimask", "kcore", "amg", "amg", "amg", "amg"], predicted_ious=[.5] * 6, stability=[1.] * 6, notes=[], seconds=0., reasoning=reasoning) | changes)
    pq.write_table(pa.Table.from_pylist(rows, schema=MINED), folder / "part-0of1-00000.parquet")
    (folder / "run.json").write_text(json.dumps({"data": {"spec": "made", "split": None, "limit": None, "seed": 0, "options": {}}}))
    return folder

def settings(**changes) -> EvaluatorTraining:
    own = dict(steps=8, batch_size=8, learning_rate=3e-3, warmup_steps=1, log_every=1, save_every=100, workers=0, validation_samples=4)
    return load_section(EvaluatorTraining, "tiny.evaluator.finetune", **(own | changes))

LORA = dict(lora_rank=8, lora_alpha=16, lora_targets="q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj", learning_rate=1e-2)

def groups(mined: Path, s: EvaluatorTraining, loaded, **kw): return open_groups([str(mined)], [], s, builder_of(loaded, PROFILE), loaded.model.config.text_config.max_position_embeddings, **kw)

def train(mined: str, folder: str, loaded=None, held: str | None = None, loop: dict | None = None, **changes) -> list[dict]:
    loaded, s = loaded or small(), settings(**changes)
    return train_evaluator(loaded, PROFILE, groups(Path(mined), s, loaded), folder, s, read_mined(held) if held else None, base=changes.get("base", ""), progress=False, **(loop or {}))

def curve(folder: Path) -> list[dict]:
    "The losses of a run's log."
    return [{k: v for k, v in r.items() if k != "seconds"} for r in map(json.loads, (Path(folder) / "run" / "log.jsonl").read_text().splitlines()) if "loss" in r]

if __name__ == "__main__":
    train(sys.argv[1], sys.argv[2], **json.loads(sys.argv[3]))
    state = PartialState()
    (Path(sys.argv[2]) / f"process-{state.process_index}-of-{state.num_processes}").touch()
