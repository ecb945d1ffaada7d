"""Whether a run keeps its RAM budget as the kernel counts it: a large checkpoint inside a control group.

    python -m benchmarks.memory_cap --model DIR [--cpu-memory 1GiB] [--slack 150MB]

The group's limit is ``--cpu-memory`` plus what importing torch and transformers takes (measured first, in a process of
its own) plus ``--slack``, page cache included. Needs root. Prints limit, the kernel's peak, page cache included, beside
``stats.peak_bytes``, and the plan's memory; exit code 1 if the run did not end well inside the limit.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.out_of_core import in_group
from flexbatch.units import format_size, parse_size

_IMPORT = """
import torch, transformers
from transformers import AutoTokenizer, AutoConfig
import flexbatch.cli.run, flexbatch.runtime.engine
torch.mm(torch.rand(64, 64), torch.rand(64, 64))
print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')).split()[1])
"""


def imports() -> int:
    """Bytes that a process takes once torch and transformers are there."""
    done = subprocess.run([sys.executable, "-c", _IMPORT], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1]) * 1024


def main() -> None:
    """Run once."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--cpu-memory", default="1GiB")
    parser.add_argument("--slack", default="150MB")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--disk-dir", default=tempfile.gettempdir())
    parser.add_argument("--output", type=Path)
    options, extra = parser.parse_known_args()
    base = imports()
    limit = parse_size(options.cpu_memory) + base + parse_size(options.slack)
    with tempfile.TemporaryDirectory() as folder:
        rows, stats = Path(folder) / "rows.jsonl", Path(folder) / "stats.json"
        with rows.open("w", encoding="utf-8") as stream:
            for row in range(options.rows):
                prompt = [(row * 37 + place * 11) % 1000 + 5 for place in range(20 + 13 * row)]
                stream.write(json.dumps({"id": str(row), "prompt": prompt, "max_tokens": 6}) + "\n")
        command = [sys.executable, "-m", "flexbatch", "run", "--model", options.model, "--input", str(rows)]
        command += ["--output", f"{folder}/out.jsonl", "--stats", str(stats), "--ignore-eos", "--quiet"]
        command += ["--device", "cpu", "--cpu-memory", options.cpu_memory, "--disk-dir", options.disk_dir, *extra]
        code, _, err, peak = in_group(command, limit)
        report = {"model": Path(options.model).name, "limit": limit, "imports": base, "exit_code": code}
        report |= {"error": err.strip()[-400:], "kernel_peak_bytes": peak}
        if code == 0:
            found = json.loads(stats.read_text(encoding="utf-8"))
            report["stats_peak_bytes"] = found["peak_bytes"]
            report["plan"] = found["plan"]["memory"]
            report["weights"] = found["plan"]["weights"]
    print(json.dumps(report, indent=1))
    print(f"limit {format_size(limit)}, of which imports {format_size(base)}", file=sys.stderr)
    if options.output:
        options.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    raise SystemExit(code != 0)


if __name__ == "__main__":
    main()
