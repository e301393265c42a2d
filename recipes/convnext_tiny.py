"""ConvNeXt-T on ImageNet-1k, pruned by UPDP.

    accelerate launch recipes/convnext_tiny.py --data_dir imagenet
    accelerate launch recipes/convnext_tiny.py --smoke

All values, each with its source, are in convnext_tiny.yaml. With `--smoke` a tiny network of the same kind
is pruned on the digits, in a minute on a CPU.
"""

from transformers import ConvNextConfig

from updp_hf.recipe.run import run

TINY = ConvNextConfig(
    num_stages=2, hidden_sizes=[32, 64], depths=[3, 3], layer_scale_init_value=0.1, patch_size=2, image_size=16
)

if __name__ == "__main__":
    run(__file__, TINY)
