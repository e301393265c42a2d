import pytest
from tiny_training import last_two, vit

from updp_hf import gate_
from updp_hf.files import refuse_occupied, save_checkpoint


def test_a_training_checkpoint_is_not_written_over(tmp_path):
    model = vit()
    gate_(model, last_two(vit))
    save_checkpoint(model, tmp_path / "checkpoint-4")
    refuse_occupied(tmp_path, vit())
    with pytest.raises(ValueError, match="holds a training checkpoint"):
        refuse_occupied(tmp_path / "checkpoint-4", vit())


def test_the_source_is_not_written_over(tmp_path):
    vit().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="where the checkpoint itself lies"):
        refuse_occupied(tmp_path, type(vit()).from_pretrained(tmp_path))
