"""MobileNetV2 on ImageNet-1k, pruned by UPDP.

    accelerate launch recipes/mobilenetv2.py --data_dir imagenet
    accelerate launch recipes/mobilenetv2.py --smoke

All values, each with its source, are in mobilenetv2.yaml. With `--smoke` a tiny network of the same kind
is pruned on the digits, in a minute on a CPU.
"""

from transformers import TimmWrapperConfig

from updp_hf.recipe.run import run

TINY = TimmWrapperConfig(architecture="mobilenetv2_035", image_size=32)

if __name__ == "__main__":
    run(__file__, TINY)
