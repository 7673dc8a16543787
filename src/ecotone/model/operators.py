"""The operators that a program may hold: a closed list of functional aten operators, looked up by name, never imported.

An operator travels as "aten.NAME.OVERLOAD". It is allowed when NAME stands in the list below, the overload exists and its
schema mutates nothing; so a program from a stranger can only compute on its own tensors. Left out on purpose: operators
that draw random numbers, read files or uninitialised memory, mutate, or whose result size depends on the data.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch

from ecotone.model.errors import ModelError

__all__ = ["ALLOWED", "GETITEM", "HEAVY", "is_allowed", "is_view", "resolve"]

GETITEM = "operator.getitem"

# Those that do the work: each may open a new block.
_HEAVY = """conv1d conv2d conv3d convolution _convolution conv_transpose1d conv_transpose2d conv_transpose3d
    linear addmm mm bmm baddbmm addbmm matmul einsum bilinear mv dot addmv tensordot
    scaled_dot_product_attention _scaled_dot_product_flash_attention_for_cpu
    _scaled_dot_product_attention_math lstm gru rnn_tanh rnn_relu lstm_cell gru_cell rnn_tanh_cell
    rnn_relu_cell embedding embedding_bag"""

_VIEW_NAMES = """alias as_strided chunk detach diagonal expand expand_as flatten getitem lift_fresh movedim moveaxis
    narrow numpy_T permute real imag view_as_real view_as_complex reshape view_as reshape_as ravel
    select slice split split_with_sizes squeeze swapaxes swapdims t tensor_split transpose unbind
    unflatten unfold unsafe_chunk unsafe_split unsafe_split_with_sizes unsqueeze view _unsafe_view
    _reshape_alias hsplit vsplit dsplit adjoint mT mH matrix_H"""

_NORMS_AND_POOLS = """batch_norm _native_batch_norm_legit_no_training native_batch_norm cudnn_batch_norm
    _batch_norm_with_update_functional layer_norm native_layer_norm group_norm native_group_norm
    instance_norm rms_norm _fused_rms_norm max_pool1d max_pool2d max_pool3d max_pool1d_with_indices
    max_pool2d_with_indices max_pool3d_with_indices avg_pool1d avg_pool2d avg_pool3d
    adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d _adaptive_avg_pool2d
    _adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d
    fractional_max_pool2d upsample_nearest1d upsample_nearest2d upsample_nearest3d
    _upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d upsample_linear1d
    upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d _upsample_bilinear2d_aa
    _upsample_bicubic2d_aa grid_sampler grid_sampler_2d grid_sampler_3d affine_grid_generator
    pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle im2col col2im max_unpool2d
    cosine_similarity pairwise_distance cdist _cdist_forward _euclidean_dist norm linalg_vector_norm
    linalg_norm linalg_matrix_norm linalg_cross cross renorm _weight_norm _weight_norm_interface"""

_ACTIVATIONS = """relu relu6 leaky_relu elu selu celu gelu silu mish hardswish hardsigmoid hardtanh sigmoid
    log_sigmoid log_sigmoid_forward softplus softshrink hardshrink threshold prelu _prelu_kernel
    rrelu glu softmax _softmax log_softmax _log_softmax _safe_softmax tanh logit"""

_ELEMENTWISE = """abs absolute neg negative sign sgn ceil floor round trunc fix frac exp exp2 expm1 log log2 log10
    log1p sqrt rsqrt square pow float_power reciprocal sin cos tan asin acos atan atan2 arctan2
    arctan sinh cosh asinh acosh atanh erf erfc erfinv sinc lgamma digamma special_expit special_erf
    special_i0 xlogy special_xlogy logaddexp logaddexp2 hypot copysign add sub subtract rsub mul
    multiply div divide true_divide floor_divide remainder fmod addcmul addcdiv lerp clamp clip
    clamp_min clamp_max maximum minimum fmax fmin max min where masked_fill nan_to_num heaviside eq
    ne lt le gt ge equal not_equal less less_equal greater greater_equal isnan isinf isfinite
    isposinf isneginf signbit isclose logical_and logical_or logical_not logical_xor bitwise_and
    bitwise_or bitwise_not bitwise_xor bitwise_left_shift bitwise_right_shift __and__ __or__ __xor__
    __lshift__ __rshift__ deg2rad rad2deg polar complex conj _conj _conj_physical resolve_conj
    resolve_neg angle bucketize searchsorted isin"""

_REDUCTIONS = """sum mean prod std var std_mean var_mean any all amax amin aminmax argmax argmin logsumexp cumsum
    cumprod cummax cummin logcumsumexp topk sort argsort msort kthvalue median nanmedian mode nansum
    nanmean count_nonzero histc diff trace segment_reduce"""

_SHAPING = """cat concat concatenate stack hstack vstack dstack column_stack pad constant_pad_nd _pad_circular
    _pad_enum reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d
    replication_pad3d repeat repeat_interleave tile flip fliplr flipud roll rot90 gather index
    index_select index_put _unsafe_index _unsafe_index_put index_add index_copy index_fill take
    take_along_dim scatter scatter_add scatter_reduce select_scatter slice_scatter diagonal_scatter
    masked_scatter unfold_copy tril triu diag diag_embed block_diag meshgrid cartesian_prod
    broadcast_tensors broadcast_to one_hot contiguous clone to _to_copy type_as copy lift_fresh_copy
    expand_copy permute_copy view_copy fill zero kron outer ger combinations trapezoid vander
    atleast_1d atleast_2d atleast_3d"""

_MAKERS = """zeros ones full zeros_like ones_like full_like new_zeros new_ones new_full arange linspace logspace
    eye scalar_tensor tril_indices triu_indices hann_window hamming_window"""

_LINEAR_ALGEBRA = """matrix_exp linalg_inv inverse linalg_det linalg_solve linalg_cholesky cholesky linalg_qr linalg_svd
    linalg_eigh _linalg_eigh linalg_matrix_power chain_matmul linalg_multi_dot fft_fft fft_ifft
    fft_rfft fft_irfft fft_fft2 fft_ifft2 fft_rfft2 fft_irfft2 fft_fftn fft_ifftn fft_rfftn
    fft_irfftn fft_fftshift fft_ifftshift _fft_r2c _fft_c2r _fft_c2c stft istft"""

HEAVY = frozenset(_HEAVY.split())
_VIEWS = frozenset(_VIEW_NAMES.split())
ALLOWED = (HEAVY | _VIEWS).union(
    _NORMS_AND_POOLS.split(), _ACTIVATIONS.split(), _ELEMENTWISE.split(), _REDUCTIONS.split(), _SHAPING.split(),
    _MAKERS.split(), _LINEAR_ALGEBRA.split(),
) - {"getitem"}  # fmt: skip


def is_allowed(name: str) -> bool:
    """Whether "aten.NAME.OVERLOAD" (or operator.getitem) may stand in a program."""
    return _find(name) is not None


def is_view(name: str) -> bool:
    """Whether the operator's result may share memory with an argument, so that it costs nothing."""
    return name == GETITEM or name.split(".")[1] in _VIEWS


def resolve(name: str) -> Callable[..., Any]:
    """The function of an allowed operator; raises ModelError for any other name."""
    found = _find(name)
    if found is None:
        raise ModelError(f"operator {name!r} is not on the list of allowed operators; capture the model again without it")
    return found


@lru_cache(maxsize=4096)
def _find(name: str) -> Callable[..., Any] | None:
    if name == GETITEM:
        return _getitem
    parts = name.split(".")
    if len(parts) != 3 or parts[0] != "aten" or parts[1] not in ALLOWED:
        return None
    packet = getattr(torch.ops.aten, parts[1], None)
    if packet is None or parts[2] not in packet.overloads():
        return None
    overload: torch._ops.OpOverload = getattr(packet, parts[2])
    return None if overload._schema.is_mutable else overload


def _getitem(values: Any, index: int) -> Any:
    return values[index]
