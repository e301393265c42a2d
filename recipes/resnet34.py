"""ResNet-34 on ImageNet-1k, pruned by UPDP.

    accelerate launch recipes/resnet34.py --data_dir imagenet
    accelerate launch recipes/resnet34.py --smoke

All values, each with its source, are in resnet34.yaml. With `--smoke` a tiny network of the same kind
is pruned on the digits, in a minute on a CPU.
"""

from transformers import TimmWrapperConfig

from updp_hf.recipe.run import run

TINY = TimmWrapperConfig(
    architecture="resnet34", model_args={"channels": [16, 24, 32, 48], "layers": [2, 2, 2, 2]}, image_size=32
)

if __name__ == "__main__":
    run(__file__, TINY)
