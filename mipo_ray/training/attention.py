"""Attention over packed rows, through the attention interface of transformers.

A packed row holds many sequences, or trees of them (`layout.Segment`). Every backend must keep them apart:

    sdpa                torch's own kernels. In 16 bits on a GPU one varlen call (`varlen`). Elsewhere
                        scaled_dot_product_attention, once for each segment: a prompt or whole sequence is plain causal
                        attention, a response sees its prompt through an explicit mask. Nothing is computed across
                        segments.
    flex_attention      one kernel over the row with a block mask, which skips blocks that are masked whole.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from mipo_ray.config.train import Attention, Layout
from mipo_ray.errors import UserError
from mipo_ray.training.layout import Segment, TokenBatch
from mipo_ray.training.varlen import VarlenRow, has_varlen_kernel, varlen_attention, varlen_row

SEGMENTED = "mipo_ray_segmented"  # the name under which transformers finds `segmented_attention`


def use_attention(model: Any, attention: Attention, layout: Layout) -> None:
    """Makes a transformers model attend as `layout` needs it, by the backend `attention`.

    Raises UserError, naming both, when the model or this machine does not have the backend.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(SEGMENTED, segmented_attention)
    # On Hopper GPUs torch prefers cuDNN, which builds a plan for every new pair of lengths: a step on 8 ragged pairs
    # took 3.5 s, and 0.03 by a kernel without plans (docs/training.md).
    torch.backends.cuda.enable_cudnn_sdp(False)
    if attention == "sdpa" and layout == "padded":
        return  # what transformers chose for the model: sdpa, or what stands in for it in a model that has none
    if layout != "padded" and (others := sorted(set(_layer_types(model)) - {"full_attention", "sliding_attention"})):
        raise UserError(
            f"train.layout: {type(model).__name__} cannot honour {layout}: it has layers with {', '.join(others)}; "
            "choose layout padded"
        )
    if attention == "sdpa" and getattr(model.config.get_text_config(), "attn_logit_softcapping", None) is not None:
        raise UserError(
            f"train.attention: sdpa cannot soft-cap attention scores, as {type(model).__name__} does, in layout "
            f"{layout}; choose layout padded"
        )
    if attention == "flex_attention" and layout != "padded" and _has_windows(model):
        raise UserError(
            f"train.attention: flex_attention cannot honour the sliding windows of {type(model).__name__} in layout "
            f"{layout}; choose attention sdpa"
        )
    name = SEGMENTED if attention == "sdpa" else attention
    try:
        model.set_attn_implementation(name)
    except (ImportError, ValueError) as error:
        raise UserError(f"train.attention: {attention} cannot run {type(model).__name__} here: {error}") from error
    if model.config._attn_implementation != name:
        raise UserError(
            f"train.attention: {type(model).__name__} did not accept {attention} for layout {layout}; choose padded"
        )


class SegmentMasks:
    """The segments of a packed row, and their masks, or their form for the varlen kernel, which all layers share.

    Both are made at their first use and kept with the row: every layer would else keep its own for backward.
    """

    def __init__(self, segments: tuple[Segment, ...], dtype: torch.dtype, device: torch.device) -> None:
        self.segments = segments
        self._dtype, self._device = dtype, device
        self._made: dict[tuple[int | None, int], list[Tensor | None]] = {}
        self._varlen: VarlenRow | None = None

    def varlen(self) -> VarlenRow:
        """The row for `varlen_attention`."""
        if self._varlen is None:
            self._varlen = varlen_row(self.segments, self._device)
        return self._varlen

    def of(self, window: int | None, groups: int) -> list[Tensor | None]:
        """The mask of each segment under a sliding window (tokens), or None where it is plainly causal.

        [groups * segment tokens, prefix + segment tokens]: that of one query head for each of the `groups` that share a
        key head, one below the other, as `segmented_attention` folds them.
        """
        if (window, groups) not in self._made:
            found = [segment_mask(s, window, dtype=self._dtype, device=self._device) for s in self.segments]
            self._made[window, groups] = [None if mask is None else mask.repeat(groups, 1) for mask in found]
        return self._made[window, groups]


def attention_inputs(model: Any, batch: TokenBatch) -> dict[str, Any]:
    """The keyword arguments of the model's forward that tell its backend who may see whom."""
    if batch.attention_mask is not None:
        return {"attention_mask": batch.attention_mask}
    name = model.config._attn_implementation
    if name == "flex_attention":
        return {"attention_mask": block_mask(batch)}
    if name == SEGMENTED:
        return {"segment_masks": SegmentMasks(batch.segments, model.dtype, batch.input_ids.device)}
    raise ValueError(f"expected a model set up by use_attention for packed rows, found attention {name!r}")


def leave_out_of_compilation() -> None:
    """Keeps `segmented_attention` out of layers that are compiled, of models that were set up by `use_attention`."""
    from transformers import AttentionInterface

    # Lengths differ from row to row, and each would be compiled anew. No decorator says so, as its import of torch's
    # compiler would cost every process a second.
    AttentionInterface.register(SEGMENTED, torch.compiler.disable(segmented_attention))


def segmented_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    segment_masks: SegmentMasks | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention of one packed row, segment by segment; the signature is that of transformers' attention functions.

    query: [1, heads, tokens, head size]; key and value: [1, key-value heads, tokens, head size]. The segments cover the
    row in its order, and each prefix is one of them. Returns [1, tokens, heads, head size], and None for the attention
    weights.

    Raises ValueError for what scaled dot product attention cannot express (soft-capped scores, attention sinks,
    position biases), and where the segments did not arrive.
    """
    if segment_masks is None:
        raise ValueError(f"{type(module).__name__} does not hand the segments of a packed row to its attention")
    for name in ("softcap", "s_aux", "position_bias"):
        if options.get(name) is not None:
            raise ValueError(f"{type(module).__name__} uses {name}, which attention sdpa does not have")
    window = options.get("sliding_window")
    if has_varlen_kernel(query, value):
        return varlen_attention((query, key, value), segment_masks.varlen(), window, scaling), None
    groups = query.shape[1] // key.shape[1]
    segments, masks = segment_masks.segments, segment_masks.of(window, groups)
    # Split once, and not sliced for each segment: the backward of a slice is a tensor of zeros as long as the row.
    lengths = [segment.end - segment.start for segment in segments]
    queries, keys, values = (states.split(lengths, dim=2) for states in (query, key, value))
    number = {segment.start: index for index, segment in enumerate(segments)}
    outputs = []
    for index, (segment, mask) in enumerate(zip(segments, masks, strict=True)):
        own_keys, own_values = keys[index], values[index]
        if segment.prefix_end > segment.prefix_start:
            prefix = number[segment.prefix_start]
            own_keys = torch.cat([keys[prefix], own_keys], dim=2)
            own_values = torch.cat([values[prefix], own_values], dim=2)
        if mask is None:
            attended = scaled_dot_product_attention(
                queries[index], own_keys, own_values, is_causal=True, scale=scaling, enable_gqa=groups > 1
            )
        else:
            # The query heads that share keys become queries of one head: no copies of the keys and values are made for
            # them, and masked attention with grouped heads has no fast kernel on a GPU.
            heads, length = key.shape[1], lengths[index]
            folded = queries[index].reshape(1, heads, groups * length, -1)
            attended = scaled_dot_product_attention(
                folded, own_keys, own_values, attn_mask=mask, scale=scaling
            ).reshape(1, heads * groups, length, -1)
        outputs.append(attended)
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def segment_mask(segment: Segment, window: int | None, *, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """[segment tokens, prefix + segment tokens]: 0 where the former may see the latter, else minus infinity.

    None where the segment is plainly causal.

    `window` is that of sliding attention, in tokens. A prefix lies right before its segment in positions, whatever lies
    between them in the row.
    """
    prefix = segment.prefix_end - segment.prefix_start
    length = segment.end - segment.start
    is_short = window is None or prefix + length <= window
    if not prefix and is_short:
        return None
    hidden = torch.full((length, prefix + length), float("-inf"), dtype=dtype, device=device)
    after = hidden.triu(prefix + 1)
    return after if is_short else after + hidden.tril(prefix - window)  # type: ignore[operator]


def block_mask(batch: TokenBatch) -> Any:
    """FlexAttention's block mask of a packed row: who may see whom, worked out from the batch's segments."""
    from torch.nn.attention.flex_attention import create_block_mask

    tokens = batch.input_ids.shape[1]
    device = batch.input_ids.device
    # A token sees the tokens of its own segment before it, and all that lie in its segment's prefix.
    own = torch.full((tokens,), -1, dtype=torch.int32)
    prefix_start = torch.zeros(tokens, dtype=torch.int32)
    prefix_end = torch.zeros(tokens, dtype=torch.int32)
    for number, segment in enumerate(batch.segments):
        own[segment.start : segment.end] = number
        prefix_start[segment.start : segment.end] = segment.prefix_start
        prefix_end[segment.start : segment.end] = segment.prefix_end
    own, prefix_start, prefix_end = own.to(device), prefix_start.to(device), prefix_end.to(device)

    def visible(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        in_segment = (own[query] == own[key]) & (query >= key)
        in_prefix = (key >= prefix_start[query]) & (key < prefix_end[query])
        return in_segment | in_prefix

    # Compiled, the mask of all tokens by all tokens, which the block mask is made of, is never in memory.
    is_cuda = batch.input_ids.is_cuda
    return create_block_mask(visible, B=1, H=None, Q_LEN=tokens, KV_LEN=tokens, device=device, _compile=is_cuda)


def _has_windows(model: Any) -> bool:
    """Whether any layer has sliding attention; configurations without `layer_types` mean all layers or none."""
    if layer_types := _layer_types(model):
        return "sliding_attention" in layer_types
    return getattr(model.config.get_text_config(), "sliding_window", None) is not None


def _layer_types(model: Any) -> list[str]:
    return getattr(model.config.get_text_config(), "layer_types", None) or []
