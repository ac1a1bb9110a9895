"""Per-step metadata of both cache groups."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.v1.attention.backend import AttentionMetadata, AttentionMetadataBuilder, CommonAttentionMetadata
from vllm.v1.attention.backends.utils import split_decodes_and_prefills
from vllm.v1.kv_cache_interface import AttentionSpec

from vllm_kivi import compat


@dataclass
class KiviMetadata(AttentionMetadata):
    """One cache group's view of a step; requests that decode come first.

    query_start_loc: int32 [num_reqs + 1]; seq_lens, num_prompt_tokens: int32 [num_reqs]; block_table: int32
    [num_reqs, max_blocks] of this group's pages.
    """

    num_actual_tokens: int
    num_decodes: int
    num_decode_tokens: int
    num_prefills: int
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    num_prompt_tokens: torch.Tensor


class KiviMetadataBuilder(AttentionMetadataBuilder[KiviMetadata]):
    supports_update_block_table = True

    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        # Draft tokens are a few more rows of a decode.
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> KiviMetadata:
        common = common_attn_metadata
        num_decodes, num_prefills, num_decode_tokens, _ = split_decodes_and_prefills(
            common,
            decode_threshold=self.reorder_batch_threshold or 1,
            # A prompt's rows share one boundary however few they are.
            treat_short_extends_as_decodes=common.is_prefilling is None,
        )
        return KiviMetadata(
            num_actual_tokens=common.num_actual_tokens,
            num_decodes=num_decodes,
            num_decode_tokens=num_decode_tokens,
            num_prefills=num_prefills,
            query_start_loc=common.query_start_loc,
            seq_lens=common.seq_lens,
            block_table=common.block_table_tensor,
            num_prompt_tokens=compat.num_prompt_tokens(common),
        )

    def update_block_table(
        self, metadata: KiviMetadata, blk_table: torch.Tensor, slot_mapping: torch.Tensor
    ) -> KiviMetadata:
        fields: dict[str, Any] = {**vars(metadata), "block_table": blk_table}
        return KiviMetadata(**fields)
