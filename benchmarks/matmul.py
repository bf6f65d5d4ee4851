"""What the machine's plain matrix products reach: the ceiling that training is held against.

    python benchmarks/matmul.py

2 m k n floating-point operations for [m, k] @ [k, n]; the median of repeated products over about a second each.
"""

import sys
from pathlib import Path

if not __package__:  # run as a script: its own folder would hide the standard library's `inspect`
    sys.path[0] = str(Path(__file__).resolve().parent.parent)


import time

from stoney_rl import cli

SQUARE = 2048


def rates(shapes: dict[str, tuple[int, int, int]], threads: int, seconds: float = 1.0) -> dict[str, dict[str, float]]:
    """GFLOP/s by dtype ('fp32', 'bf16') and name of shape. ``shapes``: name -> (m, k, n) of [m, k] @ [k, n]."""
    import torch

    torch.set_num_threads(threads)
    return {
        name: {shape: _rate(*sizes, dtype, seconds) for shape, sizes in shapes.items()}
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
    }


def _rate(m: int, k: int, n: int, dtype: object, seconds: float) -> float:
    import torch

    generator = torch.Generator().manual_seed(0)
    left = torch.randn(m, k, generator=generator).to(dtype)
    right = torch.randn(n, k, generator=generator).to(dtype).T  # as a linear layer holds its weight
    product = left @ right  # the first product also compiles its kernel
    times, end = [], time.perf_counter() + seconds
    while len(times) < 5 or time.perf_counter() < end:
        started = time.perf_counter()
        torch.mm(left, right, out=product)
        times.append(time.perf_counter() - started)
    return 2 * m * k * n / sorted(times)[len(times) // 2] / 1e9


def main(argv: list[str] | None = None) -> None:
    from benchmarks import measure

    parser = cli.make_parser(__doc__)
    parser.add_argument("--threads", type=cli.positive_int, default=measure.usable_cores(), help="torch threads")
    parser.add_argument("--tokens", type=cli.positive_int, default=512, help="m of the layer-shaped product")
    parser.add_argument("--hidden", type=cli.positive_int, default=576, help="k; SmolLM2-135M's by default")
    parser.add_argument("--intermediate", type=cli.positive_int, default=1536, help="n; SmolLM2-135M's by default")
    args = cli.parse_args(parser, argv)
    shapes = {"layer": (args.tokens, args.hidden, args.intermediate), "square": (SQUARE,) * 3}
    for dtype, by_shape in rates(shapes, args.threads).items():
        for name, rate in by_shape.items():
            print(f"{dtype}  {name:6}  {' x '.join(str(size) for size in shapes[name]):>18}  {rate:7.1f} GFLOP/s")


if __name__ == "__main__":
    cli.run(main)
