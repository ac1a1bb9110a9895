"""Per-step metadata of both cache groups."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from vllm.config import VllmConfig
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.utils import split_decodes_and_prefills
from vllm.v1.kv_cache_interface import AttentionSpec

from vllm_kivi import compat
from vllm_kivi.backend.cache import FullPrecisionSpec
from vllm_kivi.backend.heuristics import on_gpu
from vllm_kivi.backend.prefill import Piece, plan, upload


@dataclass
class KiviMetadata(AttentionMetadata):
    """One cache group's view of a step; requests that decode come first.

    query_start_loc: int32 [num_reqs + 1]; seq_lens: int32 [num_reqs]; block_table: int32 [num_reqs, max_blocks] of this
    group's pages. All three are vLLM's own buffers, which a CUDA graph that was captured with them finds filled.
    num_prompt_tokens: int32 [num_reqs] on the CPU, if any request prefills. pieces: how these do it on a GPU.
    """

    num_actual_tokens: int
    num_decodes: int
    num_decode_tokens: int
    num_prefills: int
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    num_prompt_tokens: torch.Tensor | None
    pieces: list[Piece]


class KiviMetadataBuilder(AttentionMetadataBuilder[KiviMetadata]):
    supports_update_block_table = True
    # A graph holds decodes of equal row counts. Prefill is planned on the host, so it runs between piecewise graphs.
    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH

    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        # Draft tokens are a few more rows of a decode.
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)
        compat.expose_prompt_lengths()
        compat.give_draft_models_their_pages()
        # Impls take all but the block table from the quantized pages' metadata.
        self._plans_prefill = on_gpu() and not isinstance(kv_cache_spec, FullPrecisionSpec)
        backend: Any = vllm_config.compilation_config.static_forward_context[layer_names[0]].get_attn_backend()
        self._format = backend.kv_format

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> KiviMetadata:
        common = common_attn_metadata
        num_decodes, num_prefills, num_decode_tokens, _ = split_decodes_and_prefills(
            common,
            decode_threshold=self.reorder_batch_threshold or 1,
            # A prompt's rows share one boundary however few they are. Not so on a GPU: there vLLM lets the last row of
            # a prompt join a graph of decodes, and it must not matter which way it goes.
            treat_short_extends_as_decodes=on_gpu() or common.is_prefilling is None,
        )
        num_prompt_tokens = None
        pieces: list[Piece] = []
        if num_prefills:
            seq_lens = common.seq_lens_cpu_upper_bound  # exact for requests that prefill
            if seq_lens is None:
                seq_lens = common.seq_lens.cpu()  # Waits for the device: only some drafters leave it out.
            num_prompt_tokens = compat.num_prompt_tokens(common)
            if num_prompt_tokens is None:
                num_prompt_tokens = seq_lens
            if self._plans_prefill:
                starts = common.query_start_loc_cpu[num_decodes:].tolist()
                lengths, prompts = seq_lens[num_decodes:].tolist(), num_prompt_tokens[num_decodes:].tolist()
                pieces = upload(plan(self._format, starts, lengths, prompts), self.device)
        return KiviMetadata(
            num_actual_tokens=common.num_actual_tokens,
            num_decodes=num_decodes,
            num_decode_tokens=num_decode_tokens,
            num_prefills=num_prefills,
            query_start_loc=common.query_start_loc,
            seq_lens=common.seq_lens,
            block_table=common.block_table_tensor,
            num_prompt_tokens=num_prompt_tokens,
            pieces=pieces,
        )

    def update_block_table(
        self, metadata: KiviMetadata, blk_table: torch.Tensor, slot_mapping: torch.Tensor
    ) -> KiviMetadata:
        fields: dict[str, Any] = {**vars(metadata), "block_table": blk_table}
        return KiviMetadata(**fields)
