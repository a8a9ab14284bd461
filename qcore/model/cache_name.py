"""What transformers calls a model's cache, in forwards and in what they give: `cache` from version 5.24 on, `past_key_values` before."""

from __future__ import annotations

from dataclasses import fields

from transformers.modeling_outputs import CausalLMOutputWithPast

OLD = "past_key_values"
CACHE = "cache" if any(field.name == "cache" for field in fields(CausalLMOutputWithPast)) else OLD
