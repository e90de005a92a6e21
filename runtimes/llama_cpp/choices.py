"""What a user may choose for llama.cpp: which choices there are, which go together, how llama.cpp is told.

Knows llama.cpp's parameter structures; not models or sessions.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import llama_cpp.llama_cpp as lib

from fox_edge.config import FoxConfig
from fox_edge.errors import FoxEdgeError
from fox_edge.processors import physical_cores
from fox_edge.quant import GGUF
from runtimes.base import CPU, CUDA, SessionOptions, check_choices
from runtimes.kv_types import KV_TYPES, default_kv
from runtimes.llama_cpp.device import check_device, choose_device

DEFAULT_KV = default_kv(GGUF)
_CHOICES = ("prompt_threads", "flash_attention", "repack", "mmap")


def check_options(options: SessionOptions) -> None:
    """Raises FoxEdgeError for choices that llama.cpp does not have, or not together."""
    check_choices(options, "llama.cpp", tuple(KV_TYPES[GGUF]), _CHOICES, (CPU, CUDA))
    check_device(options)
    if options.kv not in (None, DEFAULT_KV) and options.flash_attention is False:
        raise FoxEdgeError(f"--flash-attention off: a KV cache of {options.kv} needs it on")


def check_kv_blocks(options: SessionOptions, config: FoxConfig) -> None:
    """Raises FoxEdgeError when a head of this model is no whole number of the KV cache's blocks."""
    kv = options.kv or DEFAULT_KV
    block, _ = KV_TYPES[GGUF][kv]
    if config.head_dim % block:
        raise FoxEdgeError(
            f"--kv {kv}: heads of {config.head_dim} values are no whole blocks of {block}; use {DEFAULT_KV}"
        )


def shares_a_context(options: SessionOptions) -> bool:
    """Whether several conversations have one context in common, and step together."""
    # With attention in one pass over a cache that is not quantized a lone token's is split among threads, and
    # that of several is not: no bits would be alike.
    split = options.flash_attention and options.kv in (None, DEFAULT_KV)
    return options.conversations > 1 and not (split and options.fixed_batch)


def for_sharing(options: SessionOptions) -> SessionOptions:
    """The options of such a context: attention by plain products where nothing says otherwise."""
    if options.flash_attention is not None or options.kv not in (None, DEFAULT_KV):
        return options
    return replace(options, flash_attention=False)


def choose_for_model(params: Any, options: SessionOptions) -> None:
    """Write into llama_model_params what was chosen; the rest stays llama.cpp's."""
    choose_device(params, options)
    if options.repack is not None:
        params.use_extra_bufts = options.repack
    if options.mmap is not None:
        params.load_mode = lib.LLAMA_LOAD_MODE_MMAP if options.mmap else lib.LLAMA_LOAD_MODE_NONE


def choose_for_context(params: Any, options: SessionOptions) -> None:
    """Write into llama_context_params what was chosen; the rest stays llama.cpp's."""
    params.n_threads = options.threads or physical_cores()
    params.n_threads_batch = options.prompt_threads or params.n_threads
    flash = options.flash_attention
    if options.kv is not None:
        params.type_k = params.type_v = getattr(lib, f"GGML_TYPE_{options.kv.upper()}")
        if options.kv != DEFAULT_KV:
            flash = True  # left to itself llama.cpp may choose off, and then refuses the cache
    if flash is not None:
        on, off = lib.LLAMA_FLASH_ATTN_TYPE_ENABLED, lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.flash_attn_type = on if flash else off
