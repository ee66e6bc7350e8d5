# SPDX-License-Identifier: Apache-2.0
"""Small odd shapes through a backend of ``compact_attention``, and with ``--backend triton`` through the launches that find
many layers by address, to run under compute-sanitizer:

    compute-sanitizer --tool memcheck python benchmarks/gpu/sanitize.py [--backend cuda]

Inputs are made and results are compared on the CPU, so that the tool watches little else than the kernels. With
``PYTORCH_NO_CUDA_MEMORY_CACHING=1`` every tensor is an allocation of its own, and a read beyond its end is seen.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CASES = [
    {"batch": 1, "kv_heads": 2, "group": 4, "blocks": ((None, 130),), "tail": 0},
    {"batch": 3, "kv_heads": 2, "group": 3, "blocks": ((None, 67),), "tail": 13, "mask": True, "off": 0.2},
    {"batch": 2, "kv_heads": 1, "group": 7, "query_len": 2, "blocks": ((None, 1),), "tail": 9, "window": 4},
    {"batch": 5, "kv_heads": 2, "group": 4, "blocks": ((1, 300),), "tail": 21, "mask": True},
    {"batch": 2, "kv_heads": 2, "group": 2, "blocks": ((None, [33, 0, 1, 90]), (1, 17)), "tail": 5},
    {"batch": 1, "kv_heads": 1, "group": 2, "query_len": 16, "blocks": (), "tail": 40},
    {"batch": 1, "kv_heads": 1, "group": 1, "blocks": ((None, 3000),), "tail": 1, "beta": False},
]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", default="cuda")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dims", type=int, nargs="*", default=[64, 96, 128, 256])
    args = parser.parse_args(argv)
    for folder in (ROOT, ROOT / "python_tests" / "backends"):
        sys.path.insert(0, str(folder))
    import torch
    from triton_cases import check_forward, make_inputs

    import kvcompact_kernels.ops  # noqa: F401  (registers the backends)
    from kvcompact_kernels.backends.registry import BackendUnavailableError, backend_names, select
    from kvcompact_kernels.testing.draws import draws

    if args.backend not in backend_names("compact_attention"):
        print(f"there is no backend {args.backend} of compact_attention")
        return 0
    ran = 0

    @draws(3)
    def call(dim: int, number: int) -> bool:
        dtype = (torch.bfloat16, torch.float16)[number % 2] if args.device == "cuda" else torch.float32
        inputs = make_inputs("cpu", dtype, head_dim=dim, poison=False, **CASES[number])
        there = tuple(_move(x, args.device) for x in inputs)
        try:
            backend = select("compact_attention", args.backend, there)
        except BackendUnavailableError as error:
            print(f"skipped: {error}")
            return False
        out, lse = backend.run(*there)
        check_forward((out.cpu(), lse.cpu()), inputs)
        return True

    for dim in args.dims:
        ran += sum(call(dim, number) for number in range(len(CASES)))
    if args.backend == "triton":
        ran += many_layers(args.device)
    print(f"{ran} calls of {args.backend} gave the right result")
    return 0


def many_layers(device: str) -> int:
    """Packing and STILL's cross-attention of layers of other lengths and layouts; how many calls there were."""
    import torch
    from triton_still_cases import check_forward, make_inputs

    from kvcompact_kernels.backends.registry import BackendUnavailableError
    from kvcompact_kernels.backends.triton import still_compaction as still
    from kvcompact_kernels.ops import pack_slots
    from kvcompact_kernels.testing.draws import draws

    def pack() -> None:
        keys, values, kept = [], [], []
        for tokens, slots in ((63, 33), (1, 1), (100, 5)):
            for cache in (keys, values):
                cache.append(torch.randn(2, tokens, 3, 80).transpose(1, 2))
            kept.append(torch.rand(2, 3, tokens).topk(slots).indices)
        there = (_move(x, device) for x in (keys, values, kept))
        for x, y in zip(pack_slots(*there, backend="triton"), pack_slots(keys, values, kept, backend="torch")):
            if not all(torch.equal(a.cpu(), b) for a, b in zip(x, y)):
                raise AssertionError("packed slots differ")

    @draws(3)
    def attend(sizes: dict) -> None:
        layers = [make_inputs("cpu", torch.float16, poison=False, **sizes) for _ in range(3)]
        layers = [(*layer[:6], *layers[0][6:]) for layer in layers]
        pooled, lse = still.run_layers([tuple(_move(x, device) for x in layer) for layer in layers])
        for i, layer in enumerate(layers):
            check_forward((pooled[i].cpu(), lse[i].cpu()), layer)

    try:
        pack()
    except BackendUnavailableError as error:
        print(f"skipped: {error}")
        return 0
    shapes = [{"tokens": 67, "slots": 33, "kv_heads": 2, "head_dim": 96}, {"tokens": 1030, "slots": 5, "batch": 1}]
    for sizes in shapes:
        attend(sizes)
    return 1 + len(shapes)


def _move(x, device: str):
    if isinstance(x, list):
        return [_move(y, device) for y in x]
    return x.to(device) if hasattr(x, "to") else x


if __name__ == "__main__":
    sys.exit(main())
