"""What operations take from the allocator besides their outputs, and when.

Each function returns the script of one operation. Its source is the host code of PyTorch's kernel.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Final

import torch

from memfit._torch_private import aten_if_there
from memfit.cards import Gpu
from memfit.simulation.needs import Need
from memfit.simulation.schedule import BLAS_HANDLE, BLAS_LT_HANDLE
from memfit.simulation.tracing.attention_scratch import (
    cudnn_backward,
    cudnn_forward,
    efficient_backward,
    efficient_forward,
    flash_backward,
    flash_forward,
    safe_softmax,
)
from memfit.simulation.tracing.by_operation import once_per_operation
from memfit.simulation.tracing.indexing_scratch import embedding_backward, index_put
from memfit.simulation.tracing.interpolation_scratch import INTERPOLATIONS
from memfit.simulation.tracing.memory_formats import is_dense, suggested_format
from memfit.simulation.tracing.norm_scratch import (
    batch_norm,
    batch_norm_backward,
    group_norm,
    group_norm_backward,
    layer_norm,
    layer_norm_backward,
)
from memfit.simulation.tracing.reductions import input_vector, reduction
from memfit.simulation.tracing.releases import has_outer_products, torch_release
from memfit.simulation.tracing.scripts import (
    ALONE,
    OUTPUTS,
    Drop,
    Keep,
    Make,
    Release,
    Script,
    Workspace,
    contiguous_copy,
)

__all__ = [
    "kept_workspace_bytes",
    "scratch_of",
]

WORKSPACES_BY_CALL: Final = (2, 15)
"""The release of torch since which a product takes its BLAS workspace for the call."""

LT_WORKSPACES_KEPT: Final = ((2, 9), (2, 12))
"""The releases between which a workspace of cuBLASLt is kept: the first, and the one after.

Before, it is taken for the call. From torch 2.12 to 2.14, cuBLASLt shares the one of cuBLAS.

Source: pytorch/pytorch#156495, and what torch 2.8, 2.11, 2.12, 2.13 and 2.14 ask for in a rehearsed
    process.
"""

LT_WORKSPACE_BYTES: Final = 1024**2
"""The size of cuBLASLt's workspace, if it has its own."""


_HALF: Final = (torch.float16, torch.bfloat16)
_WELFORD_BYTES: Final = 16  # mean, sum of squares, and the number of values twice
_WELFORD_VECTOR: Final = 2
_PART: Final = 65_536  # elements of a tensor in a list that a block of a kernel takes
_ORDERS_OF_PARTS: Final = (1, 2, math.inf)
_PARTS_SIDE_BY_SIDE: Final = (2, 14)


_Rule = Callable[[Release, tuple[Any, ...], Any], Script]


@once_per_operation
def scratch_of(func: Any) -> _Rule | None:
    """Return the function that knows the script of an operation, if there is one."""
    return _rules().get(func)


@functools.cache
def _rules() -> dict[Any, _Rule]:
    found = {aten_if_there(name): rule for name, rule in _RULES.items()}
    found.pop(None, None)
    return found


# --- matrix products ----------------------------------------------------------------------------


def _product(kernels: Release, args: tuple[Any, ...], _result: Any) -> Script:
    """Copy matrices that BLAS cannot read as they are, and take the workspace of the call.

    Before torch 2.15, and on ROCm, a workspace is kept from the first product on that a thread
    computes.

    Source: `getCurrentCUDABlasHandleWithWorkspace` in aten/src/ATen/cuda/CublasHandlePool.cpp
        (pytorch/pytorch#194311), and `prepare_matrix_for_cublas` in
        aten/src/ATen/native/cuda/Blas.cpp.
    """
    operands = [tensor for tensor in args[-2:] if isinstance(tensor, torch.Tensor)]
    copies: Script = tuple(
        Workspace.copy_of(tensor, f"copy of operand {number}")
        for number, tensor in enumerate(operands)
        if tensor.ndim > 1 and not _is_readable(tensor)
    )
    if kernels.torch_release < WORKSPACES_BY_CALL:
        return (OUTPUTS, *copies, _handle(kernels))
    workspace = Workspace(name="BLAS workspace", need=Need(rule=_blas))
    return (OUTPUTS, *copies, _handle(kernels), workspace)


def _products(kernels: Release, args: tuple[Any, ...], result: Any) -> Script:
    """Compute outer products in a kernel of torch's own, where it has one."""
    left, right = args[:2]
    if has_outer_products() and left.shape[2] == right.shape[1] == 1:
        return ALONE
    return _product(kernels, args, result)


def _is_readable(tensor: torch.Tensor) -> bool:
    """Whether BLAS reads the matrices of a tensor as rows or as columns."""
    rows, columns = tensor.shape[-2:]
    row_stride, column_stride = tensor.stride()[-2:]
    return (column_stride == 1 and row_stride >= max(1, columns)) or (
        row_stride == 1 and column_stride >= max(1, rows)
    )


def _blas(gpu: Gpu) -> int:
    """Return the workspace of a product. On ROCm, handles keep theirs."""
    return 0 if gpu.vendor == "AMD" else gpu.blas_workspace_bytes()


def _lt(gpu: Gpu) -> int:
    return 0 if gpu.vendor == "AMD" else LT_WORKSPACE_BYTES


def _handle(kernels: Release) -> Keep:
    return Keep(name=BLAS_HANDLE, need=Need(rule=_kept, numbers=kernels.torch_release))


def _kept(gpu: Gpu, major: int, minor: int) -> int:
    """Return the workspace that a handle keeps."""
    release = (major, minor)
    if release >= WORKSPACES_BY_CALL and gpu.vendor != "AMD":
        return 0
    return gpu.blas_workspace_bytes(release)


def kept_workspace_bytes(gpu: Gpu) -> int:
    """Return what BLAS keeps on a card at most, with the installed torch.

    Forward has a handle and backward has one of its own. Only forward adds a bias in the same
    kernel.

    Args:
        gpu: The card.
    """
    release = torch_release()
    keeps_lt = LT_WORKSPACES_KEPT[0] <= release < LT_WORKSPACES_KEPT[1]
    return 2 * _kept(gpu, *release) + (_lt(gpu) if keeps_lt else 0)


def _product_and_sum(kernels: Release, args: tuple[Any, ...], result: Any) -> Script:
    """Take cuBLASLt's workspace for a product with a bias, which is added in the same kernel.

    Source: `addmm_out_cuda_impl` in aten/src/ATen/native/cuda/Blas.cpp, and
        `parseCUDABlasLtWorkspaceSize` in aten/src/ATen/cuda/CublasHandlePool.cpp (1 MiB).
    """
    bias, left, right = args[:3]
    by_call = kernels.torch_release >= WORKSPACES_BY_CALL
    is_fused = (
        (bias.ndim == 1 or (by_call and left.dtype in _HALF))
        and bias.is_contiguous()
        and min(right.shape) > 1
        and len(args) == 3  # noqa: PLR2004
    )
    script = _product(kernels, (left, right), result)
    need = Need(rule=_lt)
    workspace = Workspace(name="cuBLASLt workspace", need=need)
    if is_fused and by_call:
        return (*script[:-1], workspace)
    # cuBLASLt's own is taken first, and then that of the handle.
    if is_fused and kernels.torch_release < LT_WORKSPACES_KEPT[0]:
        return (*script[:-1], workspace, script[-1])
    if is_fused and kernels.torch_release < LT_WORKSPACES_KEPT[1]:
        return (*script[:-1], Keep(name=BLAS_LT_HANDLE, need=need), script[-1])
    return script


# --- reductions ---------------------------------------------------------------------------------


def _sum(_kernels: Release, args: tuple[Any, ...], _result: Any) -> Script:
    """Source: `sum_kernel_cuda` in aten/src/ATen/native/cuda/ReduceSumProdKernel.cu."""
    data, dims = args[0], (args[1] if len(args) > 1 else None)
    return reduction(data, dims or (), input_vector=input_vector(data.element_size()))


def _mean(_kernels: Release, args: tuple[Any, ...], _result: Any) -> Script:
    """Source: `mean_kernel_cuda` in aten/src/ATen/native/cuda/ReduceMomentKernel.cu."""
    return reduction(args[0], (args[1] if len(args) > 1 else None) or ())


def _norm(_kernels: Release, args: tuple[Any, ...], _result: Any) -> Script:
    """Source: `norm_kernel_cuda` in aten/src/ATen/native/cuda/ReduceNormKernel.cu."""
    return reduction(args[0], (args[2] if len(args) > 2 else None) or ())  # noqa: PLR2004


def _variance(_kernels: Release, args: tuple[Any, ...], _result: Any) -> Script:
    """Source: `std_var_kernel_impl` in aten/src/ATen/native/cuda/ReduceMomentKernel.cu."""
    dims = (args[1] if len(args) > 1 else None) or ()
    return reduction(args[0], dims, partial_bytes=_WELFORD_BYTES, input_vector=_WELFORD_VECTOR)


def _extreme(_kernels: Release, args: tuple[Any, ...], _result: Any) -> Script:
    """Source: `max_values_kernel_cuda` in aten/src/ATen/native/cuda/ReduceMaxValuesKernel.cu."""
    data, dims = args[0], (args[1] if len(args) > 1 else None)
    return reduction(data, dims or (), partial_bytes=data.element_size())


def _product_of_all(_kernels: Release, args: tuple[Any, ...], _result: Any) -> Script:
    """Source: `prod_kernel_cuda` in aten/src/ATen/native/cuda/ReduceSumProdKernel.cu."""
    data, *dims = args[:2]
    return reduction(data, dims, input_vector=input_vector(data.element_size()))


# --- others -------------------------------------------------------------------------------------


def _softmax_backward(_kernels: Release, args: tuple[Any, ...], _result: Any) -> Script:
    """Take the product of gradient and output, and copy what is not contiguous.

    Source: `softmax_backward_cuda_out` and `host_softmax_backward` in
        aten/src/ATen/native/cuda/SoftMax.cu.
    """
    gradient, output = args[:2]
    name = "gradient x output"
    product = gradient if gradient.is_contiguous() else gradient * output
    return (
        OUTPUTS,
        Workspace.copy_of(gradient, name),
        *contiguous_copy(f"contiguous {name}", product),
        *contiguous_copy("contiguous output", output),
    )


def _pool(_kernels: Release, args: tuple[Any, ...], _result: Any) -> Script:
    """Copy an input that is contiguous in no layout.

    Source: `max_pool2d_with_indices_out_cuda` in aten/src/ATen/native/cuda/DilatedMaxPool2d.cu
        and `avg_pool2d_out_cuda` in AveragePool2d.cu beside it.
    """
    return (OUTPUTS, *contiguous_copy("contiguous input", args[0], suggested_format(args[0])))


def _pool_backward(_kernels: Release, args: tuple[Any, ...], _result: Any) -> Script:
    """Copy what is not contiguous in the input's layout.

    Source: `max_pool2d_with_indices_backward_out_cuda` and `avg_pool2d_backward_out_cuda`.
    """
    gradient, data, indices = args[0], args[1], args[-1]
    layout = suggested_format(data)
    script: Script = (
        OUTPUTS,
        *contiguous_copy("contiguous input", data, layout),
        *contiguous_copy("contiguous gradient", gradient, layout),
    )
    if not isinstance(indices, torch.Tensor):
        return script
    return (*script, *contiguous_copy("contiguous indices", indices, layout))


def _reflection_pad_backward(_kernels: Release, args: tuple[Any, ...], _result: Any) -> Script:
    """Source: `reflection_pad2d_backward_out_template` in cuda/ReflectionPad.cu."""
    return (OUTPUTS, *contiguous_copy("contiguous gradient", args[0]))


def _unfold(_kernels: Release, args: tuple[Any, ...], result: Any) -> Script:
    """Allocate an output as large as the input, and another one if that is too small.

    Source: `im2col_cuda` in aten/src/ATen/native/cuda/Im2Col.cu and `col2im_cuda` in Col2Im.cu
        beside it, whose output is `empty_like` of the input and then resized.
    """
    data = args[0]
    copy = contiguous_copy("contiguous input", data)
    if result.numel() <= data.numel():
        return (OUTPUTS, *copy)
    first = Workspace.copy_of(data, "output before it is resized")
    return (first, *copy, OUTPUTS, Drop.of(first.name))


def _cumulate(_kernels: Release, args: tuple[Any, ...], result: Any) -> Script:
    """Convert the input. Source: `impl_func_cum_ops` in aten/src/ATen/native/ReduceOps.cpp."""
    if args[0].dtype is result.dtype:
        return ALONE
    return (OUTPUTS, Workspace.copy_of(result, "input in the output's type"))


def _power_of_number(_kernels: Release, _args: tuple[Any, ...], _result: Any) -> Script:
    """Put the base on the card. Source: `pow_Scalar_out` in aten/src/ATen/native/Pow.cpp."""
    return (OUTPUTS, Workspace(name="base", num_bytes=8))


def _dropout(_kernels: Release, _args: tuple[Any, ...], _result: Any) -> Script:
    """Make the mask first. Source: `dropout_cuda` in aten/src/ATen/native/cuda/Dropout.cu."""
    return (Make((1,)), OUTPUTS)


def _roll(_kernels: Release, args: tuple[Any, ...], _result: Any) -> Script:
    """Roll one dimension after another.

    Source: `roll_common` in aten/src/ATen/native/TensorTransformations.h.
    """
    data, shifts = args[:2]
    script: Script = ()
    for number in range(1, len(shifts) if isinstance(shifts, (list, tuple)) else 1):
        script += (Workspace.copy_of(data, f"roll {number}"),)
        if number > 1:
            script += (Drop.of(f"roll {number - 1}"),)
    return (*script, OUTPUTS)


def _norms_of_list(kernels: Release, args: tuple[Any, ...], _result: Any) -> Script:
    """Sum each tensor in parts. Where kernels differ, each tensor is reduced by itself.

    Source: `foreach_tensor_norm_cuda` in aten/src/ATen/native/cuda/ForeachReduceOp.cu. The parts
    lie side by side since pytorch/pytorch#190549. Before, each tensor had room for the parts of the
    largest.
    """
    tensors = args[0]
    order = args[1] if len(args) > 1 else 2
    is_one_kernel = len({tensor.dtype for tensor in tensors}) == 1
    if order not in _ORDERS_OF_PARTS or not is_one_kernel or not all(map(is_dense, tensors)):
        return ALONE
    parts = [-(-tensor.numel() // _PART) for tensor in tensors]
    element_bytes = 8 if tensors[0].dtype is torch.float64 else 4
    if kernels.torch_release < _PARTS_SIDE_BY_SIDE:
        size = element_bytes * len(parts) * max(parts)
        return (Workspace(name="sums of parts", num_bytes=size), OUTPUTS)
    return (
        Workspace(name="where each tensor's parts begin", num_bytes=8 * (len(parts) + 1)),
        Workspace(name="sums of parts", num_bytes=element_bytes * sum(parts)),
        OUTPUTS,
        Drop.of("sums of parts"),
    )


def _copies_input(_kernels: Release, args: tuple[Any, ...], _result: Any) -> Script:
    """Copy an input that is not contiguous, after the output was made."""
    return (OUTPUTS, *contiguous_copy("contiguous input", args[0]))


_RULES: Final[dict[str, _Rule]] = {
    "mm.default": _product,
    "bmm.default": _products,
    "baddbmm.default": _product,
    "addmm.default": _product_and_sum,
    "addmv.default": _product,
    "mv.default": _product,
    "dot.default": _product,
    "sum.default": _sum,
    "sum.dim_IntList": _sum,
    "mean.default": _mean,
    "mean.dim": _mean,
    "linalg_vector_norm.default": _norm,
    "_foreach_norm.Scalar": _norms_of_list,
    "var.correction": _variance,
    "var_mean.correction": _variance,
    "std.correction": _variance,
    "std_mean.correction": _variance,
    "amax.default": _extreme,
    "amin.default": _extreme,
    "prod.default": _product_of_all,
    "prod.dim_int": _product_of_all,
    "_scaled_dot_product_flash_attention.default": flash_forward,
    "_scaled_dot_product_flash_attention_backward.default": flash_backward,
    "_scaled_dot_product_cudnn_attention.default": cudnn_forward,
    "_scaled_dot_product_cudnn_attention_backward.default": cudnn_backward,
    "_scaled_dot_product_efficient_attention.default": efficient_forward,
    "_scaled_dot_product_efficient_attention_backward.default": efficient_backward,
    "native_layer_norm.default": layer_norm,
    "native_layer_norm_backward.default": layer_norm_backward,
    "_fused_rms_norm.default": layer_norm,
    "_fused_rms_norm_backward.default": layer_norm_backward,
    "native_group_norm.default": group_norm,
    "native_group_norm_backward.default": group_norm_backward,
    "native_batch_norm.default": batch_norm,
    "native_batch_norm_backward.default": batch_norm_backward,
    "_safe_softmax.default": safe_softmax,
    "_softmax.default": _copies_input,
    "_log_softmax.default": _copies_input,
    "_softmax_backward_data.default": _softmax_backward,
    "native_dropout.default": _dropout,
    "max_pool2d_with_indices.default": _pool,
    "max_pool2d_with_indices_backward.default": _pool_backward,
    "avg_pool2d.default": _pool,
    "avg_pool2d_backward.default": _pool_backward,
    "im2col.default": _unfold,
    "col2im.default": _unfold,
    "pow.Scalar": _power_of_number,
    "cumsum.default": _cumulate,
    "cumprod.default": _cumulate,
    "roll.default": _roll,
    "reflection_pad2d.default": _copies_input,
    "_upsample_bilinear2d_aa_backward.default": _copies_input,
    "reflection_pad2d_backward.default": _reflection_pad_backward,
    "index_put.default": index_put,
    "index_put_.default": index_put,
    "_index_put_impl_.default": index_put,
    "embedding_dense_backward.default": embedding_backward,
    **INTERPOLATIONS,
}
