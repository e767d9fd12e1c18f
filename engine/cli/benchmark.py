"""`clip-finetune bench`: how fast a training step is on this machine."""

from __future__ import annotations

import argparse

from .arguments import DEVICE_HELP, Commands, require_writable
from .terminal import print_line


def add_commands(commands: Commands) -> None:
    bench = commands.add(
        "bench", run_bench, "Measure a training step on this machine, beside those of open_clip and Hugging Face."
    )
    bench.add_argument("--model", default="ViT-B-32", metavar="M", help="ViT-B-32 (default), ViT-L-14, or a file")
    bench.add_argument("--batch-size", type=int, default=8, metavar="N", help="pairs in a step (default: 8)")
    bench.add_argument("--rounds", type=int, default=3, metavar="N", help="how often each takes a turn (default: 3)")
    bench.add_argument(
        "--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto", help="of our steps (default: auto)"
    )
    bench.add_argument("--threads", type=int, metavar="N", help="CPU cores to use (default: all)")
    bench.add_argument("--device", help=DEVICE_HELP)
    bench.add_argument("--json", metavar="FILE", help="also write the numbers to FILE")


def run_bench(arguments: argparse.Namespace) -> None:
    from ..bench.measure import bench
    from ..files import write_json

    if arguments.json:
        require_writable(arguments.json, arguments.model)
    result = bench(
        arguments.model,
        batch_size=arguments.batch_size,
        rounds=arguments.rounds,
        precision=arguments.precision,
        threads=arguments.threads,
        device=arguments.device,
        activation=arguments.activation,
        on_note=print_line,
    )
    if arguments.json:
        write_json(arguments.json, result.as_dict())
    print(result.table())
