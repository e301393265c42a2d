"""DeiT-S on ImageNet-1k, pruned by UPDP.

    accelerate launch recipes/deit_small.py --data_dir imagenet
    accelerate launch recipes/deit_small.py --smoke

All values, each with its source, are in deit_small.yaml. With `--smoke` a tiny network of the same kind
is pruned on the digits, in a minute on a CPU.
"""

from transformers import ViTConfig

from updp_hf.recipe.run import run

TINY = ViTConfig(
    hidden_size=96, num_hidden_layers=4, num_attention_heads=6, intermediate_size=384, patch_size=4, image_size=16
)

if __name__ == "__main__":
    run(__file__, TINY)
