"""Low-rank adaptation (LoRA): train small factors beside frozen weights. Modules are imported when a name is used."""

from typing import TYPE_CHECKING

from gpt2_jax.lazy_names import lazy_names

if TYPE_CHECKING:
    from gpt2_jax.lora.config import LoRAConfig
    from gpt2_jax.lora.conversion import adapter_from_lora, lora_from_adapter
    from gpt2_jax.lora.parameters import lora_init, merge_lora
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "gpt2_jax.lora.config": ("LoRAConfig",),
            "gpt2_jax.lora.conversion": ("adapter_from_lora", "lora_from_adapter"),
            "gpt2_jax.lora.parameters": ("lora_init", "merge_lora"),
        },
    )

__all__ = ["LoRAConfig", "adapter_from_lora", "lora_from_adapter", "lora_init", "merge_lora"]
