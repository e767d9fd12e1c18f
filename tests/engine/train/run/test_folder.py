"""Which folder a run gets, and what becomes of files that others delete."""

import shutil

import pytest
from train_runs import identical, lines, run

from clip_finetune.engine import UserError


def test_other_settings_or_data_get_the_next_free_folder(model, data, tmp_path):
    first = run(model, data, tmp_path / "run")
    second = run(model, data, tmp_path / "run", seed=1)
    third = run(model, data.subset(range(10)), tmp_path / "run")
    assert [result.run_folder.name for result in (first, second, third)] == ["run", "run_2", "run_3"]
    assert any("seed was 0 and is 1" in note and "run_2" in note for note in second.notes)
    assert any("the training data changed" in note for note in third.notes)
    assert run(model, data, tmp_path / "run", seed=1).already_finished


def test_fail_resume_and_restart_do_what_they_say(model, data, tmp_path):
    run(model, data, tmp_path / "run")
    with pytest.raises(UserError, match="already holds"):
        run(model, data, tmp_path / "run", on_existing="fail")
    with pytest.raises(UserError, match="seed was 0 and is 3"):
        run(model, data, tmp_path / "run", seed=3, on_existing="resume")
    again = run(model, data, tmp_path / "run", seed=3, on_existing="restart")
    assert again.run_folder == tmp_path / "run" and not again.already_finished
    assert run(model, data, tmp_path / "new", on_existing="resume").total_steps == 9


def test_a_folder_of_other_files_is_left_alone(model, data, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "diary.txt").write_text("mine")
    result = run(model, data, tmp_path / "run")
    assert result.run_folder.name == "run_2"
    with pytest.raises(UserError, match="nothing was deleted"):
        run(model, data, tmp_path / "run", on_existing="restart")
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["diary.txt"]


def test_a_run_folder_that_is_deleted_meanwhile_is_written_again(model, data, tmp_path):
    whole = run(model, data, tmp_path / "whole", validation=data)

    def delete(progress):
        if progress.step == 4:
            shutil.rmtree(tmp_path / "run", ignore_errors=True)

    result = run(model, data, tmp_path / "run", validation=data, progress=delete)
    assert any("were deleted while the training ran" in note for note in result.notes)
    assert [line["step"] for line in lines(tmp_path / "run")] == list(range(1, 10))
    assert identical(result.full_clip, whole.full_clip)
    assert run(model, data, tmp_path / "run", validation=data).already_finished


def test_a_deleted_best_model_is_noted_and_written_again(model, data, tmp_path):
    run(model, data, tmp_path / "run", validation=data)
    (tmp_path / "run" / "best.safetensors").unlink()
    result = run(model, data, tmp_path / "run", validation=data)
    assert any("was deleted" in note for note in result.notes) and result.best_step == 9


def test_a_run_name_with_formula_characters_works(model, data, tmp_path):
    assert run(model, data, tmp_path / r"price_$5_\vs_$6", epochs=1).total_steps == 3
