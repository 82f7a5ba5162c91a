"""VQA's files: official pairs, ALBEF's lists, Visual Genome, layouts, and what is left out."""

from __future__ import annotations

import pytest

from softmask.data import DataError, SampleError
from softmask.data.formats.vqa import open_vqa, read_answer_list
from tests.support.format_files import write_json, write_pictures

TEN = ["2"] * 7 + ["3", "many", "Two"]


def questions(*ids, subtype="train2014", **more):
    entries = [{"question_id": key, "image_id": key // 1000, "question": f"What is {key}?", **more} for key in ids]
    return {"info": {}, "task_type": "Open-Ended", "data_subtype": subtype, "questions": entries}


def annotations(*ids, subtype="train2014", answers=TEN):
    entries = [
        {
            "question_id": key,
            "image_id": key // 1000,
            "answers": [
                {"answer": answer, "answer_id": n, "answer_confidence": "yes"} for n, answer in enumerate(answers)
            ],
            "answer_type": "number",
            "question_type": "what is",
            "multiple_choice_answer": "2",
        }
        for key in ids
    ]
    return {"info": {}, "data_subtype": subtype, "annotations": entries}


def test_official_pair(tmp_path):
    names = ["COCO_train2014_000000000009.jpg", "COCO_train2014_000000581929.jpg"]
    pictures = write_pictures(tmp_path, *names)
    ids = (9001, 581929000, 9000)
    paths = [
        write_json(tmp_path / "a.json", annotations(*reversed(ids))),  # before the questions, in another order
        write_json(tmp_path / "q.json", questions(*ids)),
    ]
    source = open_vqa(paths)
    records = [source.read(number) for number in range(3)]
    assert [record.key for record in records] == [9001, 581929000, 9000]
    assert [record.caption for record in records] == [f"What is {key}?" for key in ids]
    assert [record.image_bytes for record in records] == [pictures[names[n]] for n in (0, 1, 0)]
    assert [record.image_id for record in records] == [0, 1, 0]
    expected = {"answers": TEN, "dataset": "vqa", "answer_type": "number", "question_type": "what is"}
    assert [record.target for record in records] == [expected] * 3 and source.problems == []


def test_answers_belong_to_their_question(tmp_path):
    paths = [write_json(tmp_path / "q.json", questions(9001, 9002))]
    for key in (9001, 9002):
        paths.append(write_json(tmp_path / f"{key}.json", annotations(key, answers=[f"answer {key}"] * 10)))
    source = open_vqa(paths)
    assert [source.example(n).target["answers"][0] for n in range(2)] == ["answer 9001", "answer 9002"]


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("", "COCO_val2014_000000000009.jpg"),
        ("val2014", "COCO_val2014_000000000009.jpg"),
        ("images", "COCO_val2014_000000000009.jpg"),
        ("images/val2014", "COCO_val2014_000000000009.jpg"),
        ("Images/mscoco/val2014", "COCO_val2014_000000000009.jpg"),
        ("test2015", "COCO_test2015_000000000009.jpg"),
    ],
)
def test_layouts(tmp_path, folder, name):
    (content,) = write_pictures(tmp_path / "root" / folder, name).values()
    subtype = "val2014" if "val" in name else "test-dev2015"  # a part of test2015
    path = write_json(tmp_path / "q.json", questions(9000, subtype=subtype))
    assert open_vqa([path], image_root=str(tmp_path / "root")).read(0).image_bytes == content


def test_train_and_val_with_albefs_lists_beside_them(tmp_path):
    root = tmp_path / "root"
    pictures = write_pictures(
        root,
        "train2014/COCO_train2014_000000000001.jpg",
        "val2014/COCO_val2014_000000000002.jpg",
        "coco/val2014/COCO_val2014_000000000003.jpg",
        "visual_genome/image/4.jpg",
    )
    listed = [
        {"question_id": 7, "question": "a?", "image": "image/4.jpg", "answer": "red", "dataset": "vg"},
        {
            "question_id": 8,
            "question": "b?",
            "image": "val2014/COCO_val2014_000000000003.jpg",
            "answer": TEN,
            "dataset": "vqa",
            "unseen": True,
        },
        {"question_id": 9, "question": "c?", "image": "image/4.jpg", "answer": ["blue"], "dataset": "vg"},
    ]
    paths = [
        write_json(tmp_path / "1.json", questions(2000, subtype="val2014", unseen=True)),
        write_json(tmp_path / "2.json", annotations(1000)),
        write_json(tmp_path / "3.json", listed),
        write_json(tmp_path / "4.json", annotations(2000, subtype="val2014")),
        write_json(tmp_path / "5.json", questions(1000)),
    ]
    source = open_vqa(paths, image_root=str(root))
    records = [source.read(number) for number in range(len(source))]
    train, val, coco, genome = pictures.values()
    assert [record.image_bytes for record in records] == [val, genome, coco, genome, train]
    assert [record.key for record in records] == [2000, 7, 8, 9, 1000]
    assert [record.target["dataset"] for record in records] == ["vqa", "vg", "vqa", "vg", "vqa"]
    assert [record.target["answers"] for record in records] == [TEN, ["red"], TEN, ["blue"], TEN]
    assert records[1].target == {"answers": ["red"], "dataset": "vg"}
    assert [record.unseen for record in records] == [True, False, True, False, False]
    assert source.problems == []


@pytest.mark.parametrize("folder", ["", "vg", "visual_genome", "visual-genome", "VG_100K", "images"])
def test_visual_genome_in_a_folder_of_its_own(tmp_path, folder):
    (content,) = write_pictures(tmp_path / folder, "4.jpg").values()
    path = write_json(tmp_path / "vg.json", [{"question": "a?", "image": "4.jpg", "answer": "red", "dataset": "vg"}])
    record = open_vqa([path]).read(0)
    assert record.image_bytes == content and record.key == 0


def test_test_splits_have_no_answers(tmp_path):
    paths = [
        write_json(tmp_path / "q.json", questions(1000, subtype="test2015")),
        write_json(tmp_path / "train.json", questions(2000)),
        write_json(tmp_path / "a.json", annotations(2000)),
        write_json(tmp_path / "list.json", [{"question_id": 5, "question": "a?", "image": "a.jpg", "dataset": "vqa"}]),
    ]
    source = open_vqa(paths)
    assert [source.example(n).target is None for n in range(3)] == [True, False, True]
    assert source.problems == [] and source.unanswered == 2


def test_question_without_annotation_is_left_out(tmp_path):
    paths = [
        write_json(tmp_path / "q.json", questions(1000, 2000, 3000)),
        write_json(tmp_path / "a.json", annotations(2000)),
    ]
    source = open_vqa(paths)
    assert [source.example(n).key for n in range(len(source))] == [2000]
    (problem,) = source.problems
    assert "q.json has 2 entries" in problem and "entry 0: question 1000 has no annotation" in problem


def test_missing_picture_is_a_sample_error(tmp_path):
    source = open_vqa([write_json(tmp_path / "q.json", questions(1000))])
    with pytest.raises(SampleError, match=r"COCO_train2014_000000000001\.jpg: cannot be read"):
        source.read(0)


@pytest.mark.parametrize("answers", [[], [3], None, "yes", [None]])
def test_unusable_annotation_is_left_out_with_its_question(tmp_path, answers):
    bad = annotations(1000, 2000)
    bad["annotations"][0]["answers"] = [{"answer": one} for one in answers] if isinstance(answers, list) else answers
    paths = [write_json(tmp_path / "q.json", questions(1000, 2000)), write_json(tmp_path / "a.json", bad)]
    source = open_vqa(paths)
    assert [source.example(n).key for n in range(len(source))] == [2000]
    assert ["q.json" in source.problems[0], "a.json" in source.problems[1]] == [True, True]
    assert "answers" in source.problems[1]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"question_id": None}, '"question_id" must be a number or a name, got None'),
        ({"question_id": True}, '"question_id" must be a number or a name, got True'),
        ({"image_id": "9"}, "\"image_id\" must be a number, got '9'"),
        ({"question": " "}, '"question" must be a text'),
    ],
)
def test_unusable_question_is_left_out_and_named(tmp_path, change, reason):
    tree = questions(1000, 2000)
    tree["questions"][1] |= change
    source = open_vqa([write_json(tmp_path / "q.json", tree)])
    (problem,) = source.problems
    assert len(source) == 1 and f"entry 1: {reason}" in problem.replace("\\'", "'")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dataset": "gqa"}, "\"dataset\" must be vqa or vg, got 'gqa'"),
        ({"answer": ["yes", 3]}, "the answers must be texts, got ['yes', 3]"),
        ({"answer": {"yes": 1}}, "the answers must be texts"),
        ({"answer": []}, "the answers must be texts, got []"),
        ({"answer": None}, "5: without an answer"),
        ({"image": ""}, '"image" must be a text'),
        ({"question": None}, '"question" must be a text, got None'),
    ],
)
def test_unusable_entry_of_a_list_is_left_out_and_named(tmp_path, change, reason):
    good = {"question_id": 5, "question": "a?", "image": "a.jpg", "answer": ["yes"], "dataset": "vqa"}
    source = open_vqa([write_json(tmp_path / "list.json", [good, good | change])])
    (problem,) = source.problems
    assert len(source) == 1 and reason in problem.replace("\\'", "'")


def test_subtype_of_the_files_name(tmp_path):
    tree = questions(9000)
    del tree["data_subtype"]
    source = open_vqa([write_json(tmp_path / "v2_OpenEnded_mscoco_val2014_questions.json", tree)])
    assert source.example(0).pictures == ("COCO_val2014_000000000009.jpg",)
    with pytest.raises(DataError, match=r'q\.json: expected "data_subtype" such as train2014, got None; add it'):
        open_vqa([write_json(tmp_path / "q.json", tree)])


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"images": []}, "expected VQA's .* got an object with 'images'"),
        (3, "expected VQA's .* got int"),
        ([], "no example in"),
        (annotations(1000), "annotations of train2014 without its questions"),
    ],
)
def test_other_files_are_refused(tmp_path, tree, message):
    with pytest.raises(DataError, match=message) as error:
        open_vqa([write_json(tmp_path / "a.json", tree)])
    assert "\n" not in str(error.value)


def test_annotations_of_another_subtype_do_not_answer(tmp_path):
    paths = [
        write_json(tmp_path / "q.json", questions(1000)),
        write_json(tmp_path / "a.json", annotations(1000, subtype="val2014")),
    ]
    with pytest.raises(DataError, match="annotations of val2014 without its questions"):
        open_vqa(paths)


def test_answer_list(tmp_path):
    assert read_answer_list(write_json(tmp_path / "a.json", ["yes", "no", "2"])) == ["yes", "no", "2"]


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (["yes", "no", "yes"], "'yes' is entry 0 and entry 2; remove one"),
        (["yes", 2], "expected texts, entry 1 is 2"),
        (["yes", " "], "expected texts, entry 1 is ' '"),
        ([], "expected a list of answers .* got an empty list"),
        ({"yes": 0}, "expected a list of answers .* got an object with 'yes'"),
    ],
)
def test_other_answer_lists_are_refused(tmp_path, tree, message):
    with pytest.raises(DataError, match=message) as error:
        read_answer_list(write_json(tmp_path / "a.json", tree))
    assert "a.json" in str(error.value) and "\n" not in str(error.value)
