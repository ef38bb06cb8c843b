"""Private interfaces of torch. A release that changes one breaks tests/experiment/test_compat.py and its users only."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def foreach(name: str, *arguments: Any, **options: Any) -> Any:
    """An operation on lists of tensors, such as ``mul_``, in few kernels. Public only inside torch's optimizers."""
    return getattr(torch, f"_foreach_{name}")(*arguments, **options)


def softmax_backward(grad: Tensor, probs: Tensor) -> Tensor:
    """Gradient of a softmax over the last dimension w.r.t. its input. Public operations take two more passes."""
    return torch._softmax_backward_data(grad, probs, -1, probs.dtype)


def mark_static(tensor: Tensor, dims: int | list[int]) -> None:
    """Mark sizes as static for torch.compile."""
    torch._dynamo.mark_static(tensor, dims)


def mark_dynamic(tensor: Tensor, dim: int) -> None:
    """Mark a size as dynamic for torch.compile."""
    torch._dynamo.mark_dynamic(tensor, dim)


def maybe_mark_dynamic(tensor: Tensor, dim: int) -> None:
    """As `mark_dynamic`, but torch.compile can still specialize, as it does for a size of 1."""
    torch._dynamo.maybe_mark_dynamic(tensor, dim)


def compiler_errors() -> tuple[type[Exception], ...]:
    """The exceptions of torch.compile and AOTInductor if there is no working compiler."""
    import torch._dynamo.exc
    import torch._inductor.exc

    found = torch._dynamo.exc.BackendCompilerFailed
    return found, torch._inductor.exc.CppCompileError, torch._inductor.exc.InvalidCxxCompiler


def build_package(program: torch.export.ExportedProgram, package: Path, options: dict[str, Any]) -> None:
    """AOTInductor's machine code of a program. Documented, but under a private name."""
    import torch._inductor

    torch._inductor.aoti_compile_and_package(program, package_path=str(package), inductor_configs=options)


def load_package(package: Path) -> Any:
    """The loader of a package from `build_package`: ``boxed_run``, ``load_constants``, ``get_constant_fqns``."""
    import torch._inductor

    return torch._inductor.aoti_load_package(str(package)).loader


def pack_matrix(weight: Tensor) -> Tensor:
    """A matrix as oneDNN packs it for `packed_product`."""
    return torch.ops.mkldnn._reorder_linear_weight(weight)


def packed_product(rows: Tensor, packed: Tensor) -> Tensor:
    """(n, N) of rows (n, K) and a packed matrix (N, K)."""
    return torch.ops.mkldnn._linear_pointwise(rows, packed, None, "none", [], "")


def int8_product(rows: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """(n, N) of rows (n, K) bfloat16, weight (N, K) int8 and scale (N,)."""
    return torch.ops.aten._weight_int8pack_mm(rows, weight, scale)
