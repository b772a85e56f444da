"""What a run leaves: an earlier adapter is kept, Ctrl-C names the checkpoint, and the last lines load the adapter."""

from __future__ import annotations

from types import SimpleNamespace

import endings
import pytest
from transformers import TrainerCallback

from tests.train.tiny_run import logits, make_base, make_data, run_here, words, write_run


def tiny(folder, **values):
    base = make_base(folder / "base")
    data = make_data(folder / "data", [{"text": words(i, 5)} for i in range(8)])
    return write_run(folder, model_name_or_path=base, dataset_name=data, **values)


def settings(folder, **values):
    fields = {"output_dir": str(folder), "resume_from_checkpoint": None, "process_index": 0, **values}
    return SimpleNamespace(**fields)


def old_run(folder):
    folder.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors", "README.md", "notes.txt"):
        (folder / name).write_text(name)
    (folder / "checkpoint-4").mkdir()
    return folder


def test_an_earlier_adapter_is_kept_beside_and_other_files_stay(tmp_path, capsys):
    folder = old_run(tmp_path / "out")
    endings.make_room(settings(folder), overwrite=False)
    assert {path.name for path in folder.iterdir()} == {"notes.txt", "previous-1"}
    kept = {path.name for path in (folder / "previous-1").iterdir()}
    assert kept == {"adapter_config.json", "adapter_model.safetensors", "README.md", "checkpoint-4"}
    assert f"is kept in {folder}/previous-1" in capsys.readouterr().out
    (folder / "adapter_config.json").write_text("{}")
    endings.make_room(settings(folder), overwrite=False)
    assert (folder / "previous-2/adapter_config.json").is_file()


def test_a_resumed_run_goes_on_in_its_folder_and_overwrite_deletes(tmp_path):
    folder = old_run(tmp_path / "out")
    before = sorted(path.name for path in folder.iterdir())
    for other in (settings(folder, resume_from_checkpoint="x"), settings(folder, process_index=1)):
        endings.make_room(other, overwrite=False)
    assert sorted(path.name for path in folder.iterdir()) == before
    endings.make_room(settings(folder), overwrite=True)
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]


def test_a_file_in_the_place_of_the_output_folder_is_refused(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(ValueError, match=r"--output_dir .*out is a file\. Name a folder"):
        run_here("sft", tiny(tmp_path))


def test_the_last_lines_of_a_run_load_its_adapter(tmp_path, capsys):
    trainer = run_here("sft", tiny(tmp_path, max_steps=1))
    printed = capsys.readouterr().out
    code = "\n".join([line.strip() for line in printed.splitlines() if line.startswith("    ")][-3:])
    assert f"moe-peft inspect {tmp_path}/out" in printed
    names: dict = {}
    exec(code, names)
    assert (logits(names["model"]) == logits(trainer.model)).all()
    card = (tmp_path / "out/README.md").read_text()
    assert "[More Information Needed]" not in card and "| train_loss |" in card and f'"{tmp_path}/base"' in card


class CtrlC(TrainerCallback):
    """Interrupts after a step, as a user would."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize(("step", "message"), [(2, "checkpoint-2; go on from it"), (0, "nothing was saved")])
def test_ctrl_c_names_the_last_whole_checkpoint_and_ends_with_130(step, message, tmp_path, capsys, monkeypatch):
    import training

    attach = training.moe_peft.attach

    def attach_and_interrupt(trainer, **values):
        attach(trainer, **values)
        trainer.add_callback(CtrlC(step))

    monkeypatch.setattr(training.moe_peft, "attach", attach_and_interrupt)
    with pytest.raises(SystemExit) as end:
        run_here("sft", tiny(tmp_path))
    assert end.value.code == 130
    assert message in capsys.readouterr().err
