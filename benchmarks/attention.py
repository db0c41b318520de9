"""What recording attention rows costs: time over the plain SDPA forward, memory against `output_attentions=True` with eager attention.

    python benchmarks/attention.py [--tokens 2000] [--rounds 9] [--threads 2] [--clock wall|cpu] [--device cpu] [--out benchmarks/results]

A random Llama; every layer's row of the last token over all tokens is recorded. Times are taken in turn, round by round. Memory is the peak of live
allocations during a forward (torch's profiler on a CPU, the allocator's statistics on CUDA); "extra" is what lies above the plain SDPA forward's peak.
"""
import argparse
import csv
import statistics
import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from rea2seg.attention import record_attention


def peak_bytes(function, device):
    "Peak of live bytes allocated during `function`."
    if device != "cpu":
        torch.cuda.synchronize(); torch.cuda.reset_peak_memory_stats(); before = torch.cuda.memory_allocated()
        function(); torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof: kept = function()
    live = peak = 0
    events = sorted((e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns())
    for e in events:
        live += e.nbytes(); peak = max(peak, live)
    del kept
    return peak


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2000); parser.add_argument("--rounds", type=int, default=9); parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall"); parser.add_argument("--device", default="cpu")
    parser.add_argument("--hidden", type=int, default=512); parser.add_argument("--layers", type=int, default=8); parser.add_argument("--out", default="benchmarks/results")
    args = parser.parse_args()
    torch.set_num_threads(args.threads); torch.manual_seed(0)
    config = LlamaConfig(vocab_size=1000, hidden_size=args.hidden, intermediate_size=3 * args.hidden, num_hidden_layers=args.layers, num_attention_heads=args.hidden // 64,
                         num_key_value_heads=args.hidden // 128, max_position_embeddings=args.tokens)
    model = LlamaForCausalLM(config).eval().to(args.device)
    ids = torch.randint(1000, (1, args.tokens), device=args.device)
    run = lambda **kw: model.model(ids, use_cache=False, **kw)
    def plain(): model.set_attn_implementation("sdpa"); return run().last_hidden_state
    def recorded():
        model.set_attn_implementation("sdpa")
        with record_attention(model, -1) as rec: run()
        return rec.rows
    def eager():
        model.set_attn_implementation("eager")
        return run(output_attentions=True).attentions
    clock = time.perf_counter if args.clock == "wall" else time.process_time
    def timed(function):
        start = clock(); function()
        if args.device != "cpu": torch.cuda.synchronize()
        return clock() - start
    ways = dict(sdpa=plain, recorded=recorded, eager=eager)
    with torch.inference_mode():
        error = (recorded()[:, 0] - torch.stack([a[0, :, -1].mean(0) for a in eager()])).abs().max().item()
        times = {k: [] for k in ways}
        for i in range(args.rounds):
            for k in ("sdpa", "recorded") if i % 2 else ("recorded", "sdpa"): times[k].append(timed(ways[k]))
            if i < 2: times["eager"].append(timed(eager))
        memory = {k: peak_bytes(f, args.device) for k, f in ways.items()}
    ratio = statistics.median(r / s for r, s in zip(times["recorded"], times["sdpa"], strict=True))
    extra = {k: memory[k] - memory["sdpa"] for k in ("recorded", "eager")}
    row = dict(tokens=args.tokens, layers=args.layers, heads=config.num_attention_heads, sdpa_s=round(statistics.median(times["sdpa"]), 3),
               recorded_s=round(statistics.median(times["recorded"]), 3), eager_s=round(statistics.median(times["eager"]), 3), overhead=round(ratio - 1, 4),
               overhead_of_minima=round(min(times["recorded"]) / min(times["sdpa"]) - 1, 4),
               peak_sdpa_mb=round(memory["sdpa"] / 2**20, 2), extra_recorded_mb=round(extra["recorded"] / 2**20, 3), extra_eager_mb=round(extra["eager"] / 2**20, 1),
               memory_ratio=round(extra["eager"] / max(extra["recorded"], 1), 1), max_error=error, threads=args.threads, clock=args.clock, rounds=args.rounds, device=args.device)
    for k, v in row.items(): print(f"{k:20} {v}")
    out = Path(args.out); out.mkdir(parents=True, exist_ok=True)
    with open(out / "attention.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, row); writer.writeheader(); writer.writerow(row)


if __name__ == "__main__": main()
