"""What a user may choose for llama.cpp: which choices there are, which go together, how llama.cpp is told.

Knows llama.cpp's parameter structures; not models or sessions.
"""

from __future__ import annotations

from typing import Any

import llama_cpp.llama_cpp as lib

from fox_edge.config import FoxConfig
from fox_edge.errors import FoxEdgeError
from fox_edge.processors import physical_cores
from fox_edge.quant import GGUF, TYPES
from runtimes.base import SessionOptions, check_choices

# What the KV cache may store, and ggml's number for it.
KV_TYPES = {"f16": lib.GGML_TYPE_F16, "q8_0": lib.GGML_TYPE_Q8_0, "q4_0": lib.GGML_TYPE_Q4_0}
DEFAULT_KV = "f16"
_CHOICES = ("prompt_threads", "flash_attention", "repack", "mmap")


def check_options(options: SessionOptions, config: FoxConfig) -> None:
    """Raises FoxEdgeError for choices that llama.cpp does not have, not together, or not for this model."""
    check_choices(options, "llama.cpp", tuple(KV_TYPES), _CHOICES)
    kv = TYPES[GGUF, options.kv or DEFAULT_KV]
    if kv.block_size > 1 and options.flash_attention is False:
        raise FoxEdgeError(f"--flash-attention off: a KV cache of {kv.name} needs it on")
    if not kv.holds(config.head_dim):
        raise FoxEdgeError(
            f"--kv {kv.name}: heads of {config.head_dim} values are no whole blocks of {kv.block_size}; "
            f"use {DEFAULT_KV}"
        )


def choose_for_model(params: Any, options: SessionOptions) -> None:
    """Write into llama_model_params what was chosen; the rest stays llama.cpp's."""
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
        params.type_k = params.type_v = KV_TYPES[options.kv]
        if options.kv != DEFAULT_KV:
            flash = True  # left to itself llama.cpp may choose off, and then refuses the cache
    if flash is not None:
        on, off = lib.LLAMA_FLASH_ATTN_TYPE_ENABLED, lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.flash_attn_type = on if flash else off
