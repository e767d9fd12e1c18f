"""The layouts of SCAM and RTA-100, and what is not one of them."""

import pytest
from image_folders import SCAM, class_folder, scam_folder
from PIL import Image

from clip_finetune.engine import UserError, eval_typographic, load_dataset
from clip_finetune.engine.evaluate.typographic.photographed import (
    SYNTHETIC,
    WrittenOn,
    attacks_in,
    load_attacks,
)


@pytest.mark.parametrize("table", ["metadata.jsonl", "scam.csv"])
def test_scams_layout_is_read_with_or_without_the_dataset_reader(tmp_path, table):
    folder = scam_folder(tmp_path / "scam", table)
    for data in (load_attacks(folder), load_dataset(folder), load_dataset(folder, caption_column="object_label")):
        known = attacks_in(data)
        assert len(known) == len(data) == 18
        named = {data.names[index]: found for index, found in known.items()}
        assert named["SynthSCAM_4.png"] == WrittenOn("object 1", "word 4", SYNTHETIC)
        assert {found.kind for found in known.values()} == set(SCAM.values())


def test_rta_100s_file_names_are_read(model, tmp_path):
    for number, (shows, word) in enumerate([("cup", "dog"), ("hot dog", "cat")]):
        name = f"label={shows}_text={word}.jpg"
        (tmp_path / "rta").mkdir(exist_ok=True)
        Image.new("RGB", (32, 32), (200 * number, 90, 90)).save(tmp_path / "rta" / name)
    data = load_attacks(tmp_path / "rta")
    assert sorted(found.word for found in attacks_in(data).values()) == ["cat", "dog"]
    found = eval_typographic(model, data)
    assert found.accuracy_clean is None and found.as_dict()["accuracy_clean"] is None and found.images == 2


def test_a_folder_without_attacks_is_none_and_an_unknown_type_is_refused(tmp_path):
    assert load_attacks(class_folder(tmp_path / "classes")) is None and load_attacks(tmp_path / "nowhere") is None
    (tmp_path / "classes/notes.csv").write_text("name,price\nfile_name,1\n")
    assert load_attacks(tmp_path / "classes") is None
    folder = scam_folder(tmp_path / "odd", "table.csv")
    text = (folder / "table.csv").read_text().replace("SynthSCAM,object", "painted,object")
    (folder / "table.csv").write_text(text)
    with pytest.raises(UserError, match="of the type 'painted'; write clean, hand-written or synthetic"):
        load_attacks(folder)


def test_a_table_cannot_name_an_image_outside_its_folder(tmp_path):
    Image.new("RGB", (32, 32)).save(tmp_path / "secret.png")
    (tmp_path / "set").mkdir()
    (tmp_path / "set/t.csv").write_text("file_name,object_label,attack_word\n../secret.png,cup,dog\n")
    assert load_attacks(tmp_path / "set") is None


def test_blank_lines_of_a_table_are_skipped_and_damage_names_its_line(tmp_path):
    folder = scam_folder(tmp_path / "scam")
    table, lines = folder / "metadata.jsonl", (folder / "metadata.jsonl").read_text().splitlines()
    for text in ("\n" * 30 + "\n\n".join(lines), "\ufeff\n  \n" + "\n".join(lines) + "\n\n"):
        table.write_text(text, encoding="utf-8")
        assert len(attacks_in(load_attacks(folder))) == 18
    for number, damaged in ((1, "{"), (1, "[" * 100_000), (3, lines[2][:-9]), (18, "12"), (2, "[1]")):
        table.write_text("\n".join([*lines[: number - 1], damaged, *lines[number:]]))
        with pytest.raises(UserError, match=rf"metadata.jsonl is damaged: line {number} is .*; fix that line"):
            load_attacks(folder)
    # Another file is none of ours, whatever is in it.
    for text in ('{"text": "a"}\n{', "{\n" + '{"text": "a"}\n' + lines[0], "nonsense\n" * 30 + lines[0], "[" * 100_000):
        table.write_text(text)
        assert load_attacks(folder) is None
    table.unlink()
    rows = scam_folder(tmp_path / "csv", "t.csv") / "t.csv"
    rows.write_text("\n \n" + rows.read_text())
    assert len(load_attacks(tmp_path / "csv")) == 18


def test_a_table_that_cannot_be_read_is_refused_in_a_sentence_and_other_files_are_skipped(tmp_path, ordinary_user):
    folder = scam_folder(tmp_path / "scam")
    (folder / "folder.csv").mkdir()
    try:
        (folder / "link.jsonl").symlink_to(folder / "nowhere.jsonl")
    except OSError:  # Windows lets not everyone make links
        pass
    assert len(attacks_in(load_attacks(folder))) == 18
    open_folder, as_user = ordinary_user
    locked = open_folder / "locked"
    scam_folder(locked)
    (locked / "metadata.jsonl").chmod(0)
    with as_user(), pytest.raises(UserError, match="metadata.jsonl cannot be read .*; make it readable or move it"):
        load_attacks(locked)
    locked.chmod(0)
    with as_user():
        assert load_attacks(locked) is None
    locked.chmod(0o755)
