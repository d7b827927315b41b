"""`python -m tests.benchmarks`: measures, prints the tables, and writes them with `--output FOLDER`."""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path

import torch

from adapterkit.torchvision_ops import ensure_torchvision_ops


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description="Time adapterkit beside PEFT.")
    parser.add_argument("--rounds", type=int, default=15, help="measurements of each alternative (default: 15)")
    parser.add_argument("--threads", type=int, help="torch's threads (default: torch's own choice)")
    parser.add_argument("--output", type=Path, help="a folder for results.json and results.md")
    parser.add_argument("cases", nargs="*", help="only these (default: all)")
    chosen = parser.parse_args(arguments)
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    ensure_torchvision_ops()
    from tests.benchmarks import report

    if unknown := set(chosen.cases) - set(report.CASES):
        parser.error(f"no such case: {', '.join(sorted(unknown))}; there are: {', '.join(report.CASES)}")
    described = report.machine()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of saved embeddings that it cannot look up offline
        results = {name: report.CASES[name](chosen.rounds) for name in chosen.cases or report.CASES}
    content = report.as_json(results, described)
    text = report.as_markdown(content)
    print(text)
    if chosen.output is not None:
        chosen.output.mkdir(parents=True, exist_ok=True)
        (chosen.output / "results.md").write_text(text, encoding="utf-8")
        (chosen.output / "results.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
