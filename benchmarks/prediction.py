"""Whether plans take as long as they say: predicted against measured seconds, over varied placements.

    python benchmarks/prediction.py --models DIR[,DIR] [--disk-dir DIR] [--only "NAME;NAME"] [--output FILE [--add]]

Every setting runs as ``flexbatch run`` in a process of its own; before every third one the machine is profiled anew, so
that its speed of that hour counts. ``sim`` runs and their profile have one thread for products, so that the GPU it
plays has a core of its own and copies, disk and attention on the CPU have the other. The ratio is that of all sweeps of
the job, predicted over measured (``job``), and of the mean sweep of the steady state over the median one (``sweep``)
where rows come and go during most of the job. 1 is right; the aim is 0.8 to 1.2 for all, 0.9 to 1.1 at the median.
A busy machine shows in single runs: ``--add`` adds to the runs that FILE holds, and each setting's median counts.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GPU = "8GiB"


@dataclass(frozen=True, slots=True)
class Setting:
    """One run: ``rows`` of ``prompt`` + ``new`` tokens with ``options`` of ``flexbatch run``."""

    name: str
    device: str
    rows: int
    prompt: int
    new: int
    options: tuple[str, ...]
    throttle: tuple[str, ...] = ()

    @property
    def steady(self) -> bool:
        """Whether rows come and go during most of the job."""
        return "--max-sequences" in self.options


def _setting(name: str, device: str, size: tuple[int, int, int], options: str, throttle: str = "") -> Setting:
    return Setting(name, device, *size, tuple(options.split()), tuple(throttle.split()))


SETTINGS = [
    _setting("cpu: resident, few rows", "cpu", (4, 64, 48), "--weights 0,100,0"),
    _setting("cpu: resident, many rows", "cpu", (48, 64, 16), "--weights 0,100,0"),
    _setting("cpu: resident, steady", "cpu", (128, 48, 16), "--weights 0,100,0 --max-sequences 24"),
    _setting("cpu: disk, few rows", "cpu", (4, 16, 16), "--weights 0,0,100"),
    _setting("cpu: disk, many rows", "cpu", (128, 16, 12), "--weights 0,0,100"),
    _setting("cpu: half on disk", "cpu", (32, 32, 16), "--weights 0,50,50"),
    _setting("cpu: slow disk", "cpu", (48, 32, 12), "--weights 0,30,70", "disk_read=600MB"),
    _setting("cpu: cache on disk", "cpu", (48, 96, 12), "--weights 0,100,0 --kv 0,50,50"),
    _setting("sim: resident", "sim", (32, 64, 16), "--weights 100,0,0 --kv 100,0,0"),
    _setting("sim: from RAM", "sim", (32, 32, 12), "--weights 0,100,0 --kv 100,0,0", "h2d=1GB"),
    _setting("sim: three tiers", "sim", (32, 32, 12), "--weights 30,30,40 --kv 100,0,0", "h2d=1GB disk_read=700MB"),
    _setting("sim: from disk", "sim", (64, 16, 8), "--weights 0,0,100 --kv 100,0,0", "h2d=800MB disk_read=800MB"),
    _setting(
        "sim: cache in RAM, attended there",
        "sim",
        (48, 128, 12),
        "--weights 50,50,0 --kv 0,100,0 --cpu-attention on",
        "h2d=1GB d2h=1GB",
    ),
    _setting(
        "sim: cache in RAM, brought up",
        "sim",
        (32, 128, 8),
        "--weights 50,50,0 --kv 0,100,0 --cpu-attention off",
        "h2d=1GB d2h=1GB",
    ),
    _setting(
        "sim: hidden states in RAM",
        "sim",
        (256, 24, 8),
        "--weights 0,100,0 --kv 50,50,0 --hidden 0,100,0 --micro-batch 64",
        "h2d=1GB d2h=1GB",
    ),
    _setting(
        "sim: steady, chosen by the policy", "sim", (128, 48, 12), "--max-sequences 32", "h2d=1GB d2h=1GB disk_read=1GB"
    ),
]


def profiled(device: str, folder: Path, disk_dir: str) -> dict[str, Any]:
    """Measure the machine as ``device`` sees it."""
    file = folder / f"{device}.json"
    file.unlink(missing_ok=True)
    command = [sys.executable, "-m", "flexbatch", "profile", "--device", device, "--output", str(file), "--quiet"]
    command += ["--disk-dir", disk_dir, *(["--gpu-memory", GPU] if device == "sim" else [])]
    subprocess.run(command, check=True, env=_environment(device))
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def _environment(device: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1" if device == "sim" else str(os.cpu_count() or 1)}


def measured(setting: Setting, model: str, profile: dict[str, Any], folder: Path, disk_dir: str) -> dict[str, Any]:
    """Run ``setting`` and return what was predicted beside what happened."""
    own = json.loads(json.dumps(profile))
    command = [sys.executable, "-m", "flexbatch", "run", "--model", model, "--device", setting.device]
    command += ["--gpu-memory", GPU] if setting.device == "sim" else []
    for limit in setting.throttle:
        resource, rate = limit.split("=")
        own["links"][resource] = min(
            own["links"][resource], float(rate.removesuffix("MB").removesuffix("GB")) * _UNIT[rate[-2:]]
        )
        command += ["--throttle", limit]
    machine, rows, stats = folder / "machine.json", folder / "rows.jsonl", folder / "stats.json"
    machine.write_text(json.dumps(own), encoding="utf-8")
    with rows.open("w", encoding="utf-8") as stream:
        for row in range(setting.rows):
            prompt = [(row * 37 + place * 11) % 1000 + 5 for place in range(setting.prompt)]
            stream.write(json.dumps({"prompt": prompt, "max_tokens": setting.new}) + "\n")
    command += ["-i", str(rows), "-o", str(folder / "out.jsonl"), "--stats", str(stats), "--ignore-eos", "--quiet"]
    command += ["--disk-dir", disk_dir, "--overwrite", *setting.options]
    subprocess.run(command, check=True, env={**_environment(setting.device), "FLEXBATCH_PROFILE": str(machine)})
    found = json.loads(stats.read_text(encoding="utf-8"))
    predicted = found["plan"]["predicted"]
    report = {
        "setting": setting.name,
        "model": Path(model).name,
        "bottleneck": predicted["bottleneck"],
        "predicted_job_s": predicted["job_s"],
        "measured_job_s": found["generate_s"],
        "job": predicted["job_s"] / found["generate_s"],
        "sweeps": found["sweeps"],
        "busy_s": found["busy_s"],
    }
    if setting.steady:
        report |= {"predicted_sweep_s": predicted["sweep_s"], "measured_sweep_s": found["sweep_s"]}
        report["sweep"] = predicted["sweep_s"] / found["sweep_s"]
    return report


_UNIT = {"MB": 1e6, "GB": 1e9}


def main() -> None:
    """Run all settings and print, or write, one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", required=True)
    parser.add_argument("--disk-dir", default=tempfile.gettempdir())
    parser.add_argument("--only")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--add", action="store_true")
    options = parser.parse_args()
    models = options.models.split(",")
    wanted = [
        item for item in SETTINGS if options.only is None or any(part in item.name for part in options.only.split(";"))
    ]
    runs: list[dict[str, Any]] = []
    if options.add and options.output and options.output.exists():
        runs = json.loads(options.output.read_text(encoding="utf-8"))["runs"]
    profiles: dict[str, tuple[int, dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for number, setting in enumerate(wanted):
            taken, profile = profiles.get(setting.device, (-3, {}))
            if number - taken >= 3:
                profile = profiled(setting.device, folder, options.disk_dir)
                profiles[setting.device] = (number, profile)
            model = models[SETTINGS.index(setting) % len(models)]
            runs.append(measured(setting, model, profile, folder, options.disk_dir))
            print(json.dumps(runs[-1]), flush=True)
    found = summary(runs)
    print(json.dumps({name: value for name, value in found.items() if name != "runs"}, indent=1))
    if options.output:
        options.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Every setting's median ratio, and how far these are from 1."""
    ratios: dict[str, list[float]] = {}
    for run in runs:
        ratios.setdefault(run["setting"], []).append(run["job"])
    medians = {setting: statistics.median(found) for setting, found in ratios.items()}
    off = [abs(ratio - 1) for ratio in medians.values()]
    return {"settings": medians, "median_error": statistics.median(off), "worst_error": max(off), "runs": runs}


if __name__ == "__main__":
    main()
