"""Small calls of every GPU backend, for compute-sanitizer to watch: python tests/gpu/sanitizer_cases.py [how many of each]"""

import sys
from pathlib import Path

if __name__ == "__main__":
    for folder in ("gpu", "kernels"):
        sys.path.insert(0, str(Path(__file__).parents[1] / folder))

import torch
from barrier_problems import fresh_state, random_problem
from head_on_gpu import DEVICE, HEAD_BACKENDS, on_device, random_case, run

from l3m_kernels import set_workspace
from l3m_kernels.backends import TABLE


def main(most: int = 12) -> None:
    for backend in HEAD_BACKENDS:
        if backend == "reference":
            continue
        for seed in range(most):
            case = random_case(seed, backend, workspace=1 << 20)
            inputs = on_device(case, case.build())
            set_workspace(1 << 20, low_memory=seed % 3 == 0)
            if seed % 4 == 0 and inputs.targets.numel():
                inputs.targets[(0,) * inputs.targets.ndim] = 1 << 30  # outside: a row of NaN, no access
            run(case, inputs, seed % 2 == 0, backend)
        barrier = next(row.ops["barrier_weights"] for row in TABLE if row.name == backend)
        for seed in range(min(most, 8)):
            rewards, norm, sums, *rest = random_problem(seed)
            state = fresh_state(rewards, rest[-2])
            arguments = (rewards, norm, sums, state, *rest)
            barrier(*(value.to(DEVICE) if isinstance(value, torch.Tensor) else value for value in arguments))
        torch.cuda.synchronize()
        print(f"{backend}: done")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
