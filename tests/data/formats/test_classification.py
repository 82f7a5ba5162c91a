"""Classified images: folders of subfolders, shards with .cls, class names and templates."""

from __future__ import annotations

import pickle

import pytest

from softmask.data import DataError, SampleError, open_source, shard_index
from softmask.data.formats import class_shards
from softmask.data.formats.classification import beside, open_classification, read_templates
from tests.support.data_files import make_image, sample, write_tar
from tests.support.format_files import write_pictures


def targets(source) -> list[int]:
    return [source.read(number).target for number in range(len(source))]


def write_folder(root):
    """Two classes: red_apple with three pictures, one of them deeper, and dog with one."""
    return write_pictures(root, "red_apple/2.PNG", "red_apple/in/1.jpg", "red_apple/1.webp", "dog/9.jpeg")


def test_image_folder(tmp_path):
    pictures = write_folder(tmp_path / "train")
    source = open_classification([str(tmp_path / "train")])
    assert source.classes == ["dog", "red apple"]
    records = [source.read(number) for number in range(len(source))]
    names = ["dog/9.jpeg", "red_apple/1.webp", "red_apple/2.PNG", "red_apple/in/1.jpg"]
    assert [record.key for record in records] == names
    assert [record.image_bytes for record in records] == [pictures[name] for name in names]
    assert [(record.target, record.caption) for record in records] == [(0, "")] + [(1, "")] * 3
    assert [record.image_id for record in records] == [0, 1, 2, 3] and source.problems == []
    assert list(source.captions()) == []
    copy = pickle.loads(pickle.dumps(source))
    assert copy.read(1) == records[1] and copy.classes == source.classes


def test_folder_in_the_image_root(tmp_path, monkeypatch):
    write_folder(tmp_path / "root" / "train")
    monkeypatch.chdir(tmp_path)
    assert targets(open_classification(["train"], image_root=str(tmp_path / "root"))) == [0, 1, 1, 1]
    assert targets(open_classification(["root/train"], image_root=str(tmp_path))) == [0, 1, 1, 1]


def test_other_files_are_counted_and_hidden_ones_are_not(tmp_path):
    write_folder(tmp_path)
    for name in ("dog/.DS_Store", "dog/._9.jpeg", "dog/list.txt", "red_apple/in/Thumbs.db"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / ".cache").mkdir()
    (tmp_path / "empty").mkdir()
    source = open_classification([str(tmp_path)])
    assert source.classes == ["dog", "empty", "red apple"] and targets(source) == [0, 2, 2, 2]
    (problem,) = source.problems
    assert "3 entries that cannot be used" in problem and "dog/list.txt: no picture by its ending" in problem


@pytest.mark.parametrize("place", ["train/classnames.txt", "classnames.txt"])
def test_class_names_of_a_file(tmp_path, place):
    write_folder(tmp_path / "train")
    (tmp_path / place).write_text("domestic dog\n apple \n\n")
    source = open_classification([str(tmp_path / "train")])
    assert source.classes == ["domestic dog", "apple"] and targets(source) == [0, 1, 1, 1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("dog\n", r"classnames\.txt names 1 classes, but .*train has 2 subfolders; write a line for each"),
        ("dog\n\napple\n", r"classnames\.txt, line 2: expected the name of a class, got an empty line"),
    ],
)
def test_class_names_that_do_not_fit(tmp_path, content, message):
    write_folder(tmp_path / "train")
    (tmp_path / "classnames.txt").write_text(content)
    with pytest.raises(DataError, match=message):
        open_classification([str(tmp_path / "train")])


def test_names_of_training(tmp_path):
    write_folder(tmp_path)
    names = ["red apple", "cat", "dog"]
    source = open_classification([str(tmp_path)], names=names)
    assert source.classes == names and targets(source) == [2, 0, 0, 0] and source.problems == []
    source = open_classification([str(tmp_path)], names=["red apple", "cat"])
    assert targets(source) == [0, 0, 0]
    assert "1 entries" in source.problems[0] and "dog: of no known class" in source.problems[0]


def test_names_of_training_that_repeat(tmp_path):
    """ImageNet's have "sunglasses" twice: they can only be matched by place."""
    write_folder(tmp_path)
    (tmp_path / "classnames.txt").write_text("glasses\nglasses\n")
    assert targets(open_classification([str(tmp_path)], names=["glasses", "glasses"])) == [0, 1, 1, 1]
    with pytest.raises(DataError, match="the known classes hold 'glasses' more than once"):
        open_classification([str(tmp_path)], names=["glasses", "glasses", "cat"])


def test_other_paths_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.json").write_text("[]")
    for paths, message in (
        (["none"], "none: expected a folder of a subfolder per class, .* No such file"),
        (["empty"], "empty: expected a folder .* got a folder without subfolders"),
        (["file.json"], "file.json: expected a folder .* Not a directory"),
        (["empty", "empty"], "empty: expected one folder of a subfolder per class, or shards .* got 2"),
    ):
        with pytest.raises(DataError, match=message) as error:
            open_classification([str(tmp_path / path) for path in paths])
        assert "\n" not in str(error.value)


def labelled(number: int, label: str) -> list[tuple[str, bytes]]:
    return [(f"s{number:04d}.cls", label.encode()), (f"s{number:04d}.png", make_image(number, size=(4, 4)))]


def write_labelled(folder, *shards):
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, members in enumerate(shards):
        paths.append(str(write_tar(folder / f"{number}.tar", [one for some in members for one in some])))
    return paths


@pytest.mark.parametrize("place", ["test/classnames.txt", "classnames.txt"])
def test_shards(tmp_path, place):
    paths = write_labelled(tmp_path / "test", [labelled(0, "1"), labelled(1, "0\n")], [labelled(2, "2")])
    (tmp_path / place).write_text("cat\ndog\nowl\n")
    source = open_classification(paths)
    assert source.classes == ["cat", "dog", "owl"] and source.problems == []
    records = [source.read(number) for number in (2, 0, 1)]
    assert [record.target for record in records] == [2, 1, 0]
    assert [record.image_bytes for record in records] == [make_image(n, size=(4, 4)) for n in (2, 0, 1)]
    assert [(record.name, record.key, record.caption) for record in records[:2]] == [
        ("1.tar:s0002", "s0002", ""), ("0.tar:s0000", "s0000", ""),
    ]  # fmt: skip
    assert source.group_sizes.tolist() == [2, 1] and source.image_ids.tolist() == [0, 1, 2] and source.images == 3
    assert source.paths == paths and list(source.captions()) == []
    assert pickle.loads(pickle.dumps(source)).read(2) == records[0]
    with pytest.raises(IndexError):
        source.read(3)


def test_shards_with_names_of_training(tmp_path):
    paths = write_labelled(tmp_path, [labelled(0, "0"), labelled(1, "1"), labelled(2, "2"), labelled(3, "1")])
    assert targets(open_classification(paths, names=["a", "b", "c"])) == [0, 1, 2, 1], "the numbers are training's"
    (tmp_path / "classnames.txt").write_text("cat\ndog\nowl\n")
    source = open_classification(paths, names=["owl", "dog"])
    assert source.classes == ["owl", "dog"] and targets(source) == [1, 0, 1]
    (problem,) = source.problems
    assert "0.tar has 1 images of unknown classes, left out; the first is of class 0" in problem


def test_unusable_samples_are_left_out_and_named(tmp_path):
    bad = [[("x.png", b"p")], [("y.cls", b"1")], labelled(8, "dog"), labelled(9, "-1"), labelled(10, "7")]
    paths = write_labelled(tmp_path, [labelled(0, "0"), *bad, [*labelled(1, "1"), ("s0001.json", b"{}")]])
    (tmp_path / "classnames.txt").write_text("cat\ndog\n")
    source = open_classification(paths)
    assert targets(source) == [0, 1]
    assert source.problems == [
        f"{paths[0]} has 1 images without .cls, left out; the first is 'x'",
        f"{paths[0]} has 3 .cls without an image or without a number, left out; the first is 'y'",
        f"{paths[0]} has 1 images of unknown classes, left out; the first is of class 7",
        "1 members of 1 shards are not read (neither images nor .cls, or duplicates in a sample); "
        f"the first is 's0001.json' of {paths[0]}",
    ]
    assert open_classification(paths).problems == source.problems, "the cache loses them"


@pytest.mark.parametrize("blocks", [5, 6, 7])
def test_broken_shard(tmp_path, blocks):
    """It ends within the second .cls, after it, or within its image: no part is blamed for the other."""
    (path,) = write_labelled(tmp_path, [labelled(0, "0"), labelled(1, "1")])
    (tmp_path / "classnames.txt").write_text("cat\ndog\n")
    content = (tmp_path / "0.tar").read_bytes()
    (tmp_path / "0.tar").write_bytes(content[: blocks * 512])
    source = open_classification([path])
    assert targets(source) == [0]
    (problem,) = source.problems
    assert "0.tar ends" in problem and problem.endswith("the samples before are used")


def test_shard_that_shrinks_after_it_was_indexed(tmp_path):
    (path,) = write_labelled(tmp_path, [labelled(0, "0")])
    source = open_classification([path], names=["cat"])
    (tmp_path / "0.tar").write_bytes((tmp_path / "0.tar").read_bytes()[:1200])
    with pytest.raises(SampleError, match=r"0\.tar:#0: has \d+ of \d+ bytes"):
        source.read(0)
    (tmp_path / "0.tar").unlink()
    with pytest.raises(SampleError, match=r"cannot be read \(No such file"):
        pickle.loads(pickle.dumps(source)).read(0)


def test_shards_that_cannot_be_used(tmp_path):
    paths = write_labelled(tmp_path, [labelled(0, "5")])
    with pytest.raises(DataError, match=r"0\.tar: expected classnames\.txt in the folder .* got none; write it"):
        open_classification(paths)
    (tmp_path / "classnames.txt").write_text("cat\n")
    with pytest.raises(DataError, match=r"no image with a \.cls in 1 shards, .* of unknown classes"):
        open_classification(paths)
    with pytest.raises(DataError, match=r"none\.tar cannot be read: No such file"):
        open_classification([str(tmp_path / "none.tar")])


def test_digest_is_of_the_labels(tmp_path):
    digests = [
        open_classification(write_labelled(tmp_path / str(n), [labelled(0, label)]), names=["a", "b"]).digest
        for n, label in enumerate("001")
    ]
    assert digests[0] == digests[1] != digests[2]


def test_indices_of_captions_and_of_classes_are_apart(tmp_path, monkeypatch):
    """Both kinds of samples in one shard, read either way first; what captions had cached before stays valid."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = str(write_tar(tmp_path / "a.tar", [*sample(0), ("000000.cls", b"1")]))
    for _ in range(2):
        assert open_classification([path], names=["a", "b"]).read(0).target == 1
        captioned = open_source(path)
        assert captioned.read(0).caption and "'000000.cls'" in captioned.problems[0]
    cached = sorted(file.name for file in (tmp_path / "cache" / "softmask" / "shard-index").iterdir())
    assert len(cached) == 2
    # The name under which every version so far has kept the index of captions.
    stat = (tmp_path / "a.tar").stat()
    identity = f"{shard_index.CACHE_VERSION}|{path}|{stat.st_size}|{stat.st_mtime_ns}"
    assert shard_index.hashlib.sha256(identity.encode()).hexdigest()[:40] + ".npz" in cached
    monkeypatch.setattr(shard_index, "scan_shard", None)
    monkeypatch.setattr(class_shards, "scan_classes", None)
    assert open_source(path).read(0).caption and open_classification([path], names=["a", "b"]).read(0).target == 1


def test_templates(tmp_path):
    path = tmp_path / "zeroshot_classification_templates.txt"
    path.write_text("a photo of a {c}.\n{c}\n\n")
    assert read_templates(str(path)) == ["a photo of a {c}.", "{c}"]
    for content, line in (("{c}\na photo\n", 2), ("{c} and {c}\n", 1), ("{c}\n\n{c}\n", 2), ("", 1), ("{}", 1)):
        path.write_text(content)
        with pytest.raises(DataError, match=rf"templates\.txt, line {line}: expected {{c}} once"):
            read_templates(str(path))
    path.write_bytes(b"\xff{c}")
    with pytest.raises(DataError, match=r"templates\.txt is not UTF-8"):
        read_templates(str(path))
    with pytest.raises(DataError, match=r"none\.txt cannot be read"):
        read_templates(str(tmp_path / "none.txt"))


def test_beside(tmp_path):
    (tmp_path / "test").mkdir()
    assert beside(str(tmp_path / "test"), "a.txt") is None
    (tmp_path / "a.txt").write_text("")
    assert beside(str(tmp_path / "test"), "a.txt") == str(tmp_path / "a.txt")
    (tmp_path / "test" / "a.txt").write_text("")
    assert beside(str(tmp_path / "test"), "a.txt") == str(tmp_path / "test" / "a.txt")
