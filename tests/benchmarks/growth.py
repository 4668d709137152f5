"""How time and memory grow: ``python -m tests.benchmarks.growth --out data/results/growth.jsonl``.

Each point is a process of its own, because the largest memory of a process only grows. Needs Linux.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

BASE = {"model": "LeNetZhu", "restarts": 1, "steps": 20, "side": 32, "local_steps": 0, "recompute": None}
AXES: dict[str, list[dict[str, Any]]] = {
    "restarts": [{"restarts": n} for n in (1, 2, 4, 8, 16, 32)],
    "steps": [{"steps": n} for n in (10, 20, 40, 80)],
    "side": [{"model": "ConvNet8", "steps": 5, "side": n} for n in (16, 32, 64, 128)],
    "parameters": [{"model": f"ConvNet{n}", "steps": 3} for n in (8, 16, 32, 64)],
    "local steps": [
        {"model": "ConvNet8", "steps": 2, "local_steps": n, "recompute": again}
        for again in (False, True)
        for n in (1, 5, 20, 100)
    ],
}


def main() -> None:
    """Measure every point and write a line for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("results/growth.jsonl"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--point", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.point:
        print(json.dumps(_measure(json.loads(args.point), args.device)))
        return
    lines = []
    for axis, points in AXES.items():
        for point in points:
            settings = {**BASE, **point}
            found = _apart(settings, args.device)
            lines.append(json.dumps({"axis": axis, **settings, **found}))
            print(
                f"{axis:12} {point}: {found['seconds'] * 1000:.0f} ms, {found['megabytes']:.0f} MB",
                flush=True,
            )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text("\n".join(lines) + "\n")


def _apart(settings: dict[str, Any], device: str) -> dict[str, Any]:
    command = [
        sys.executable,
        "-m",
        "tests.benchmarks.growth",
        "--device",
        device,
        "--point",
        json.dumps(settings),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{settings} failed:\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _measure(point: dict[str, Any], device: str) -> dict[str, Any]:
    """Return the time of a whole attack, and how much more memory the largest step took than the network."""
    import torch

    import invlib as iv
    from invlib.models import cards

    if device == "cpu":
        torch.set_num_threads(1)
    x = torch.rand(1, 3, point["side"], point["side"], generator=torch.Generator().manual_seed(0)).to(device)
    y = torch.zeros(1, dtype=torch.int64, device=device)
    model = iv.models.build(point["model"], image_size=point["side"], seed=0).to(device)
    steps = point["local_steps"]
    client = iv.FedAvg(lr=0.01, local_steps=steps) if steps else iv.FedSGD()
    seen = iv.observe(model, x, y, client, normalization=iv.CIFAR10)
    attack = iv.inverting_gradients(
        steps=point["steps"], restarts=point["restarts"], recompute=point["recompute"]
    )
    before = _memory(device)
    times = []
    for _ in range(3):
        began = time.perf_counter()
        found = attack(model, seen)
        times.append(time.perf_counter() - began)
    return {
        "seconds": statistics.median(times),
        "megabytes": _memory(device) - before,
        "parameters": sum(p.numel() for p in model.parameters()),
        "engine": found.engine,
        "device": torch.cuda.get_device_name() if device != "cpu" else "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": cards.commit(),
    }


def _memory(device: str) -> float:
    import torch

    if device != "cpu":
        return torch.cuda.max_memory_allocated() / 2**20
    with open("/proc/self/status") as status:  # what resource tells includes what the parent process had
        kilobytes = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    return kilobytes / 2**10


if __name__ == "__main__":
    main()
