"""KiviCache: a cache of transformers that holds packed codes."""

from __future__ import annotations

import copy
import functools
import logging
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from vllm_kivi import ops
from vllm_kivi.format import HEAD_DIMS, PRESETS, KVFormat
from vllm_kivi.options import KiviOptions
from vllm_kivi.transformers.attention import LAYER, NAME
from vllm_kivi.transformers.pages import Pages

logger = logging.getLogger("vllm_kivi.transformers")

# Why a layer keeps the cache that DynamicCache gives it.
WINDOW = "sliding window"
NO_ATTENTION = "no attention"


@dataclass(frozen=True)
class LayerInfo:
    """What one layer's cache holds: tokens of all rows, without padding where attention "kivi" knew of it."""

    quantized_tokens: int  # that the next token reads quantized
    full_tokens: int
    num_bytes: int  # memory, tables and room for tokens to come included
    elements: int  # numbers in the keys and values of all tokens
    dtype_bytes: int  # of a number that is not quantized
    kept: str = ""  # why the layer keeps DynamicCache's cache, such as "sliding window"

    @property
    def bits_per_element(self) -> float:
        return 8 * self.num_bytes / max(self.elements, 1)

    @property
    def compression(self) -> float:
        """How often the bytes fit into those of the same tokens in the model's dtype."""
        return self.elements * self.dtype_bytes / max(self.num_bytes, 1)


@dataclass(frozen=True)
class CacheInfo:
    """What a cache holds, layer by layer."""

    name: str  # the preset, and what else was said
    layers: tuple[LayerInfo, ...]

    @property
    def total(self) -> LayerInfo:
        """Sums of all layers: a token counts once in each."""
        names = ("quantized_tokens", "full_tokens", "num_bytes", "elements")
        sums = {name: sum(getattr(layer, name) for layer in self.layers) for name in names}
        return LayerInfo(**sums, dtype_bytes=max((layer.dtype_bytes for layer in self.layers), default=0))

    def __str__(self) -> str:
        lines = [f"{self.name}: layer, tokens quantized and in full precision, MiB, bits per element, compression"]
        for name, layer in [*enumerate(self.layers), ("all", self.total)]:
            lines.append(
                f"{name:>5} {layer.quantized_tokens:9,} {layer.full_tokens:9,} {layer.num_bytes / 2**20:10.2f} "
                f"{layer.bits_per_element:6.2f} {layer.compression:6.2f}x"
                + (f"  not quantized: {layer.kept}" if layer.kept else "")
            )
        return "\n".join(lines)


class KiviLayer(CacheLayerMixin):
    """One attention layer of a KiviCache; its pages are made at the first update."""

    is_sliding = False
    is_croppable = True

    def __init__(
        self,
        config: Any,
        make_format: Callable[..., KVFormat],
        max_cache_len: int,
        max_crop: int,
        workspaces: dict[tuple[Any, ...], Tensor],
    ) -> None:
        super().__init__()
        self.config = config
        self.make_format = make_format  # of head_dim, num_kv_heads and dtype
        self.max_cache_len = max_cache_len
        self.max_crop = max_crop
        self.workspaces = workspaces  # of all layers, by device and layout
        self.pages: Pages | None = None
        self.is_waiting = False  # there are keys that attention "kivi" has yet to store
        self._was_attended: bool | None = None  # what is stored came by attention "kivi"; None: nothing is
        del self.keys, self.values  # so that whoever reads them is told

    def __getattr__(self, name: str) -> Any:
        if name in ("keys", "values"):
            raise AttributeError(
                f"kivi: a KiviCache has packed pages and no .{name}; use DynamicCache for what reads them, such as "
                "the cross-attention of an EncoderDecoderCache"
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @property
    def is_compileable(self) -> bool:  # type: ignore[override]
        """Whether a step of one token allocates nothing and the host need not know how many there are."""
        return self.max_cache_len > 0 and self._is_attended

    @property
    def _is_attended(self) -> bool:
        """The model uses attention "kivi"."""
        return self.config._attn_implementation == NAME

    @torch.compiler.disable
    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make the pages for keys and values like these: [B, H, q, D].

        Raises:
            ValueError: values of another size than keys, or a head size or dtype that is not supported.
        """
        if key_states.shape != value_states.shape:
            raise ValueError(
                f"kivi: values {list(value_states.shape)} of another size than keys {list(key_states.shape)} are not "
                "supported; use DynamicCache"
            )
        batch_size, num_kv_heads, _, head_dim = key_states.shape
        dtype = str(key_states.dtype).removeprefix("torch.")
        fmt = self.make_format(head_dim=head_dim, num_kv_heads=num_kv_heads, dtype=dtype)
        device = key_states.device
        self.pages = Pages(fmt, batch_size, device, self.max_cache_len, self.max_crop, self._workspace(fmt, device))
        self.is_initialized = True

    def _workspace(self, fmt: KVFormat, device: torch.device) -> Tensor | None:
        """What layers share, because one attends after the other."""
        if device.type == "cpu":
            return None
        key = device, *fmt.layout()
        if key not in self.workspaces:
            with torch.inference_mode(False):
                self.workspaces[key] = ops.decode_workspace(fmt.layout(), device)
            torch._dynamo.mark_static_address(self.workspaces[key])
        return self.workspaces[key]

    @property
    def batch_size(self) -> int:
        return self.pages.batch_size if self.pages else -1

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take new keys and values [B, H, q, D].

        Returns:
            With attn_implementation="kivi" the same tensors, which the attention function stores; else all keys and
            values that the step attends to, dequantized: [B, H, tokens, D].

        Raises:
            ValueError: gradients, another batch size, another model's shapes or dtype, a full cache, attention that
                did not store what it got, or that changed.
        """
        if self.is_waiting:
            raise ValueError(
                'kivi: attention "kivi" never got the keys of the last step: the model changed them after its cache '
                'took them, or failed; use attn_implementation="sdpa", or reset() the cache'
            )
        if key_states.requires_grad or value_states.requires_grad:
            raise ValueError("kivi: a KiviCache has no gradients; run the model under torch.no_grad()")
        # Under torch.autocast RoPE leaves keys in float32; attention of transformers rounds them like this.
        key_states = key_states.to(value_states.dtype)
        if self.pages is None:
            self.lazy_initialization(key_states, value_states)
        assert self.pages is not None
        fmt, (_, heads, _, head_dim), dtype = self.pages.fmt, key_states.shape, key_states.dtype
        if (heads, head_dim, dtype) != (fmt.num_kv_heads, fmt.head_dim, getattr(torch, fmt.dtype)):
            raise ValueError(
                f"kivi: keys of {heads} heads of {head_dim} in {str(dtype).removeprefix('torch.')} do not fit this "
                f"cache of {fmt.num_kv_heads} heads of {fmt.head_dim} in {fmt.dtype}; use the model and dtype that it "
                "was made with, or make a new cache"
            )
        if len(key_states) != self.batch_size:
            raise ValueError(
                f"kivi: a batch of {len(key_states)} rows does not fit this cache of {self.batch_size}; make a new "
                "cache, or use batch_repeat_interleave or batch_select_indices"
            )
        if self._was_attended is None:
            self._was_attended = self._is_attended
        elif self._was_attended != self._is_attended:
            self._change_attention()
        if not self._is_attended:
            return self._append(key_states, value_states)
        self.is_waiting = True
        setattr(key_states, LAYER, self)
        return key_states, value_states

    @torch.compiler.disable
    def _change_attention(self) -> None:
        """Waits for the device if attention "kivi" gives way to another.

        Raises:
            ValueError: there is padding that one of them would not see as the other left it, or may be.
        """
        assert self.pages is not None
        if not self._was_attended or self.pages.has_padding:
            raise ValueError(
                'kivi: the attention has changed; "kivi" leaves padding out and any other stores it, so keep to one of '
                "them, or reset() the cache"
            )
        self._was_attended = self._is_attended

    @torch.compiler.disable
    def _append(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        assert self.pages is not None
        return self.pages.append(key_states, value_states)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, logits_soft_cap: float
    ) -> Tensor:
        """Store what `update` got and attend: query [B, heads, q, D], mask bool [B, 1, 1, q] -> [B, q, heads, D]."""
        assert self.pages is not None
        real = None if mask is None else mask[:, 0, 0]
        compiled = self.is_compileable and query.shape[2] == 1
        output = (self.pages.attend if compiled else self._attend)(query, key, value, real, scale, logits_soft_cap)
        self.is_waiting = False
        return output

    @torch.compiler.disable
    def _attend(self, *args: Any) -> Tensor:
        assert self.pages is not None
        return self.pages.attend(*args)

    def get_seq_length(self) -> Any:
        """Tokens of a row, padding included: an int32 tensor [] where is_compileable."""
        if self.pages is None:
            return 0
        # A copy: whoever gets it may add to it.
        return self.pages.lengths[-1].clone() if self.is_compileable else self.pages.num_positions

    def get_mask_sizes(self, query_length: int) -> tuple[int, Any]:
        """Tokens of the mask, and the first: attention "kivi" wants to know of new tokens which are padding.

        Raises:
            RuntimeError: more than max_cache_len, as far as only the device knows; on a GPU an assertion there, which
                ends the process's use of it.
        """
        length = self.get_seq_length()
        if not self._is_attended:
            return length + query_length, 0
        if isinstance(length, Tensor):
            torch._assert_async(
                length + query_length <= self.max_cache_len,
                f"kivi: the tokens do not fit a cache of max_cache_len={self.max_cache_len}; make it larger, or leave "
                "it out for a cache that grows",
            )
        return query_length, length

    def get_max_length(self) -> int:
        return self.max_cache_len or -1

    def reset(self) -> None:
        self.is_waiting, self._was_attended = False, None
        if self.pages:
            self.pages.reset()

    def offload(self) -> None:
        raise NotImplementedError("kivi: a KiviCache cannot be offloaded; use DynamicCache(offloading=True)")

    def prefetch(self) -> None:
        self.offload()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.pages:
            self.pages.select(torch.arange(self.batch_size).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.pages:
            rows = torch.arange(self.batch_size, device=indices.device)
            self.pages.select(rows[indices])

    def crop(self, tokens_to_remove: int) -> None:
        """Remove -tokens_to_remove tokens; a positive number is the length to keep, as in transformers."""
        if self.pages:
            count = int(tokens_to_remove)  # of some versions of transformers a tensor
            self.pages.crop(max(self.pages.num_positions - count, 0) if count > 0 else -count)

    def info(self) -> LayerInfo:
        if self.pages is None:
            return LayerInfo(0, 0, 0, 0, 0)
        fmt, lengths = self.pages.fmt, self.pages.seq_lens.tolist()
        quantized = 0 if fmt.full_precision else sum(max(0, fmt.boundary(n) - fmt.sink_tokens) for n in lengths)
        elements = sum(lengths) * fmt.num_kv_heads * 2 * fmt.head_dim
        return LayerInfo(quantized, sum(lengths) - quantized, self.pages.num_bytes, elements, fmt.element_bytes)

    def state(self) -> dict[str, Any] | None:
        if self.pages is None:
            return None
        fmt = self.pages.fmt
        shape = {"head_dim": fmt.head_dim, "num_kv_heads": fmt.num_kv_heads, "dtype": fmt.dtype}
        return {"shape": shape, "was_attended": self._was_attended, "pages": self.pages.state()}

    def restore(self, state: dict[str, Any]) -> None:
        fmt = self.make_format(**state["shape"])
        self.pages = Pages.restored(fmt, state["pages"], self._workspace(fmt, state["pages"]["memory"].device))
        self._was_attended = state["was_attended"]
        self.is_initialized = True


class KiviCache(Cache):
    """A KV cache of a few bits per number for `model.generate(..., past_key_values=KiviCache(model.config))`.

    With a model of `attn_implementation="kivi"` attention reads the packed pages. With any other attention the cache
    dequantizes all of a layer at every step, and padding is stored like any token.

    Layers with a sliding window, and layers that are not attention, keep the cache that DynamicCache gives them.

    Args:
        config: the model's own configuration, model.config: the cache looks there which attention the model uses.
        preset: "kivi2", "kivi2_boost", "kivi_k4v2", "kivi4" or "kivi8", see the README.
        k_bits, v_bits: of keys and values, 2, 4, 8 or 16, which is not quantized; None: the preset's. Any two go
            together; on a GPU those that no preset has are served by Triton.
        max_cache_len: tokens of a row, with padding, whose memory is taken at once; None: the cache grows. generate()
            compiles the model with such a cache, as with StaticCache; layers with a sliding window, which cannot be
            cropped or move rows then, are StaticCache's.
        max_crop: most tokens that `crop` removes without loss, as assisted decoding does in every step: as many more
            stay in full precision. What a larger crop leaves has its last tokens as they were quantized.
        options: those of KiviOptions, such as residual_length=64.

    Raises:
        ValueError: for an unknown preset or option, a bad value, or a model in which nothing would be quantized.
    """

    def __init__(
        self,
        config: Any,
        preset: str = "kivi2",
        *,
        k_bits: int | None = None,
        v_bits: int | None = None,
        max_cache_len: int | None = None,
        max_crop: int = 0,
        **options: Any,
    ) -> None:
        if preset not in PRESETS:
            raise ValueError(f"kivi: preset={preset!r} is not supported; accepted: {', '.join(PRESETS)}")
        for name, value in (("max_cache_len", max_cache_len), ("max_crop", max_crop)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
                raise ValueError(f"kivi: {name}={value!r} is not supported; accepted: an integer of 0 or more")
        own = KiviOptions.from_additional_config({"kivi": options})
        bits: dict[str, Any] = {
            name: value for name, value in (("k_bits", k_bits), ("v_bits", v_bits)) if value is not None
        }
        text_config = config.get_text_config(decoder=True)
        make_format = functools.partial(own.format, preset, **bits)
        stock = StaticCache(config, max_cache_len) if max_cache_len else DynamicCache(config=config)
        workspaces: dict[tuple[Any, ...], Tensor] = {}
        layers = [
            KiviLayer(text_config, make_format, max_cache_len or 0, max_crop, workspaces)
            if type(layer) in (DynamicLayer, StaticLayer)
            else layer
            for layer in stock.layers
        ]
        if not any(isinstance(layer, KiviLayer) for layer in layers):
            raise ValueError(
                "kivi: nothing would be quantized: no layer of this model has attention without a sliding window, or "
                "without a recurrent state in the same layer; use DynamicCache"
            )
        _say_kept(layers)
        # Layers at the end that share keys have no cache.
        for layer, layer_config in zip(layers, text_config.per_layer_config, strict=False):
            if not isinstance(layer, KiviLayer):
                continue
            head_dim = getattr(layer_config, "head_dim", None)
            head_dim = head_dim or layer_config.hidden_size // layer_config.num_attention_heads
            if head_dim not in HEAD_DIMS:
                accepted = ", ".join(map(str, HEAD_DIMS))
                raise ValueError(f"kivi: head size {head_dim} is not supported; accepted: {accepted}; use DynamicCache")
            fmt = make_format(head_dim=head_dim, num_kv_heads=1, dtype="bfloat16")  # refuses what does not go together
        if fmt.full_precision or (max_cache_len and fmt.boundary(max_cache_len) <= fmt.sink_tokens):
            logger.warning(
                "kivi: this cache will quantize nothing: %s",
                "it keeps keys and values in full precision"
                if fmt.full_precision
                else f"max_cache_len={max_cache_len} is hardly more than residual_length={fmt.residual_length}",
            )
        super().__init__(layers=layers)
        self.is_encoder_decoder = getattr(config, "is_encoder_decoder", False)
        self.settings = {"preset": preset, "max_cache_len": max_cache_len, "max_crop": max_crop} | bits | options

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Take a layer's new keys and values, as its `update` does.

        Raises:
            ValueError: the same, and cross-attention of an encoder-decoder model that stores what the encoder said.
        """
        # Without EncoderDecoderCache such a model writes both to one layer: the first is then ahead of the next. A step
        # of one token is not looked at: it may be compiled.
        looked_at = self.is_encoder_decoder and layer_idx == 0 and key_states.shape[2] > 1 and len(self.layers) > 1
        if looked_at and self.get_seq_length(0) > self.get_seq_length(1):
            raise ValueError(
                "kivi: in an encoder-decoder model a KiviCache holds the decoder's self-attention only; pass "
                "past_key_values=EncoderDecoderCache(KiviCache(model.config), DynamicCache())"
            )
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    @torch.inference_mode(False)  # steps may go on without
    def __deepcopy__(self, memo: dict[int, Any]) -> KiviCache:
        """A copy for the same model: it still sees which attention that uses."""
        for layer in self.layers:
            if isinstance(layer, KiviLayer):
                memo[id(layer.config)] = layer.config
        new = copy.copy(self)
        new.layers = copy.deepcopy(self.layers, memo)
        return new

    def info(self) -> CacheInfo:
        """What the cache holds; waits for the device. Warns when nothing is quantized."""
        unsaid = {"preset": self.settings["preset"], "max_cache_len": None, "max_crop": 0}
        said = [f"{name}={value}" for name, value in self.settings.items() if (name, value) not in unsaid.items()]
        name = " ".join([self.settings["preset"], *said])
        info = CacheInfo(name, tuple(_layer_info(layer) for layer in self.layers))
        if not info.total.quantized_tokens:
            logger.warning(
                "kivi: nothing in this cache is quantized (%d tokens in %d layers): a row stays in full precision up "
                "to residual_length tokens, and always with full_precision=True",
                info.total.full_tokens,
                len(info.layers),
            )
        return info

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the cache to a file, packed as it is: a prompt that is computed once and used again.

        Raises:
            ValueError: the model has layers other than attention.
        """
        layers = [layer.state() if isinstance(layer, KiviLayer) else _sliding_state(layer) for layer in self.layers]
        torch.save({"settings": self.settings, "layers": layers}, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str], config: Any, device: Any = None) -> KiviCache:
        """The cache that `save` wrote, for the same model.

        Args:
            config: model.config.
            device: where all layers go; None: each to the device that it was on.

        Raises:
            ValueError: the file is of another model, or of another version of this package.
        """
        data = torch.load(path, map_location=device, weights_only=True)
        if not isinstance(data, dict) or data.keys() != {"settings", "layers"}:
            raise ValueError(f"kivi: {path} holds no KiviCache; load what KiviCache.save wrote")
        cache = cls(config, **data["settings"])
        if len(data["layers"]) != len(cache.layers):
            raise ValueError(
                f"kivi: {path} has {len(data['layers'])} layers, the model {len(cache.layers)}; use the model that it "
                "was made with"
            )
        for layer, state in zip(cache.layers, data["layers"], strict=True):
            if state is None:
                continue
            if isinstance(layer, KiviLayer) != ("pages" in state):
                raise ValueError(
                    f"kivi: {path} has sliding windows in other layers; use the model that it was made with"
                )
            if isinstance(layer, KiviLayer):
                layer.restore(state)
            else:
                _restore_sliding(layer, state)
        return cache


def _sliding_names(layer: Any) -> tuple[str, ...]:
    if isinstance(layer, StaticSlidingWindowLayer):
        return "keys", "values", "cumulative_length", "cumulative_length_int"
    if isinstance(layer, DynamicSlidingWindowLayer):
        return "keys", "values", "cumulative_length"
    raise ValueError(f"kivi: a cache with layers of type {type(layer).__name__} cannot be saved; compute it again")


def _sliding_state(layer: Any) -> dict[str, Any] | None:
    names = _sliding_names(layer)
    if not layer.is_initialized:
        return None
    state = {name: getattr(layer, name) for name in names}
    # Cloned, because they can be windows of larger tensors.
    return {name: x.clone() if isinstance(x, Tensor) else x for name, x in state.items()}


def _restore_sliding(layer: Any, state: dict[str, Any]) -> None:
    layer.lazy_initialization(state["keys"], state["values"])
    for name in _sliding_names(layer):
        if isinstance(layer, StaticLayer) and isinstance(state[name], Tensor):
            getattr(layer, name).copy_(state[name])
        else:
            setattr(layer, name, state[name])


def _layer_info(layer: Any) -> LayerInfo:
    if isinstance(layer, KiviLayer):
        return layer.info()
    tensors = [x for x in (getattr(layer, "keys", None), getattr(layer, "values", None)) if x is not None]
    tokens = sum(x.shape[0] * x.shape[2] for x in tensors[:1])
    elements = sum(x.numel() for x in tensors)
    num_bytes = sum(x.untyped_storage().nbytes() for x in tensors)
    return LayerInfo(0, tokens, num_bytes, elements, max((x.element_size() for x in tensors), default=0), _kept(layer))


def _kept(layer: Any) -> str:
    """Why a layer keeps the cache that DynamicCache gives it; "": it does not."""
    if isinstance(layer, KiviLayer):
        return ""
    if getattr(layer, "is_sliding", False):
        return WINDOW
    if not isinstance(layer, CacheLayerMixin):
        return NO_ATTENTION
    if isinstance(layer, LinearAttentionCacheLayerMixin):
        return "attention beside a recurrent state"
    return f"a cache of type {type(layer).__name__}"


def _say_kept(layers: list[Any]) -> None:
    kept = Counter(_kept(layer) for layer in layers)
    del kept[""]
    if kept:
        # Those that hold few tokens, or none, are no reason to warn.
        logger.log(
            logging.INFO if kept.keys() <= {WINDOW, NO_ATTENTION} else logging.WARNING,
            "kivi: %d of %d layers are not quantized: %s",
            kept.total(),
            len(layers),
            ", ".join(f"{count} ({why})" for why, count in kept.items()),
        )
