"""ResNet-34 on ImageNet-1k, pruned by UPDP: every value, with its source, is in resnet34.yaml.

accelerate launch recipes/resnet34.py --data_dir imagenet
accelerate launch recipes/resnet34.py --smoke   # a tiny network of the same kind on digits, a minute on a CPU
"""

from updp_hf.recipe.run import run

if __name__ == "__main__":
    run(__file__)
