"""ConvNeXt-T on ImageNet-1k, pruned by UPDP; all values, each with its source, are in convnext_tiny.yaml.

accelerate launch recipes/convnext_tiny.py --data_dir imagenet
accelerate launch recipes/convnext_tiny.py --smoke
"""

from transformers import ConvNextConfig

from updp_hf.recipe import run

TINY = ConvNextConfig(
    num_stages=2, hidden_sizes=[32, 64], depths=[3, 3], layer_scale_init_value=0.1, patch_size=2, image_size=16
)

if __name__ == "__main__":
    run(__file__, TINY)
