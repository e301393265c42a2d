"""Images are found where the arguments say, with classes for labels, or one sentence says what is wrong."""

import datasets
import huggingface_hub.errors
import PIL.Image
import pytest
from tiny_pictures import BROKEN, CLASSES, WHOLE, pixels
from transformers import HfArgumentParser

from updp_hf.data.sources import DataArguments, load_splits
from updp_hf.errors import AccessError

COUNT = WHOLE + BROKEN


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def a_set(labels, feature=None, image="image", label="label"):
    images = [PIL.Image.fromarray(pixels(index, 4, 4, 3)) for index in range(len(labels))]
    features = datasets.Features({image: datasets.Image(), label: feature or datasets.Value("int64")})
    return datasets.Dataset.from_dict({image: images, label: labels}, features=features)


def named(count=3):
    return datasets.ClassLabel(names=[f"class {number}" for number in range(count)])


def saved(folder, **splits):
    datasets.DatasetDict(splits).save_to_disk(folder)
    return str(folder)


def load(folder, seed=0, **options):
    return load_splits(DataArguments(data_dir=str(folder), **options), seed)


# where they come from


def test_a_folder_of_images_is_loaded_with_its_validation_part(picture_folder):
    splits = load(picture_folder)
    assert splits.labels == CLASSES
    assert (len(splits.train), len(splits.held_out), splits.num_train_images) == (COUNT, 6, COUNT)
    assert splits.train.info.dataset_name == "imagefolder"


def test_a_folder_of_images_is_streamed(picture_folder):
    splits = load(picture_folder, streaming=True)
    assert isinstance(splits.train, datasets.IterableDataset)
    assert isinstance(splits.held_out, datasets.IterableDataset)
    assert (splits.labels, splits.num_train_images) == (CLASSES, None)  # nobody has counted the files
    again, otherwise = (load(picture_folder, seed, streaming=True).train for seed in (0, 1))
    paths = [
        [row["image"]["path"] for row in part.cast_column("image", datasets.Image(decode=False))]
        for part in (splits.train, again, otherwise)
    ]
    assert len(set(paths[0])) == COUNT
    assert paths[0] == paths[1] != paths[2]
    assert sorted(paths[1]) == sorted(paths[2]) != paths[0]


def test_a_stream_goes_on_in_another_order(picture_folder):
    args = DataArguments(data_dir=str(picture_folder), streaming=True)
    begun, resumed, again = (load_splits(args, 0, first_step=step) for step in (0, 3, 3))
    orders = [[row["label"] for row in splits.train.select_columns("label")] for splits in (begun, resumed, again)]
    assert orders[0] != orders[1] == orders[2]
    assert sorted(orders[0]) == sorted(orders[1])
    held_out = [[row["label"] for row in splits.held_out.select_columns("label")] for splits in (begun, resumed)]
    assert held_out[0] == held_out[1]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_saved_dataset_is_loaded(tmp_path, streaming):
    folder = saved(tmp_path / "saved", train=a_set([0, 1, 2], named()), test=a_set([1], named()))
    splits = load(folder, streaming=streaming)
    assert (splits.labels, splits.num_train_images) == (named().names, 3)
    assert sorted(row["label"] for row in splits.train) == [0, 1, 2]
    assert [row["label"] for row in splits.held_out] == [1]


def test_a_saved_split_is_parted(tmp_path):
    a_set([0, 1] * 20, named(2)).save_to_disk(tmp_path / "saved")
    splits = load(tmp_path / "saved")
    assert (len(splits.train), len(splits.held_out), splits.num_train_images) == (36, 4, 36)
    assert sorted(splits.held_out["label"]) == [0, 0, 1, 1]


def test_whatever_load_dataset_takes_is_loaded(tmp_path):
    a_set([0, 1] * 10, named(2)).to_parquet(tmp_path / "train.parquet")
    assert len(load_splits(DataArguments(dataset_name=str(tmp_path)), 0).train) == 18


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["digits", "glyphs"])
def test_sets_made_here_are_asked_for_as_the_arguments_say(monkeypatch, name, streaming):
    asked = []

    def make(*args):
        asked.append(args)
        return datasets.DatasetDict({"train": a_set([0, 1], named(2)), "test": a_set([1], named(2))})

    monkeypatch.setitem(__import__("sys").modules, f"updp_hf.data.made_here.{name}", type("Made", (), {name: make}))
    args = DataArguments(dataset=name, num_glyphs=7, glyph_resolution=9, streaming=streaming)
    splits = load_splits(args, seed=3)
    assert asked == [(3,) if name == "digits" else (7, 9, 3)]
    assert [row["label"] for row in splits.held_out] == [1]


# what cannot be had


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["ILSVRC/imagenet-1k", "nobody/nothing", "cifar10"])
def test_offline_one_sentence_says_what_was_not_reached_and_what_there_is_instead(name, streaming):
    with pytest.raises(AccessError) as error:
        load_splits(DataArguments(dataset_name=name, streaming=streaming), 0)
    text = str(error.value)
    assert text.startswith(f"{name} could not be reached, neither on the Hub nor here (Couldn't reach '{name}' on the")
    assert text.endswith(
        "): connect, log in if it is gated, or give `--data_dir` for a folder of images, or `--dataset digits` or "
        "`--dataset glyphs` for sets made here."
    )
    assert "\n" not in text


@pytest.mark.parametrize(
    "error",
    [
        datasets.exceptions.DatasetNotFoundError("Dataset 'a/b' is a gated dataset on the Hub.\nLog in."),
        huggingface_hub.errors.OfflineModeIsEnabled("offline"),
        huggingface_hub.errors.HFValidationError("no id"),
        TimeoutError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_whatever_the_hub_answers_the_sentence_is_one(monkeypatch, error):
    def refuse(*args, **kwargs):
        raise error

    monkeypatch.setattr("updp_hf.data.loading.datasets.load_dataset", refuse)
    with pytest.raises(AccessError, match=r"^a/b could not be reached, .*sets made here\.$"):
        load_splits(DataArguments(dataset_name="a/b"), 0)


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`--data_dir` is .*nowhere, which is no folder: give .*glyphs"):
        load(tmp_path / "nowhere")


@pytest.mark.parametrize("content", [None, "train/cat/notes.txt"])
def test_a_folder_without_images_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / content).parent.mkdir(parents=True)
        (tmp_path / content).write_text("no image")
    with pytest.raises(ValueError, match=r"No images could be loaded from .*expected train/ and validation/"):
        load(tmp_path)


# splits


@pytest.mark.parametrize(
    ("others", "chosen"),
    [
        ({"val": [0], "validation": [1], "test": [2]}, [1]),
        ({"val": [0], "test": [2]}, [0]),
        ({"test": [2]}, [2]),
        ({"validation": [-1, -1], "test": [2]}, [2]),
        ({"test": [-1, -1]}, None),
        ({"extra": [2]}, None),
    ],
)
def test_the_split_to_evaluate_on_is_the_first_with_labels(tmp_path, others, chosen):
    parts = {name: a_set(labels, named()) for name, labels in others.items()}
    splits = load(saved(tmp_path / "saved", train=a_set([0, 1, 2] * 10, named()), **parts))
    if chosen is None:
        assert (len(splits.train), len(splits.held_out)) == (27, 3)
        assert sorted(splits.held_out["label"]) == [0, 1, 2]
    else:
        assert (len(splits.train), splits.held_out["label"][:]) == (30, chosen)


def test_splits_can_be_chosen(tmp_path):
    parts = {"mine": a_set([0] * 4, named()), "train": a_set([1], named()), "yours": a_set([2] * 2, named())}
    folder = saved(tmp_path / "saved", **parts)
    splits = load(folder, train_split="mine", eval_split="yours")
    assert (splits.train["label"][:], splits.held_out["label"][:]) == ([0] * 4, [2] * 2)
    with pytest.raises(
        ValueError, match=r"no split 'other', but \['mine', 'train', 'yours'\]: choose with `--train_split`"
    ):
        load(folder, train_split="other")
    with pytest.raises(ValueError, match=r"^There is no split 'other', but .*: choose with `--eval_split`"):
        load(folder, eval_split="other")


def test_a_chosen_split_without_labels_is_refused(tmp_path):
    folder = saved(tmp_path / "saved", train=a_set([0, 1], named()), test=a_set([-1], named()))
    with pytest.raises(ValueError, match="The images of 'test' have no labels: choose another"):
        load(folder, eval_split="test")


def test_a_tenth_is_held_out_by_the_seed(tmp_path):
    folder = saved(tmp_path / "saved", train=a_set([0, 1] * 20, named(2)))
    images = [[row["image"].tobytes() for row in load(folder, seed).held_out] for seed in (0, 0, 1)]
    assert images[0] == images[1] != images[2]


def test_classes_of_one_image_do_not_keep_a_tenth_from_being_held_out(tmp_path):
    splits = load(saved(tmp_path / "saved", train=a_set([0] * 19 + [1], named(2))))
    assert (len(splits.train), len(splits.held_out)) == (18, 2)


def test_a_stream_is_not_parted(tmp_path):
    folder = saved(tmp_path / "saved", train=a_set([0, 1] * 20, named(2)))
    with pytest.raises(ValueError, match="no split to evaluate on, and a stream cannot be parted"):
        load(folder, streaming=True)


@pytest.mark.parametrize("streaming", [False, True])
def test_so_many_images_are_taken_and_no_more_than_there_are(picture_folder, streaming):
    splits = load(picture_folder, streaming=streaming, max_train_samples=5, max_eval_samples=4)
    assert splits.num_train_images == 5
    raw = [part.cast_column("image", datasets.Image(decode=False)) for part in (splits.train, splits.held_out)]
    assert [len(list(part)) for part in raw] == [5, 4]
    splits = load(picture_folder, streaming=streaming, max_train_samples=99, max_eval_samples=99)
    assert splits.num_train_images == (99 if streaming else COUNT)


# columns and labels


def test_columns_may_have_other_names(tmp_path):
    folder = saved(tmp_path / "saved", train=a_set([0, 1] * 10, named(2), "img", "fine"))
    splits = load(folder, image_column_name="img", label_column_name="fine")
    assert splits.train.column_names == ["img", "fine"]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_column_that_is_not_there_is_refused_with_those_that_could_be_meant(tmp_path, streaming):
    folder = saved(tmp_path / "saved", train=a_set([0, 1], named(2), "img", "fine"))
    with pytest.raises(
        ValueError,
        match=r"^The column 'image' is not among \['fine', 'img'\]. 'img' could be meant: set `--image_column_name`.$",
    ):
        load(folder, streaming=streaming)
    with pytest.raises(ValueError, match=r"The column 'label' .* 'fine' could be meant: set `--label_column_name`.$"):
        load(folder, image_column_name="img", streaming=streaming)
    with pytest.raises(ValueError, match=r"^The column 'fine' is ClassLabel.* 'img' could be meant: set `--image_col"):
        load(folder, image_column_name="fine", streaming=streaming)


def test_numbers_without_names_become_classes(tmp_path):
    folder = saved(tmp_path / "saved", train=a_set([0, 3] * 10), test=a_set([4]))
    splits = load(folder)
    assert splits.labels == ["0", "1", "2", "3", "4"]
    assert splits.train["label"][:2] == [0, 3]
    assert splits.held_out["label"][:] == [4]


def test_names_become_classes_with_the_same_numbers_in_both_parts(tmp_path):
    text = datasets.Value("string")
    splits = load(saved(tmp_path / "saved", train=a_set(["owl", "cat"] * 10, text), test=a_set(["dog", "owl"], text)))
    assert splits.labels == ["cat", "dog", "owl"]
    assert splits.train["label"][:2] == [2, 0]
    assert splits.held_out["label"][:] == [1, 2]


@pytest.mark.parametrize(
    ("labels", "feature", "expected"),
    [
        ([0, -1], None, "some images have -1 for a label"),
        ([0, None], None, "some images have None for a label"),
        ([0, -1], named(), "some images have -1 for a label"),
        (["a", None], datasets.Value("string"), "some images have None for a label"),
        ([5, 123456], None, "goes up to 123456 for 2 images, which are no class numbers"),
    ],
)
def test_labels_that_are_no_classes_are_refused(tmp_path, labels, feature, expected):
    with pytest.raises(ValueError, match=expected):
        load(saved(tmp_path / "saved", train=a_set(labels, feature)))


def test_parts_with_other_classes_are_refused(tmp_path):
    folder = saved(tmp_path / "saved", train=a_set([0, 1], named(2)), test=a_set([0, 1], named(3)))
    with pytest.raises(ValueError, match="both must have the same, in the same order"):
        load(folder)


def test_a_stream_needs_classes_that_are_known(tmp_path):
    folder = saved(tmp_path / "saved", train=a_set([0, 1]), test=a_set([0, 1]))
    with pytest.raises(ValueError, match="the classes of a stream are not known: do without `--streaming`"):
        load(folder, streaming=True)


# arguments


@pytest.mark.parametrize("given", [{}, {"dataset": "digits", "data_dir": "x"}, {"dataset_name": "x", "data_dir": "x"}])
def test_one_source_is_to_be_given(given):
    with pytest.raises(ValueError, match=r"^Of `dataset`, `dataset_name` and `data_dir`, .* given: give one\.$"):
        DataArguments(**given)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"dataset": "letters"}, "`dataset` is 'letters', expected one of"),
        ({"dataset": "digits", "max_train_samples": 0}, "`max_train_samples` is 0, expected at least 1"),
        ({"dataset": "glyphs", "num_glyphs": 0}, "`num_glyphs` is 0, expected at least 1"),
    ],
)
def test_arguments_out_of_range_are_refused(given, expected):
    with pytest.raises(ValueError, match=expected):
        DataArguments(**given)


def test_arguments_are_read_from_a_command_line_and_explain_themselves():
    parser = HfArgumentParser(DataArguments)
    (args,) = parser.parse_args_into_dataclasses(["--dataset", "glyphs", "--streaming", "--num_glyphs", "10"])
    assert (args.dataset, args.streaming, args.num_glyphs) == ("glyphs", True, 10)
    assert all(action.help for action in parser._actions)
