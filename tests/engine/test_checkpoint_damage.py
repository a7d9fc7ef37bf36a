"""Whatever happens to the files of a checkpoint afterwards is noticed; the newest complete one is taken."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from qmemtune.engine import checkpoints
from qmemtune.engine.checkpoints import checked, complete_checkpoints, newest_complete, rotate
from qmemtune.engine.folder import open_run
from qmemtune.engine.manifest import NotComplete
from qmemtune.engine.run import train
from qmemtune.errors import UserError

FILES = (
    "adapter_config.json", "adapter_model.safetensors", "best.json", "measured.json", "optimizer.pt", "rng_state.pth",
    "scheduler.pt", "totals.json", "trainer_state.json", "manifest.json",
)  # fmt: skip


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def lengthen(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\0")


def flip_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) * 2 // 3] ^= 1
    file.write_bytes(content)


def clear(file: Path) -> None:
    file.write_bytes(b"")


def zero(file: Path) -> None:
    """The right length and no content, as some file systems leave it after a power cut."""
    file.write_bytes(b"\0" * file.stat().st_size)


def empty_json(file: Path) -> None:
    file.write_text("{}")


def into_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def dangling(file: Path) -> None:
    file.unlink()
    file.symlink_to("nowhere")


def stray(file: Path) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(b"x")


def change_manifest(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        facts = json.loads((folder / "manifest.json").read_text())
        change(facts)
        (folder / "manifest.json").write_text(json.dumps(facts))

    return damage


DAMAGE: dict[str, Callable[[Path], object]] = {
    **{f"{name} missing": lambda folder, name=name: (folder / name).unlink() for name in FILES},
    **{f"{name} cut": lambda folder, name=name: truncate(folder / name) for name in FILES},
    **{f"{name} flipped": lambda folder, name=name: flip_bit(folder / name) for name in FILES},
    **{f"{name} empty": lambda folder, name=name: clear(folder / name) for name in FILES},
    **{f"{name} {{}}": lambda folder, name=name: empty_json(folder / name) for name in FILES if name.endswith("json")},
    "optimizer zeros": lambda folder: zero(folder / "optimizer.pt"),
    "weights longer": lambda folder: lengthen(folder / "adapter_model.safetensors"),
    "random state a folder": lambda folder: into_folder(folder / "rng_state.pth"),
    "scheduler a dead link": lambda folder: dangling(folder / "scheduler.pt"),
    "manifest a list": lambda folder: (folder / "manifest.json").write_text("[]"),
    "manifest no text": lambda folder: (folder / "manifest.json").write_bytes(b"\xff\xfe\x00{}"),
    "manifest deep": lambda folder: (folder / "manifest.json").write_text("[" * 100_000),
    "another step in it": change_manifest(lambda facts: facts.update(step=7)),
    "other processes in it": change_manifest(lambda facts: facts.update(world_size=2)),
    "an entry less": change_manifest(lambda facts: facts["files"].pop("optimizer.pt")),
    "no digest": change_manifest(lambda facts: facts.pop("digest")),
    "a file of another checkpoint": lambda folder: shutil.copy(
        folder.parent / "checkpoint-2" / "optimizer.pt", folder / "optimizer.pt"
    ),
    "a stray model": lambda folder: stray(folder / "model.safetensors"),
    "a stray adapter in a folder": lambda folder: stray(folder / "other" / "adapter_model.safetensors"),
    "all but the manifest": lambda folder: [f.unlink() for f in folder.iterdir() if f.name != "manifest.json"],
    "nothing in it": lambda folder: [f.unlink() for f in folder.iterdir()],
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("whole") / "checkpoints"


@pytest.fixture
def run(whole: Path, composed, tmp_path: Path) -> Path:
    """A run with checkpoints of steps 2, 4 and 6."""
    if not whole.exists():
        options = ("trainer.max_steps=6", "trainer.save_steps=2", "trainer.save_total_limit=9")
        train(composed(*options, "evaluation.at_end=false"))
        shutil.move(tmp_path / "run", whole.parent / "run")
        shutil.move(whole.parent / "run" / "checkpoints", whole)
    shutil.copytree(whole, tmp_path / "run" / "checkpoints")
    return tmp_path / "run"


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_and_the_one_before_is_taken(run, composed, kind):
    newest = run / "checkpoints" / "checkpoint-6"
    DAMAGE[kind](newest)
    with pytest.raises(NotComplete) as error:
        checked(newest)
    opened = open_run(composed("resume=auto").config)
    assert opened.checkpoint is not None
    assert opened.checkpoint.step == 4
    assert opened.notes[0] == f"warning: passed over {newest}: {error.value.findings[0].problem}"
    if kind.split()[0] in FILES:
        assert kind.split()[0] in opened.notes[0]


def test_there_are_many_kinds_of_damage():
    assert len(DAMAGE) >= 20


def test_a_copy_under_another_number_is_not_that_step(run):
    shutil.copytree(run / "checkpoints" / "checkpoint-2", run / "checkpoints" / "checkpoint-9")
    newest, damaged = newest_complete(run / "checkpoints")
    assert newest is not None
    assert newest.step == 6
    assert "of step 2" in damaged[0].problem


def test_nothing_starts_anew_beside_damaged_checkpoints(run, composed):
    for path in (run / "checkpoints").iterdir():
        truncate(path / "optimizer.pt")
    before = sorted(path.name for path in (run / "checkpoints").rglob("*"))
    with pytest.raises(UserError) as error:
        train(composed("resume=auto", "trainer.max_steps=6"))
    assert [Path(str(finding.where)).name for finding in error.value.findings] == [
        "checkpoint-6", "checkpoint-4", "checkpoint-2",
    ]  # fmt: skip
    assert "start at step 0" in str(error.value)
    with pytest.raises(UserError, match="unfinished run"):
        train(composed("trainer.max_steps=6"))
    assert sorted(path.name for path in (run / "checkpoints").rglob("*")) == before


def test_a_run_goes_on_past_a_damaged_checkpoint(run, composed, recorder):
    flip_bit(run / "checkpoints" / "checkpoint-6" / "adapter_model.safetensors")
    progress = recorder()
    train(composed("resume=auto", "trainer.max_steps=6", "trainer.save_steps=2"), progress=progress)
    assert progress.steps == [5, 6]
    assert any("passed over" in message and "SHA-256" in message for message in progress.messages)
    # Two are kept, and both are whole.
    assert [c.step for c in complete_checkpoints(run / "checkpoints")] == [4, 6]


def test_a_damaged_checkpoint_that_is_passed_over_is_kept_under_another_name(run, composed, recorder):
    root, options = run / "checkpoints", ("trainer.max_steps=6", "trainer.save_steps=2", "evaluation.at_end=false")
    for name in ("damaged-checkpoint-6", "damaged-checkpoint-6-2"):
        stray(root / "checkpoint-6" / "mine.json")
        content = {file.name: file.read_bytes() for file in (root / "checkpoint-6").iterdir()}
        progress = recorder()
        train(composed("resume=auto", *options), progress=progress)
        assert progress.steps == [5, 6]
        assert {file.name: file.read_bytes() for file in (root / name).iterdir()} == content
        assert any(f"is kept as {root / name}:" in message for message in progress.messages)
    assert [c.step for c in complete_checkpoints(root)] == [4, 6]
    assert newest_complete(root)[1] == []


def test_a_note_beside_the_files_of_a_checkpoint_is_no_damage(run, composed):
    (run / "checkpoints" / "checkpoint-6" / "why I kept this.txt").write_text("it is the good one")
    opened = open_run(composed("resume=auto").config)
    assert opened.checkpoint is not None
    assert opened.checkpoint.step == 6


def test_only_whole_ones_of_the_later_checkpoints_are_deleted(run):
    root = run / "checkpoints"
    flip_bit(root / "checkpoint-6" / "optimizer.pt")
    assert checkpoints.remove_later(root, 2) == [root / "damaged-checkpoint-6"]
    assert sorted(path.name for path in root.iterdir()) == ["checkpoint-2", "damaged-checkpoint-6"]


def test_the_limit_counts_complete_ones_only(run):
    root = run / "checkpoints"
    flip_bit(root / "checkpoint-4" / "optimizer.pt")
    rotate(root, 2, newest=root / "checkpoint-6")
    assert sorted(path.name for path in root.iterdir()) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    rotate(root, 1, newest=root / "checkpoint-6")
    assert not (root / "checkpoint-2").exists()
    assert checked(root / "checkpoint-6").step == 6


def test_a_checkpoint_has_no_name_before_all_of_it_is_on_the_disk(run, monkeypatch):
    """Cut off at every system call that matters: nothing half-written has a checkpoint's name."""
    root, synced = run / "checkpoints", []
    source = root / "checkpoint-6"
    content = {f.name: f.read_bytes() for f in source.iterdir() if f.name != "manifest.json"}
    shutil.rmtree(source)
    real = os.fsync

    class CutError(Exception):
        pass

    def fsync(handle: int) -> None:
        if len(synced) == limit:
            raise CutError
        synced.append(os.readlink(f"/proc/self/fd/{handle}"))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    facts = {"step": 6, "world_size": 1, "rows_per_step": 3}
    for limit in range(100):
        synced.clear()
        written = checkpoints.begin(root) / "checkpoint-6"
        written.mkdir()
        for name, data in content.items():
            (written / name).write_bytes(data)
        try:
            checkpoints.complete(written, root, facts)
            break
        except CutError:
            found = [checkpoint.step for checkpoint in complete_checkpoints(root)]
            # Only the folder of names is not safe yet at the last call.
            assert found == ([2, 4, 6] if limit == len(content) + 2 else [2, 4])
    assert limit == len(content) + 3
    assert {Path(path).name for path in synced} >= {*content, "manifest.json", "checkpoint-6", "checkpoints"}
    assert not (root / checkpoints.WRITING).exists()
