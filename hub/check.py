"""What the library `kernels` has to say of a kernel repository: `python hub/check.py build/hub/l3m-kernels`, without a network.

Its parsers read build.toml, the names of the variants and their metadata; its digest of every file is the one that the metadata says; it
picks the variant of this machine and imports it, where the package itself cannot be imported. Then ops are run and compared with torch's.
"""

import argparse
import sys
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from kernels import get_local_kernel  # type: ignore[import-not-found]  # in an environment of its own
from kernels._rust import Build, Digest, DigestAlgorithm, Metadata  # type: ignore[import-not-found]
from kernels.variants import parse_variant, resolve_variant  # type: ignore[import-not-found]

# Triton has no float64.
PRECISION = {"cpu": (torch.float64, 1e-10), "cuda": (torch.float32, 1e-4)}


def check_layout(repository: Path) -> list[str]:
    """-> the ids of the variants."""
    wanted = {f"torch-{str(backend).lower()}" for backend in Build.open(repository).general.backends}
    folders = sorted(path for path in (repository / "build").iterdir())
    assert {path.name for path in folders} == wanted, f"build.toml wants {wanted}"
    found = []
    for folder in folders:
        assert parse_variant(folder.name).variant_str == folder.name
        metadata = Metadata.read_from_file(folder / "metadata.json")
        assert metadata.digest is not None
        metadata.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, folder))
        assert folder.name == f"torch-{str(metadata.backend.backend_type).lower()}"
        assert metadata.id.isidentifier()
        found.append(metadata.id)
    assert len(set(found)) == len(found)
    return found


def load(repository: Path) -> ModuleType:
    sys.modules["l3m_kernels"] = None  # type: ignore[assignment]  # so an import of it by that name fails
    variant, _ = resolve_variant([parse_variant(path.name) for path in (repository / "build").iterdir()])
    assert variant is not None
    kernel = get_local_kernel(repository)
    assert Path(kernel.__file__ or "").parent == repository / "build" / variant.variant_str
    return kernel


def check_ops(kernel: ModuleType, device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    dtype, tolerance = PRECISION[device]
    leaves = [torch.randn(s, generator=generator, dtype=dtype) for s in ((11, 6), (19, 6), (19,))]
    leaves = [leaf.to(device).requires_grad_() for leaf in leaves]
    targets = torch.randint(19, (11,), generator=generator).to(device)
    targets[3] = -100
    loss = kernel.drop_in.linear_cross_entropy(leaves[0], leaves[1], targets, linear_bias=leaves[2])
    losses = (loss, F.cross_entropy(F.linear(*leaves), targets))
    found, wanted = ([loss, *torch.autograd.grad(loss, leaves)] for loss in losses)
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)
    token = kernel.drop_in.selective_log_softmax(leaves[0], leaves[1], targets.clamp(min=0), bias=leaves[2])
    torch.testing.assert_close(-token[targets >= 0].mean(), losses[1], rtol=tolerance, atol=tolerance)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("repository", type=Path)
    repository = parser.parse_args().repository.resolve()
    identities = check_layout(repository)
    kernel = load(repository)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    check_ops(kernel, device)
    check_layout(repository)  # loading has changed nothing
    print(f"{', '.join(identities)}: read by kernels; {kernel.__name__} loaded, right on {device}\n{kernel.backends()}")
