"""What pruning costs while training: time and memory of steps, against plain fine-tuning of the same network.

    python -m recipes.benchmarks.training --output model_cards/benchmark_training_cpu.json
    python -m recipes.benchmarks.training --device cuda --bf16 --compile --batch_size 128

The tables of all runs, one on each device, are written to `benchmark_training.md` beside the output.

Networks in the shapes of DeiT-S and ConvNeXt-T with random weights take training steps in turn, each as the Trainers
take them: the stock Trainer for plain fine-tuning, `UPDPTrainer` with λ held at 0, 0.5 and 1, `SupernetTrainer` with
its four settings a step. All do so with a teacher, too: the unpruned checkpoint, or the supernet's own open setting. A
step is the callback that writes λ, forward, loss, backward, clipping and the optimizer.

Memory is the peak of two steps: what the device's allocator gave out, or, on a CPU, by how much the peak of resident
memory of a process grew that was forked for this alone, from one that holds the libraries and nothing else.
"""

from pathlib import Path

import torch

from recipes.benchmarks.conditions import write_json
from recipes.benchmarks.training.arguments import TrainingBenchmarkArguments
from recipes.benchmarks.training.measuring import benchmark
from recipes.benchmarks.training.tables import report_of, tables
from updp_hf.recipe.command_line import parse_arguments


def main() -> None:
    (options,) = parse_arguments(TrainingBenchmarkArguments)
    torch.backends.cudnn.benchmark = True
    results = benchmark(options)
    print(tables(results))
    if options.output:
        write_json(results, options.output)
        files = sorted(Path(options.output).parent.glob("benchmark_training_*.json"))
        (Path(options.output).parent / "benchmark_training.md").write_text(report_of(files), encoding="utf-8")


if __name__ == "__main__":
    main()
