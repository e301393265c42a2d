"""What the models of the benchmark of coverage get to see."""

import torch
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
)


def inputs_for(model: PreTrainedModel, size: int, seed: int) -> dict[str, Tensor]:
    """Return a batch of four. The images differ in colour as much as in detail: all means over noise would be alike."""
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    colour, detail = (torch.randn(4, 3, side, side, generator=generator).double() for side in (1, size))
    images = colour + detail
    if config.model_type == "imagegpt":  # one token for each pixel
        return {"input_ids": torch.randint(config.vocab_size - 1, (4, config.n_positions), generator=generator)}
    if config.model_type == "siglip2":  # patches
        patch = config.vision_config.patch_size
        patches = nn.functional.unfold(images, patch, stride=patch).mT
        shapes = torch.tensor([[size // patch, size // patch]] * 4)
        return {
            "pixel_values": patches,
            "pixel_attention_mask": torch.ones(patches.shape[:2]),
            "spatial_shapes": shapes,
        }
    if config.model_type == "shieldgemma2":  # a prompt around the image
        prompt = torch.tensor([[2, *[config.image_token_index] * config.mm_tokens_per_image, 3]] * 4)
        return {"input_ids": prompt, "pixel_values": images}
    return {model.main_input_name: images}


def converted(inputs: dict[str, Tensor], dtype: torch.dtype, batch_size: int = 4) -> dict[str, Tensor]:
    return {name: x[:batch_size].to(dtype) if x.is_floating_point() else x[:batch_size] for name, x in inputs.items()}
