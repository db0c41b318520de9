"""Regression, not parity: outputs that this package itself once computed from seeded random checkpoints, so that a clone without the
recorded reference (whose outputs are the reference implementation's own) still notices when any number of the path changes.
`python tests/test_regression.py` records them anew, after a change that was meant."""
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from rea2seg.generators import load_generator
from rea2seg.masks import from_rle, to_rle
from rea2seg.pipeline import Rea2Seg
from stacks import FOLDERS, LAYERS, OPEN, QUESTIONS, picture

RECORDED = Path(__file__).with_name("regression.json")
SIZES = [(48, 80), (90, 50)]

def thumb(t: torch.Tensor, most: int = 96) -> list[float]:
    "Evenly spaced values of a tensor, five digits."
    flat = t.detach().float().flatten()
    return [float(f"{v:.5g}") for v in flat[torch.linspace(0, len(flat) - 1, min(most, len(flat))).long()].tolist()]

def weights(gen) -> dict:
    "What tells another random generator's weights from changed arithmetic."
    state = {**gen.model.state_dict(), **{f"sam.{k}": v for k, v in gen.sam.state_dict().items()}}
    return {"tensors": len(state), "sum": sum(float(v.double().sum()) for v in state.values()), "abs": sum(float(v.double().abs().sum()) for v in state.values())}

def measured(family: str, folder: Path) -> dict:
    "The numbers of every stage, on two pictures that are no squares."
    model, out = Rea2Seg.from_profile("tiny", device="cpu", generator=FOLDERS[family](folder), evaluator="attention", max_new_tokens=4, seed_points=60, **LAYERS | OPEN), []
    for (H, W), question in zip(SIZES, QUESTIONS, strict=False):
        r = model.segment(picture(H, W), question)
        g, c = r.grounding, r.candidates
        out.append({"answer": g.answer, "notes": list(r.notes), "sources": list(c.sources), "seeds": r.seeds.points_xy.int().tolist(), "top_tokens": r.seeds.top_tokens.tolist(), "masks": [to_rle(m) for m in c.masks],
                    **{name: thumb(t) for name, t in dict(prompt_embed=g.prompt_embed, low_res_masks=g.low_res_masks, attention=g.attention_layers, logits=g.logits, boxes=g.token_boxes_xyxy,
                                                          features=g.embedding.features, predicted_ious=c.predicted_ious, stability=c.stability, scores=c.scores).items()}})
    return {"weights": weights(model.generator), "results": out}

@pytest.mark.parametrize("family", FOLDERS)
def test_numbers_are_those_recorded(family, tmp_path):
    kept, now = json.loads(RECORDED.read_text())[family], measured(family, tmp_path / "model")
    assert now["weights"] == pytest.approx(kept["weights"], rel=1e-6), "torch draws other random weights here: record anew"
    for new, old in zip(now["results"], kept["results"], strict=True):
        for name in ("answer", "notes", "sources", "seeds", "top_tokens"): assert new[name] == old[name], name
        for name, values in old.items():
            # the background point is an argmax: where logits nearly tie, another processor's rounding moves it, and the masks after it a little
            loose = 1e-2 if name in ("predicted_ious", "stability", "scores") else 2e-4
            if isinstance(values[0], float): np.testing.assert_allclose(new[name], values, atol=loose, rtol=loose, err_msg=name)
        for a, b in zip(new["masks"], old["masks"], strict=True): assert (from_rle(a) != from_rle(b)).mean() <= .01

def test_a_changed_number_is_noticed(tmp_path):
    "One weight of the connection moved by a hundredth shows in what is recorded."
    kept = json.loads(RECORDED.read_text())["lens"]
    gen = load_generator(FOLDERS["lens"](tmp_path / "model"), layers=range(1, 3))
    with torch.no_grad(): gen.model.get_parameter("proj_to_sam.2.bias")[0] += .01
    g = gen.ground(picture(*SIZES[0]), QUESTIONS[0], max_new_tokens=4)
    assert np.abs(np.array(thumb(g.logits)) - kept["results"][0]["logits"]).max() > 2e-4
    assert np.abs(np.array(thumb(g.attention_layers)) - kept["results"][0]["attention"]).max() < 1e-5

if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as tmp: RECORDED.write_text(json.dumps({family: measured(family, Path(tmp) / family) for family in FOLDERS}, separators=(",", ":")) + "\n")
    print(RECORDED, RECORDED.stat().st_size, "bytes")
