"""lm-eval's own model for transformers, on a KiviCache. The command line is lm-eval's, with one more model:

    python -m vllm_kivi.transformers.lm_eval --model hf-kivi --model_args pretrained=MODEL,preset=kivi2 --tasks wikitext

A text that is computed at once attends to itself in full precision and measures nothing of the cache. So texts to
score, and prompts, go through it in chunks, as in `vllm-kivi eval`: what lies further back is read quantized.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from vllm_kivi.options import KiviOptions
from vllm_kivi.transformers.attention import NAME
from vllm_kivi.transformers.cache import KiviCache, KiviLayer

try:
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    raise ImportError(f"{error}; hf-kivi needs lm-eval: pip install 'vllm-kivi[eval]'") from error

logger = logging.getLogger("vllm_kivi.transformers")

# Of KiviCache; all others are HFLM's.
OPTIONS = {"k_bits", "v_bits", *(field.name for field in dataclasses.fields(KiviOptions))}


@register_model("hf-kivi")
class KiviLM(HFLM):
    """A causal model whose every batch has a new KiviCache.

    Args:
        pretrained: as for HFLM: a folder, a name on the hub, or a model.
        preset: as for KiviCache.
        chunk_tokens: so many tokens of a text go through the model at once.
        kwargs: options of KiviCache, such as residual_length=64 or k_bits=4, and what HFLM takes. A model that is
            loaded here has attn_implementation="kivi" unless another is named.

    Raises:
        ValueError: an unknown preset or a bad option, an encoder-decoder model, or one that KiviCache does not support.
    """

    def __init__(self, pretrained: Any, *, preset: str = "kivi2", chunk_tokens: int = 64, **kwargs: Any) -> None:
        if isinstance(chunk_tokens, bool) or not isinstance(chunk_tokens, int) or chunk_tokens < 1:
            raise ValueError(f"kivi: chunk_tokens={chunk_tokens!r} is not supported; accepted: an integer of 1 or more")
        self.preset = preset
        self.chunk_tokens = chunk_tokens
        self.options = {name: kwargs.pop(name) for name in OPTIONS & kwargs.keys()}
        self.quantized_tokens = self.cached_tokens = 0
        if isinstance(pretrained, str):
            kwargs = {"attn_implementation": NAME} | kwargs
        super().__init__(pretrained, **kwargs)
        if self.backend != "causal":
            raise ValueError("kivi: encoder-decoder models are not supported; use --model hf")
        self._new_cache()  # refuses what it cannot hold, before anything is computed

    def _new_cache(self) -> KiviCache:
        return KiviCache(self.model.config, preset=self.preset, **self.options)

    def _stream(self, tokens: Tensor, cache: KiviCache, mask: Tensor | None = None, **kwargs: Any) -> Iterator[Tensor]:
        """Logits [B, chunk, vocabulary] of chunk after chunk of texts that begin in the first column.

        Args:
            tokens: [B, T].
            mask: [B, T], 0 where a text has ended; None: what follows it is cached like a text.
        """
        for start in range(0, tokens.shape[1], self.chunk_tokens):
            end = start + self.chunk_tokens
            seen = None if mask is None else mask[:, :end]
            yield self.model(tokens[:, start:end], attention_mask=seen, past_key_values=cache, **kwargs).logits

    def _autocast(self) -> torch.autocast:
        dtype = self.mixed_precision_dtype
        return torch.autocast(device_type=self.device.type, dtype=dtype, enabled=dtype is not None)

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """Logits [B, T, vocabulary] of texts with padding after them, which none of their tokens attends to."""
        cache = self._new_cache()
        with torch.no_grad(), self._autocast():
            logits = torch.cat(list(self._stream(inps, cache)), 1)
        self._count(cache)
        return logits

    def _model_generate(
        self, context: Tensor, max_length: int, stop: list[str], *, attention_mask: Tensor, **kwargs: Any
    ) -> Tensor:
        """Answers [B, up to max_length] to prompts with padding before them, which the first T columns are."""
        cache = self._new_cache()
        # Chunks count from the first token of each prompt, as they do alone: padding goes between a prompt and its last
        # token, from which the answer goes on.
        before, last = attention_mask[:, :-1], attention_mask[:, -1:]
        order = before.sort(dim=1, descending=True, stable=True).indices
        context = torch.cat((context[:, :-1].gather(1, order), context[:, -1:]), 1)
        mask = torch.cat((before.gather(1, order), last), 1)
        with torch.no_grad(), self._autocast():
            for _ in self._stream(context[:, :-1], cache, mask[:, :-1], logits_to_keep=1):
                pass
        answer = super()._model_generate(
            context, max_length, stop, attention_mask=mask, past_key_values=cache, **kwargs
        )
        self._count(cache)
        return answer

    def _detect_batch_size(self, *args: Any, **kwargs: Any) -> int:
        """What HFLM does with batch_size=auto; the texts that it tries are not counted."""
        counted = self.quantized_tokens, self.cached_tokens
        batch_size: int = super()._detect_batch_size(*args, **kwargs)
        self.quantized_tokens, self.cached_tokens = counted
        return batch_size

    def _count(self, cache: KiviCache) -> None:
        layers = [layer.info() for layer in cache.layers if isinstance(layer, KiviLayer)]
        self.quantized_tokens += sum(layer.quantized_tokens for layer in layers)
        self.cached_tokens += sum(layer.quantized_tokens + layer.full_tokens for layer in layers)

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes beside its results: of the cache, too, and how much of what was in it was quantized."""
        if not self.quantized_tokens:
            logger.warning(
                "kivi: nothing was quantized: a text stays in full precision up to residual_length tokens, and always "
                "with full_precision=True"
            )
        return super().get_model_info() | {
            "kivi_preset": self.preset,
            "kivi_options": self.options,
            "kivi_chunk_tokens": self.chunk_tokens,
            "kivi_quantized_share": self.quantized_tokens / max(self.cached_tokens, 1),
        }


if __name__ == "__main__":
    cli_evaluate()
