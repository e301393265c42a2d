"""Prune any image classifier of transformers or timm, as the YAML file of a recipe says.

    accelerate launch recipes/prune.py --config recipes/deit_small.yaml --data_dir imagenet
    accelerate launch recipes/prune.py --config mine.yaml --model_name_or_path me/my-checkpoint

The scripts beside this one are the same with a file of their own each.
"""

from updp_hf.recipe.run import run

if __name__ == "__main__":
    run(__file__)
